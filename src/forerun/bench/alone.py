"""One variant in a process of its own: `python -m forerun.bench.alone` reads a job on stdin, measures, and leaves its run."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from forerun.bench import kept, memory
from forerun.bench.folder import folders
from forerun.bench.lanes import Lane
from forerun.config import Experiment, parse
from forerun.types import UserError


def each(
    lanes: Sequence[Lane], baseline: str, experiment: Experiment, out: Path, console: Console, measure_memory: bool
) -> None:
    """Measure the lanes that are not finished, the baseline first; a process that dies is a row with its error."""
    todo = [lane for lane in sorted(lanes, key=lambda lane: lane.name != baseline) if lane.finished is None]
    for number, lane in enumerate(todo, 1):
        lane.folder.mkdir(exist_ok=True)
        kept.forget(lane.folder)
        job = {
            "experiment": experiment.model_dump(mode="json"), "out": str(out), "name": lane.name, "memory": measure_memory,
            "hashes": {other.name: other.hash for other in lanes},
        }  # fmt: skip
        with console.status(f"{lane.name}: in a process of its own ({number} of {len(todo)})"):
            lane.error = start(job)
        lane.finished = kept.read(lane.folder) if lane.error is None else None
        if lane.error is None and lane.finished is None:
            lane.error = "its process left no figures"
        if lane.error is not None and lane.name == baseline:
            raise UserError(f"baseline {lane.name!r}: {lane.error}")


def start(job: dict[str, Any], command: Sequence[str] = (sys.executable, "-m", "forerun.bench.alone")) -> str | None:
    """Run a job to its end; returns what went wrong."""
    try:
        done = memory.apart(command, json.dumps(job))
    except OSError as error:
        return f"no process: {error}"
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        hint = ", as the system does when memory runs out; lower engine.rows or engine.capacity, or take a smaller model"
        return f"its process was ended by {name}" + (hint if name == "SIGKILL" else "")
    if done.returncode:
        return f"its process ended with status {done.returncode}: {' '.join(done.stderr.strip().splitlines()[-1:])}"
    try:
        told: str | None = json.loads(done.stdout.strip().splitlines()[-1])["error"]
    except (ValueError, KeyError, IndexError):
        return "its process did not say how it ended"
    return told


def main() -> None:
    from forerun.bench.measure import together
    from forerun.bench.methods import maker

    job = json.load(sys.stdin)
    experiment, out = parse(Experiment, job["experiment"], "experiment"), Path(job["out"])
    variants = experiment.expand()
    lanes = [Lane(name, variants[name], out / folder, job["hashes"][name]) for name, folder in folders(list(variants)).items()]
    for lane in lanes:
        lane.finished = kept.usable(lane.folder, lane.hash) if lane.name != job["name"] else None
    [own] = [lane for lane in lanes if lane.name == job["name"]]
    others = [lane for lane in lanes if lane is not own]
    together([own], others, "", experiment, maker(), Console(quiet=True), job["memory"], own_process=True)
    print(json.dumps({"error": own.error}))
    sys.stdout.flush()
    os._exit(0)  # nothing to clean up, and worker threads of libraries may linger


if __name__ == "__main__":
    main()
