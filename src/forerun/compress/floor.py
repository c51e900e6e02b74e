"""The largest fraction that keeps a measured quality above a floor: bisection that asks few questions where few decide."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from forerun.types import UserError

FIRST = 100
"""Questions of a first look; each further look at an undecided fraction doubles them."""


class Measured(Protocol):
    """One figure of quality with its interval; the types of forerun.evaluate fit."""

    @property
    def value(self) -> float: ...

    @property
    def low(self) -> float | None: ...

    @property
    def high(self) -> float | None: ...

    @property
    def count(self) -> int: ...


@dataclass(frozen=True)
class Floor:
    """What must hold of a figure: at least the limit, or at most."""

    name: str  # of the measure, such as race-high or perplexity
    at_least: bool
    limit: float

    def holds(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit

    def __str__(self) -> str:
        return f"{self.name}{'>=' if self.at_least else '<='}{self.limit:g}"


@dataclass(frozen=True)
class Probe:
    """What was found at one fraction."""

    fraction: float
    value: float
    low: float | None
    high: float | None
    count: int  # questions asked, or tokens that count
    kept: bool  # whether the floor holds
    decided: bool  # by the interval; otherwise by the value alone, with all questions asked


def parse(text: str) -> Floor:
    """`race-high>=0.5` or `perplexity<=12`."""
    found = re.fullmatch(r"\s*([\w@.-]+)\s*(>=|<=)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?)\s*", text)
    if found is None:
        raise UserError(f"--floor {text!r}: say a measure and a limit, such as race-high>=0.5 or perplexity<=12")
    return Floor(found[1], found[2] == ">=", float(found[3]))


Measure = Callable[[float, int | None], Measured]
"""Measures one fraction on the first so many questions; None: on all."""


def look(measure: Measure, floor: Floor, fraction: float, first: int, most: int | None) -> Probe:
    """Ask more and more questions until the 95 % interval lies on one side of the limit, or there are no more questions.

    Each look has an interval of its own, which is not widened for looking more than once.
    """
    asked: int | None = first
    while True:
        asked = None if asked is None or (most is not None and asked >= most) else asked
        found = measure(fraction, asked if asked is not None else most)
        if found.low is not None and found.high is not None:
            sides = {floor.holds(found.low), floor.holds(found.high)}
            if len(sides) == 1:
                return probe(fraction, found, sides.pop(), decided=True)
        # One less than asked: a text's first token is asked for but cannot count.
        if asked is None or found.count < asked - 1:
            return probe(fraction, found, floor.holds(found.value), decided=False)
        asked = None if found.low is None else 2 * asked  # without an interval only all questions can decide


def probe(fraction: float, found: Measured, kept: bool, decided: bool) -> Probe:
    return Probe(fraction, found.value, found.low, found.high, found.count, kept, decided)


def search(
    measure: Measure,
    floor: Floor,
    low: float = 0.0,
    high: float = 0.9,
    tolerance: float = 0.01,
    *,
    first: int = FIRST,
    most: int | None = None,
    tell: Callable[[Probe], None] = lambda _: None,
) -> tuple[float | None, list[Probe]]:
    """The largest fraction from `low` to `high` at which the floor holds, to `tolerance`, and all that was looked at.

    `most` is the user's own limit of questions. Quality is taken to fall as the fraction rises: of a quality that recovers,
    bisection finds one crossing of several. None where the floor does not even hold at `low`.
    """
    probes: list[Probe] = []

    def holds(fraction: float) -> bool:
        probes.append(look(measure, floor, fraction, first, most))
        tell(probes[-1])
        return probes[-1].kept

    if not holds(low):
        return None, probes
    if holds(high):
        return high, probes
    while high - low > tolerance:
        middle = round((low + high) / 2, 6)
        if holds(middle):
            low = middle
        else:
            high = middle
    return low, probes
