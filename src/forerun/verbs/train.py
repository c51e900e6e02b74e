"""`forerun train`: from a config to a trained head or draft, with a progress bar."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from forerun.train.run import TRAINED, train
from forerun.train.settings import load
from forerun.types import UserError
from forerun.verbs.common import hush_libraries


def run(words: Sequence[str], out: str, *, as_json: bool = False, quiet: bool = False) -> int:
    """`words`: one config file and overrides a.b=c. The same command resumes a run. Returns the exit status."""
    configs = [word for word in words if "=" not in word]
    if len(configs) != 1:
        raise UserError(f"train takes one config file, not {len(configs)}; e.g. forerun train eagle.yaml --out runs/eagle")
    config = load(configs[0], [word for word in words if "=" in word])
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder")
    hush_libraries()
    console = Console(stderr=True, quiet=quiet)
    with Bar.on(console, config.steps) as bar:
        validation = train(config, folder, bar)
    if validation is None:
        return 0  # the first process tells
    if as_json:
        print(json.dumps({"folder": str(folder / TRAINED), "validation": validation}))
    else:
        report = Console(quiet=quiet)
        report.print(table(validation))
        said = f"{config.kind}: {validation['efficiency']:.2f} tokens a round by a chain on held-out text: {folder / TRAINED}"
        report.print(said, markup=False, highlight=False)
    return 0


def table(validation: dict[str, Any]) -> Table:
    """Held-out acceptance by guess."""
    shown = Table()
    for name in ("guess", "right", "right after right ones"):
        shown.add_column(name, justify="right")
    for i, (right, given) in enumerate(zip(validation["top1"], validation["acceptance"], strict=True), 1):
        shown.add_row(str(i), f"{right:.1%}", f"{given:.1%}")
    return shown


@dataclass
class Bar:
    """A progress bar that names the loss and the last validation."""

    progress: Progress
    steps: int
    task: TaskID | None = None
    validated: str = ""

    @staticmethod
    def on(console: Console, steps: int) -> Bar:
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        return Bar(Progress(*columns, console=console), steps)

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def say(self, words: str) -> None:
        self.progress.console.print(words, markup=False, highlight=False)

    def preparing(self, what: str, done: int, total: int) -> None:
        self._show(what, done, total)

    def trained(self, step: int, loss: float, validation: dict[str, Any] | None) -> None:
        if validation is not None:
            self.validated = f", {validation['efficiency']:.2f} tokens a round"
            rates = " ".join(f"{rate:.3f}" for rate in validation["acceptance"])
            self.say(f"step {step}: loss {loss:.3f}, acceptance {rates}{self.validated}")
        self._show(f"loss {loss:.3f}{self.validated}", step, self.steps)

    def _show(self, what: str, done: int, total: int) -> None:
        if self.task is None:
            self.task = self.progress.add_task(what, total=total)
        self.progress.update(self.task, description=what, completed=done, total=total)
