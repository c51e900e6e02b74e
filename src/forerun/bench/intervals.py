"""Ratios of paired totals with bootstrap intervals, and percentiles; None where nothing was measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from forerun.bench.metrics import Record

RESAMPLES = 2000
FEWEST = 8
"""Prompts below which a bootstrap over them says little: no interval."""
Pair = tuple["Record", "Record"]


def paired(ours: Iterable[Record], theirs: Iterable[Record]) -> dict[str, list[Pair]]:
    """By prompt: our record beside the baseline's of the same request, completion and repeat.

    The turns of a conversation are one prompt: later ones depend on the answers to the earlier.
    """
    partner = {record.key: record for record in theirs}
    pairs: dict[str, list[Pair]] = {}
    for record in ours:
        if (other := partner.get(record.key)) is not None:
            pairs.setdefault(record.conversation, []).append((record, other))
    return pairs


def ratio_interval(
    pairs: dict[str, list[Pair]], cost: Callable[[Record], tuple[float, int]], seed: int
) -> dict[str, float | None]:
    """The baseline's seconds per token over ours, with a bootstrap 95 % interval over prompts (percentile method).

    `cost` gives a record's seconds and tokens. Where both sides emit the same tokens, as greedy ones do, this is the ratio
    of the paired totals of seconds; where they do not, neither gains by saying less. Few prompts give no interval.
    """
    if not pairs:
        return {"value": None, "low": None, "high": None, "prompts": None}
    totals = np.array([[*summed(ours for ours, _ in of), *summed(theirs for _, theirs in of)] for of in costs(pairs, cost)])
    times = np.random.default_rng(seed).multinomial(len(totals), np.full(len(totals), 1 / len(totals)), size=RESAMPLES)
    drawn = speedups(times @ totals)
    drawn = drawn[np.isfinite(drawn)]
    low, high = np.percentile(drawn, [2.5, 97.5]) if len(totals) >= FEWEST and len(drawn) else (None, None)
    [value] = speedups(totals.sum(0, keepdims=True))
    return {"value": finite(value), "low": finite(low), "high": finite(high), "prompts": len(pairs)}


def costs(
    pairs: dict[str, list[Pair]], cost: Callable[[Record], tuple[float, int]]
) -> list[list[tuple[tuple[float, int], tuple[float, int]]]]:
    return [[(cost(ours), cost(theirs)) for ours, theirs in of_prompt] for of_prompt in pairs.values()]


def summed(many: Iterable[tuple[float, int]]) -> tuple[float, int]:
    seconds, tokens = zip(*many, strict=True)
    return sum(seconds), sum(tokens)


def speedups(totals: np.ndarray) -> np.ndarray:
    """[n] from [n, 4]: our seconds and tokens, their seconds and tokens; no number where one of them is 0."""
    our_s, our_tokens, their_s, their_tokens = totals.T
    with np.errstate(divide="ignore", invalid="ignore"):
        found: np.ndarray = (their_s / their_tokens) / (our_s / our_tokens)
    return np.where(their_s > 0, found, np.nan)


def finite(value: float | None) -> float | None:
    return None if value is None or not np.isfinite(value) else float(value)


def ratio(over: float | None, under: float | None) -> float | None:
    return None if over is None or not under else over / under


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear interpolation between order statistics, as numpy's default."""
    return float(np.percentile(np.asarray(values), percent)) if len(values) else None
