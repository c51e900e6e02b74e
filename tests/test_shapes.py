"""Trees by choices against brute force, and the policy of tree sizes on simulated machines whose best shape is known."""

import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from forerun.draft import Outcome
from forerun.draft.choices import Choices, Path, chain_choices, default_choices, read_choices
from forerun.draft.shapes import AdaptiveShape, FixedShape, Shape, ShapePolicy, grid, prefixes, prices
from forerun.types import UserError

ANY: Any = None  # no policy looks at verdicts or hidden states


# Choices.


def test_a_tree_by_hand() -> None:
    tree = read_choices([(1,), (0, 0), (0,), (0, 0, 1)])
    assert tree.paths == ((), (1,), (0,), (0, 0), (0, 0, 1)), "in the order given, but parents first"
    assert (tree.parents, tree.depths, tree.ranks) == ((0, 0, 0, 2, 3), (0, 1, 1, 2, 3), (0, 1, 0, 0, 1))
    parents_N, depths_N, ranks_N = tree.tensors(torch.device("cpu"))
    assert (parents_N.tolist(), depths_N.tolist(), ranks_N.tolist()) == ([0, 0, 0, 2, 3], [0, 1, 1, 2, 3], [0, 1, 0, 0, 1])
    assert [tree.deepest(n) for n in range(1, 6)] == [0, 1, 1, 2, 3]
    assert [tree.is_chain(n) for n in range(1, 6)] == [True, True, False, False, False]
    assert tree.cut(2, 9).paths == ((), (1,), (0,), (0, 0))
    assert tree.cut(9, 3).paths == ((), (1,), (0,))
    assert chain_choices(3).paths == ((), (0,), (0, 0), (0, 0, 0))
    assert all(chain_choices(3).is_chain(n) for n in range(1, 5))
    assert read_choices([]).size == 1


@pytest.mark.parametrize(
    ("paths", "named"),
    [
        ([(0,), (1, 0)], r"path \[1, 0\] lacks its parent \[1\]"),
        ([(0,), (0, 0, 0)], r"path \[0, 0, 0\] lacks its parent \[0, 0\]"),
        ([(0,), (1,), (0,)], r"path \[0\] is given twice"),
        ([(0,), ()], r"\[\] is no path"),
        ([(0,), (0, -1)], r"\[0, -1\] is no path"),
    ],
)
def test_a_faulty_tree_is_refused_by_its_path(paths: list[Path], named: str) -> None:
    with pytest.raises(UserError, match=named) as caught:
        read_choices(paths)
    assert "\n" not in str(caught.value)


def value(accuracies: list[list[float]], path: Path) -> float:
    return math.prod(accuracies[depth][rank] for depth, rank in enumerate(path))


def best_sum(accuracies: list[list[float]], nodes: int) -> float:
    """The most probability that any tree of so many nodes holds, by trying every set of paths."""
    every = [
        path for depth in range(1, len(accuracies) + 1) for path in itertools.product(*map(range, map(len, accuracies[:depth])))
    ]
    sums = [
        sum(value(accuracies, path) for path in chosen)
        for chosen in itertools.combinations(every, nodes - 1)
        if all(path[:-1] in chosen or len(path) == 1 for path in chosen)
    ]
    return 1 + max(sums)


TABLES = {
    "two heads": [[0.6, 0.3, 0.1], [0.5, 0.25]],
    "three heads": [[0.5, 0.3], [0.45, 0.3], [0.4, 0.35]],
    "a better second head": [[0.4, 0.3], [0.9, 0.05], [0.9]],
    "ranks out of order": [[0.2, 0.5], [0.1, 0.6, 0.2]],
    "ties": [[0.5, 0.5], [0.5, 0.5]],
}


@pytest.mark.parametrize("name", TABLES)
def test_default_choices_is_the_best_tree_of_every_size(name: str) -> None:
    table = TABLES[name]
    most = sum(math.prod(map(len, table[:depth])) for depth in range(1, len(table) + 1)) + 1
    whole = default_choices(table, most)
    assert whole.size == most
    for nodes in range(1, min(most, 8) + 1):
        tree = default_choices(table, nodes)
        assert tree.size == nodes
        assert tree.paths == whole.paths[:nodes], "a smaller tree is the start of a larger one"
        assert sum(value(table, path) for path in tree.paths) == pytest.approx(best_sum(table, nodes))


def test_default_choices_settles_ties_and_leaves_out_the_impossible() -> None:
    assert default_choices([[0.5, 0.5], [1.0, 0.5]], 6).paths == ((), (0,), (1,), (0, 0), (1, 0), (0, 1))
    assert default_choices([[1.0, 0.0], [0.0, 0.3]], 9).paths == ((), (0,), (0, 1))


def test_shapes_of_a_static_tree_and_of_a_grown_one() -> None:
    tree = default_choices([[0.6, 0.2, 0.1]] * 3, 20)
    assert [nodes for _, nodes in prefixes(tree)] == [1, 2, 3, 4, 6, 8, 12, 16, 20]
    assert all(tree.cut(depth, nodes).size == nodes for depth, nodes in prefixes(tree))
    shapes = grid(6, 24)
    assert {(depth, depth + 1) for depth in (1, 2, 3, 4, 6)} <= set(shapes), "chains"
    assert (6, 24) == max(shapes) == shapes[-1]
    assert all(0 < depth < nodes <= 24 for depth, nodes in shapes)
    assert max(nodes for depth, nodes in shapes if depth == 1) <= 9, "one pass gives no more than its branches"
    assert grid(0, 5) == []


# Policies.


def rows(*remaining: int | None) -> list[Any]:
    return [None if left is None else SimpleNamespace(remaining=left) for left in remaining]


def outcome(paths: list[list[int]], nodes: int, draft: float = 0.1, verify: float = 1.0, rest: float = 0.1) -> Outcome:
    accepted = [len(path) - 1 for path in paths]
    return Outcome(accepted, accepted, nodes, draft, verify, rest, ANY, None, paths)


def test_a_fixed_shape_is_cut_to_what_some_row_can_use() -> None:
    policy = FixedShape(4, 12)
    assert (policy.depth, policy.nodes) == (4, 12)
    assert policy.shape(rows(2, None, 9)) == (4, 12)
    assert policy.shape(rows(2, None, 3)) == (2, 12), "the size stays, so that few occur"
    assert policy.shape(rows(1, None, 1)) == (0, 1)


@dataclass(frozen=True)
class Machine:
    """Seconds of a round, and how likely each guess at each depth is right; `regrown`: a tree of each depth is the best one."""

    accuracies: list[list[float]]
    draft: Callable[[int], float]  # seconds by depth
    verify: Callable[[int], float]  # seconds by nodes
    regrown: bool = False
    largest: int = 32
    noise: float = 0.05  # spread of a measurement

    def tree(self, shape: Shape) -> Choices:
        depth, nodes = shape
        if self.regrown:
            return default_choices(self.accuracies[:depth], nodes)
        return default_choices(self.accuracies, self.largest).cut(depth, nodes)

    @property
    def shapes(self) -> list[Shape]:
        whole = default_choices(self.accuracies, self.largest)
        return grid(len(self.accuracies), self.largest) if self.regrown else prefixes(whole)

    def rate(self, shape: Shape) -> float:
        """Expected tokens a second."""
        tokens = sum(value(self.accuracies, path) for path in self.tree(shape).paths)
        return tokens / (self.draft(shape[0]) + self.verify(shape[1]) + 0.1)

    def walk(self, draw: random.Random, numbers: dict[Path, int]) -> list[int]:
        """The accepted path: at each depth one guess is right, or none."""
        path: Path = ()
        nodes = [0]
        for accuracies in self.accuracies:
            right = draw.choices(range(len(accuracies) + 1), [*accuracies, max(0.0, 1 - sum(accuracies))])[0]
            path = (*path, right)
            if path not in numbers:
                break
            nodes.append(numbers[path])
        return nodes


def play(policy: ShapePolicy, machine: Machine, count: int, batch: int = 1, seed: int = 0,
         slow: Callable[[int, Shape], float] = lambda *_: 1.0) -> list[Shape]:  # fmt: skip
    """The shapes that a policy chooses; `slow(round, shape)` stretches a measurement. No clock is read."""
    draw, chosen = random.Random(seed), []
    known: dict[Shape, dict[Path, int]] = {}
    for at in range(count):
        shape = policy.shape(rows(*[1000] * batch))
        if shape not in known:
            known[shape] = {path: number for number, path in enumerate(machine.tree(shape).paths)}
        paths = [machine.walk(draw, known[shape]) for _ in range(batch)]
        stretch = [1 + machine.noise * draw.uniform(-1, 1) for _ in range(3)]
        draft, verify = machine.draft(shape[0]) * stretch[0], machine.verify(shape[1]) * stretch[1] * slow(at, shape)
        policy.observe(outcome(paths, shape[1], draft, verify, 0.1 * stretch[2]))
        chosen.append(shape)
    return chosen


GOOD = [[0.6, 0.15, 0.08, 0.04, 0.03], *[[0.5, 0.15, 0.08, 0.05, 0.03]] * 3]
SURE = [[0.85, 0.06, 0.03, 0.02]] * 6
POOR = [[0.06, 0.03, 0.02]] * 4


def machines(batch: int) -> dict[str, Machine]:
    """Verification costs a little for every node of every row, on top of reading the weights."""

    def verify(nodes: int) -> float:
        return 1 + 0.012 * batch * nodes

    return {
        "heads at once": Machine(GOOD, lambda depth: 0.1 if depth else 0.0, verify),
        "a pass a depth": Machine(GOOD, lambda depth: 0.08 * depth, verify, regrown=True),
        "sure guesses": Machine(SURE, lambda depth: 0.05 * depth, verify, regrown=True),
        "bad guesses": Machine(POOR, lambda depth: 0.1 * depth, verify),
        "a step in the cost": Machine(GOOD, lambda depth: 0.05 * depth, lambda nodes: 1.0 if batch * nodes <= 64 else 2.5),
        "larger is free": Machine(GOOD, lambda depth: 0.05, lambda nodes: 1.0),
    }


def best(machine: Machine) -> Shape:
    return max([(0, 1), *machine.shapes], key=machine.rate)


def check(chosen: list[Shape], machine: Machine) -> None:
    """Late rounds, probes among them, lose little against the best shape, and few of them are far from it."""
    late, most = chosen[-200:], machine.rate(best(machine))
    rates = [machine.rate(shape) / most for shape in late]
    story = f"best is {best(machine)}, chosen {late[-24:]}"
    assert len(late) / sum(1 / rate for rate in rates) > 0.93, story
    assert sum(rate > 0.9 for rate in rates) >= 0.85 * len(late), story


def test_the_machines_are_of_all_kinds() -> None:
    found = {batch: {name: best(machine) for name, machine in machines(batch).items()} for batch in (1, 16)}
    assert found[1]["heads at once"][1] >= 12, "alone a tree pays"
    assert found[16]["heads at once"][1] <= 3, "in a batch it does not"
    assert found[16]["sure guesses"] == (depth := found[16]["sure guesses"][0], depth + 1), "a chain is best"
    assert found[16]["bad guesses"] == (0, 1)
    assert found[1]["larger is free"][1] == found[16]["larger is free"][1] == 32


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("name", machines(1))
def test_adaptive_finds_the_best_shape(name: str, batch: int) -> None:
    machine = machines(batch)[name]
    for seed in range(3):
        check(play(AdaptiveShape(machine.shapes), machine, 500, batch, seed), machine)


@pytest.mark.parametrize("name", machines(1))
def test_a_slow_first_pass_of_every_size_does_not_mislead(name: str) -> None:
    seen: set[int] = set()

    def slow(at: int, shape: Shape) -> float:
        first = shape[1] not in seen
        seen.add(shape[1])
        return 20.0 if first else 1.0

    machine = machines(4)[name]
    check(play(AdaptiveShape(machine.shapes), machine, 600, 4, slow=slow), machine)


@pytest.mark.parametrize("at", [1, 5, 40])
def test_a_single_slow_round_does_not_exclude_a_shape_for_good(at: int) -> None:
    for machine in machines(4).values():
        check(play(AdaptiveShape(machine.shapes), machine, 600, 4, slow=lambda now, _: 30.0 if now == at else 1.0), machine)


def test_adaptive_follows_a_change_of_text_and_of_batch() -> None:
    alone, crowd = machines(1), machines(16)
    policy = AdaptiveShape(alone["heads at once"].shapes)
    for machine, batch in ((alone["heads at once"], 1), (crowd["heads at once"], 16), (alone["heads at once"], 1)):
        check(play(policy, machine, 900, batch), machine)
    poor = Machine(POOR, lambda depth: 0.1 * depth, lambda nodes: 1 + 0.05 * nodes, regrown=True)
    good = Machine(SURE[:4], lambda depth: 0.1 * depth, lambda nodes: 1 + 0.02 * nodes, regrown=True)
    policy = AdaptiveShape(good.shapes)
    for machine in (good, poor, good):
        check(play(policy, machine, 900), machine)


def test_what_smaller_trees_would_have_accepted_is_counted_without_bias() -> None:
    """Rounds of one large shape tell the expected tokens of every smaller one."""
    machine = Machine(GOOD, lambda depth: 0.1, lambda nodes: 1.0)
    policy = AdaptiveShape(machine.shapes)
    policy.MEMORY = 1.0  # type: ignore[misc]  # all rounds count alike, so that chance is small
    draw, numbers = random.Random(0), {path: i for i, path in enumerate(machine.tree((4, 32)).paths)}
    for _ in range(4000):
        policy.last, policy.whole = (4, 32), [True] * 4
        policy.observe(outcome([machine.walk(draw, numbers) for _ in range(4)], 32))
    told = policy.tokens()
    for depth, nodes in machine.shapes:
        expected = sum(value(machine.accuracies, path) for path in machine.tree((depth, nodes)).paths)
        assert told[nodes][depth] == pytest.approx(expected, abs=0.04)


def test_small_rounds_say_nothing_of_larger_trees() -> None:
    policy = AdaptiveShape([(1, 2), (2, 4), (3, 8)])
    policy.last, policy.whole = (2, 4), [True]
    policy.observe(outcome([[0, 1, 3]], 4))
    assert policy.tries == {2: [1], 4: [1, 1, 0], 8: [0, 0, 0]}
    assert policy.hits == {2: [1], 4: [1, 1, 0], 8: [0, 0, 0]}
    policy.last = (3, 8)
    policy.observe(outcome([[0, 2, 5]], 8))
    share = policy.MEMORY
    assert policy.tries == {2: [share + 1], 4: [share + 1, share + 1, 0], 8: [1, 1, 1]}
    assert policy.hits == {2: [share], 4: [share + 1, share, 0], 8: [1, 1, 0]}


def test_rounds_at_the_end_of_a_text_say_nothing() -> None:
    """A row that could not use the whole tree is no refusal, and a tree cut for all rows has other times."""
    policy = AdaptiveShape([(1, 2), (3, 8)])
    plain = rows(99, 99, None)
    for _ in range(2):
        assert policy.shape(plain) == (0, 1)
        policy.observe(outcome([[0]] * 3, 1))
    assert policy.shape(rows(99, 2, None)) == (3, 8)
    policy.observe(outcome([[0, 1, 2], [0], [0]], 8))
    assert policy.tries[8] == [1, 1, 1]
    before = [dict(times) for times in (policy.draft, policy.verify)]
    assert policy.shape(rows(3, 2, None)) == (2, 8)
    policy.observe(outcome([[0, 1, 2], [0], [0]], 8))
    assert policy.tries[8] == [1, 1, 1]
    assert [dict(times) for times in (policy.draft, policy.verify)] == before
    assert policy.shape(rows(1, None, None)) == (0, 1)


def test_prices_rise_with_the_size_and_start_from_the_next_smaller_one() -> None:
    times = {1: deque([1.0, 1.2, 9.0]), 4: deque([30.0]), 8: deque([2.0, 2.4, 2.2]), 16: deque([3.0]), 32: deque[float]()}
    assert prices(times, [1, 2, 4, 6, 8, 16, 32, 64]) == {1: 1.2, 2: 1.2, 4: 2.2, 6: 2.2, 8: 2.2, 16: 3.0, 32: 3.0, 64: 3.0}


def test_adaptive_keeps_to_its_shapes() -> None:
    machine = machines(1)["a pass a depth"]
    policy = AdaptiveShape(machine.shapes)
    assert set(play(policy, machine, 300)) <= {(0, 1), *machine.shapes}
    assert (policy.depth, policy.nodes) == (4, 32)
    nothing = AdaptiveShape([])
    assert set(play(nothing, machine, 60)) == {(0, 1)}
