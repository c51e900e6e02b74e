"""The MLP speculator: greedy equality with fitted heads, its recurrence against one by hand, the law when sampling."""

import itertools

import pytest
import torch

from forerun.accept import choose
from forerun.draft import Adaptive, Batch, Constant, Heuristic, LengthPolicy, Row
from forerun.draft.mlp import MLPDraft
from forerun.engine import Engine
from forerun.heads import MLPShape, MLPSpeculator
from forerun.model import Target
from forerun.sampling import Randomness, build_warp
from forerun.types import Completion, Request, Sampling, complete
from models import BUILDERS, VOCABULARY, prompts, tiny
from rigged import NEW, mlp, reference
from test_distribution import PROMPT, SAMPLINGS, V, chi_square, exact, model

CPU = torch.device("cpu")


class Ragged:
    """Lengths of each row by itself, with rounds that draft nothing."""

    limit = 3

    def __init__(self) -> None:
        self.script = itertools.cycle([[0, 3, 2], [3, 0, 1], [1, 1, 0], [0, 0, 0], [2, 0, 0]])

    def depths(self, rows: list[Row | None]) -> list[int]:
        return [min(k, row.remaining - 1) if row else 0 for k, row in zip(next(self.script), rows, strict=False)]

    def observe(self, outcome: object) -> None:
        pass

    def admit(self, row: int) -> None:
        pass


POLICIES = {
    "constant": lambda rows: Constant(3),
    "longer-than-the-head": lambda rows: Constant(9),
    "heuristic": lambda rows: Heuristic(2, rows),
    "adaptive": lambda rows: Adaptive(3),
    "ragged": lambda rows: Ragged(),
}


def engine_of(architecture: str, policy: LengthPolicy, rows: int, greedy: bool = False) -> Engine:
    draft = MLPDraft(mlp(architecture), policy, rows, greedy)
    target = Target(tiny(architecture), features=draft.features)
    return Engine(target, draft, choose("auto", draft.drawn), rows=rows, capacity=96, debug=True)


def requests_of(temperature: float = 0.0, **kw: float) -> list[Request]:
    pairs = zip(prompts(), NEW, strict=True)
    return [Request(str(i), p, Sampling(temperature=temperature, max_new=n, seed=i, **kw)) for i, (p, n) in enumerate(pairs)]


@pytest.mark.parametrize("rows", [1, 3], ids=["alone", "joining-and-leaving"])
@pytest.mark.parametrize(
    ("architecture", "kind"), [*((name, "constant") for name in BUILDERS), *(("llama", kind) for kind in POLICIES)]
)
def test_greedy_output_is_what_transformers_generates(architecture: str, kind: str, rows: int) -> None:
    completions = complete(engine_of(architecture, POLICIES[kind](rows), rows), requests_of())
    assert [list(c.tokens) for c in completions] == reference(architecture)
    rounds = [r for c in completions for r in c.rounds]
    assert sum(len(c.tokens) for c in completions) == len(completions) + sum(r.accepted + 1 for r in rounds)
    assert max(r.drafted for r in rounds) <= 3
    if kind == "constant":
        assert max(r.accepted for r in rounds) == 3, "deep paths must occur"
        assert any(r.accepted < r.drafted for r in rounds), "both outcomes must occur"


def pace(completions: list[Completion]) -> list[list[tuple[int, int]]]:
    return [[(r.drafted, r.accepted) for r in c.rounds] for c in completions]


@pytest.mark.parametrize("greedy", [False, True], ids=["drawn", "chosen"])
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_a_row_does_not_depend_on_its_company(temperature: float, greedy: bool) -> None:
    alone, together = (
        complete(engine_of("llama", Constant(3), rows, greedy=greedy), requests_of(temperature, repetition_penalty=1.1))
        for rows in (1, len(NEW))
    )
    assert [c.tokens for c in alone] == [c.tokens for c in together]
    assert pace(alone) == pace(together)


@pytest.mark.parametrize("kind", ["constant", "ragged"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_head_reads_the_state_before_the_pending_token(architecture: str, kind: str) -> None:
    engine = engine_of(architecture, POLICIES[kind](3), 3)
    draft = engine.drafter
    assert isinstance(draft, MLPDraft)
    for request in requests_of():
        engine.submit(request)
    while engine.busy:
        engine.step()
        for i, row in enumerate(engine.rows):
            if row is not None:
                fresh = engine.target.model(torch.tensor([row.tokens[:-1]]), output_hidden_states=True).hidden_states[-1]
                torch.testing.assert_close(draft.end.read()[i], fresh[0, -1], rtol=0, atol=1e-9)


def chain_by_hand(head: MLPSpeculator, state_H: torch.Tensor, token: int, steps: int) -> tuple[list[int], list[torch.Tensor]]:
    """Best tokens and the logits that they were taken from, one row, one step after another."""
    state = state_H / state_H.pow(2).mean().add(1e-6).sqrt() / 2**0.5 if head.shape.scale_input else state_H
    tokens, logits = [token], []
    for i in range(steps):
        mixed = head.projections[i].weight @ state + head.token_weight * head.embeddings[i].weight[tokens[-1]]
        normed = mixed / mixed.pow(2).mean().add(1e-6).sqrt() * head.norms[i].weight + head.norms[i].bias
        state = torch.nn.functional.gelu(normed)
        logits.append(head.outputs[i].weight @ state)
        tokens.append(int(logits[-1].argmax()))
    return tokens, logits


def batch_of(samplings: list[Sampling | None]) -> Batch:
    rows = [Row(sampling, [3, 7 + i], 2, Randomness(i, CPU)) if sampling else None for i, sampling in enumerate(samplings)]
    return Batch(rows, build_warp(samplings, VOCABULARY, CPU), None, CPU)


@pytest.mark.parametrize("scaled", [False, True])
def test_the_chain_is_the_recurrence_by_hand(scaled: bool) -> None:
    head = mlp("llama", scale_input=scaled)
    draft = MLPDraft(head, Constant(3), 3)
    for i in range(3):
        draft.end.admit(i, torch.randn(2, 32, generator=torch.Generator().manual_seed(i), dtype=torch.float64))
    tree = draft.propose(batch_of([Sampling(max_new=9), None, Sampling(max_new=3)]))
    assert (tree.is_chain, tree.probs_BNV, tree.depth) == (True, None, 3)
    assert tree.parents_BN.tolist() == [[0, 0, 1, 2], [0, -1, -1, -1], [0, 0, 1, -1]]
    for i in (0, 2):
        assert tree.tokens_BN[i].tolist() == chain_by_hand(head, draft.end.read()[i], 7 + i, 3)[0]
    warm = Sampling(temperature=0.7, top_k=4, max_new=9)
    drawn = draft.propose(batch_of([warm, None, Sampling(max_new=9)]))
    assert drawn.probs_BNV is not None
    first_V = chain_by_hand(head, draft.end.read()[0], 7, 1)[1][0] / 0.7
    kept_V = torch.where(first_V >= first_V.topk(4).values[-1], first_V, -torch.inf).softmax(-1)
    torch.testing.assert_close(drawn.probs_BNV[0, 1], kept_V)
    assert drawn.tokens_BN[2].tolist() == chain_by_hand(head, draft.end.read()[2], 9, 3)[0]  # greedy beside a drawn one


@pytest.mark.parametrize(
    ("greedy", "name"),
    [*((False, name) for name in SAMPLINGS), (True, "temperature-1")],
    ids=["drawn", "drawn-warped", "chosen"],
)
def test_the_joint_law_of_three_tokens(greedy: bool, name: str) -> None:
    rows, samples = 500, 1500
    torch.manual_seed(1)
    head = MLPSpeculator(MLPShape(model().config.hidden_size, V, 2)).requires_grad_(False)
    draft = MLPDraft(head, Constant(2), rows, greedy)
    assert choose("auto", draft.drawn).name == ("match" if greedy else "block")
    engine = Engine(Target(model(), features=(-1,)), draft, choose("auto", draft.drawn), rows=rows, capacity=24, seed=5)
    # A fourth token leaves room for chains of two.
    sampling = Sampling(**{field: getattr(SAMPLINGS[name], field) for field in Sampling.__slots__} | {"max_new": 4})
    completions = complete(engine, [Request(str(i), PROMPT, sampling) for i in range(samples)])
    counts = torch.zeros(V, V, V, dtype=torch.float64)
    drawn = torch.tensor([c.tokens[:3] for c in completions])
    counts.index_put_(tuple(drawn.T), torch.ones(samples, dtype=torch.float64), accumulate=True)
    joint = exact(sampling)
    assert float(counts[joint == 0].sum()) == 0, "a token that the warpers exclude was drawn"
    statistic, limit = chi_square(counts, joint * samples)
    assert statistic < limit
    assert {r.accepted for c in completions for r in c.rounds} == {0, 1, 2}, "all outcomes must occur"
