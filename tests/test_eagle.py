"""EAGLE drafts against explicit passes without a cache: entries, every kind of tree, laws; rounds that go any way they can."""

import itertools

import pytest
import torch
from torch import Tensor

from eagle_world import CPU, GREEDY, ROWS, V, World, check_entries, check_tree, chosen, network, shown, valid, world
from forerun.draft import Constant, Row
from forerun.draft.choices import Choices, read_choices
from forerun.draft.eagle import LATE, EagleDraft
from forerun.draft.expand import Dynamic
from forerun.draft.shapes import FixedShape
from forerun.sampling import Randomness, build_warp, law
from forerun.types import Sampling, UserError

BUSHY = read_choices([(0,), (1,), (0, 0), (2,), (1, 1), (0, 0, 0), (0, 1), (0, 0, 2), (1, 1, 0)])
FULL = read_choices([(0,), (1,), (0, 0), (2,), (1, 0), (0, 0, 0), (0, 1), (0, 0, 1), (1, 0, 0)])  # every elder sibling is there
SAMPLED = Sampling(temperature=0.8, top_k=6, max_new=40)


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


KINDS = {
    "chain": (lambda: Constant(4), None, 4),
    "static": (lambda: FixedShape(3, 10), BUSHY, 3),
    "dynamic": (lambda: FixedShape(4, 14), Dynamic(3), 4),
    "dynamic-chain": (lambda: FixedShape(3, 9), Dynamic(1), 3),
}


@pytest.mark.parametrize(("version", "draft"), [(1, 0), (3, 0), (3, 11)], ids=["1", "3", "3-draft-vocabulary"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_round_drafts_what_fresh_passes_say(kind: str, version: int, draft: int) -> None:
    """Rows join, leave, end and are penalized; paths of all lengths are accepted; entries and trees are checked every round."""
    policy, form, limit = KINDS[kind]
    w = world(version, policy(), form, draft=draft)
    moved = Sampling(max_new=9, repetition_penalty=1.4, frequency_penalty=0.5, logit_bias={3: 2.0})
    w.join(0)
    lengths: set[int] = set()
    for round in range(12):
        if round == 1:
            w.join(2, length=1, sampling=moved)
        if round == 3:
            w.join(1, length=11)
        if round == 8:
            w.leave(0)
            w.join(0, length=5)
        tree = w.drafter.propose(w.batch())
        assert (tree.size <= w.drafter.size, tree.depth <= w.drafter.depth, tree.probs_BNV) == (True, True, None)
        check_tree(w, tree, limit)
        before = [row and len(row.tokens) for row in w.rows]
        w.finish(tree)
        lengths |= {len(row.tokens) - old for row, old in zip(w.rows, before, strict=True) if row and old}
        if w.rows[2] and w.rows[2].remaining <= 0:
            w.leave(2)
        check_entries(w)
    assert w.rows[2] is None, "a row must have come to its end, its trees cut"
    assert {1, 2, 3, limit} <= lengths, "short and long paths must occur"


def test_the_batch_does_not_change_a_rows_tree() -> None:
    for policy, form, _ in KINDS.values():
        together, alone = world(3, policy(), form), world(3, policy(), form)
        prompts = [[1, 2, 3], [4] * 9, [7, 8]]
        rows = [
            Row(Sampling(max_new=new), [*p, 5], len(p), Randomness(0, CPU)) for p, new in zip(prompts, (30, 3, 8), strict=True)
        ]
        for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            together.rows[i] = row
            together.drafter.admit(i, prompt, together.features(prompt))
        trees = together.drafter.propose(together.batch())
        for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
            alone.rows = [None, row, None]
            alone.drafter.admit(1, prompt, alone.features(prompt))
            tree = alone.drafter.propose(alone.batch())
            # A static tree that is cut for its only row leaves out what is padding in company.
            one, other = ([node and node[0] for node in valid(shown(*place))] for place in ((tree, 1), (trees, i)))
            assert [path for path in one if path is not None] == [path for path in other if path is not None]
            alone.leave(1)


class Replayed:
    """A pass as a captured graph makes it: the next call with the same shapes overwrites what it gave."""

    def __init__(self, function) -> None:
        self.function, self.given = function, {}

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        key = tuple(tensor.shape for tensor in tensors)
        fresh = self.function(*(tensor.clone() for tensor in tensors))
        if key not in self.given:
            self.given[key] = tuple(tensor.clone() for tensor in fresh)
        for old, new in zip(self.given[key], fresh, strict=True):
            old.copy_(new)
        return self.given[key]


@pytest.mark.parametrize("kind", KINDS)
def test_passes_may_overwrite_what_they_gave(kind: str) -> None:
    policy, form, limit = KINDS[kind]
    w = world(3, policy(), form)
    w.drafter.first, w.drafter.further = Replayed(w.drafter._first), Replayed(w.drafter._further)
    w.join(0)
    w.join(1)
    for _ in range(5):
        tree = w.drafter.propose(w.batch())
        w.drafter.propose(w.batch())
        check_tree(w, tree, limit)
        w.finish(tree)
        check_entries(w)


# Rounds that are out of the ordinary.


class Scripted:
    """Depths from a list, over and over."""

    def __init__(self, script: list[int]) -> None:
        self.script, self.limit = itertools.cycle(script), max(script)

    def depths(self, rows: list[Row | None]) -> list[int]:
        depth = next(self.script)
        return [min(depth, row.remaining - 1) if row else 0 for row in rows]

    def observe(self, outcome: object) -> None:
        pass

    def admit(self, row: int) -> None:
        pass


@pytest.mark.parametrize("script", [[0, 0, 0, 3], [2, 0], [0, 1, 0, 0, 0, 0, 0, 4]], ids=str)
def test_rounds_that_draft_nothing_keep_their_features(script: list[int]) -> None:
    w = world(3, Scripted(script))
    w.join(1)
    for round in range(12):
        if round == 4:
            w.join(0)
        tree = w.drafter.propose(w.batch())
        if tree.size > 1:
            check_tree(w, tree, tree.depth)
        w.finish(tree)
        check_entries(w)


def test_what_waits_is_entered_before_it_is_too_much() -> None:
    w = World(EagleDraft(*network(3), Scripted([0]), ROWS, 2 * LATE + 80))
    w.join(0, sampling=Sampling(max_new=2 * LATE + 20))
    widths = []
    for _ in range(LATE + 8):
        w.finish(w.drafter.propose(w.batch()))
        widths.append(w.drafter.waiting_BWF.shape[1])
    assert max(widths) == LATE
    assert widths[-1] < 16
    row = w.rows[0]
    assert row is not None
    assert w.drafter.cache.lengths[0] > LATE
    front = w.drafter._enter(w.batch())
    torch.testing.assert_close(front.logits_BPD[0, 0], w.guess(row)[0], rtol=0, atol=1e-9)


def test_padding_may_be_wider_than_the_cache() -> None:
    w = World(EagleDraft(*network(3), Scripted([0] * 18 + [2]), ROWS, 27))
    w.join(0, length=1, sampling=Sampling(max_new=22))
    for _ in range(18):
        w.finish(w.drafter.propose(w.batch()))
    assert w.drafter.waiting_BWF.shape[1] > w.drafter.cache.capacity
    check_tree(w, w.drafter.propose(w.batch()), 2)


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_that_broke_off_leaves_no_trace(kind: str) -> None:
    """Proposed and never told of: the next round drafts the same, and all entries stay right."""
    policy, form, limit = KINDS[kind]
    w = world(3, policy(), form)
    w.join(0)
    w.join(1, length=2)
    for _ in range(4):
        lost = w.drafter.propose(w.batch())
        tree = w.drafter.propose(w.batch())
        assert [valid(shown(tree, i)) for i in range(ROWS)] == [valid(shown(lost, i)) for i in range(ROWS)]
        check_tree(w, tree, limit)
        w.finish(tree)
        check_entries(w)


@pytest.mark.parametrize("script", [[3], [0, 3]], ids=str)
def test_a_round_whose_features_were_never_told_does_not_wedge_a_row(script: list[int]) -> None:
    """Tokens came and their features did not: drafting goes on, and after the next request nothing of it is left."""
    w = world(1, Scripted(script))
    w.join(0)
    w.join(1)
    for _ in range(3):
        w.finish(w.drafter.propose(w.batch()))
        w.drafter.propose(w.batch())
        row = w.rows[0]
        assert row is not None
        row.tokens += [1, 2, 3, 4]
        assert bool(torch.isfinite(w.drafter._enter(w.batch()).logits_BPD[:2]).all())
    w.leave(0)
    w.join(0)
    for _ in range(3):
        w.finish(w.drafter.propose(w.batch()))
        check_entries(w)


def test_what_is_not_a_number_stays_in_its_request() -> None:
    """A row whose target broke leaves NaN in features and cache; its neighbour and its successor draft as ever."""
    w = world(1, FixedShape(3, 8), Dynamic(3))
    w.join(0)
    w.join(1)
    w.finish(w.drafter.propose(w.batch()))
    w.drafter.waiting_BWF[0] = torch.nan
    for _ in range(2):
        tree = w.drafter.propose(w.batch())
        assert bool((tree.parents_BN < torch.arange(tree.size).clamp_min(1)).all()), "a tree even so"
        row, w.rows[0] = w.rows[0], None
        check_tree(w, w.drafter.propose(w.batch()), 3)
        w.rows[0] = row
    w.leave(0)
    w.join(0)
    tree = w.drafter.propose(w.batch())
    check_tree(w, tree, 3)
    w.finish(tree)
    check_entries(w)


# Drawn drafts.


@pytest.mark.parametrize("form", [None, FULL], ids=["chain", "static"])
@pytest.mark.parametrize("draft", [0, 4], ids=["whole", "draft-vocabulary"])
def test_drawn_nodes_carry_the_law_without_elder_siblings(draft: int, form: Choices | None) -> None:
    """In a batch with a greedy row, whose tree is the one it gets alone; padding where no token is left."""
    w = world(3, FixedShape(3, 10) if form else Constant(3), form, drawn=True, draft=draft)
    penalized = Sampling(temperature=0.8, top_k=1, max_new=40, presence_penalty=0.7)
    for i, sampling in enumerate((SAMPLED, GREEDY, penalized)):
        w.join(i, sampling=sampling)
    greedy = w.rows[1]
    assert greedy is not None
    ended = 0
    for _ in range(5):
        tree = w.drafter.propose(w.batch())
        assert tree.probs_BNV is not None and isinstance(w.drafter.tree, Choices)
        assert valid(shown(tree, 1)) == valid(chosen(w, greedy, w.drafter.tree, 3))
        certain_NV = torch.nn.functional.one_hot(tree.tokens_BN[1, 1:], V).double()
        assert torch.equal(tree.probs_BNV[1, 1:], certain_NV)
        for i, row in enumerate(w.rows):
            paths = shown(tree, i)
            for node in range(1, tree.size if row and i != 1 else 0):
                assert row is not None
                parent = w.drafter.tree.parents[node]
                if paths[parent][1] < 0:
                    assert paths[node][1] < 0, "below padding is padding"
                    continue
                elder = [m for m in range(1, node) if w.drafter.tree.parents[m] == parent]
                logits = w.scores(row, paths[parent][0])
                own = law(logits[None, None], build_warp([row.sampling], V, CPU))[0, 0]
                own[tree.tokens_BN[i, elder]] = 0
                assert (paths[node][1] >= 0) == bool(own.sum() > 0)
                if paths[node][1] >= 0:
                    torch.testing.assert_close(tree.probs_BNV[i, node], own / own.sum(), rtol=0, atol=1e-9)
                    assert float(own[tree.tokens_BN[i, node]]) > 0
                ended += paths[node][1] < 0
        w.finish(tree)
        check_entries(w)
    assert bool(ended) == (form is not None)


def test_a_rows_draws_do_not_depend_on_its_neighbours() -> None:
    """Not on how deep theirs go either: the row is at its end."""
    for form in (None, FULL):
        drawn = []
        for others in (0, 2):
            w = world(3, FixedShape(3, 10) if form else Constant(3), form, drawn=True)
            w.join(0, sampling=Sampling(temperature=0.8, max_new=5))
            for i in range(others):
                w.join(1 + i, sampling=(GREEDY, SAMPLED)[i])
            trees = []
            for _ in range(3):
                tree = w.drafter.propose(w.batch())
                trees.append([node[0] for node in shown(tree, 0) if node[1] >= 0])
                w.finish(tree, eager=0.0)
                row = w.rows[0]
                assert row is not None
                row.tokens[-1] = 5  # the world's own draws are not those of the row
            drawn.append(trees)
        assert drawn[0] == drawn[1]
        assert [max(map(len, tree)) for tree in drawn[0]] == [3, 2, 1]


def test_choices_that_cannot_be_drafted_are_refused() -> None:
    with pytest.raises(UserError, match=r"\[11\] ranks beyond the draft's 11 tokens"):
        world(3, FixedShape(1, 3), read_choices([(0,), (11,)]), draft=11)
    with pytest.raises(UserError, match=r"\[0, 2\] is drawn after \[0, 1\]"):
        world(3, FixedShape(2, 4), read_choices([(0,), (0, 0), (0, 2)]), drawn=True)
