"""A head on disk: config.json (its shape) and model.safetensors. A folder is written whole or not at all."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from forerun.heads.eagle import Eagle, EagleShape
from forerun.heads.medusa import Medusa, MedusaShape
from forerun.heads.mlp import MLPShape, MLPSpeculator
from forerun.types import UserError

Head = Medusa | MLPSpeculator | Eagle
Shape = MedusaShape | MLPShape | EagleShape
SHAPES: dict[str, type[Shape]] = {"medusa": MedusaShape, "mlp": MLPShape, "eagle": EagleShape}


def build(shape: Shape) -> Head:
    """A head whose tensors are all NaN, so that one that is never filled is loud."""
    with torch.device("cpu"):
        head: Head = (
            Medusa(shape)
            if isinstance(shape, MedusaShape)
            else MLPSpeculator(shape)
            if isinstance(shape, MLPShape)
            else Eagle(shape)
        )
    for parameter in head.parameters():
        nn.init.constant_(parameter, float("nan"))
    return head.eval().requires_grad_(False)


def save(head: Head, folder: Path, extra: dict[str, Any] | None = None) -> None:
    """Write a head; `extra` goes into config.json beside its shape (a tree of choices, how it was trained)."""
    half_done = folder.with_name(folder.name + ".part")
    shutil.rmtree(half_done, ignore_errors=True)
    half_done.mkdir(parents=True)
    (half_done / "config.json").write_text(json.dumps(asdict(head.shape) | (extra or {}), indent=2) + "\n", encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in head.state_dict().items()}, half_done / "model.safetensors")
    shutil.rmtree(folder, ignore_errors=True)
    half_done.rename(folder)


def load(folder: Path, dtype: torch.dtype | None = None) -> tuple[Head, dict[str, Any]]:
    """A head of our own layout and the rest of its config.json; UserError where a file or a tensor is missing or wrong."""
    try:
        settings: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = SHAPES[settings["kind"]]
        names = {field.name for field in fields(kind)}
        own: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items() if key in names}
        head = build(kind(**own))
        head.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"head {folder}: {type(error).__name__}: {reason}; give a folder that forerun train wrote") from error
    return (head if dtype is None else head.to(dtype)), {key: value for key, value in settings.items() if key not in names}
