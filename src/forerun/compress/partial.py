"""Finished layers of an unfinished run, each a file that is whole or absent."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from forerun.compress.recipes import Row
from forerun.packed.codes import CodedLinear


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
