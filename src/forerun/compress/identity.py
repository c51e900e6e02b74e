"""A name for all that a compressed model depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forerun.compress.opened import model_place
from forerun.config import ModelConfig, RecipeConfig, WorkloadConfig

VERSION = 2
"""Raise it whenever the same recipe makes another model."""


def identity(config: ModelConfig, embedded: str, recipes: Sequence[RecipeConfig]) -> str:
    """A hash of the model's files (name, size, time of change), the recipes, their calibration texts and the code's version."""
    said: list[Any] = [VERSION, config.dtype, config.weights, files(model_place(config.path, embedded))]
    for recipe in recipes:
        calibration = getattr(recipe, "calibration", None)
        workload: WorkloadConfig | None = None if calibration is None else calibration.workload
        place = None if workload is None or workload.path is None else Path(workload.path)
        told = recipe.model_dump(mode="json")
        if place is not None and place.exists():  # however the path was written
            told["calibration"]["workload"]["path"] = str(place.resolve())
        said += [told, None if place is None else files(place)]
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:24]


def files(place: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of change of a file, or of all files below a folder."""
    found = sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place]
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in found if path.exists()]
