"""The figures for people: a table on the terminal, report.md, report.html that needs nothing else, and summary.csv."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from forerun.bench import blocks, folder, page, sections
from forerun.bench.blocks import Section
from forerun.bench.headline import findings
from forerun.bench.material import Material, gather
from forerun.bench.metrics import Record
from forerun.bench.show import interval, number, quality, share
from forerun.bench.sweeps import differing
from forerun.bench.table import MEANINGS, rows
from forerun.bench.table import table as make_table
from forerun.config import Experiment

__all__ = ["MEANINGS", "headline", "interval", "machine", "number", "quality", "rows", "share", "table", "write"]
FOOTER = (
    "A dash stands for what was not measured. Every figure: summary.json and summary.csv; raw: records.jsonl of each variant."
)


def headline(summary: dict[str, Any]) -> str:
    return "forerun bench" + {"complete": "", "interrupted": " (interrupted: what was measured so far)"}.get(
        summary.get("status", "complete"), " (failed: what was measured until then)"
    )


def table(summary: dict[str, Any], experiment: Experiment | None = None) -> Table:
    """The table printed at the end of a run: 80 columns hold it. The experiment tells which variants promise the same text."""
    configs, floor = (experiment.expand(), experiment.floor) if experiment else ({}, None)
    return make_table(summary, headline(summary), findings(summary, configs, floor)[0].text)


def machine(out: Path) -> list[str]:
    """What the run in a folder was measured on, in a few lines; nothing where it ended before that was written."""
    return folder.machine(folder.environment(out))


def setting(experiment: Experiment, summary: dict[str, Any], prompts: Sequence[Record]) -> list[str]:
    """What was asked for, and of what there was; `prompts` are records of one variant."""
    sampling, engine = experiment.sampling, experiment.engine
    how = "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}"
    size = f"{how}, at most {sampling.max_new} new tokens, {engine.rows} rows"
    turns = "variants one after another in processes of their own" if experiment.fresh else "variants interleaved"
    floor = [f"quality floor {experiment.floor}"] if experiment.floor else []
    return [
        f"model {experiment.model.path}, dtype {experiment.model.dtype}",
        served(experiment, summary.get("workload") or {}, prompts),
        *[f"workload: {remark}" for remark in (summary.get("workload") or {}).get("remarks") or ()],
        f"{experiment.repeats} repeats, {size}; {turns}, warm-up apart",
        f"baseline {experiment.baseline_name()}",
        *floor,
    ]


def served(experiment: Experiment, source: dict[str, Any], records: Sequence[Record]) -> str:
    """The workload: where it came from, how much of it was taken and how it was clipped, and how its requests came."""
    config = experiment.workload
    lengths = {one.conversation: one.prompt_tokens for one in records if one.turn == 1}
    asked = config.prompts if config.kind == "synthetic" else config.limit
    few = f" of {asked} asked" if asked is not None and len(lengths) < asked else ""
    found = f" of {source['rows']:,} rows found" if source.get("rows") is not None and not few else ""
    clipped = sum(length == config.max_prompt_tokens for length in lengths.values())
    concurrency = f"{config.concurrency}" if config.concurrency else f"{experiment.engine.rows} (engine.rows)"
    told = [
        f"workload {config.kind}" + (f": {source['name']}" if source.get("name") else ""),
        str(source.get("origin") or config.path or ""),
        f"split {source['split']}" if source.get("split") else "",
        f"{len(lengths)}{few}{found} used",
        f"limit {config.limit}" if config.limit is not None else "",
        f"categories {', '.join(config.categories)}" if config.categories else "",
        f"clipped to {config.max_prompt_tokens} tokens ({clipped} of them so long)" if config.max_prompt_tokens else "",
        f"licence {source['licence']}" if source.get("licence") else "",
        f"open loop, {config.rate:g} requests a second (Poisson)" if config.rate else f"closed loop, {concurrency} in flight",
    ]
    return ", ".join(one for one in told if one)


def write(summary: dict[str, Any], experiment: Experiment, out: Path) -> None:
    """summary.json, summary.csv, report.md and report.html, from the summary and the records in the folder."""
    put(out / "summary.json", json.dumps(summary, indent=2, allow_nan=False) + "\n")
    reports(summary, experiment, out, out)


def reports(summary: dict[str, Any], experiment: Experiment, run: Path, out: Path) -> None:
    """The reports of the run in the folder `run`, into the folder `out`."""
    configs = experiment.expand()
    records = folder.records(run, list(summary["variants"]))
    found = gather(summary, configs, records, experiment.floor, tuple(experiment.axes))
    notes = [*machine(run), *setting(experiment, summary, records.get(summary["baseline"], []))]
    made = [sections.headline(found), *sections.body(found), *sections.appendix(found, notes)]
    publish(headline(summary), experiment.model.path, made, found, out)


def publish(title: str, subtitle: str, made: Sequence[Section], found: Material, out: Path) -> None:
    """report.md, report.html and summary.csv."""
    put(out / "report.md", blocks.markdown(title, made) + f"\n{FOOTER}\n")
    put(out / "report.html", page.render(title, subtitle, made, FOOTER))
    put(out / "summary.csv", comma_separated(found))


def put(path: Path, text: str) -> None:
    """A file that is whole or not there: the last one stays until the next is written."""
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(text, encoding="utf-8", newline="")
    beside.replace(path)


def comma_separated(found: Material) -> str:
    """One line a variant, flat names such as speedup.value, null empty; settings that vary stand in `config.` columns."""
    settings = differing(found.configs)
    lines = []
    for name, figures in found.variants.items():
        varied = {f"config.{key}": value for key, value in settings.get(name, {}).items()}
        lines.append({"variant": name, "baseline": found.baselines.get(name)} | flat(varied) | flat(figures))
    out = io.StringIO()
    writer = csv.DictWriter(out, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return out.getvalue()


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Nested figures under dotted names, lists by index; a null stays one, and true is `true`."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if inner is None:
        return {path: str(value).lower() if isinstance(value, bool) else value}
    found: dict[str, Any] = {}
    for key, one in inner:
        found |= flat(one, f"{path}.{key}" if path else str(key))
    return found
