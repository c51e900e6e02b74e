"""A run on disk: its settings, and one checkpoint that is whole or absent."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn
from torch.optim import Optimizer

from forerun.config import flatten_keys
from forerun.train.settings import Training
from forerun.types import UserError

STATE = "state.pt"
FREE = {"steps", "save_minutes", "validate_every", "loggers", "layouts", "write.rows"}
"""Settings that a resumed run may change."""


def save(folder: Path, step: int, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
    state = {"step": step, "module": module.state_dict(), "optimizers": [one.state_dict() for one in optimizers]}
    torch.save(state, folder / "state.part")
    (folder / "state.part").replace(folder / STATE)


def load(folder: Path, module: nn.Module, optimizers: Sequence[Optimizer]) -> int:
    """Put the checkpoint's state into module and optimizers and return its step; 0 where there is none."""
    path = folder / STATE
    if not path.exists():
        return 0
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        module.load_state_dict(state["module"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        return int(state["step"])
    except Exception as error:  # a file of something else, other shapes: no common base class
        raise UserError(f"{path} is no checkpoint of this run ({str(error).splitlines()[0]}); name another --out") from error


def claim(folder: Path, config: Training) -> None:
    """Write the run's settings into its folder; refuse one that holds a checkpoint of a run with others."""
    folder.mkdir(parents=True, exist_ok=True)
    path, ours = folder / "config.yaml", config.model_dump(mode="json")
    if path.exists() and (folder / STATE).exists():
        read: Any = OmegaConf.to_container(OmegaConf.load(path))
        theirs, mine = flatten_keys(read), flatten_keys(ours)
        changed = [key for key in {**theirs, **mine} if key not in FREE and theirs.get(key) != mine.get(key)]
        if changed:
            key = changed[0]
            raise UserError(
                f"{folder} holds a run with {key}={theirs.get(key)}, not {mine.get(key)}; "
                "name another --out, or give its settings to resume it"
            )
    OmegaConf.save(OmegaConf.create(ours), path)
