"""Drafters: n-gram lookup against a brute-force search, the draft model's cache, a draft of oneself, the confidence stop."""

import itertools

import pytest
import torch

from forerun.accept import choose
from forerun.draft import Batch, Constant, DraftModel, Heuristic, LengthPolicy, NGram, NoDraft, Row
from forerun.draft.ngram import Index
from forerun.engine import Engine
from forerun.model import Target
from forerun.sampling import Randomness, build_warp
from forerun.types import Completion, Request, Sampling
from models import VOCABULARY, near_copy, prompts, tiny

CPU = torch.device("cpu")
CAPACITY = 96


# n-gram lookup.


def searched(tokens: list[int], k: int, shortest: int, longest: int) -> list[int]:
    """The continuation by looking through the whole text: longest suffix first, then the most recent earlier occurrence."""
    for n in range(longest, shortest - 1, -1):
        if n > len(tokens):
            continue
        suffix = tokens[len(tokens) - n :]
        for start in range(len(tokens) - n - 1, -1, -1):
            if tokens[start : start + n] == suffix:
                text = list(tokens)
                for i in range(k):  # where the text ends, go on with what was copied
                    text.append(text[start + n + i])
                return text[len(tokens) :]
    return []


RANGES = [(1, 1), (1, 3), (2, 4), (3, 3)]


@pytest.mark.parametrize(("shortest", "longest"), RANGES)
@pytest.mark.parametrize("alphabet", [1, 2, 3, 8])
def test_the_index_finds_what_a_search_finds(alphabet: int, shortest: int, longest: int) -> None:
    generator = torch.Generator().manual_seed(alphabet)
    found = 0
    for _ in range(20):
        text = torch.randint(0, alphabet, (40,), generator=generator).tolist()
        grown, at = Index(shortest, longest), 1
        while at < len(text):
            at = min(len(text), at + int(torch.randint(1, 6, (1,), generator=generator)))
            part, k = text[:at], int(torch.randint(0, 8, (1,), generator=generator))
            grown.extend(part)
            once = Index(shortest, longest)
            once.extend(part)
            expected = searched(part, k, shortest, longest)
            assert grown.continuation(part, k) == expected
            assert once.continuation(part, k) == expected
            assert grown.followed_at == once.followed_at
            found += bool(expected)
    assert found > 0


def test_the_index_by_hand() -> None:
    index = Index(1, 3)
    index.extend(text := [1, 2, 9, 1, 2, 8, 5, 2])
    assert index.continuation(text, 3) == [8, 5, 2]  # the most recent 2
    index.extend(text := [*text, 7, 1, 2])
    assert index.continuation(text, 2) == [8, 5]  # 1 2 goes before 2
    index.extend(text := [*text, 9])
    assert index.continuation(text, 2) == [1, 2]  # 1 2 9 goes before the more recent ones
    index.extend(text := [*text, 3])
    assert index.continuation(text, 2) == []
    index.extend(text := [*text, 3])
    assert index.continuation(text, 4) == [3, 3, 3, 3]  # a text that repeats itself goes on repeating


def batch_of(texts: list[list[int] | None], samplings: Sampling | None = None) -> Batch:
    sampling = samplings or Sampling(max_new=50)
    rows = [Row(sampling, text, len(text), Randomness(0, CPU)) if text else None for text in texts]
    return Batch(rows, build_warp([sampling if text else None for text in texts], VOCABULARY, CPU), None, CPU)


def test_ngram_drafts_each_row_by_itself() -> None:
    drafter = NGram(Constant(3), rows=3, lookup_min=1, lookup_max=2)
    drafter.admit(0, [4, 5, 6, 4], None)
    tree = drafter.propose(batch_of([[4, 5, 6, 4], None, [1, 2, 3]]))
    assert tree.tokens_BN.tolist() == [[4, 5, 6, 4], [0, 0, 0, 0], [3, 0, 0, 0]]
    assert tree.parents_BN.tolist() == [[0, 0, 1, 2], [0, -1, -1, -1], [0, -1, -1, -1]]
    assert tree.probs_BNV is None
    assert drafter.propose(batch_of([None, None, [1, 2, 3]])).size == 1


def test_a_new_request_forgets_the_text_of_the_row_before() -> None:
    drafter = NGram(Constant(3), rows=1)
    drafter.admit(0, [4, 5, 6, 4], None)
    assert drafter.propose(batch_of([[4, 5, 6, 4]])).size == 4
    drafter.release(0)
    drafter.admit(0, [9, 4], None)
    assert drafter.propose(batch_of([[9, 4]])).size == 1


def test_no_draft_is_the_tree_of_one_node() -> None:
    tree = NoDraft().propose(batch_of([[7, 8], None]))
    assert (tree.tokens_BN.tolist(), tree.parents_BN.tolist(), tree.depth) == ([[8], [0]], [[0], [0]], 0)


# The draft model.


def engine_of(target: Target, drafter: DraftModel, rows: int, rule: str = "auto") -> Engine:
    return Engine(target, drafter, choose(rule, drafter.drawn), rows=rows, capacity=CAPACITY, debug=True)


def check_cache(engine: Engine) -> None:
    """The draft's cache holds committed tokens only, and feeding it the rest scores as a fresh forward pass does."""
    drafter = engine.drafter
    assert isinstance(drafter, DraftModel)
    lengths = list(drafter.cache.lengths)
    for i, row in enumerate(engine.rows):
        if row is None:
            assert lengths[i] == 0
            continue
        assert 0 < lengths[i] < len(row.tokens), "the pending token is not committed yet"
    if any(engine.rows):
        with torch.inference_mode():
            batch = Batch(engine.rows, engine.warp, None, CPU)
            logits_BV = drafter._first_pass(batch)
            drafter.cache.lengths[:] = lengths  # what was fed is rubbish by right again
            for i, row in enumerate(engine.rows):
                if row is not None:
                    fresh_V = drafter.target.model(torch.tensor([row.tokens]), use_cache=False).logits[0, -1]
                    torch.testing.assert_close(logits_BV[i], fresh_V, rtol=0, atol=1e-10)


def run(engine: Engine, requests: list[Request]) -> list[Completion]:
    """Run to the end, the draft's cache checked after every step."""
    from forerun.types import Delta, join

    deltas: dict[str, list[Delta]] = {request.id: [] for request in requests}
    for request in requests:
        engine.submit(request)
    while engine.busy:
        for delta in engine.step():
            deltas[delta.id].append(delta)
        check_cache(engine)
    return [join(parts) for parts in deltas.values()]


def requests_of(temperature: float, new: tuple[int, ...] = (12, 5, 20, 9)) -> list[Request]:
    return [
        Request(str(i), prompt, Sampling(temperature=temperature, max_new=n, seed=i))
        for i, (prompt, n) in enumerate(zip(prompts(), new, strict=False))
    ]


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("k", range(1, 6))
def test_a_draft_of_oneself_is_always_accepted(k: int, rows: int, temperature: float) -> None:
    """Greedy by any rule, sampled by the ratio rule: any fault of the draft's cache shows at once."""
    target = Target(tiny("llama"))
    completions = run(engine_of(target, DraftModel(target, Constant(k), rows, CAPACITY), rows), requests_of(temperature))
    rounds = [round for completion in completions for round in completion.rounds]
    assert [round.accepted for round in rounds] == [round.drafted for round in rounds]
    assert max(round.drafted for round in rounds) == k


class Scripted:
    """Depths from a list, over and over: rounds of depth 0 among others."""

    def __init__(self, script: list[list[int]]) -> None:
        self.script = itertools.cycle(script)
        self.limit = max(max(depths) for depths in script)

    def depths(self, rows: object) -> list[int]:
        return [min(depth, row.remaining - 1) if row else 0 for depth, row in zip(next(self.script), rows, strict=True)]  # type: ignore[call-overload]

    def observe(self, outcome: object) -> None:
        pass

    def admit(self, row: int) -> None:
        pass


SCRIPTS = {
    "zeros": [[0, 0, 0]] * 5 + [[3, 3, 3]],
    "ragged": [[0, 4, 2], [3, 0, 1], [1, 1, 0], [0, 0, 0], [5, 0, 0], [0, 0, 1]],
}


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_rounds_without_drafts_leave_the_cache_right(script: str, temperature: float) -> None:
    target = Target(tiny("llama"))
    drafter = DraftModel(target, Scripted(SCRIPTS[script]), 3, CAPACITY)
    completions = run(engine_of(target, drafter, 3), requests_of(temperature))
    rounds = [round for completion in completions for round in completion.rounds]
    assert [round.accepted for round in rounds] == [round.drafted for round in rounds]
    assert {0, 3} <= {round.drafted for round in rounds} or {0, 5} <= {round.drafted for round in rounds}


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "sampled"])
@pytest.mark.parametrize("confidence", [0.0, 0.5])
def test_the_drafts_cache_holds_what_was_accepted(architecture: str, temperature: float, confidence: float) -> None:
    target = Target(tiny(architecture))
    noisy = near_copy(tiny(architecture), 0.6 if temperature else 0.15)
    drafter = DraftModel(Target(noisy), Constant(4), 3, CAPACITY, confidence=confidence)
    completions = run(engine_of(target, drafter, 3), requests_of(temperature))
    rounds = [round for completion in completions for round in completion.rounds]
    assert any(round.accepted == round.drafted > 0 for round in rounds)
    assert any(round.accepted < round.drafted for round in rounds) or confidence, "both outcomes must occur"


def propose(
    drafter: DraftModel, texts: list[list[int] | None], sampling: Sampling
) -> tuple[list[list[int]], torch.Tensor | None]:
    """The drafts of one round, without padding, and the laws they were drawn from."""
    with torch.inference_mode():
        for i, text in enumerate(texts):
            drafter.cache.release(i)
            if text:
                drafter.admit(i, text[:-1], None)
        tree = drafter.propose(batch_of(texts, sampling))
    drafts = [
        [token for token, valid in zip(tokens[1:], fine[1:], strict=True) if valid]
        for tokens, fine in zip(tree.tokens_BN.tolist(), tree.valid_BN.tolist(), strict=True)
    ]
    return drafts, tree.probs_BNV


@pytest.mark.parametrize("temperature", [0.0, 0.7], ids=["greedy", "sampled"])
def test_the_confidence_stop_keeps_the_last_token(temperature: float) -> None:
    """The drafts are those of a full round up to and with the first token that is less probable than the threshold."""
    target, sampling = Target(tiny("llama", scale=1.7)), Sampling(temperature=temperature, max_new=50)
    texts: list[list[int] | None] = [list(prompt) for prompt in prompts()[:5]]
    drafts, full_BNV = propose(DraftModel(target, Constant(6), 5, CAPACITY), texts, sampling)
    with torch.inference_mode():
        if full_BNV is None:
            pairs = [(text or [], draft) for text, draft in zip(texts, drafts, strict=True)]
            logits = [target.model(torch.tensor([text + draft])).logits[0, len(text) - 1 : -1] for text, draft in pairs]
            full_BNV = torch.cat([torch.zeros(5, 1, VOCABULARY), torch.stack(logits).softmax(-1)], 1)
    own = [[float(full_BNV[i, n + 1, token]) for n, token in enumerate(draft)] for i, draft in enumerate(drafts)]
    ordered = sorted(itertools.chain(*own))
    for threshold in (ordered[4], ordered[len(ordered) // 3]):
        stopped, _ = propose(DraftModel(target, Constant(6), 5, CAPACITY, confidence=threshold + 1e-9), texts, sampling)
        first = [next((n for n, p in enumerate(probs) if p < threshold + 1e-9), 5) for probs in own]
        assert stopped == [draft[: n + 1] for draft, n in zip(drafts, first, strict=True)]
        assert len(set(map(len, stopped))) > 1


def test_a_threshold_of_one_drafts_a_single_token() -> None:
    """Even the least sure draft is kept."""
    drafter = DraftModel(Target(tiny("llama")), Constant(4), 2, CAPACITY, confidence=1.0)
    assert [len(draft) for draft in propose(drafter, [[1, 2, 3], [4, 5]], Sampling(max_new=50))[0]] == [1, 1]


def test_a_greedy_rows_stop_does_not_depend_on_its_neighbours() -> None:
    """Beside a sampled row, a greedy one still judges by the draft's own probabilities, not by its one-hot law."""
    target, text = Target(tiny("llama", scale=1.2)), [5, 6, 7]
    greedy, sampled = Sampling(max_new=50), Sampling(temperature=1.0, max_new=50)

    def lengths(samplings: list[Sampling]) -> list[int]:
        drafter = DraftModel(target, Constant(4), len(samplings), CAPACITY, confidence=0.9)
        rows = [Row(sampling, list(text), len(text), Randomness(0, CPU)) for sampling in samplings]
        with torch.inference_mode():
            for i in range(len(rows)):
                drafter.admit(i, text[:-1], None)
            tree = drafter.propose(Batch(rows, build_warp(samplings, VOCABULARY, CPU), None, CPU))
        return (tree.valid_BN.sum(1) - 1).tolist()

    assert lengths([greedy, sampled])[0] == lengths([greedy])[0] < 4


def test_drafts_are_cut_to_what_a_row_can_still_use() -> None:
    drafter = DraftModel(Target(tiny("llama")), Constant(4), 2, CAPACITY)
    assert [len(draft) for draft in propose(drafter, [[1, 2, 3], [4, 5]], Sampling(max_new=3))[0]] == [2, 2]


@pytest.mark.parametrize("policy", [Constant(3), Heuristic(1, 2)], ids=["constant", "heuristic"])
def test_drawn_chains_carry_their_laws(policy: LengthPolicy) -> None:
    drafter = DraftModel(Target(tiny("llama")), policy, 2, CAPACITY)
    drafts, probs_BNV = propose(drafter, [[1, 2, 3], [4, 5]], Sampling(temperature=1.0, top_k=3, max_new=50))
    assert probs_BNV is not None
    assert probs_BNV.shape == (2, len(drafts[0]) + 1, VOCABULARY)
    assert (probs_BNV[:, 1:] > 0).sum(-1).tolist() == [[3] * len(drafts[0])] * 2
    assert all(float(probs_BNV[i, n + 1, token]) > 0 for i, draft in enumerate(drafts) for n, token in enumerate(draft))
    greedy = DraftModel(Target(tiny("llama")), policy, 2, CAPACITY, greedy=True)
    assert propose(greedy, [[1, 2, 3], [4, 5]], Sampling(temperature=1.0, max_new=50))[1] is None
    assert (drafter.drawn, greedy.drawn) == (True, False)
