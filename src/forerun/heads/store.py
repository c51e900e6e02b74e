"""A head on disk: config.json (its shape) and model.safetensors. A folder is written whole or not at all.

Public layouts are read and written by forerun.heads.formats; `load` reads either kind of folder.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

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
    write_folder(folder, asdict(head.shape) | (extra or {}), head.state_dict())


def write_folder(
    folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Tensor], file: str = "model.safetensors"
) -> None:
    """config.json and one file of tensors (a .pt file by torch.save), in place of what the folder held."""
    half_done = folder.with_name(folder.name + ".part")
    shutil.rmtree(half_done, ignore_errors=True)
    half_done.mkdir(parents=True)
    (half_done / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    if file.endswith(".safetensors"):
        save_file(whole, half_done / file, metadata={"format": "pt"})
    else:
        torch.save(whole, half_done / file)
    shutil.rmtree(folder, ignore_errors=True)
    half_done.rename(folder)


def cast(head: Head, dtype: torch.dtype) -> Head:
    """Its parameters in another type; the rotary frequencies stay in float32, where `head.to(dtype)` would round them."""
    for parameter in head.parameters():
        parameter.data = parameter.data.to(dtype)
    return head


def refuse_misfit(folder: Path, shape: Shape, target_hidden: int | None, target_vocab: int | None) -> None:
    """UserError where a head was made for another hidden size or vocabulary; None is not checked."""
    for what, own, other in (
        ("hidden size", shape.hidden_size, target_hidden),
        ("a vocabulary of size", shape.vocab_size, target_vocab),
    ):
        if other is not None and own != other:
            raise UserError(f"head {folder} is for {what} {own}, the target has {other}; give a head that was trained for it")


def load(folder: Path, dtype: torch.dtype | None = None, target: PreTrainedConfig | None = None) -> tuple[Head, dict[str, Any]]:
    """A head of our own layout and the rest of its config.json, or one of a public layout (formats.read) and nothing.

    UserError where a file or a tensor is missing or wrong, or where the head does not fit `target`, if that is given.
    """
    text: Any = None if target is None else target.get_text_config(decoder=True)
    sizes = (None, None, None) if text is None else (text.hidden_size, text.vocab_size, text.num_hidden_layers)
    try:
        settings: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if "kind" not in settings:
            from forerun.heads import formats  # which builds on this file

            head = formats.read(folder, *sizes)
            return (head if dtype is None else cast(head, dtype)), {}
        kind = SHAPES[settings["kind"]]
        names = {field.name for field in fields(kind)}
        own: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in settings.items() if key in names}
        shape = kind(**own)
        refuse_misfit(folder, shape, *sizes[:2])
        head = build(shape)
        head.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"head {folder}: {type(error).__name__}: {reason}; give a folder that forerun train wrote") from error
    return (head if dtype is None else cast(head, dtype)), {key: value for key, value in settings.items() if key not in names}
