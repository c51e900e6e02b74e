"""The files of a public layout: its settings and tensors as they lie there, and a head filled from them."""

from __future__ import annotations

import functools
import json
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from forerun.heads.store import Head, Shape, build, cast
from forerun.types import UserError

# The first pattern that matches counts; several files are parts of one.
PATTERNS = ("medusa_lm_head.safetensors", "model*.safetensors", "medusa_lm_head.pt", "pytorch_model*.bin")
PREFIXES = ("medusa_head.", "medusa_heads.")  # beside them may lie the target's own tensors
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@dataclass(frozen=True)
class Source:
    """A folder as it was found; `target_layers` is how many layers the target has, where that is known."""

    folder: Path
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    target_layers: int | None

    def error(self, message: str) -> UserError:
        return UserError(f"head {self.folder}: {message}")

    def holds(self, prefix: str) -> bool:
        return any(name.startswith(prefix) for name in self.tensors)


@dataclass(frozen=True)
class Found:
    """What a folder says: the head's shape, the layout's name for each of our tensors, and those tensors."""

    shape: Shape
    rename: Callable[[str], str]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Parts:
    """What goes into a folder."""

    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    file: str = "model.safetensors"


def open_folder(folder: Path, target_layers: int | None) -> Source:
    """UserError where config.json or the tensors are missing or cannot be read; pickled files may hold tensors alone."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        files = next((found for pattern in PATTERNS if (found := sorted(folder.glob(pattern)))), [])
        tensors = {name: tensor for file in files for name, tensor in load_tensors(file).items()}
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        raise UserError(f"head {folder}: {reason}; fetch the folder anew, best in safetensors") from error
    if not isinstance(settings, dict) or not tensors:
        raise UserError(f"head {folder}: needs config.json and one of {', '.join(PATTERNS)}; fetch the whole folder")
    for prefix in PREFIXES:
        if any(name.startswith(prefix) for name in tensors):
            tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return Source(folder, settings, tensors, target_layers)


def load_tensors(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return load_file(file)
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(f"{file.name} is not a dict of tensors")
    return tensors


def fill(source: Source, found: Found) -> Head:
    """The head with every tensor of `found`, in their type; UserError that names what is missing, left over or misshapen."""
    head = build(found.shape)
    state = head.state_dict()
    names = {ours: found.rename(ours) for ours in state}
    missing, surplus = set(names.values()) - found.tensors.keys(), found.tensors.keys() - set(names.values())
    if missing or surplus:
        faults = [f"{verb} {listed(those)}" for verb, those in (("lacks", missing), ("holds unknown", surplus)) if those]
        raise source.error(f"{' and '.join(faults)}; give a whole head of a layout that forerun reads")
    for ours, theirs in names.items():
        if state[ours].shape != found.tensors[theirs].shape:
            given, wanted = list(found.tensors[theirs].shape), list(state[ours].shape)
            raise source.error(
                f"{theirs} has shape {given}, by config.json it should have {wanted}; they are of different heads"
            )
    if broken := [theirs for theirs in names.values() if found.tensors[theirs].isnan().any()]:
        raise source.error(f"NaN in {listed(broken)}; its training failed, give another")
    kinds = {found.tensors[names[ours]].dtype for ours, _ in head.named_parameters()}
    if kinds - FLOATS:
        raise source.error(f"holds tensors of type {listed(map(str, kinds - FLOATS))}; give a head that is not quantized")
    cast(head, functools.reduce(torch.promote_types, kinds))
    head.load_state_dict({ours: found.tensors[theirs] for ours, theirs in names.items()})
    return head


def listed(names: Iterable[str], most: int = 4) -> str:
    """The first names in order, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return ", ".join(ordered[:most]) + more


def type_name(head: Head) -> str:
    """As in config.json: `float32`."""
    return str(next(head.parameters()).dtype).removeprefix("torch.")


def renamer(table: dict[str, str]) -> Callable[[str], str]:
    """Renames by the first part of a tensor's name; what the table does not have keeps its name."""

    def rename(name: str) -> str:
        first, dot, rest = name.partition(".")
        return table.get(first, first) + dot + rest

    return rename
