"""A run folder read back: what the reports of finished runs are made from. Older folders, which lack figures, are readable."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forerun.bench.metrics import Record
from forerun.bench.show import ABSENT
from forerun.config import Experiment, load
from forerun.types import UserError

Records = dict[str, list[Record]]
NAMED = "name one that forerun bench --out wrote"


@dataclass(frozen=True)
class Folder:
    """What a run left behind; the environment is empty where it ended before that was written."""

    path: Path
    summary: dict[str, Any]
    experiment: Experiment
    environment: dict[str, Any]


def read(path: Path) -> Folder:
    """Raises UserError with one line for a folder that holds no run, or one that has not finished."""
    file = path / "summary.json"
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; {NAMED}")
    if not file.is_file():
        begun = (path / "config.yaml").is_file()
        why = "its run has not finished (no summary.json yet)" if begun else "not a run folder (no summary.json)"
        raise UserError(f"{path}: {why}; {NAMED}")
    summary = parsed(file)
    variants = summary.get("variants")
    if "baseline" not in summary or not isinstance(variants, dict) or not all(isinstance(v, dict) for v in variants.values()):
        raise UserError(f"{file}: not a summary of forerun bench; {NAMED}")
    if not (path / "config.yaml").is_file():
        raise UserError(f"{path}: config.yaml is missing, so what was measured is not known; {NAMED}")
    return Folder(path, summary, load(str(path / "config.yaml"), []), environment(path))


def environment(path: Path) -> dict[str, Any]:
    file = path / "environment.json"
    return parsed(file) if file.is_file() else {}


def parsed(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(found, dict):
        raise UserError(f"{file}: expected a JSON object; {NAMED}")
    return found


def folders(names: Sequence[str]) -> dict[str, str]:
    """A folder name for each variant: its own name as far as a file system takes it."""
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^\w.,=+-]+", "_", name).strip(".")[:100] or "variant"
        found[name] = plain if plain not in found.values() else f"{plain}-{len(found)}"
    return found


def records(path: Path, names: Sequence[str]) -> Records:
    """The raw records of each variant; lines that were cut short, or are of another version, are left out."""
    return {name: list(lines(path / plain / "records.jsonl")) for name, plain in folders(names).items()}


def lines(file: Path) -> Iterator[Record]:
    if not file.is_file():
        return
    with file.open(encoding="utf-8") as opened:
        for line in opened:
            try:
                yield Record.from_json(json.loads(line))
            except (ValueError, TypeError, KeyError):
                continue


def machine(found: dict[str, Any]) -> list[str]:
    """What a run was measured on, in a few lines; nothing where that was not written."""
    if not found:
        return []
    busy = ", ".join(f"{load:.1f}" for load in found.get("load_average") or []) or ABSENT
    cores = f"{found.get('cpu_allowed')} CPU cores, {found.get('threads')} threads"
    commit = found.get("commit") or "no checkout"
    return [
        f"{device(found)}, {cores}; load average at the start {busy}",
        f"forerun {found.get('forerun')} ({commit}), Python {found.get('python')}, {packages(found)}",
        f"started {found.get('started')}",
    ]


def packages(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {version}" for name, version in (found.get("packages") or {}).items())


def device(found: dict[str, Any]) -> str:
    """The accelerators or, without any, the processor."""
    gpus = "; ".join(str(gpu.get("name")) for gpu in found.get("gpus") or [])
    return gpus or found.get("cpu") or found.get("platform") or "unknown machine"
