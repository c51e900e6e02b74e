"""What a measure of quality finds: a figure with its interval, and what each question came to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Tell = Callable[[str, int, int], None]
"""Progress: what is being done, how much of it is done, of how much."""


@dataclass(frozen=True)
class Quality:
    """One figure. `items`: whether each question was passed, in the same order for every variant, for paired tests."""

    name: str  # of the measure: perplexity, race-high, humaneval, lm-eval's task
    metric: str  # perplexity, bits_per_byte, acc, acc_norm, pass@1, exact_match
    value: float
    low: float | None  # 95 % interval; None: none can be told
    high: float | None
    higher_is_better: bool
    count: int  # questions, or tokens that count
    items: tuple[bool, ...] | None = None
    details: dict[str, Any] = field(default_factory=dict)  # what else should be known: data set, shots, licence, tokens
