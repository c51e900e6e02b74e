"""The tables of a report: the one on the terminal, the full one, and the figures that few ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from forerun.bench.headline import listed
from forerun.bench.show import (
    ABSENT,
    GENERATED,
    Figures,
    at,
    bounds,
    interval,
    mark,
    measures,
    mebibytes,
    number,
    own,
    probability,
    quality,
    share,
    short,
    titled,
    unjudged,
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
    "quality": quality,
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
    "in flight": lambda v: number(v.get("in_flight"), 2),
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
    "between tokens ms p50/p95/p99": "time from one delta to the next, in equal parts for the delta's tokens: a reader sees "
    "them together, after the whole of it",
    "first token ms p50/p95/p99": "p95 needs 20 requests and p99 100; n: how many there were",
    "in flight": "requests in flight on average while the variant had the machine: seconds of all requests over its seconds; a "
    "turn of it starts empty and drains at its end",
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


def remarks(variants: dict[str, Figures]) -> list[str]:
    """What a figure must not be read without: tasks that were refused, texts that nothing judged, times that were not
    interleaved, and commits that differ.
    """
    measured = {name: figures for name, figures in variants.items() if figures.get("error") is None}
    found: list[str] = []
    for name, figures in measured.items():
        for measure, one in (figures.get("quality") or {}).items():
            if refused := at(one, "details.refused.tasks"):
                first = at(one, "details.refused.first")
                found.append(f"{measure} of {name}: {len(refused)} tasks were refused and count as failed; the first: {first}")
    if lossy := unjudged(measured):
        found.append(f"Nothing judged the text of {listed(lossy)}: {GENERATED}")
    if apart := [name for name, figures in measured.items() if figures.get("interleaved") is False]:
        found.append(f"Measured apart from the baseline, so that drift of the machine is in their speed-ups: {listed(apart)}")
    commits = {figures["commit"]: name for name, figures in reversed(measured.items()) if figures.get("commit")}
    if len(commits) > 1:
        told = [f"{short(commit)} ({name})" for commit, name in reversed(commits.items())]
        found.append(f"Measured at different commits of forerun: {listed(told)}")
    return found


def losses(variants: dict[str, Figures]) -> list[str]:
    """For each variant that lost requests, how many, and why."""
    found = []
    for name, figures in variants.items():
        lost = at(figures, "lost.requests") or 0
        asked = lost + (count(figures, "requests") or 0)
        if lost and figures.get("error") is None:
            found.append(f"{name} lost {lost} of {asked} requests: {at(figures, 'lost.why')}")
    return found


def thousandfold(value: float | None) -> float | None:
    return None if value is None else 1e3 * value


def percentiles(figures: Figures, name: str) -> str:
    found = [at(figures, f"{name}.{key}") for key in ("p50", "p95", "p99")]
    few = f" (n={count(figures, 'requests')})" if None in found else ""
    return ABSENT if found[0] is None else " / ".join(number(value, 1) for value in found) + few


def measured_cell(name: str) -> Show:
    """A quality column: the figure with its interval and, where outcomes are paired, the p of McNemar's test.

    A score that is the model's stands beside one of its variants, and under a lossy rule beside none.
    """

    def show(figures: Figures) -> str:
        found = (figures.get("quality") or {}).get(name) or {}
        if found.get("of_target") or found.get("shared_with"):
            return "of the target" if found.get("of_target") else f"as {found['shared_with']}"
        p, refused = found.get("mcnemar_p"), at(found, "details.refused.tasks")
        said = worth(found or None) + (f", p {probability(p)}" if p is not None else "")
        return said + (f", {len(refused)} refused" if refused else "")

    return show


def quality_columns(variants: dict[str, Figures]) -> dict[str, Show]:
    """One column a measure, named with its metric where that says more than the measure."""
    columns: dict[str, Show] = {}
    for name in measures(variants):
        metrics = [
            at(figures, "quality").get(name, {}).get("metric") for figures in variants.values() if figures.get("quality")
        ]
        columns[titled(name, next((one for one in metrics if one), name))] = measured_cell(name)
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
    variants = summary["variants"]
    judging = [name for v in variants.values() if v.get("lossless") is False for name in own(v)]
    chosen = next(iter([*judging, *measures(variants)]), None)
    if judged:
        shown["quality"] = lambda v: worth(own(v).get(chosen or "")).partition(" ")[0]
    prompts = sorted({n for v in variants.values() if (n := at(v, "speedup.prompts"))})
    over = f", n={'-'.join(str(one) for one in (*prompts[:1], *prompts[1:][-1:]))} prompts" if prompts else ""
    caption = f"{found}\n" if found else ""
    caption += f"speed-up over {summary['baseline']} (bootstrap 95 %{over}); more in report.md\n"
    caption += "lossless, or LOSSY with its worst total variation: by exact enumeration"
    if chosen:
        caption += f"\nquality: {chosen}"
    caption += "".join(f"\n{line}" for line in (*losses(variants), *remarks(variants)))
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
