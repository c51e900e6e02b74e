"""EAGLE in the engine: plain decoding's tokens whatever is accepted, the target's own features, and the target's law.

The head of the greedy tests is told the right continuations (and at every fourth position a wrong token before it), so that
paths of all depths are accepted, which a random head never sees.
"""

import functools
import itertools

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from forerun.accept import choose
from forerun.draft import Constant
from forerun.draft.choices import Choices, read_choices
from forerun.draft.eagle import EagleDraft
from forerun.draft.expand import Dynamic
from forerun.draft.shapes import AdaptiveShape, FixedShape, grid
from forerun.engine import Engine
from forerun.heads import Eagle, EagleShape
from forerun.heads.eagle import shape_for
from forerun.model import Target
from forerun.types import Completion, Delta, Request, Sampling, complete, join
from models import VOCABULARY, plain_greedy, prompts, tiny
from test_distribution import LENGTH, PROMPT, SAMPLINGS, V, chi_square, exact
from test_distribution import model as small

CAPACITY = 96
NEW = (20, 7, 26, 12, 17)
PROMPTS = prompts()[: len(NEW)]
TREE = read_choices([(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 0, 0, 0)])


@functools.cache
def reference(architecture: str) -> list[list[int]]:
    return [plain_greedy(tiny(architecture), prompt, new) for prompt, new in zip(PROMPTS, NEW, strict=True)]


class Told(Eagle):
    """Its passes are a head's own, but it guesses by the token of an entry and its position."""

    def __init__(self, shape: EagleShape, embedding: nn.Module, next_TV: Tensor) -> None:
        super().__init__(shape)
        self.embeds_VH: Tensor = embedding(torch.arange(VOCABULARY))
        self.next_TV = next_TV

    def forward(self, embeds_BNH, states_BNH, positions_BN, mask, cache=None):
        super().forward(embeds_BNH, states_BNH, positions_BN, mask, cache)
        tokens_BN = torch.cdist(embeds_BNH, self.embeds_VH.to(embeds_BNH.dtype)).argmin(-1)
        states_BNH = torch.zeros_like(embeds_BNH)
        states_BNH[..., 0], states_BNH[..., 1] = positions_BN + 1, tokens_BN
        return states_BNH

    def logits(self, states: Tensor, target_output: nn.Module) -> Tensor:
        at, tokens = states[..., 0].long(), states[..., 1].long()
        right = self.next_TV[at, tokens][..., None]
        scores = states.new_zeros(*at.shape, VOCABULARY).scatter(-1, right, 3.0)
        scores = scores.scatter(-1, (right + 1) % VOCABULARY, torch.where(at % 4 == 3, 5.0, 1.0)[..., None].to(scores.dtype))
        return scores[..., self.token_ids] if self.shape.version == 3 else scores


def told_for(architecture: str, version: int, draft: int = 0) -> Told:
    torch.manual_seed(0)
    model = tiny(architecture)
    next_TV = torch.randint(0, VOCABULARY, (CAPACITY, VOCABULARY))
    for prompt, output in zip(PROMPTS, reference(architecture), strict=True):
        tokens = [*prompt, *output]
        for at, (token, after) in enumerate(itertools.pairwise(tokens)):
            next_TV[at, token] = after
    features = (-1,) if version == 1 else (0, 1, 2)
    shape = shape_for(model.config, version, features=features, draft_vocab_size=draft)
    head = Told(shape, model.get_input_embeddings(), next_TV).double().requires_grad_(False)
    if draft:
        head.token_ids.copy_(torch.randperm(VOCABULARY)[:draft])
    return head


def check_features(engine: Engine, model: PreTrainedModel) -> None:
    """What waits to be entered is what the target says of those positions in a fresh pass."""
    drafter = engine.drafter
    assert isinstance(drafter, EagleDraft)
    for i, row in enumerate(engine.rows):
        if row is not None:
            states = model(torch.tensor([row.tokens[:-1]]), output_hidden_states=True).hidden_states
            fresh_TF = torch.cat([states[layer][0] for layer in drafter.features], -1)[drafter.cache.lengths[i] :]
            assert len(fresh_TF) > 0
            torch.testing.assert_close(drafter.waiting_BWF[i, : len(fresh_TF)], fresh_TF, rtol=0, atol=1e-9)


def run(engine: Engine, model: PreTrainedModel) -> list[Completion]:
    requests = [Request(str(i), p, Sampling(max_new=n)) for i, (p, n) in enumerate(zip(PROMPTS, NEW, strict=True))]
    deltas: dict[str, list[Delta]] = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.busy:
        for delta in engine.step():
            deltas[delta.id].append(delta)
        check_features(engine, model)
    return [join(parts) for parts in deltas.values()]


KINDS = {
    "chain": (lambda: Constant(4), None),
    "static": (lambda: FixedShape(4, 10), TREE),
    "dynamic": (lambda: FixedShape(4, 12), Dynamic(3)),
    "dynamic-adaptive": (lambda: AdaptiveShape(grid(4, 12, 3)), Dynamic(3)),
}


@pytest.mark.parametrize(("version", "draft", "rows"), [(1, 0, 1), (1, 0, 3), (3, 0, 3), (3, 60, 3)])
@pytest.mark.parametrize(
    ("architecture", "kind"),
    [*itertools.product(["llama", "qwen3", "gemma3", "gpt2"], ["chain", "static", "dynamic"]), ("llama", "dynamic-adaptive")],
)
def test_greedy_output_is_what_transformers_generates(
    architecture: str, kind: str, rows: int, version: int, draft: int
) -> None:
    policy, tree = KINDS[kind]
    model, head = tiny(architecture), told_for(architecture, version, draft)
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    drafter = EagleDraft(head, embedding, output, policy(), rows, CAPACITY, tree, chunk=6)
    rule = choose("auto", drafter.drawn, drafter.size > drafter.depth + 1)
    target = Target(model, features=drafter.features)
    completions = run(Engine(target, drafter, rule, rows=rows, capacity=CAPACITY, debug=True), model)
    assert [list(c.tokens) for c in completions] == reference(architecture)
    rounds = [r for c in completions for r in c.rounds]
    accepted, drafted = (sum(getattr(r, name) for r in rounds) for name in ("accepted", "drafted"))
    assert sum(NEW) == len(NEW) + accepted + len(rounds), "no round is cut: depths fit what remains"
    assert 0 < accepted < drafted
    if not draft and kind != "dynamic-adaptive":
        assert max(r.accepted for r in rounds) >= 3
        assert accepted > (0.3 if kind == "chain" else 0.6) * drafted, "a tree has the right token among the two best"


# Sampling: the joint law of the first three tokens, as for the other drafters.


def drafter_for(tree: Choices | Dynamic | None, drawn: bool, draft: int) -> EagleDraft:
    torch.manual_seed(4)
    target = small()
    shape = shape_for(target.config, 3, features=(0, 1), draft_vocab_size=draft)
    head = Eagle(shape).requires_grad_(False)
    for parameter in head.parameters():
        parameter.mul_(3.0 if parameter.ndim > 1 else 1.0)
    if draft:
        head.token_ids.copy_(torch.tensor([4, 0, 2]))
    policy = Constant(2) if tree is None else FixedShape(2, 7)
    return EagleDraft(head, target.get_input_embeddings(), target.get_output_embeddings(), policy, 250, 18, tree, drawn)


SAMPLES = 2500
SMALL = read_choices([(0,), (1,), (0, 0), (2,), (1, 0), (0, 1)])
METHODS = {
    "chain": ("block", None, True, 0, "warped-and-penalized"),
    "chain-draft-vocabulary": ("standard", None, True, 3, "temperature-1"),
    "static": ("match", SMALL, False, 0, "temperature-1"),
    "static-drawn": ("multi-round", SMALL, True, 0, "warped-and-penalized"),
    "static-drawn-draft-vocabulary": ("multi-round", SMALL, True, 3, "temperature-1"),
    "dynamic": ("match", Dynamic(3), True, 0, "warped-and-penalized"),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_joint_law_of_three_tokens(method: str) -> None:
    rule, tree, drawn, draft, law_name = METHODS[method]
    sampling, drafter = SAMPLINGS[law_name], drafter_for(tree, drawn, draft)
    target = Target(small(), features=drafter.features)
    engine = Engine(target, drafter, choose(rule, drafter.drawn, tree is not None), rows=250, capacity=18, seed=5)
    completions = complete(engine, [Request(str(i), PROMPT, sampling) for i in range(SAMPLES)])
    drawn_tokens = torch.tensor([c.tokens for c in completions])
    counts = torch.zeros(V, V, V, dtype=torch.float64)
    counts.index_put_(tuple(drawn_tokens.T), torch.ones(SAMPLES, dtype=torch.float64), accumulate=True)
    joint = exact(sampling)
    assert joint.ndim == LENGTH
    assert float(counts[joint == 0].sum()) == 0, "a token that the warpers exclude was drawn"
    statistic, limit = chi_square(counts, joint * SAMPLES)
    assert statistic < limit
    rounds = [r for c in completions for r in c.rounds]
    assert 0 < sum(r.accepted for r in rounds) < sum(r.drafted for r in rounds), "both outcomes must occur"
