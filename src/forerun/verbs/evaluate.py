"""`forerun eval`: from a config and the names of tasks to a table of quality, and a folder with every answer."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from forerun.bench import hardware, methods
from forerun.bench.assess import assess
from forerun.bench.folder import folders
from forerun.bench.lanes import Lane, Maker, guarded
from forerun.bench.measure import terminable
from forerun.bench.quality import Finding, Scored, beside
from forerun.bench.show import probability, worth
from forerun.config import ChoiceConfig, CodeConfig, Experiment, GSM8KConfig, PerplexityConfig, load, parse, save
from forerun.evaluate.measure import check
from forerun.types import UserError
from forerun.verbs.common import hush_libraries

OWN = tuple(
    kind
    for measure in (PerplexityConfig, ChoiceConfig, CodeConfig, GSM8KConfig)
    for kind in get_args(measure.model_fields["kind"].annotation)
    if kind != "choice"
)
"""Measures that need no more than their name."""
SPECIAL = ("tasks", "limit", "shots", "path")
"""Words of the form a=b that say what to measure; all others override the configuration."""
SUMMARY = "quality.json"


def run(
    words: Sequence[str],
    out: str | None = None,
    *,
    data: str | None = None,
    overwrite: bool = False,
    as_json: bool = False,
    quiet: bool = False,
    maker: Maker | None = None,
) -> int:
    """Returns the exit status: 0, 1 where a variant or a measure failed, 130 after an interrupt.

    `data` is a folder of data sets. `maker` stands in for models in tests.
    """
    experiment = plan(words, data)
    folder = Path(out or time.strftime("runs/eval-%Y%m%d-%H%M%S"))
    hush_libraries()
    for one in experiment.quality:
        check(one)
    clear(folder, overwrite)
    summary = evaluate(experiment, maker or methods.maker(), folder, Console(stderr=True, quiet=quiet))
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        console = Console()
        console.print(table(summary))
        for name, error in errors(summary):
            console.print(f"{name} failed: {error}", style="red", markup=False, highlight=False)
        console.print(f"{folder / SUMMARY}", markup=False, highlight=False)
    return 130 if summary["status"] == "interrupted" else int(bool(errors(summary)))


def plan(words: Sequence[str], data: str | None = None) -> Experiment:
    """The experiment of a command line: [CONFIG] [a.b=c ...], with `tasks=` in the place of the config's own measures.

    `tasks` are names of our measures, JSONL files of questions, and else tasks of lm-evaluation-harness or their YAML files;
    `limit` (questions), `shots` and `path` hold for all of them that have such a setting, but perplexity has its own limit, of
    tokens: `quality.0.limit`.
    """
    configs = [word for word in words if "=" not in word]
    if len(configs) > 1:
        raise UserError(f"eval takes one config file, not {len(configs)}: {', '.join(configs)}; tasks are given as tasks=a,b")
    said = dict(word.split("=", 1) for word in words if word.split("=", 1)[0] in SPECIAL and "=" in word)
    overrides = [word for word in words if "=" in word and word.split("=", 1)[0] not in SPECIAL]
    tasks = [task for task in said.pop("tasks", "").split(",") if task]
    flags: dict[str, Any] = {"quality": measures(tasks)} if tasks else {}
    if data is not None:
        flags["data"] = data
    experiment = load(configs[0] if configs else None, overrides, flags)
    if not experiment.quality:
        known = ", ".join(OWN)
        raise UserError(
            f"nothing to measure: give tasks=a,b ({known}, a JSONL file, tasks of lm-eval), or a config with quality"
        )
    if said:
        told = experiment.model_dump()
        told["quality"] = [one | {key: said[key] for key in set(said) & wanted(one)} for one in told["quality"]]
        experiment = parse(Experiment, told, "command line")
    experiment.expand()  # a mistake in a variant shows before anything is loaded
    return experiment.located()


def wanted(measure: dict[str, Any]) -> set[str]:
    return set(measure) - ({"limit"} if measure["kind"] == "perplexity" else set())


def measures(tasks: Sequence[str]) -> list[dict[str, Any]]:
    """Names of tasks as measures of a configuration; those of lm-evaluation-harness together, since they share its start."""
    found: list[dict[str, Any]] = [{"kind": task} for task in tasks if task in OWN]
    found += [{"kind": "choice", "path": task} for task in tasks if is_questions(task)]
    others = [task for task in tasks if task not in OWN and not is_questions(task)]
    return found + ([{"kind": "lm-eval", "tasks": others}] if others else [])


def is_questions(task: str) -> bool:
    return task.removesuffix(".gz").removesuffix(".xz").endswith(".jsonl")


def evaluate(experiment: Experiment, maker: Maker, out: Path, console: Console) -> dict[str, Any]:
    """Measure every variant, the baseline first, and write what was found, after an interrupt too.

    UserError where the baseline cannot be built; any other variant that fails, and any measure, is an error in its place.
    """
    variants, baseline = experiment.expand(), experiment.baseline_name()
    lanes = {name: Lane(name, variants[name], out / folder) for name, folder in folders(list(variants)).items()}
    shared: dict[Scored, Finding] = {}
    status = "complete"
    try:
        with terminable():
            for lane in sorted(lanes.values(), key=lambda lane: lane.name != baseline):
                with guarded(lane, baseline):
                    lane.backend = maker.build(lane.variant)
                    begin(out, experiment)
                    lane.facts = lane.backend.facts
                    assess(lane, experiment, shared, console)
                    lane.backend = None  # and with it the memory of its cache
    except KeyboardInterrupt:
        status = "interrupted"
    begin(out, experiment)
    summary: dict[str, Any] = {"status": status, "baseline": baseline, "variants": {}}
    for name, lane in lanes.items():
        found = beside(lane.quality, lanes[baseline].quality)
        summary["variants"][name] = {"error": lane.error, "quality": found or {}}
    hardware.write(out / "environment.json", hardware.environment(), {lane.name: lane.facts for lane in lanes.values()})
    part = out / f"{SUMMARY}.part"
    part.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    part.replace(out / SUMMARY)
    return summary


def begin(out: Path, experiment: Experiment) -> None:
    """The folder, which there is no need of before a model is built."""
    out.mkdir(parents=True, exist_ok=True)
    save(experiment, out / "config.yaml")


def errors(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """What failed: variants, and measures of variants."""
    whole = [(name, figures["error"]) for name, figures in summary["variants"].items() if figures["error"]]
    return whole + [
        (f"{name}, {measure}", one["error"])
        for name, figures in summary["variants"].items()
        for measure, one in figures["quality"].items()
        if one.get("error")
    ]


def table(summary: dict[str, Any]) -> Table:
    """A line for each figure of each variant."""
    against = summary["baseline"]
    shown = Table(
        "variant", "measure", "value (95 %)", "count", "p", "texts", caption=f"p (McNemar) and texts: against {against}"
    )
    for column, whole in zip(shown.columns, (False, False, True, True, True, True), strict=True):
        column.no_wrap, column.overflow = whole, "fold"
    for name, figures in summary["variants"].items():
        for measure, one in figures["quality"].items():
            p, equal = (None, None) if name == against else (one.get("mcnemar_p"), one.get("greedy_equal"))
            full = measure if "/" in measure or one.get("metric", measure) == measure else f"{measure}/{one['metric']}"
            count = f"{one['count']:,}" if "count" in one else ""
            told = {None: "", True: "the same", False: "others"}[equal]
            shown.add_row(name, full, worth(one), count, "" if p is None else probability(p), told)
    return shown


def clear(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds a run, or take the summary of that evaluation out of it; its answers are written over."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder")
    if (folder / "summary.json").exists():
        raise UserError(f"--out {folder} holds a run of bench; name another folder")
    if (folder / SUMMARY).exists() and not overwrite:
        raise UserError(f"--out {folder} already holds an evaluation; name another folder, or give --overwrite")
    (folder / SUMMARY).unlink(missing_ok=True)
