"""`forerun compress`: from a config to a smaller model, and what was done to each kind of layer."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from forerun.compress.recipes import Row
from forerun.compress.run import Report, compress
from forerun.config import load_compression
from forerun.types import UserError
from forerun.verbs.common import hush_libraries


def run(
    words: Sequence[str],
    out: str | None,
    floor: str | None = None,
    axis: str | None = None,
    *,
    overwrite: bool = False,
    small: bool = False,
    as_json: bool = False,
    quiet: bool = False,
) -> int:
    """`words`: at most one config file, and overrides a.b=c. The same command resumes. Returns the exit status.

    With `floor` (`race-high>=0.5`): the largest value of `axis` at which it holds; status 1 where it holds at none.
    """
    configs = [word for word in words if "=" not in word]
    if len(configs) > 1:
        raise UserError(f"compress takes one config file, not {len(configs)}: {', '.join(configs)}")
    if out is None:
        raise UserError("--out: name the folder for the compressed model")
    config = load_compression(configs[0] if configs else None, [word for word in words if "=" in word], small)
    hush_libraries()
    console = Console(stderr=True, quiet=quiet)
    if floor is not None:
        from forerun.verbs.floor import search

        return search(config, Path(out), floor, axis, console, overwrite=overwrite, as_json=as_json)
    if axis is not None:
        raise UserError("--axis goes with --floor, a quality that is to be kept, such as --floor 'race-high>=0.5'")
    with Bar.on(console) as bar:
        report = compress(config, Path(out), bar.tell, overwrite=overwrite)
    if as_json:
        print(json.dumps({"folder": out, **asdict(report)}))
    else:
        shown = Console(quiet=quiet)
        shown.print(table(report.rows))
        shown.print(headline(report, out), markup=False, highlight=False)
    return 0


def headline(report: Report, out: str) -> str:
    share = report.bytes_after / report.bytes_before
    return f"{size(report.bytes_before)} -> {size(report.bytes_after)} ({share:.1%}), embeddings and head included: {out}"


def table(rows: Sequence[Row]) -> Table:
    """A line for each recipe and kind of layer, such as mlp.down_proj."""
    shown = Table()
    for name in ("recipe", "layers", "kept", "bytes", "error (worst)"):
        shown.add_column(name, justify="left" if name in ("recipe", "layers") else "right")
    kinds: dict[tuple[int, str, str], list[Row]] = {}
    for row in rows:
        kinds.setdefault((row.recipe, row.did, re.sub(r"^.*?\.\d+\.", "", row.layer)), []).append(row)
    for (_, did, name), group in kinds.items():
        first, errors = group[0], [row.error for row in group if row.error is not None]
        low, high = min(row.kept for row in group), max(row.kept for row in group)
        kept = f"{low}" if low == high else f"{low} to {high}"
        shown.add_row(
            did,
            f"{len(group)} x {name}",
            f"{kept} of {first.total}",
            f"{size(sum(row.bytes_before for row in group))} -> {size(sum(row.bytes_after for row in group))}",
            f"{sum(errors) / len(errors):.1%} ({max(errors):.1%}) of {first.of}" if errors else "not measured",
        )
    return shown


def size(count: int) -> str:
    """Bytes in the largest unit that leaves digits before the point; powers of 1000."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            return f"{count / one:.3g} {unit}"
    return f"{count} B"


@dataclass
class Bar:
    """A progress bar for each thing that is being done."""

    progress: Progress
    tasks: dict[str, TaskID] = field(default_factory=dict)

    @staticmethod
    def on(console: Console) -> Bar:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        return Bar(Progress(*columns, console=console))

    def __enter__(self) -> Bar:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def tell(self, what: str, done: int, total: int) -> None:
        if what not in self.tasks:
            self.tasks[what] = self.progress.add_task(what, total=total)
        self.progress.update(self.tasks[what], completed=done, total=total)
