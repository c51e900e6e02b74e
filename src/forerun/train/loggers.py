"""What a run tells: log.jsonl always; TensorBoard and Weights & Biases where asked for and installed."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from forerun.types import UserError

LOG = "log.jsonl"


@dataclass(frozen=True)
class Log:
    """One line of figures a step, wherever it goes."""

    path: Path
    others: tuple[Callable[[int, dict[str, float]], None], ...] = ()
    closers: tuple[Callable[[], None], ...] = ()

    def write(self, step: int, figures: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **figures}) + "\n")
        for tell in self.others:
            tell(step, numbers(figures))

    def close(self) -> None:
        for close in self.closers:
            close()


def numbers(figures: dict[str, Any], name: str = "") -> dict[str, float]:
    """Nested figures under names such as validation/top1/0; what is no number is left out."""
    flat: dict[str, float] = {}
    for key, value in figures.items():
        full = f"{name}{key}"
        if isinstance(value, dict):
            flat |= numbers(value, f"{full}/")
        elif isinstance(value, list):
            flat |= numbers({str(i): part for i, part in enumerate(value)}, f"{full}/")
        elif isinstance(value, int | float):
            flat[full] = float(value)
    return flat


def open_log(folder: Path, step: int, names: Sequence[str], settings: dict[str, Any]) -> Log:
    """The log of a run that goes on after `step`: lines past it, which an interrupted run wrote, go."""
    path = folder / LOG
    if path.exists():
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if json.loads(line)["step"] <= step]
        path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    tellers, closers = [], []
    for name in names:
        tell, close = tensorboard(folder) if name == "tensorboard" else wandb(folder, settings)
        tellers.append(tell)
        closers.append(close)
    return Log(path, tuple(tellers), tuple(closers))


Teller = tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]


def tensorboard(folder: Path) -> Teller:
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise UserError("loggers=[tensorboard] needs TensorBoard: pip install 'forerun[loggers]'") from error
    writer = SummaryWriter(str(folder / "tensorboard"))

    def tell(step: int, figures: dict[str, float]) -> None:
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return tell, writer.close


def wandb_library() -> ModuleType:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise UserError("Weights & Biases (wandb) is not installed: pip install 'forerun[loggers]'") from error


def wandb(
    folder: Path,
    settings: dict[str, Any],
    *,
    project: str = "forerun",
    entity: str | None = None,
    name: str | None = None,
    resume: bool = True,
    files: Sequence[Path] = (),
    quiet: bool = False,
) -> Teller:
    """A run named after the folder; `resume` continues the run of that name. `files` are taken along at its end.

    Without a network, WANDB_MODE=offline keeps the run in the folder.
    """
    again = {"resume": "allow", "id": folder.name} if resume else {}
    run = wandb_library().init(
        project=project, entity=entity, name=name or folder.name, dir=str(folder), config=settings,
        settings={"silent": quiet}, **again,
    )  # fmt: skip

    def close() -> None:
        for file in files:
            run.save(str(file), base_path=str(file.parent), policy="now")
        run.finish()

    return lambda step, figures: run.log(figures, step=step), close
