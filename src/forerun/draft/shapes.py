"""How deep and how large the next tree is. Policies look at the past only, so every lossless rule stays lossless under them.

A shape is (depth, nodes): drafting passes, and nodes with node 0. Trees are expected to come best node first, parents before
children, so that a smaller shape's tree is the start of a larger one's.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from itertools import accumulate
from statistics import median, median_low
from typing import Protocol

from forerun.draft.choices import Choices
from forerun.draft.protocol import Outcome, Row

Shape = tuple[int, int]


class ShapePolicy(Protocol):
    """`depth` and `nodes` are the most that `shape` ever returns.

    A depth is cut to what some row can still use; the nodes are not, so that few sizes occur: what is too deep is padding.
    """

    depth: int
    nodes: int

    def shape(self, rows: Sequence[Row | None]) -> Shape: ...
    def observe(self, outcome: Outcome) -> None: ...
    def admit(self, row: int) -> None: ...


def usable(rows: Sequence[Row | None]) -> int:
    """How deep the row with most tokens left can use a tree: a round emits one token more than it accepts."""
    return max((row.remaining - 1 for row in rows if row), default=0)


class FixedShape:
    """Always the same; where only plain steps are left, those."""

    def __init__(self, depth: int, nodes: int) -> None:
        self.depth, self.nodes = depth, nodes

    def shape(self, rows: Sequence[Row | None]) -> Shape:
        depth = min(self.depth, usable(rows))
        return depth, self.nodes if depth else 1

    def observe(self, outcome: Outcome) -> None:
        pass

    def admit(self, row: int) -> None:
        pass


def by_nodes(shape: Shape) -> Shape:
    return shape[1], shape[0]


def grid(depth: int, nodes: int, branch: int = 8) -> list[Shape]:
    """Shapes for a drafter whose every depth costs a pass: chains, and trees of doubling sizes.

    A pass expands `branch` nodes by as many children each, so a shallow tree is not large.
    """
    depths = {*range(1, min(depth, 4) + 1), *range(6, depth, 2), depth}
    sizes = {nodes, *(2**i for i in range(2, nodes.bit_length()))}
    most = {d: min(nodes, 1 + branch + (d - 1) * branch**2) for d in depths}
    return [(d, n) for d in sorted(depths) for n in sorted({d + 1, *sizes}) if 0 < d < n <= most[d]]


def prefixes(choices: Choices) -> list[Shape]:
    """Shapes for a static tree: its first nodes, in sizes that grow by about half."""
    sizes = {2**i for i in range(choices.size.bit_length())} | {3 * 2**i for i in range(choices.size.bit_length())}
    return [(choices.deepest(n), n) for n in sorted({*sizes, choices.size}) if n <= choices.size]


class AdaptiveShape:
    """Renewal-reward over a few shapes: the one of most expected tokens over expected seconds, one for the batch.

    Tokens: the part of an accepted path that lies among the first n nodes is what the tree of n nodes would have accepted, so
    every round tells of its own size and of all smaller ones, whatever was chosen. For each size the conditional acceptances by
    depth are kept (a depth counts where it was drafted and reached). A size starts from what the next smaller one refuses,
    less a share, and is never held for worse than that one, so that larger trees get tried. Where trees of another depth are
    ranked anew (EAGLE-2), a shallower tree keeps a few more of its nodes than is counted here: up to a few per cent of tokens.
    Seconds: median times of drafting by depth, of verification by nodes, and of the rest. More is taken to cost no less: a
    size costs no more than any larger one was measured to, and one not measured yet what the nearest smaller one does. The
    first time of each prepares kernels and memory and is not counted. Every PROBE rounds a neighbour of the best shape or the
    plain step takes a turn, so that no slow measurement excludes a shape for good.
    """

    MEMORY = 0.98  # weight of a round among the acceptances, relative to the next one
    PRIOR = 0.7  # acceptance before anything was drafted
    EASE = 0.8  # share of the smaller size's refusals that a size not tried is expected to refuse
    WINDOW = 9  # rounds a median looks back
    PROBE = 24

    def __init__(self, shapes: Iterable[Shape]) -> None:
        self.shapes = sorted({(0, 1), *shapes}, key=by_nodes)
        self.depth, self.nodes = max(depth for depth, _ in self.shapes), self.shapes[-1][1]
        sizes = sorted({nodes for _, nodes in self.shapes} - {1})
        self.tries, self.hits = ({n: [0.0] * min(self.depth, n - 1) for n in sizes} for _ in range(2))
        self.draft: dict[int, deque[float]] = {}
        self.verify: dict[int, deque[float]] = {}
        self.rest: deque[float] = deque(maxlen=self.WINDOW)
        self.rounds = 0
        self.last: Shape | None = None  # what the next outcome is of; None: it was cut at the end of the text
        self.whole: list[bool] = []  # rows that could use all of it

    def shape(self, rows: Sequence[Row | None]) -> Shape:
        depth, nodes = self.best()
        self.rounds += 1
        if self.rounds % self.PROBE == 0:
            probes = self.neighbours((depth, nodes))
            depth, nodes = probes[self.rounds // self.PROBE % len(probes)]
        room = usable(rows)
        self.last = (depth, nodes) if depth <= room else None
        self.whole = [row is not None and row.remaining > depth for row in rows]
        depth = min(depth, room)
        return depth, nodes if depth else 1

    def neighbours(self, shape: Shape) -> list[Shape]:
        """The next deeper, larger, shallower and smaller ones, and the plain step."""
        depth, nodes = shape
        more = [one for one in self.shapes if one != shape and one[0] >= depth and one[1] >= nodes]
        less = [one for one in self.shapes if one != shape and one[0] <= depth and one[1] <= nodes]
        near = [by(ones, key=key) for ones, by in ((more, min), (less, max)) for key in (tuple, by_nodes) if ones]
        return list(dict.fromkeys([*near, (0, 1)]))

    def best(self) -> Shape:
        """The shape of the highest expected rate; the plain step until one has been timed."""
        if not self.verify.get(1):
            return 0, 1
        tokens, rest = self.tokens(), median(self.rest)
        verify = prices(self.verify, tokens)
        draft = prices(self.draft, range(self.depth + 1))
        return max(self.shapes, key=lambda shape: tokens[shape[1]][shape[0]] / (verify[shape[1]] + draft[shape[0]] + rest))

    def tokens(self) -> dict[int, list[float]]:
        """Expected tokens of a round, by nodes and depth."""
        deepest = range(self.depth + 1)
        expected = {1: [1.0 for _ in deepest]}
        for size, reach in self.reach().items():
            sums = list(accumulate(reach, initial=1.0))
            expected[size] = [sums[min(depth, len(reach))] for depth in deepest]
        return expected

    def reach(self) -> dict[int, list[float]]:
        """By size: the probabilities that a path of at least 1, 2, ... drafts is accepted."""
        reached: dict[int, list[float]] = {}
        smaller_rates: list[float] = []
        smaller_reach: list[float] = []
        for size, tries in self.tries.items():
            rates: list[float] = []
            reach: list[float] = []
            for i, (tried, hit) in enumerate(zip(tries, self.hits[size], strict=True)):
                before = rates[-1] if rates else self.PRIOR
                prior = 1 - (1 - smaller_rates[i]) * self.EASE if i < len(smaller_rates) else before
                rates.append((hit + prior) / (tried + 1))
                so_far = rates[-1] * (reach[-1] if reach else 1.0)
                reach.append(max(so_far, smaller_reach[i]) if i < len(smaller_reach) else so_far)
            reached[size] = smaller_reach = reach
            smaller_rates = rates
        return reached

    def observe(self, outcome: Outcome) -> None:
        if self.last is None:
            return
        depth, nodes = self.last
        paths = [path for path, whole in zip(outcome.paths, self.whole, strict=True) if whole]
        for size, tries in self.tries.items():
            if size <= nodes:
                within = [sum(0 < node < size for node in path) for path in paths]
                hits = self.hits[size]
                for i in range(min(depth, len(tries))):
                    tries[i] = tries[i] * self.MEMORY + sum(count >= i for count in within)
                    hits[i] = hits[i] * self.MEMORY + sum(count > i for count in within)
        self.rest.append(outcome.other_seconds)
        for times, key, seconds in ((self.draft, depth, outcome.draft_seconds), (self.verify, nodes, outcome.verify_seconds)):
            if key in times:
                times[key].append(seconds)
            else:
                times[key] = deque(maxlen=self.WINDOW)

    def admit(self, row: int) -> None:
        pass


def prices(times: dict[int, deque[float]], wanted: Iterable[int]) -> dict[int, float]:
    """Seconds at each depth or size, by those measured, of which the smallest is the plain step's."""
    found = {at: median_low(seconds) for at, seconds in times.items() if seconds}
    known: dict[int, float] = {}
    least = math.inf
    for at in sorted(found, reverse=True):  # no more than any larger one
        known[at] = least = min(least, found[at])
    return {at: known[max(one for one in known if one <= at)] for at in wanted}
