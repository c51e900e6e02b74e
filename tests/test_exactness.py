"""The exactness matrix: every drafter on every architecture emits what transformers' own greedy generate emits (float64)."""

import functools

import pytest

from forerun.accept import choose
from forerun.draft import Adaptive, Constant, Drafter, DraftModel, Heuristic, NGram, NoDraft
from forerun.engine import Engine
from forerun.model import Target
from forerun.types import Completion, Request, Sampling, complete
from models import BUILDERS, near_copy, plain_greedy, prompts, tiny

NEW = (30, 12, 40, 8, 25, 33, 19)
CAPACITY = 96
DRAFTERS = ("none", "ngram", "ngram-heuristic", "model", "model-self", "model-adaptive", "model-confident")


@functools.cache
def reference(architecture: str) -> list[list[int]]:
    return [plain_greedy(tiny(architecture), prompt, new) for prompt, new in zip(prompts(), NEW, strict=True)]


@functools.cache
def target(architecture: str) -> Target:
    return Target(tiny(architecture))


@functools.cache
def noisy(architecture: str) -> Target:
    return Target(near_copy(tiny(architecture)))


def drafter(kind: str, architecture: str, rows: int) -> Drafter:
    def model(own: Target, policy: object, **options: float) -> DraftModel:
        return DraftModel(own, policy, rows, CAPACITY, **options)

    builders = {
        "none": NoDraft,
        "ngram": lambda: NGram(Constant(4), rows),
        "ngram-heuristic": lambda: NGram(Heuristic(2, rows), rows, 2, 4),
        "model": lambda: model(noisy(architecture), Constant(4)),
        "model-self": lambda: model(target(architecture), Constant(3)),
        "model-adaptive": lambda: model(noisy(architecture), Adaptive(4)),
        "model-confident": lambda: model(noisy(architecture), Constant(5), confidence=0.3),
    }
    return builders[kind]()


def run(kind: str, architecture: str, rows: int) -> list[Completion]:
    draft = drafter(kind, architecture, rows)
    engine = Engine(target(architecture), draft, choose("auto", draft.drawn), rows=rows, capacity=CAPACITY, debug=True)
    requests = [Request(str(i), p, Sampling(max_new=n)) for i, (p, n) in enumerate(zip(prompts(), NEW, strict=True))]
    return complete(engine, requests)


@pytest.mark.parametrize("rows", [1, 3], ids=["alone", "joining-and-leaving"])
@pytest.mark.parametrize("kind", DRAFTERS)
@pytest.mark.parametrize("architecture", BUILDERS)
def test_greedy_output_is_what_transformers_generates(architecture: str, kind: str, rows: int) -> None:
    completions = run(kind, architecture, rows)
    assert [list(c.tokens) for c in completions] == reference(architecture)
    rounds = [r for c in completions for r in c.rounds]
    emitted = sum(len(c.tokens) for c in completions)
    assert emitted == len(completions) + sum(r.accepted + 1 for r in rounds)  # no round is cut: depths fit what remains
    if kind == "model-self":
        assert all(r.accepted == r.drafted for r in rounds)
        assert any(r.drafted for r in rounds)
    if kind in ("ngram", "model"):
        assert 0 < sum(r.accepted for r in rounds) < sum(r.drafted for r in rounds), "both outcomes must occur"


@pytest.mark.parametrize("kind", ["none", "ngram", "model"])
def test_a_row_advances_at_its_own_pace(kind: str) -> None:
    """In a batch, each row's rounds are those of the same request alone."""
    alone = run(kind, "llama", 1)
    together = run(kind, "llama", 7)
    assert [[(r.drafted, r.accepted) for r in c.rounds] for c in together] == [
        [(r.drafted, r.accepted) for r in c.rounds] for c in alone
    ]
