"""What a measure of quality finds: a figure with its interval, and what each question came to."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forerun.types import Backend, Scorer, UserError
from forerun.workload.sets import SETS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def write_items(folder: Path, name: str, items: Iterable[Mapping[str, Any]]) -> Path:
    """Write `folder/name.jsonl`, a line for each question; the file appears when it is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    path, part = folder / f"{name}.jsonl", folder / f"{name}.jsonl.part"
    with part.open("w", encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps(item, ensure_ascii=False) + "\n")
    part.replace(path)
    return path


def scorer_of(backend: Backend, name: str) -> Scorer:
    """The backend's scorer; UserError where it has none."""
    if backend.scorer is None:
        raise UserError(f"{name} is measured by log-likelihood, which this backend does not tell; take backend=forerun")
    return backend.scorer


def limit_of(backend: Backend) -> int | None:
    """Most tokens that the backend's model reads at once; None where nobody says."""
    return None if backend.scorer is None else backend.scorer.limit


def tokenizer_of(backend: Backend, name: str) -> PreTrainedTokenizerBase:
    """The backend's tokenizer; UserError where it has none."""
    if backend.tokenizer is None:
        raise UserError(f"{name} is measured on text, and the model has no tokenizer; put one beside its weights")
    return backend.tokenizer


def described(kind: str, path: str | None) -> dict[str, Any]:
    """What is measured on: the data, where they come from, and under which licence."""
    data = SETS[kind]
    origin = path or ("shipped" if kind == "demo" else f"Hub: {data.hub}")
    return {"data": data.title, "origin": origin, "licence": data.licence}
