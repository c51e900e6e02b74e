"""The tables of a report: the one on the terminal, the full one, and the figures that few ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from forerun.bench.show import (
    ABSENT,
    Figures,
    at,
    bounds,
    interval,
    mark,
    measures,
    mebibytes,
    number,
    probability,
    quality,
    share,
    worth,
)  # fmt: skip

Show = Callable[[Figures], str]
COLUMNS: dict[str, Show] = {
    "output": lambda v: v.get("label") or ABSENT,
    "rule": lambda v: v.get("rule") or ABSENT,
    "speed-up": lambda v: interval(v.get("speedup")),
    "over its own plain": lambda v: interval(v.get("over_own_plain")),
    "quality": quality,
    "decode tok/s": lambda v: number(at(v, "tokens_per_second.decode"), 1),
    "tokens/s": lambda v: number(at(v, "tokens_per_second.total"), 1),
    "ms/token": lambda v: number(at(v, "ms_per_token.p50"), 2),
    "end to end": lambda v: interval(v.get("speedup_e2e")),
    "acceptance": lambda v: share(v.get("acceptance_rate")),
    "tokens/round": lambda v: number(v.get("block_efficiency"), 2),
    "overhead": lambda v: number(v.get("overhead"), 2),
    "exact": lambda v: share(v.get("exact_share")),
    "memory": lambda v: mebibytes(v.get("peak_memory_bytes")),
}
ON_TERMINAL: dict[str, Show] = {
    "output": mark,
    "tok/s": COLUMNS["tokens/s"],
    "ms/tok": COLUMNS["ms/token"],
    "speed-up": COLUMNS["speed-up"],
    "quality": lambda v: quality(v).partition(";")[0].rpartition(" ")[2],
    "accept": COLUMNS["acceptance"],
    "t/round": COLUMNS["tokens/round"],
    "exact": COLUMNS["exact"],
    "MiB": lambda v: mebibytes(v.get("peak_memory_bytes")).removesuffix(" MiB"),
}
MORE: dict[str, Show] = {
    "requests": lambda v: number(count(v, "requests"), 0),
    "tokens": lambda v: number(count(v, "tokens"), 0),
    "first token ms p50/p95/p99": lambda v: percentiles(v, "ttft_ms"),
    "between tokens ms p50/p95/p99": lambda v: percentiles(v, "inter_token_ms"),
    "request ms p50/p95/p99": lambda v: percentiles(v, "latency_ms"),
    "rounds": lambda v: number(count(v, "rounds"), 0),
    "rollbacks": lambda v: number(count(v, "rollbacks"), 0),
    "draft wastage": lambda v: share(v.get("draft_wastage")),
    "verification wastage": lambda v: share(v.get("verification_wastage")),
    "efficiency gain": lambda v: number(v.get("efficiency_gain"), 2),
    "residual": lambda v: share(v.get("identity_residual")),
    "weights": lambda v: mebibytes(v.get("weight_bytes")),
    "KV cache": lambda v: mebibytes(v.get("kv_bytes")),
    "device memory": lambda v: mebibytes(v.get("peak_device_bytes")),
    "busy": lambda v: number(v.get("utilization_percent"), 0, "%"),
    "CPU": lambda v: number(v.get("cpu_percent"), 0, "%"),
    "energy": lambda v: number(v.get("energy_joules"), 1, " J"),
    "mJ/token": lambda v: number(thousandfold(v.get("energy_per_token")), 1),
}
MEANINGS = {
    "output": "which law the text has, by exact enumeration of the rule over a standard grid of laws, never by its own claim; "
    "TV: total variation between what comes out and what should; a LOSSY speed-up counts only with its quality beside it",
    "rule": "the acceptance rule with its parameters, what rule.kind=auto took",
    "tokens/s": "all tokens over all seconds, prefill included",
    "decode tok/s": "tokens after a request's first delta over the seconds since it, in each request's own stream",
    "ms/token": "median over requests of the decode's milliseconds per token",
    "speed-up": "the baseline's decode seconds per token over the variant's, on paired prompts, with a bootstrap 95 % interval",
    "over its own plain": "the same against plain decoding of the variant's own target with the same sampling and engine: "
    "what speculation gives there, apart from what the target's own changes give",
    "quality": "what the text is worth beside the baseline's",
    "end to end": "the speed-up with prefill included",
    "acceptance": "accepted over drafted tokens, pooled over all rounds",
    "tokens/round": "block efficiency: tokens emitted for each pass of the target, the correction or bonus included",
    "overhead": "seconds of a round in plain steps; speed-up = tokens/round over overhead, up to the residual",
    "exact": "share of greedy requests that equal the baseline's plain decoding token for token",
    "memory": "peak of a process of its own: resident memory, on a GPU what torch allocated there",
    "between tokens ms p50/p95/p99": "time between tokens as a reader sees them",
    "rollbacks": "rounds in which a drafted token was refused",
    "draft wastage": "drafted tokens that were refused, of all drafted",
    "verification wastage": "positions that the target computed and nothing came of, of all it computed",
    "efficiency gain": "the speed-up less 1",
    "residual": "how far tokens/round over overhead is off the clock's speed-up",
    "busy": "of the device while decoding, as it tells",
}


def count(figures: Figures, name: str) -> int | None:
    """A count, where newer and where older runs keep it."""
    found = at(figures, f"counts.{name}")
    value: int | None = figures.get(name) if found is None else found
    return value


def thousandfold(value: float | None) -> float | None:
    return None if value is None else 1e3 * value


def percentiles(figures: Figures, name: str) -> str:
    found = [at(figures, f"{name}.{key}") for key in ("p50", "p95", "p99")]
    return ABSENT if found[0] is None else " / ".join(number(value, 1) for value in found)


def measured_cell(name: str) -> Show:
    """A quality column: the figure with its interval and, where outcomes are paired, the p of McNemar's test."""

    def show(figures: Figures) -> str:
        one = at(figures, "quality") or {}
        found = one.get(name)
        p = (found or {}).get("mcnemar_p")
        return worth(found) + (f", p {probability(p)}" if p is not None else "")

    return show


def quality_columns(variants: dict[str, Figures]) -> dict[str, Show]:
    """One column a measure, named with its metric where that says more than the measure."""
    columns: dict[str, Show] = {}
    for name in measures(variants):
        metrics = [
            at(figures, "quality").get(name, {}).get("metric") for figures in variants.values() if figures.get("quality")
        ]
        metric = next((one for one in metrics if one), name)
        columns[name if metric == name else f"{name} {metric}"] = measured_cell(name)
    return columns


def any_lossy(summary: dict[str, Any]) -> bool:
    """Whether a speed-up among the rows must not stand without its quality."""
    return any(figures.get("lossless") is False for figures in summary["variants"].values())


def columns(summary: dict[str, Any]) -> dict[str, Show]:
    """Those of the full table: `quality` gives way to the measures where there are any."""
    variants = summary["variants"]
    found: dict[str, Show] = {}
    for name, show in COLUMNS.items():
        if name == "quality":
            found |= quality_columns(variants) or ({name: show} if any_lossy(summary) else {})
        elif name != "over its own plain" or any(bounds(v.get("over_own_plain"))[0] is not None for v in variants.values()):
            found[name] = show
    return found


def rows(summary: dict[str, Any]) -> list[list[str]]:
    """The full table, header first."""
    return filled(summary["variants"], columns(summary))


def more(summary: dict[str, Any]) -> list[list[str]]:
    """The other figures, header first, without columns in which nothing was measured."""
    variants = {name: figures for name, figures in summary["variants"].items() if figures.get("error") is None}
    known = {name: show for name, show in MORE.items() if any(show(figures) != ABSENT for figures in variants.values())}
    return filled(variants, known)


def filled(variants: dict[str, Figures], shown: dict[str, Show]) -> list[list[str]]:
    lines = [["variant", *shown]]
    for name, figures in variants.items():
        error = figures.get("error")
        failed = [f"failed: {error}"] + [""] * (len(shown) - 1)
        lines.append([name, *(failed if error is not None else [show(figures) for show in shown.values()])])
    return lines


def table(summary: dict[str, Any], title: str, found: str) -> Table:
    """The table printed at the end of a run, 80 columns wide; `found` is what it comes to, in a sentence."""
    judged = any_lossy(summary) or bool(measures(summary["variants"]))
    hidden = ("ms/tok", "MiB") if judged else ("quality",)
    shown = {name: show for name, show in ON_TERMINAL.items() if name not in hidden}
    caption = f"{found}\n" if found else ""
    caption += f"speed-up over {summary['baseline']} (bootstrap 95 %); more in report.md\n"
    caption += "lossless, or LOSSY with its worst total variation: by exact enumeration"
    if first := next(iter(measures(summary["variants"])), None):
        caption += f"\nquality: {first}"
    made = Table(title=escape(title), caption=escape(caption), box=box.SIMPLE_HEAD, padding=0)
    made.add_column("variant", overflow="fold", min_width=9)
    for name in shown:
        made.add_column(name, justify="left" if name == "output" else "right", no_wrap=True)
    for name, figures in summary["variants"].items():
        if figures.get("error") is not None:
            made.add_row(escape(name), "failed", *[""] * (len(shown) - 1), style="red")
        else:
            made.add_row(escape(name), *[escape(show(figures)) for show in shown.values()])
    return made


def by_category(summary: dict[str, Any]) -> tuple[list[list[str]], list[list[float | None]]]:
    """Speed-up of each variant on each category, header first; beside it how each cell is tinted.

    A tint is the speed-up where its interval leaves 1 out, else None.
    """
    tried = {name: v["categories"] for name, v in summary["variants"].items() if v.get("categories")}
    names = list(dict.fromkeys(name for found in tried.values() for name in found))
    lines, tints = [["variant", *names]], []
    for name, found in tried.items():
        speedups = [(found.get(category) or {}).get("speedup") for category in names]
        lines.append([name, *[interval(one) for one in speedups]])
        tints.append([clear(one) for one in speedups])
    return (lines, tints) if len(names) > 1 else ([["variant"]], [])


def clear(speedup: dict[str, Any] | None) -> float | None:
    """A speed-up of which the interval leaves 1 out."""
    value, low, high = bounds(speedup)
    return value if low is not None and high is not None and (low > 1 or high < 1) else None
