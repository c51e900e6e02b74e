"""Intervals and paired tests for measures of quality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from forerun.evaluate.quality import Quality

DRAWS = 2000
CONFIDENCE = 0.95


def wilson(passed: int, count: int) -> tuple[float, float] | tuple[None, None]:
    """95 % interval of a proportion (Wilson 1927); nothing where nothing was asked."""
    if not count:
        return None, None
    interval = stats.binomtest(passed, count).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def passes(name: str, metric: str, items: Sequence[bool], details: dict[str, Any]) -> Quality:
    """The share of the questions that were passed, with Wilson's interval."""
    low, high = wilson(sum(items), len(items))
    value = sum(items) / len(items)
    return Quality(name, metric, value, low, high, higher_is_better=True, count=len(items), items=tuple(items), details=details)


def mcnemar(ours: Sequence[bool], theirs: Sequence[bool]) -> float:
    """Exact two-sided p that two variants pass the same questions equally often (McNemar 1947, binomial form).

    Only questions that one passed and the other failed count; 1.0 where there are none.
    """
    won = sum(a and not b for a, b in zip(ours, theirs, strict=True))
    lost = sum(b and not a for a, b in zip(ours, theirs, strict=True))
    return float(stats.binomtest(won, won + lost).pvalue) if won + lost else 1.0


def compare(ours: Quality, baseline: Quality) -> float | None:
    """McNemar's p of a measure against the baseline's; None where the two are not answers to the same questions."""
    same = (ours.name, ours.metric, ours.count) == (baseline.name, baseline.metric, baseline.count)
    if not same or ours.items is None or baseline.items is None or len(ours.items) != len(baseline.items):
        return None
    return mcnemar(ours.items, baseline.items)


def ratio(parts: Sequence[float], wholes: Sequence[float], seed: int = 0) -> tuple[float, float] | tuple[None, None]:
    """95 % percentile bootstrap of sum(parts) / sum(wholes) over pairs drawn together; nothing where there is one pair."""
    if len(parts) < 2:
        return None, None
    draw = np.random.default_rng(seed)
    tops, bottoms = np.asarray(parts, float), np.asarray(wholes, float)
    ratios: list[float] = []
    while len(ratios) < DRAWS:  # some at a time, for there may be many pairs
        picked = draw.integers(len(tops), size=(min(DRAWS - len(ratios), 1 + 2**20 // len(tops)), len(tops)))
        ratios.extend(tops[picked].sum(1) / bottoms[picked].sum(1))
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def bits(nats: float) -> float:
    return nats / math.log(2)
