"""Length policies: sequences by hand, and the adaptive one on simulated machines whose best depth is known."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from forerun.draft import Adaptive, Constant, Heuristic, LengthPolicy, Outcome, build_policy

ANY: Any = None  # no policy looks at verdicts or hidden states


def rows(*remaining: int | None) -> list[Any]:
    return [None if left is None else SimpleNamespace(remaining=left) for left in remaining]


def outcome(drafted: list[int], accepted: list[int], draft: float = 1.0, nodes: int | None = None) -> Outcome:
    return Outcome(drafted, accepted, max(drafted) + 1 if nodes is None else nodes, draft, 1.0, 0.1, ANY, None)


def test_constant_is_cut_to_what_is_useful() -> None:
    policy = Constant(4)
    assert policy.depths(rows(100, None, 5, 3, 1)) == [4, 0, 4, 2, 0]
    policy.observe(outcome([4], [0]))
    assert policy.depths(rows(100)) == [4]
    assert Constant(0).depths(rows(100)) == [0]


def test_heuristic_adds_two_and_takes_one_each_row_by_itself() -> None:
    policy = Heuristic(3, rows=3)
    many = rows(100, 100, None)
    seen = [policy.depths(many)]
    for accepted in ([3, 2, 0], [5, 0, 0], [0, 0, 0], [6, 1, 0]):
        drafted = policy.depths(many)
        policy.observe(outcome(drafted, accepted))
        seen.append(policy.depths(many))
    assert seen == [[3, 3, 0], [5, 2, 0], [7, 1, 0], [6, 1, 0], [8, 3, 0]]


def test_heuristic_stays_within_its_limits() -> None:
    policy = Heuristic(2, rows=1)
    for _ in range(10):
        policy.observe(outcome(policy.depths(rows(100)), policy.depths(rows(100))))
    assert policy.depths(rows(100)) == [policy.limit] == [8]
    for _ in range(20):
        policy.observe(outcome(policy.depths(rows(100)), [0]))
    assert policy.depths(rows(100)) == [1]
    policy.observe(outcome([0], [0]))  # a round that drafted nothing says nothing
    assert policy.depths(rows(100)) == [1]
    policy.admit(0)
    assert policy.depths(rows(100)) == [2]


def test_policies_never_pass_their_limit() -> None:
    for kind in ("constant", "heuristic", "adaptive"):
        policy = build_policy(kind, 3, 2)
        for _ in range(60):
            depths = policy.depths(rows(100, 100))
            assert max(depths) <= policy.limit
            policy.observe(outcome(depths, depths))


# A simulated machine.


@dataclass(frozen=True)
class Machine:
    """Seconds of a round, and how likely each position is accepted."""

    alphas: tuple[float, ...]
    draft: float  # seconds a drafted token
    verify: Callable[[int], float]  # seconds by nodes
    rest: float = 0.1
    noise: float = 0.05  # spread of a measurement

    def rate(self, depth: int) -> float:
        """Expected tokens a second."""
        expected, reach = 1.0, 1.0
        for alpha in self.alphas[:depth]:
            reach *= alpha
            expected += reach
        return expected / (depth * self.draft + self.verify(depth + 1) + self.rest)

    @property
    def best(self) -> int:
        return max(range(len(self.alphas) + 1), key=self.rate)


def play(policy: LengthPolicy, machine: Machine, rounds: int, seed: int = 0, slow: Callable[[int, int], float] = lambda *_: 1.0,
         batch: int = 1) -> list[int]:  # fmt: skip
    """The depths that a policy chooses; `slow(round, nodes)` stretches a measurement. No clock is read."""
    draw = random.Random(seed)
    chosen = []
    for round in range(rounds):
        drafted = policy.depths(rows(*[1000] * batch))
        depth = max(drafted)
        accepted = []
        for _ in range(batch):
            wins = [draw.random() < alpha for alpha in machine.alphas]
            accepted.append(next((i for i in range(depth) if not wins[i]), depth))
        stretch = [1 + machine.noise * draw.uniform(-1, 1) for _ in range(3)]
        verify = machine.verify(depth + 1) * stretch[0] * slow(round, depth + 1)
        seconds = (depth * machine.draft * stretch[1], verify, machine.rest * stretch[2])
        policy.observe(Outcome(drafted, accepted, depth + 1, *seconds, ANY, None))
        chosen.append(depth)
    return chosen


LIMIT = 8
MACHINES = {
    "cheap draft, good guesses": Machine((0.9,) * LIMIT, 0.02, lambda n: 1.0),
    "four is best": Machine((0.75,) * LIMIT, 0.1, lambda n: 1.0 + 0.02 * n),
    "bad guesses": Machine((0.1,) * LIMIT, 0.3, lambda n: 1.0),
    "nodes cost as much as tokens": Machine((0.7,) * LIMIT, 0.05, lambda n: 1.0 * n),
    "one is best": Machine((0.6, *[0.2] * (LIMIT - 1)), 0.15, lambda n: 1.0),
    "a step in the cost": Machine((0.9,) * LIMIT, 0.02, lambda n: 1.0 if n <= 4 else 2.2),
}


def check(chosen: list[int], machine: Machine) -> None:
    """Nearly all of the late rounds are as good as the best depth, up to 5 %; the rest are probes."""
    late = chosen[-200:]
    good = [machine.rate(depth) > 0.95 * machine.rate(machine.best) for depth in late]
    assert sum(good) >= 0.85 * len(late), f"best is {machine.best}, chosen {late[-24:]}"


def test_the_machines_are_of_all_kinds() -> None:
    best = {machine.best for machine in MACHINES.values()}
    assert {0, 1, 4, LIMIT} <= best or {0, 1, 3, LIMIT} <= best


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("name", MACHINES)
def test_adaptive_finds_the_best_depth(name: str, batch: int) -> None:
    for seed in range(3):
        check(play(Adaptive(LIMIT), MACHINES[name], 500, seed, batch=batch), MACHINES[name])


@pytest.mark.parametrize("name", MACHINES)
def test_a_slow_first_round_does_not_mislead(name: str) -> None:
    """The first pass allocates and warms up: one plain step that took fifty times as long."""
    check(play(Adaptive(LIMIT), MACHINES[name], 500, slow=lambda at, nodes: 50.0 if at == 0 else 1.0), MACHINES[name])


@pytest.mark.parametrize("name", MACHINES)
def test_a_slow_first_pass_of_every_size_does_not_mislead(name: str) -> None:
    """Every new shape is prepared once."""
    seen: set[int] = set()

    def slow(round: int, nodes: int) -> float:
        first = nodes not in seen
        seen.add(nodes)
        return 20.0 if first else 1.0

    check(play(Adaptive(LIMIT), MACHINES[name], 800, slow=slow), MACHINES[name])


@pytest.mark.parametrize("at", [1, 2, 5, 30])
def test_a_single_slow_round_does_not_exclude_a_depth_for_good(at: int) -> None:
    for machine in MACHINES.values():
        check(play(Adaptive(LIMIT), machine, 500, slow=lambda now, nodes: 30.0 if now == at else 1.0), machine)


def test_adaptive_follows_a_change() -> None:
    """Text that was easy to guess becomes hard, and the other way round."""
    easy, hard = MACHINES["cheap draft, good guesses"], Machine((0.1,) * LIMIT, 0.02 * 10, lambda n: 1.0)
    policy = Adaptive(LIMIT)
    for machine in (easy, hard, easy):
        check(play(policy, machine, 700), machine)


def test_adaptive_counts_a_position_only_where_it_was_reached() -> None:
    """Fully accepted short drafts say nothing of the position after them."""
    policy = Adaptive(4)
    for _ in range(200):
        policy.observe(outcome([2], [2]))
    for _ in range(200):
        policy.observe(outcome([4], [3]))
    shares = [hits / tries for hits, tries in zip(policy.hits, policy.tries, strict=True)]
    assert shares[:3] == pytest.approx([1, 1, 1], abs=0.02)
    assert shares[3] == pytest.approx(0, abs=0.02)


def test_the_price_of_a_draft_counts_the_passes_that_were_made() -> None:
    """Where all rows stopped early, or padding cut a row's count, the draft made `nodes - 1` passes all the same."""
    policy = Adaptive(4)
    policy.observe(outcome([0], [0]))
    for _ in range(20):
        policy.observe(outcome([1], [1], draft=4.0, nodes=5))
    assert list(policy.draft) == pytest.approx([1.0] * 9)


def test_adaptive_starts_plainly_and_touches_no_idle_row() -> None:
    policy = Adaptive(4)
    seen = []
    for _ in range(4):
        seen.append(policy.depths(rows(100, None, 2)))
        policy.observe(outcome(seen[-1], [0, 0, 0]))
    assert seen[0] == [0, 0, 0]
    assert all(depths[1] == 0 and depths[2] <= 1 for depths in seen)
    assert max(depths[0] for depths in seen) > 0


def test_adaptive_with_nothing_to_choose() -> None:
    policy = Adaptive(0)
    for _ in range(60):
        assert policy.depths(rows(100)) == [0]
        policy.observe(outcome([0], [0]))
