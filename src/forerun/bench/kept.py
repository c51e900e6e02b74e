"""What a finished variant leaves beside its records, so that a later run need not measure it again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from forerun.bench.metrics import Lost, Record, Run
from forerun.bench.quality import Finding
from forerun.config import EMBEDDED, Experiment, Variant
from forerun.types import Phases

FILE, RECORDS, LOST = "finished.json", "records.jsonl", "lost.jsonl"
MACHINE = ("forerun", "python", "packages", "cpu", "cpu_allowed", "threads", "gpus")  # of environment.json


def content_hash(variant: Variant, experiment: Experiment, environment: dict[str, Any]) -> str:
    """Of all that decides a variant's figures: its settings, what runs on it, versions, machine, and the files it reads.

    Files count by their place, size and time of change, not by their content.
    """
    settings = {
        "variant": variant.model_dump(mode="json"),
        **experiment.model_dump(mode="json", include={"workload", "repeats", "warmup", "quality", "fresh"}),
    }
    known = {name: environment.get(name) for name in MACHINE}
    text = json.dumps([settings, known, [files(path) for path in sorted(set(paths(settings)))]], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def paths(settings: Any) -> Iterator[str]:
    """Every `path` in nested settings."""
    if isinstance(settings, dict):
        if isinstance(path := settings.get("path"), str):
            yield path
        settings = list(settings.values())
    if isinstance(settings, list):
        for part in settings:
            yield from paths(part)


def files(path: str) -> list[tuple[str, int, int]]:
    """Resolved place, bytes and nanoseconds of the last change of each file of a path; none of what is not on this machine."""
    found = []
    for file in sorted(walk(local(path))):
        status = file.stat()
        found.append((str(file.resolve()), status.st_size, status.st_mtime_ns))
    return found


def local(path: str) -> Path:
    """Where the files of a path lie: the package, a file or folder, a module's source, or the Hub's cache."""
    if path == EMBEDDED:
        from forerun.model import ASSETS

        return ASSETS
    if Path(path).exists():
        return Path(path)
    if ":" in path:  # a rule as module:Name
        return Path(path.partition(":")[0].replace(".", "/") + ".py")
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(path, "config.json")
    except ValueError:  # no name that the Hub could have
        return Path(path)
    return Path(cached).parent if isinstance(cached, str) else Path(path)


def walk(path: Path) -> Iterator[Path]:
    """Without the hidden folders that some tools leave."""
    if path.is_file():
        yield path
    for folder, inner, names in os.walk(path):
        inner[:] = [name for name in inner if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if Path(folder, name).is_file())


def write(run: Run, folder: Path) -> None:
    """All of a run but its records and what it lost; whole or not at all."""
    data = {one.name: getattr(run, one.name) for one in fields(run) if one.name not in ("records", "lost")}
    data |= {"phases": asdict(run.phases) if run.phases else None, "quality": [one.to_json() for one in run.quality]}
    draft = folder / f"{FILE}.part"
    draft.write_text(json.dumps(data, indent=1, default=str) + "\n", encoding="utf-8")
    draft.replace(folder / FILE)


def read(folder: Path) -> Run | None:
    """What `write` left; None where it left nothing that can be read."""
    try:
        data = json.loads((folder / FILE).read_text(encoding="utf-8"))
        lines = (folder / RECORDS).read_text(encoding="utf-8").splitlines()
        data |= {
            "records": [Record.from_json(json.loads(line)) for line in lines],
            "lost": [Lost(**json.loads(line)) for line in lost(folder)],
            "phases": Phases(**data["phases"]) if data["phases"] else None,
            "quality": tuple(Finding.from_json(one) for one in data["quality"]),
        }
        return Run(**data)
    except (OSError, ValueError, KeyError, TypeError):  # another version's, or damaged: measured again
        return None


def lost(folder: Path) -> list[str]:
    """The lines of the file that is there only where something was lost."""
    file = folder / LOST
    return file.read_text(encoding="utf-8").splitlines() if file.is_file() else []


def forget(folder: Path) -> None:
    """So that nothing of an earlier measurement is taken for the next one's."""
    for name in (FILE, RECORDS, LOST):
        (folder / name).unlink(missing_ok=True)


def usable(folder: Path, hash: str | None) -> Run | None:
    """A finished run of exactly this content, in which no measure failed."""
    run = read(folder)
    return run if run is not None and run.hash == hash and all(one.error is None for one in run.quality) else None
