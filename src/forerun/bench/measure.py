"""`forerun bench` from an experiment to a run folder: who is measured, with whom, and what is kept when something ends it."""

from __future__ import annotations

import dataclasses
import signal
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from forerun.bench import alone, hardware, kept, memory, per_request, report
from forerun.bench.assess import assess, known
from forerun.bench.folder import folders
from forerun.bench.lanes import Lane, Maker, prepare
from forerun.bench.metrics import summarize
from forerun.bench.turns import rotate
from forerun.config import Experiment, LogConfig, save
from forerun.train import loggers
from forerun.types import UserError
from forerun.workload import source


def run(
    experiment: Experiment,
    maker: Maker,
    out: Path,
    console: Console,
    measure_memory: bool = True,
    resume: bool = False,
) -> dict[str, Any]:
    """Measure an experiment into the folder `out` and return its summary.

    With `resume`, variants that an earlier run finished with the same content are taken as they are. Raises UserError for
    what makes the baseline impossible; any other variant that fails becomes a row with its error. An interrupt keeps what was
    measured and sets `status` to "interrupted" in the summary and the reports.
    """
    variants, baseline = experiment.expand(), experiment.baseline_name()
    if experiment.wandb is not None:
        loggers.wandb_library()  # that it is missing shows before anything is measured
    out.mkdir(parents=True, exist_ok=True)
    save(experiment, out / "config.yaml")
    experiment, machine = experiment.located(), hardware.environment()
    lanes = [
        Lane(name, variants[name], out / folder, kept.content_hash(variants[name], experiment, machine))
        for name, folder in folders(list(variants)).items()
    ]
    status, workload = "failed", described(experiment, console)
    try:
        with terminable():
            try:
                if resume:
                    take_finished(lanes, experiment, measure_memory)
                hardware.write(out / "environment.json", machine, {})
                if experiment.fresh:
                    alone.each(lanes, baseline, experiment, out, console, measure_memory)
                else:
                    todo = [lane for lane in lanes if lane.finished is None]
                    others = [lane for lane in lanes if lane.finished is not None]
                    together(todo, others, baseline, experiment, maker, console, measure_memory)
                status = "complete"
            except KeyboardInterrupt:
                status = "interrupted"
    finally:
        runs = {lane.name: lane.run() for lane in lanes}
        summary = {"status": status, "workload": workload} | summarize(runs, baseline)
        if status != "failed" or any(one.records for one in runs.values()):
            hardware.write(out / "environment.json", machine, {name: one.facts for name, one in runs.items()})
            per_request.write(runs, baseline, out)
            report.write(summary, experiment, out)
    if experiment.wandb is not None:
        log(summary, experiment, experiment.wandb, out, console)
    return summary


def described(experiment: Experiment, console: Console) -> dict[str, Any] | None:
    """Where the prompts come from, with how many rows, under which licence; None where they cannot be read, as shows soon."""
    try:
        with console.status(f"workload {experiment.workload.kind}: counting its rows"):
            found = source(experiment.workload)
    except UserError:
        return None
    for remark in found.remarks:
        console.print(f"workload: {remark}", markup=False, highlight=False)
    return dataclasses.asdict(found) | {"remarks": list(found.remarks)}


def together(
    lanes: Sequence[Lane],
    others: Sequence[Lane],
    baseline: str,
    experiment: Experiment,
    maker: Maker,
    console: Console,
    measure_memory: bool,
    *,
    own_process: bool = False,
) -> None:
    """Measure some variants in turns in this process; `others` are finished, and what they scored is not scored again.

    `own_process`: this process has nothing else in it, so its own peak is the only variant's.
    """
    if not lanes:
        return
    session = uuid.uuid4().hex
    for lane in lanes:
        lane.session = session
        kept.forget(lane.folder)
    prepare(lanes, baseline, experiment, maker, console)
    rotate(lanes, baseline, experiment, console)
    shared = known(others, experiment)
    for lane in lanes:
        if lane.backend is None:
            continue
        lane.facts = lane.backend.facts | lane.told  # a cache that was made with the first request has its size by now
        if measure_memory:
            weigh(lane, experiment, console, own_process)
        assess(lane, experiment, shared, console)
        kept.write(lane.run(), lane.folder)


def weigh(lane: Lane, experiment: Experiment, console: Console, own_process: bool) -> None:
    """Peak memory, in a process of its own."""
    if own_process:
        found: memory.Peaks | None = memory.peaks(str(lane.facts.get("device", "cpu")))
    else:
        with console.status(f"{lane.name}: peak memory in a process of its own"):
            found = memory.measure(lane.variant, experiment)
    if found is not None:
        lane.peak_memory_bytes, lane.peak_device_bytes = found


def take_finished(lanes: Sequence[Lane], experiment: Experiment, measure_memory: bool) -> None:
    for lane in lanes:
        found = kept.usable(lane.folder, lane.hash)
        if found is not None and measure_memory and found.peak_memory_bytes is None:
            peaks = memory.measure(lane.variant, experiment)
            if peaks is not None:
                found = dataclasses.replace(found, peak_memory_bytes=peaks.process, peak_device_bytes=peaks.device)
                kept.write(found, lane.folder)
        lane.finished = found


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM interrupts as Ctrl-C does, so that what was measured is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def log(summary: dict[str, Any], experiment: Experiment, config: LogConfig, out: Path, console: Console) -> None:
    """The final figures to Weights & Biases. Everything is on disk by now, so that a failure there is no more than a remark."""
    try:
        tell, close = loggers.wandb(
            out, experiment.model_dump(mode="json"), project=config.project, entity=config.entity,
            name=config.name, resume=False, files=(out / "report.html",), quiet=console.quiet,
        )  # fmt: skip
        tell(0, loggers.numbers(summary["variants"]))
        close()
    except Exception as error:  # noqa: BLE001, whatever the service or the network raises
        first = (str(error).strip().splitlines() or [""])[0]
        told = f"Weights & Biases: {type(error).__name__}: {first}; without a network set WANDB_MODE=offline"
        console.print(told, style="red", markup=False, highlight=False)
