"""requests.csv: one line for each request, its own figures and its speed-up over the baseline's record of the same request."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from forerun.bench.intervals import ratio
from forerun.bench.metrics import Record, Run

FILE = "requests.csv"
COLUMNS = (
    "id", "category", "turn", "repeat", "index", "prompt_tokens", "finish", "first_s", "total_s", "decode_s", "decode_tokens",
    "ms_per_token",
)  # fmt: skip
DRAFTED = ("drafted", "accepted", "acceptance_rate", "block_efficiency")


def write(runs: Mapping[str, Run], baseline: str, out: Path) -> None:
    """An empty field was not measured, or means nothing with random weights."""
    with (out / FILE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ("variant", *COLUMNS, "tokens", "rounds", *DRAFTED, "speedup", "speedup_e2e"))
        writer.writeheader()
        for name, run in runs.items():
            writer.writerows({"variant": name, **line} for line in lines(run, runs[baseline]))


def lines(run: Run, baseline: Run) -> Iterator[dict[str, Any]]:
    partner = {record.key: record for record in baseline.records}
    for record in run.records:
        told = dict.fromkeys(DRAFTED) if run.random_weights else {name: getattr(record, name) for name in DRAFTED}
        yield (
            {name: getattr(record, name) for name in COLUMNS}
            | told
            | {
                "tokens": len(record.tokens),
                "rounds": None if record.rounds is None else len(record.rounds),
                "speedup": faster(record.ms_per_token, partner.get(record.key), decode=True),
                "speedup_e2e": faster(1e3 * record.total_s / len(record.tokens), partner.get(record.key), decode=False),
            }
        )


def faster(ours: float | None, other: Record | None, *, decode: bool) -> float | None:
    """The baseline's milliseconds per token over ours."""
    if other is None:
        return None
    return ratio(other.ms_per_token if decode else 1e3 * other.total_s / len(other.tokens), ours)
