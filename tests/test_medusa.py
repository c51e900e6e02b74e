"""Medusa: greedy equality with fitted heads, the state that heads read, trees of every shape, the law when sampling."""

import itertools

import pytest
import torch

from forerun.accept import choose
from forerun.draft import Batch, Outcome, Row
from forerun.draft.choices import default_choices, read_choices
from forerun.draft.hidden import EndState
from forerun.draft.medusa import MedusaDraft
from forerun.draft.shapes import AdaptiveShape, FixedShape, Shape, ShapePolicy, prefixes
from forerun.engine import Engine
from forerun.heads import Medusa, MedusaShape
from forerun.model import Target
from forerun.sampling import Randomness, build_warp
from forerun.types import Completion, Request, Sampling, UserError, complete
from models import BUILDERS, VOCABULARY, prompts, tiny
from rigged import NEW, medusa, reference
from test_distribution import PROMPT, SAMPLINGS, V, chi_square, exact, model

CPU = torch.device("cpu")
TREE = default_choices([[0.6, 0.2, 0.1]] * 4, 16)


class Scripted:
    """Shapes from a list, over and over: plain steps and trees of all sizes among others."""

    def __init__(self, script: list[Shape]) -> None:
        self.script = itertools.cycle(script)
        self.depth, self.nodes = max(depth for depth, _ in script), max(nodes for _, nodes in script)

    def shape(self, rows: object) -> Shape:
        return next(self.script)

    def observe(self, outcome: object) -> None:
        pass

    def admit(self, row: int) -> None:
        pass


POLICIES = {
    "fixed": lambda: FixedShape(4, 16),
    "chain-like": lambda: FixedShape(1, 2),
    "scripted": lambda: Scripted([(4, 16), (0, 1), (1, 4), (2, 16), (3, 7), (0, 1), (1, 2)]),
    "adaptive": lambda: AdaptiveShape(prefixes(TREE)),
}


def engine_of(architecture: str, policy: ShapePolicy, rows: int) -> Engine:
    draft = MedusaDraft(medusa(architecture), TREE, policy, rows)
    rule = choose("auto", draft.drawn, trees=draft.size > draft.depth + 1)
    return Engine(Target(tiny(architecture), features=draft.features), draft, rule, rows=rows, capacity=96, debug=True)


def requests_of(temperature: float = 0.0) -> list[Request]:
    pairs = zip(prompts(), NEW, strict=True)
    return [Request(str(i), p, Sampling(temperature=temperature, max_new=n, seed=i)) for i, (p, n) in enumerate(pairs)]


@pytest.mark.parametrize("rows", [1, 3], ids=["alone", "joining-and-leaving"])
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [*((name, "fixed") for name in BUILDERS), *((name, kind) for name in ("llama", "gemma3") for kind in POLICIES)],
)
def test_greedy_output_is_what_transformers_generates(architecture: str, kind: str, rows: int) -> None:
    completions = complete(engine_of(architecture, POLICIES[kind](), rows), requests_of())
    assert [list(c.tokens) for c in completions] == reference(architecture)
    rounds = [r for c in completions for r in c.rounds]
    # No row gets deeper trees than it can still use.
    assert sum(len(c.tokens) for c in completions) == len(completions) + sum(r.accepted + 1 for r in rounds)
    if kind == "fixed":
        assert {r.nodes for r in rounds} <= {1, 16}, "few sizes occur"
    if kind in ("fixed", "scripted"):
        assert max(r.accepted for r in rounds) == 4, "deep paths must occur"
        assert any(r.accepted < r.drafted for r in rounds), "both outcomes must occur"


def pace(completions: list[Completion]) -> list[list[tuple[int, int]]]:
    return [[(r.drafted, r.accepted) for r in c.rounds] for c in completions]


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
def test_a_row_does_not_depend_on_its_company(temperature: float) -> None:
    alone, together = (
        complete(engine_of("llama", FixedShape(4, 16), rows), requests_of(temperature)) for rows in (1, len(NEW))
    )
    assert [c.tokens for c in alone] == [c.tokens for c in together]
    assert pace(alone) == pace(together)


# The state that the heads read.


def watch(engine: Engine) -> None:
    """Run to the end; after every step the state kept of each row is what a fresh forward pass says of its tokens."""
    draft = engine.drafter
    assert isinstance(draft, MedusaDraft)
    for request in requests_of():
        engine.submit(request)
    while engine.busy:
        engine.step()
        for i, row in enumerate(engine.rows):
            if row is not None:
                fresh = engine.target.model(torch.tensor([row.tokens[:-1]]), output_hidden_states=True).hidden_states[-1]
                torch.testing.assert_close(draft.end.read()[i], fresh[0, -1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["fixed", "scripted"])
@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_the_heads_read_the_state_before_the_pending_token(architecture: str, kind: str) -> None:
    watch(engine_of(architecture, POLICIES[kind](), 3))


class OneEarlier(EndState):
    """A fault: the state at the last but one accepted node."""

    def observe(self, outcome: Outcome) -> None:
        assert outcome.hidden_BNH is not None
        node_B = outcome.verdict.path_BD.gather(1, (outcome.verdict.accepted_B[:, None] - 2).clamp_min(0))[:, 0]
        self.state_BH = outcome.hidden_BNH[torch.arange(len(node_B)), node_B]


class PromptStart(EndState):
    """A fault: the state at the first position of the prompt."""

    def admit(self, row: int, hidden_TH: torch.Tensor | None) -> None:
        assert hidden_TH is not None
        super().admit(row, hidden_TH.flip(0))


@pytest.mark.parametrize("fault", [OneEarlier, PromptStart])
def test_a_state_of_another_position_is_noticed(fault: type[EndState]) -> None:
    engine = engine_of("llama", FixedShape(4, 16), 3)
    assert isinstance(engine.drafter, MedusaDraft)
    engine.drafter.end = fault(3)
    with pytest.raises(AssertionError, match="not close"):
        watch(engine)


# The tree.


def rows_of(*remaining: int | None) -> Batch:
    """Rows that may still write so many tokens, the pending one 7."""
    samplings = [None if left is None else Sampling(max_new=left) for left in remaining]
    rows = [Row(sampling, [3, 7], 2, Randomness(0, CPU)) if sampling else None for sampling in samplings]
    return Batch(rows, build_warp(samplings, VOCABULARY, CPU), None, CPU)


def propose(draft: MedusaDraft, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, int, bool]:
    for i in range(len(batch.rows)):
        draft.end.admit(i, torch.randn(2, 32, generator=torch.Generator().manual_seed(i), dtype=torch.float64))
    tree = draft.propose(batch)
    assert tree.probs_BNV is None
    return tree.tokens_BN, tree.parents_BN, tree.depth, tree.is_chain


def test_a_node_is_its_heads_guess_of_its_rank() -> None:
    choices = read_choices([(0,), (1,), (0, 0), (0, 2), (1, 0), (0, 2, 1)])
    draft = MedusaDraft(head := medusa("llama"), choices, FixedShape(3, 7), 2)
    tokens_BN, parents_BN, depth, is_chain = propose(draft, rows_of(9, 9))
    assert (depth, is_chain) == (3, False)
    assert parents_BN.tolist() == [[0, 0, 0, 1, 1, 2, 4]] * 2
    for tokens_N, state_H in zip(tokens_BN, draft.end.read(), strict=True):
        order_KV = head(state_H).argsort(-1, descending=True)
        guessed = [int(order_KV[len(path) - 1, path[-1]]) for path in choices.paths[1:]]
        assert tokens_N.tolist() == [7, *guessed]


def test_what_a_row_cannot_use_is_padding() -> None:
    draft = MedusaDraft(medusa("llama"), read_choices([(0,), (0, 0), (1,), (0, 0, 0)]), FixedShape(3, 5), 4)
    _, parents_BN, depth, _ = propose(draft, rows_of(9, 3, None, 1))
    assert (depth, parents_BN.tolist()) == (3, [[0, 0, 1, 0, 2], [0, 0, 1, 0, -1], [0, -1, -1, -1, -1], [0, -1, -1, -1, -1]])
    _, parents_BN, depth, _ = propose(draft, rows_of(3, None, 2, 1))
    assert (depth, parents_BN.tolist()) == (2, [[0, 0, 1, 0, -1], [0, -1, -1, -1, -1], [0, 0, -1, 0, -1], [0, -1, -1, -1, -1]])
    tokens_BN, _, depth, is_chain = propose(draft, rows_of(1, None, 1, 1))
    assert (tokens_BN.shape[1], depth, is_chain) == (1, 0, True)


def test_a_policy_cuts_the_tree_to_its_best_nodes() -> None:
    for depth, nodes in ((4, 16), (4, 5), (2, 16), (1, 2)):
        draft = MedusaDraft(medusa("llama"), TREE, FixedShape(depth, nodes), 1)
        kept = [path for path in TREE.paths[:nodes] if len(path) <= depth]
        assert (draft.choices.paths, draft.size, draft.depth) == (tuple(kept), len(kept), max(map(len, kept)))
        tokens_BN, parents_BN, _, is_chain = propose(draft, rows_of(99))
        assert tokens_BN.shape == (1, len(kept))
        assert is_chain == (parents_BN[0, 1:].tolist() == list(range(len(kept) - 1)))


def test_a_tree_that_the_head_cannot_fill_is_refused() -> None:
    head = Medusa(MedusaShape(hidden_size=8, vocab_size=V, heads=2))
    with pytest.raises(UserError, match=r"path \[0, 0, 0\] is deeper than the 2 heads"):
        MedusaDraft(head, read_choices([(0,), (0, 0), (0, 0, 0)]), FixedShape(3, 4), 1)
    with pytest.raises(UserError, match=r"path \[5\] ranks beyond the 5 tokens"):
        MedusaDraft(head, read_choices([(0,), (5,)]), FixedShape(3, 4), 1)
    MedusaDraft(head, read_choices([(0,), (0, 0), (0, 0, 0)]), FixedShape(2, 4), 1)  # the policy asks for no more


# Sampling.


@pytest.mark.parametrize("name", SAMPLINGS)
def test_the_joint_law_of_three_tokens(name: str) -> None:
    rows, samples = 500, 1500
    torch.manual_seed(1)
    head = Medusa(MedusaShape(model().config.hidden_size, V, 2)).requires_grad_(False)
    choices = read_choices([(0,), (1,), (0, 0), (0, 1), (1, 0), (2,)])
    draft = MedusaDraft(head, choices, FixedShape(2, 7), rows)
    engine = Engine(Target(model(), features=(-1,)), draft, choose("auto", trees=True), rows=rows, capacity=24, seed=5)
    # A fourth token leaves room for paths of two.
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
