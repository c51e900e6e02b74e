"""`forerun report`: the reports of one finished run made anew, or several finished runs side by side."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from forerun.bench import compare, folder, report
from forerun.types import UserError

WRITTEN = ("report.md", "report.html", "summary.csv")


def run(folders: Sequence[str], out: str | None, *, as_json: bool = False, quiet: bool = False) -> int:
    """Returns the exit status 0; a folder that holds no finished run is a UserError of one line, before anything is written."""
    if not folders:
        raise UserError("report: name the folder of a finished run, or several to compare")
    paths = [Path(name) for name in folders]
    return one(paths[0], out, as_json, quiet) if len(paths) == 1 else several(paths, out, as_json, quiet)


def one(path: Path, out: str | None, as_json: bool, quiet: bool) -> int:
    """The reports of one run, beside its figures or elsewhere."""
    found = folder.read(path)
    target = path if out is None else empty(Path(out))
    report.reports(found.summary, found.experiment, path, target)
    if as_json:
        print(json.dumps(found.summary, indent=2))
    elif not quiet:
        console = Console()
        console.print(report.table(found.summary, found.experiment))
        console.print(f"{target}/report.html", markup=False, highlight=False)
    return 0


def several(paths: Sequence[Path], out: str | None, as_json: bool, quiet: bool) -> int:
    """A comparison, in a folder of its own."""
    target = empty(Path(out or time.strftime("runs/report-%Y%m%d-%H%M%S")))
    found = compare.write(paths, target)
    if as_json:
        print(json.dumps(summary(found), indent=2))
    elif not quiet:
        console = Console()
        for name, values in found.differences.items():
            console.print(f"{name} differs: {' | '.join(values)}", markup=False, highlight=False)
        for why in found.refused:
            console.print(f"no speed-up across the runs: {why}", markup=False, highlight=False)
        console.print(f"{target}/report.html", markup=False, highlight=False)
    return 0


def summary(found: compare.Comparison) -> dict[str, Any]:
    """A comparison as data."""
    whole = compare.merged(found)
    return {
        "runs": {side.name: str(side.run.path) for side in found.sides},
        "differences": found.differences,
        "refused": found.refused,
        "across": compare.across(found, whole),
        "variants": whole.variants,
    }


def empty(path: Path) -> Path:
    """A folder for reports: new, empty, or one that holds reports only."""
    if path.exists() and not path.is_dir():
        raise UserError(f"--out {path} is a file; name a folder")
    foreign = sorted(one.name for one in path.iterdir() if one.name not in WRITTEN) if path.exists() else []
    if foreign:
        raise UserError(f"--out {path} holds other files ({foreign[0]}, ...); name a new folder")
    path.mkdir(parents=True, exist_ok=True)
    return path
