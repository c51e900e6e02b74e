"""`forerun bench`: from flags and a config to a run folder and a table."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from forerun.bench import kept, methods, report
from forerun.bench.headline import parse_floor
from forerun.bench.lanes import Maker
from forerun.bench.measure import run as measure
from forerun.config import EMBEDDED, METHODS, Experiment, load
from forerun.evaluate.measure import check
from forerun.types import UserError
from forerun.verbs.common import hush_libraries, known_method

NEEDS = {"model": "--draft, a smaller model of the same family"} | dict.fromkeys(
    ("medusa", "eagle"), "a head for it: drafter.path=FOLDER in a config, from forerun train or a public one"
)
METRICS = ("bits_per_byte", "acc", "acc_norm", "exact_match")
"""A floor may name these instead of a measure, as `pass@k` and what tasks of lm-eval tell."""
RUN_FILES = ("config.yaml", "environment.json", "summary.json", "summary.csv", "requests.csv", "report.md", "report.html")


def run(
    words: Sequence[str],
    out: str | None,
    flags: dict[str, Any],
    drafter: dict[str, Any],
    method: str | None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    small: bool = False,
    data: str | None = None,
    memory: bool = True,
    as_json: bool = False,
    quiet: bool = False,
    maker: Maker | None = None,
) -> int:
    """Returns the exit status: 0, 1 where a variant or a measure failed, 130 after an interrupt.

    `resume` goes on with the run that `out` holds, `small` takes the config's own small size with shipped prompts for data
    sets that are not there, `data` is a folder of data sets. `maker` stands in for models in tests.
    """
    console = Console(stderr=True, quiet=quiet)
    experiment = plan(words, flags | {"data": data}, drafter, method, small=small)
    if small:
        experiment, remarks = experiment.without_data()
        for remark in remarks:
            console.print(remark, markup=False, highlight=False)
    experiment.expand()  # a mistake in a variant shows before anything is loaded
    check_floor(experiment)
    hush_libraries()
    for one in experiment.located().quality:
        check(one)
    if resume and (out is None or overwrite):
        raise UserError("--resume goes on with the run that --out holds: name that folder, and leave out --overwrite")
    folder = Path(out or time.strftime("runs/bench-%Y%m%d-%H%M%S"))
    clear(folder, overwrite, resume)
    summary = measure(experiment, maker or methods.maker(), folder, console, memory, resume)
    if as_json:
        print(json.dumps(summary, indent=2))
    else:
        tell(summary, experiment, folder)
    if summary["status"] == "interrupted":
        return 130
    return int(any(failures(figures) for figures in summary["variants"].values()))


def check_floor(experiment: Experiment) -> None:
    """UserError where the floor is on a measure that the experiment does not take."""
    if experiment.floor is None:
        return
    measure = parse_floor(experiment.floor).measure
    taken = [name for one in experiment.quality for name in getattr(one, "tasks", (one.kind,))]
    a_metric = measure in METRICS or measure.startswith("pass@") or any(hasattr(one, "tasks") for one in experiment.quality)
    if not taken or not (a_metric or measure.startswith(tuple(taken))):
        known = ", ".join(taken) or "nothing"
        raise UserError(f"floor {experiment.floor}: {measure} is not measured; quality has {known}")


def tell(summary: dict[str, Any], experiment: Experiment, folder: Path) -> None:
    console = Console()
    console.print(report.table(summary, experiment))
    for name, figures in summary["variants"].items():
        for failure in failures(figures):
            console.print(f"{name} failed: {failure}", style="red", markup=False, highlight=False)
    console.print(f"{report.headline(summary)}: {folder}/report.html", markup=False, highlight=False)


def failures(figures: dict[str, Any]) -> list[str]:
    """Why a variant, or a measure of it, has no figures."""
    if figures["error"] is not None:
        return [figures["error"]]
    return [f"{name}: {one['error']}" for name, one in (figures["quality"] or {}).items() if "error" in one]


def plan(
    words: Sequence[str], flags: dict[str, Any], drafter: dict[str, Any], method: str | None, *, small: bool = False
) -> Experiment:
    """The experiment that a command line asks for; flags that were not given are None."""
    configs = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    if len(configs) > 1:
        raise UserError(f"bench takes one config file, not {len(configs)}: {', '.join(configs)}")
    given = {key: value for key, value in flags.items() if value is not None}
    of_drafter = {key: value for key, value in drafter.items() if value is not None}
    if method is not None:
        known_method(method)
    if small and not configs:
        raise UserError("--small asks for a config's own small size: name a config with a section `small:`")
    if not configs:
        early = [word for word in overrides if word.startswith(("model.", "workload.", "backend="))]
        said = load(None, early, given)
        if said.backend == "endpoint":  # a server drafts as it was started to
            return load(None, overrides, given | {"variants": {"server": {}}})
        # Many prompts: the interval is over them, not repeats.
        once: dict[str, Any] = (
            {"repeats": 1, "sampling.max_new": 48, "workload.limit": 32} if said.workload.kind == "demo" else {}
        )
        drafted = "path" in of_drafter or any(word.startswith("drafter.path=") for word in overrides)
        compared = methods.compare(wanted(method, said.model.path, drafted), of_drafter)
        if method is None and said.model.path == EMBEDDED and not drafted and said.workload.kind == "demo":
            compared |= methods.COMPRESSED
            once["quality"] = [{"kind": "perplexity", "text": "demo"}]
        return load(None, overrides, once | given | {"variants": compared})
    if method is None:
        kind = {"drafter.kind": "model"} if "path" in of_drafter else {}
        given |= kind | {f"drafter.{key}": value for key, value in of_drafter.items()}
        return load(configs[0], overrides, given, small)
    compared = methods.compare([method], of_drafter)
    return load(configs[0], overrides, given, small).model_copy(update={"variants": compared, "baseline": "plain"})


def wanted(method: str | None, path: str, has_draft: bool) -> Sequence[str]:
    """The method asked for, or all that ship; the embedded draft and heads go with the embedded target only."""
    draftless = path != EMBEDDED and not has_draft
    if method is None:
        own = ["ngram", "model"] if has_draft else ["ngram"]
        return methods.SHIPPED if path == EMBEDDED else own
    if METHODS[method] in methods.TRAINED and draftless:
        raise UserError(f"--method {method} with a model of your own needs {NEEDS[METHODS[method]]}")
    return [method]


def clear(folder: Path, overwrite: bool, resume: bool = False) -> None:
    """Refuse a folder that holds a run, or take that run (and nothing else) out of it; one to go on with stays as it is."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder")
    records = sorted(folder.glob(f"*/{kept.RECORDS}"))
    if resume or (not records and not (folder / "summary.json").exists()):
        return
    if not overwrite:
        raise UserError(f"--out {folder} already holds a run; name another folder, or give --overwrite or --resume")
    for path in records:
        kept.forget(path.parent)
        shutil.rmtree(path.parent / "quality", ignore_errors=True)
        if not any(path.parent.iterdir()):
            path.parent.rmdir()
    for name in RUN_FILES:
        (folder / name).unlink(missing_ok=True)
