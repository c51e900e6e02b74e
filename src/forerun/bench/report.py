"""The figures for people: a table on the terminal, report.md, and report.html that needs nothing else."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from forerun.bench import page
from forerun.config import Experiment

Figures = dict[str, Any]
ABSENT = "-"


def number(value: float | None, digits: int, unit: str = "") -> str:
    return ABSENT if value is None else f"{value:,.{digits}f}{unit}"


def share(value: float | None) -> str:
    return ABSENT if value is None else "100%" if value == 1 else f"{100 * value:.1f}%"


def interval(figures: dict[str, float | None]) -> str:
    if figures["value"] is None:
        return ABSENT
    low, high = figures["low"], figures["high"]
    if low is None or high is None or low == high:  # one prompt, or the baseline itself
        return f"{figures['value']:.2f}x"
    return f"{figures['value']:.2f}x ({low:.2f}-{high:.2f})"


def mark(figures: Figures) -> str:
    """A rule's label in one word; of a lossy one with the total variation that its label begins with."""
    if figures["lossless"] is None:
        return "unchecked"
    if figures["lossless"] or figures["meaningless"]:
        return "lossless" if figures["lossless"] else "meaningless"
    tv = figures["rule_evidence"]["tv"]
    return "LOSSY" if tv is None else "LOSSY <.01" if tv < 0.005 else f"LOSSY {tv:.2f}".replace(" 0.", " .")


def quality(figures: Figures) -> str:
    """What the text is worth beside the baseline's."""
    return ABSENT if figures["quality"] is None else str(figures["quality"])


def mebibytes(value: float | None) -> str:
    return ABSENT if value is None else f"{value / 2**20:,.0f} MiB"


COLUMNS: dict[str, Callable[[Figures], str]] = {
    "output": lambda v: v["label"] or ABSENT,
    "rule": lambda v: v["rule"] or ABSENT,
    "tokens/s": lambda v: number(v["tokens_per_second"]["total"], 1),
    "decode tok/s": lambda v: number(v["tokens_per_second"]["decode"], 1),
    "ms/token": lambda v: number(v["ms_per_token"]["p50"], 2),
    "speed-up": lambda v: interval(v["speedup"]),
    "quality": quality,
    "end to end": lambda v: interval(v["speedup_e2e"]),
    "acceptance": lambda v: share(v["acceptance_rate"]),
    "tokens/round": lambda v: number(v["block_efficiency"], 2),
    "overhead": lambda v: number(v["overhead"], 2),
    "exact": lambda v: share(v["exact_share"]),
    "memory": lambda v: mebibytes(v["peak_memory_bytes"]),
}
ON_TERMINAL: dict[str, Callable[[Figures], str]] = {
    "output": mark,
    "tok/s": COLUMNS["tokens/s"],
    "ms/tok": COLUMNS["ms/token"],
    "speed-up": COLUMNS["speed-up"],
    "quality": quality,
    "accept": COLUMNS["acceptance"],
    "t/round": COLUMNS["tokens/round"],
    "exact": COLUMNS["exact"],
    "MiB": lambda v: mebibytes(v["peak_memory_bytes"]).removesuffix(" MiB"),
}
MEANINGS = {
    "output": "which law the text has, by exact enumeration of the rule over a standard grid of laws, never by its own claim; "
    "TV: total variation between what comes out and what should; a LOSSY speed-up counts only with its quality beside it",
    "rule": "the acceptance rule with its parameters, what rule.kind=auto took",
    "tokens/s": "all tokens over all seconds, prefill included",
    "decode tok/s": "tokens after a request's first delta over the seconds since it, in each request's own stream",
    "ms/token": "median over requests of the decode's milliseconds per token",
    "speed-up": "the baseline's decode seconds per token over the variant's, on paired prompts, with a bootstrap 95 % interval",
    "quality": "what the text is worth beside the baseline's",
    "end to end": "the speed-up with prefill included",
    "acceptance": "accepted over drafted tokens, pooled over all rounds",
    "tokens/round": "block efficiency: tokens emitted for each pass of the target, the correction or bonus included",
    "overhead": "seconds of a round in plain steps; speed-up = tokens/round over overhead, up to the residual",
    "exact": "share of greedy requests that equal the baseline's plain decoding token for token",
    "memory": "peak of a process of its own: resident memory, on a GPU what torch allocated there",
}


def any_lossy(summary: dict[str, Any]) -> bool:
    """Whether a speed-up among the rows must not stand without its quality."""
    return any(figures["lossless"] is False for figures in summary["variants"].values())


def table(summary: dict[str, Any]) -> Table:
    """The table printed at the end of a run: 80 columns hold it."""
    hidden = ("ms/tok", "MiB") if any_lossy(summary) else ("quality",)
    columns = {name: show for name, show in ON_TERMINAL.items() if name not in hidden}
    caption = f"speed-up over {summary['baseline']} (bootstrap 95 %); more in report.md\n"
    caption += "lossless, or LOSSY with its worst total variation: by exact enumeration"
    found = Table(title=headline(summary), caption=caption, box=box.SIMPLE_HEAD, padding=0)
    found.add_column("variant", overflow="fold", min_width=9)
    for name in columns:
        found.add_column(name, justify="left" if name == "output" else "right", no_wrap=True)
    for name, figures in summary["variants"].items():
        if figures["error"] is not None:
            found.add_row(escape(name), "failed", *[""] * (len(columns) - 1), style="red")
        else:
            found.add_row(escape(name), *[show(figures) for show in columns.values()])
    return found


def headline(summary: dict[str, Any]) -> str:
    return "forerun bench" + {"complete": "", "interrupted": " (interrupted: what was measured so far)"}.get(
        summary["status"], " (failed: what was measured until then)"
    )


def rows(summary: dict[str, Any]) -> list[list[str]]:
    """The full table, header first."""
    columns = {name: show for name, show in COLUMNS.items() if name != "quality" or any_lossy(summary)}
    lines = [["variant", *columns]]
    for name, figures in summary["variants"].items():
        failed = [f"failed: {figures['error']}"] + [""] * (len(columns) - 1)
        lines.append([name, *(failed if figures["error"] is not None else [show(figures) for show in columns.values()])])
    return lines


def machine(out: Path) -> list[str]:
    """What the run was measured on, in a few lines; nothing where it ended before that was written."""
    path = out / "environment.json"
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    devices = "; ".join(gpu["name"] for gpu in found["gpus"]) or found["cpu"] or found["platform"]
    busy = ", ".join(f"{load:.1f}" for load in found["load_average"] or [])
    return [
        f"{devices}, {found['cpu_allowed']} CPU cores, {found['threads']} threads; load average at the start {busy or ABSENT}",
        f"forerun {found['forerun']} ({found['commit'] or 'no checkout'}), Python {found['python']}, {packages}",
        f"started {found['started']}",
    ]


def markdown(summary: dict[str, Any], experiment: Experiment, out: Path) -> str:
    header, *body = [[cell.replace("|", r"\|") for cell in line] for line in rows(summary)]
    lines = [f"# {headline(summary)}", "", *[f"- {line}" for line in (*machine(out), *setting(experiment))], ""]
    lines += ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    lines += ["| " + " | ".join(line) + " |" for line in body]
    lines += ["", *[f"- **{name}**: {meaning}" for name, meaning in MEANINGS.items() if name in header]]
    lines += ["", f"`{ABSENT}` was not measured. Every figure: `summary.json`; raw: `<variant>/records.jsonl`.", ""]
    return "\n".join(lines)


def setting(experiment: Experiment) -> list[str]:
    sampling, engine = experiment.sampling, experiment.engine
    how = "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"
    size = f"{how}, at most {sampling.max_new} new tokens, {engine.rows} rows"
    return [
        f"workload {experiment.workload.kind}, {experiment.repeats} repeats, {size}; variants interleaved, warm-up apart",
        f"baseline {experiment.baseline_name()}",
    ]


def write(summary: dict[str, Any], experiment: Experiment, out: Path) -> None:
    """summary.json, report.md and report.html."""
    (out / "summary.json").write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (out / "report.md").write_text(markdown(summary, experiment, out), encoding="utf-8")
    notes = [html.escape(line) for line in (*machine(out), *setting(experiment))]
    table, measured = rows(summary), summary["variants"].items()
    meanings = {name: meaning for name, meaning in MEANINGS.items() if name in table[0]}
    bars = {name: page.Bar(**figures["speedup"], warning=warning(figures)) for name, figures in measured}
    (out / "report.html").write_text(page.render(headline(summary), notes, table, meanings, bars), encoding="utf-8")


def warning(figures: Figures) -> str:
    """What a bar of the chart must not be seen without."""
    if figures["meaningless"]:
        return "meaningless text"
    return f"LOSSY, quality {quality(figures)}" if figures["lossless"] is False else ""
