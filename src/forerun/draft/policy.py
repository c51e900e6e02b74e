"""How many tokens to draft next. Policies look at the past only, so every lossless rule stays lossless under them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median, median_low
from typing import Protocol

from forerun.draft.protocol import Outcome, Row


class LengthPolicy(Protocol):
    """`limit` is the most that `depths` ever returns for a row."""

    limit: int

    def depths(self, rows: Sequence[Row | None]) -> list[int]: ...
    def observe(self, outcome: Outcome) -> None: ...
    def admit(self, row: int) -> None: ...


def build_policy(kind: str, k: int, rows: int) -> LengthPolicy:
    if kind == "heuristic":
        return Heuristic(k, rows)
    return Adaptive(k) if kind == "adaptive" else Constant(k)


def useful(rows: Sequence[Row | None], depths: Sequence[int]) -> list[int]:
    """Cut to what a row can still use: a round emits one token more than it accepts. Idle rows draft nothing."""
    return [min(depth, row.remaining - 1) if row else 0 for row, depth in zip(rows, depths, strict=True)]


class Constant:
    """Always k."""

    def __init__(self, k: int) -> None:
        self.limit = k

    def depths(self, rows: Sequence[Row | None]) -> list[int]:
        return useful(rows, [self.limit] * len(rows))

    def observe(self, outcome: Outcome) -> None:
        pass

    def admit(self, row: int) -> None:
        pass


class Heuristic:
    """Each row by itself: two more after a fully accepted round, one less after any other (as transformers' schedule)."""

    def __init__(self, k: int, rows: int) -> None:
        self.first = k
        self.limit = max(4 * k, 1)
        self.current = [k] * rows

    def depths(self, rows: Sequence[Row | None]) -> list[int]:
        return useful(rows, self.current)

    def observe(self, outcome: Outcome) -> None:
        for row, (drafted, accepted) in enumerate(zip(outcome.drafted, outcome.accepted, strict=True)):
            if drafted:
                self.current[row] += 2 if accepted == drafted else -1
                self.current[row] = min(max(self.current[row], 1), self.limit)

    def admit(self, row: int) -> None:
        self.current[row] = self.first


class Adaptive:
    """Renewal-reward: draft as deep as maximizes expected tokens over expected seconds of a round, one depth for the batch.

    Expected tokens of depth d: 1 + sum over i <= d of the product of the conditional acceptances up to i (a position counts
    only where it was drafted and reached, so that a fully accepted draft is not taken for a refusal one deeper).
    Seconds: median times of a drafted token, of a verification by its size, and of the rest. The first verification of a size
    prepares kernels and memory and is not counted. More nodes are taken to cost no less: a size costs no more than any
    larger one was measured to, and a size not measured yet what the nearest smaller one does, so it gets tried once it
    promises anything. Every PROBE rounds a neighbour of the best depth or the plain step is timed again, so that no slow
    measurement excludes a depth for good.
    """

    MEMORY = 0.98  # weight of a round among the acceptances, relative to the next one
    PRIOR = 0.7  # acceptance before anything was drafted
    WINDOW = 9  # rounds a median looks back
    PROBE = 24

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.tries, self.hits = [0.0] * limit, [0.0] * limit
        self.draft: deque[float] = deque(maxlen=self.WINDOW)
        self.verify: dict[int, deque[float]] = {}
        self.rest: deque[float] = deque(maxlen=self.WINDOW)
        self.rounds = 0

    def depths(self, rows: Sequence[Row | None]) -> list[int]:
        depth = self.best()
        self.rounds += 1
        if self.rounds % self.PROBE == 0:
            probes = [depth + 1, depth - 1, 0] if depth else [1]
            depth = min(probes[self.rounds // self.PROBE % len(probes)], self.limit)
        return useful(rows, [depth] * len(rows))

    def best(self) -> int:
        """The depth of the highest expected rate; 0 until a plain step has been timed."""
        if not self.verify.get(1):
            return 0
        measured = {size: median_low(times) for size, times in self.verify.items() if times}
        draft, rest = median(self.draft) if self.draft else 0.0, median(self.rest)
        rates = []
        for depth in range(self.limit + 1):
            nearest = max(size for size in measured if size <= depth + 1)
            verify = min(seconds for size, seconds in measured.items() if size >= nearest)
            rates.append(self.tokens(depth) / (verify + depth * draft + rest))
        return max(range(self.limit + 1), key=rates.__getitem__)

    def tokens(self, depth: int) -> float:
        """Expected tokens of a round of this depth. A position starts from what the one before it accepts (the first from
        PRIOR), as one imaginary try: else a depth never tried would look as bad as any prior, and never be tried."""
        expected, reach, rate = 1.0, 1.0, self.PRIOR
        for i in range(depth):
            rate = (self.hits[i] + rate) / (self.tries[i] + 1)
            reach *= rate
            expected += reach
        return expected

    def observe(self, outcome: Outcome) -> None:
        pairs = list(zip(outcome.drafted, outcome.accepted, strict=True))
        for i in range(min(max(outcome.drafted), self.limit)):
            self.tries[i] = self.tries[i] * self.MEMORY + sum(d > i and a >= i for d, a in pairs)
            self.hits[i] = self.hits[i] * self.MEMORY + sum(d > i and a > i for d, a in pairs)
        if outcome.nodes in self.verify:
            self.verify[outcome.nodes].append(outcome.verify_seconds)
        else:
            self.verify[outcome.nodes] = deque(maxlen=self.WINDOW)
        self.rest.append(outcome.other_seconds)
        if outcome.nodes > 1:
            self.draft.append(outcome.draft_seconds / (outcome.nodes - 1))

    def admit(self, row: int) -> None:
        pass
