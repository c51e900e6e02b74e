"""A name for all that a compressed model depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forerun.compress.opened import hub_files, model_place
from forerun.config import EMBEDDED, ModelConfig, RecipeConfig, WorkloadConfig

VERSION = 2
"""Raise it whenever the same recipe makes another model."""


def identity(config: ModelConfig, embedded: str, recipes: Sequence[RecipeConfig]) -> str:
    """A hash of the model's files, the recipes, the files of their calibration texts and the code's version.

    Files are known by name, size and time of change; those in the Hub's cache by name and the Hub's own hash of them.
    """
    weights = config.weights != "random"
    place = model_place(config.path, embedded, weights=weights)
    from_hub = config.path != EMBEDDED and not Path(config.path).exists()
    own = [told(path) for path in hub_files(place, weights=weights)] if from_hub else files(place)
    said: list[Any] = [VERSION, config.dtype, config.weights, own]
    for recipe in recipes:
        calibration = getattr(recipe, "calibration", None)
        workload: WorkloadConfig | None = None if calibration is None else calibration.workload
        texts = None if workload is None or workload.path is None else Path(workload.path)
        settings = recipe.model_dump(mode="json")
        if texts is not None and texts.exists():  # however the path was written
            settings["calibration"]["workload"]["path"] = str(texts.resolve())
        said += [settings, None if texts is None else files(texts)]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:24]


def files(place: Path) -> list[tuple[str, ...]]:
    """What is told of a file, or of all files below a folder."""
    found = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    return [told(path) for path in found if path.exists()]


def told(path: Path) -> tuple[str, ...]:
    """A file's name with its size and time of change, or with the hash after which the Hub's cache names what it links to."""
    if path.is_symlink() and path.resolve().parent.name == "blobs":
        return path.name, path.resolve().name
    return path.name, str(path.stat().st_size), str(path.stat().st_mtime_ns)
