"""The folder beside a model while it is made: held by one run, with finished layers, each a file that is whole or absent."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from forerun.compress.recipes import Row
from forerun.model import first_line
from forerun.packed.codes import CodedLinear
from forerun.types import UserError

MARK = "identity"
"""The file by which such a folder is ours: what the run depends on as a hash, or nothing. It is also the lock."""
REPLACED = "replaced"
"""In such a folder: the old model, while the new one takes its place."""


@contextmanager
def held(work: Path, out: Path) -> Iterator[Path]:
    """Make the folder of unfinished work for `out` and hold it alone; its mark. In the end only finished layers are left in it.

    UserError where another run holds it, or where it has other files than ours: nothing of them is removed.
    """
    import fcntl

    mark, busy = work / MARK, f"another run writes to {out} just now ({work}); wait for it, or name another folder"
    if work.exists() and not is_ours(work):
        raise UserError(f"{work} holds other files than those of an unfinished run; move it, or name another folder than {out}")
    try:
        work.mkdir(parents=True, exist_ok=True)
        file = mark.open("a")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {first_line(error)}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(busy) from error
        except OSError:
            pass  # a file system without locks
        if not mark.exists() or not os.path.samestat(os.fstat(file.fileno()), mark.stat()):  # the other run ended just now
            raise UserError(busy)
        put_back(work, out)
        try:
            yield mark
        finally:
            tidy(work)


def is_ours(work: Path) -> bool:
    """Whether a folder is one that `held` made; an empty one may be."""
    if not work.is_dir():
        return False
    mark = work / MARK
    if not mark.is_file():
        return not any(work.iterdir())
    return re.fullmatch("[0-9a-f]*", mark.read_text(encoding="utf-8", errors="replace")) is not None


def tidy(work: Path) -> None:
    """Remove what is of no use to a later run: everything but layers, and the old model if it could not be put back."""
    for path in work.glob("*/"):
        if path.name != REPLACED:
            shutil.rmtree(path, ignore_errors=True)
    if not any(work.glob("*.safetensors")) and not (work / REPLACED).exists():
        shutil.rmtree(work, ignore_errors=True)


def clear(mark: Path) -> None:
    """Remove all that an earlier run left in a held folder."""
    for path in mark.parent.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path != mark:
            path.unlink()


def exchange(made: Path, work: Path, out: Path) -> None:
    """Put a finished model in its place; the one that was there goes into the held folder, and back if this fails."""
    try:
        if out.exists():
            out.rename(work / REPLACED)
        made.rename(out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {first_line(error)}") from error
    finally:
        put_back(work, out)


def put_back(work: Path, out: Path) -> None:
    """Finish an exchange, or undo it where it was cut off between its two steps."""
    if (work / REPLACED).exists() and not out.exists():
        (work / REPLACED).rename(out)
    shutil.rmtree(work / REPLACED, ignore_errors=True)


def keep(path: Path, layers: Mapping[str, CodedLinear], rows: Sequence[Row]) -> None:
    """Write a decoder layer's coded linear layers and what the report says of them."""
    tensors = {
        f"{name}|{key}": value.contiguous() for name, layer in layers.items() for key, value in layer.state_dict().items()
    }
    shapes = {name: [layer.bits, layer.group_size, layer.in_features] for name, layer in layers.items()}
    half_done = path.with_suffix(".part")
    metadata = {"layers": json.dumps(shapes), "rows": json.dumps([asdict(row) for row in rows])}
    save_file(tensors, half_done, metadata=metadata)
    half_done.replace(path)


def read(path: Path, device: torch.device) -> tuple[dict[str, CodedLinear], list[Row]] | None:
    """What `keep` wrote; None where it is absent, or damaged, so that the layer is made anew."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            said: dict[str, str] = file.metadata()
            shapes: dict[str, Any] = json.loads(said["layers"])
            layers = {}
            for name, (bits, group_size, inputs) in shapes.items():
                own = {key.split("|")[1]: file.get_tensor(key) for key in file.keys() if key.split("|")[0] == name}  # noqa: SIM118 no mapping
                packed = CodedLinear(inputs, len(own["packed"]), bits, group_size, device=torch.device("meta"))
                packed.packed = own["packed"]
                packed.scales, packed.zeros = own["scales"], own["zeros"]
                packed.group, packed.bias = own.get("group"), own.get("bias")
                layers[name] = packed
            return layers, [Row(**row) for row in json.loads(said["rows"])]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError):
        return None
