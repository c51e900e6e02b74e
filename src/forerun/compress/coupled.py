"""Channels that several layers share: MLP channels, and KV heads with their query heads, pruned with the same indices in each.

What is left is an ordinary smaller model, described by its config alone. Shape suffixes: U units, N outputs, K inputs.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from forerun.compress import prune
from forerun.packed.codes import CodedLinear
from forerun.types import UserError

What = Literal["mlp", "heads"]


class NothingPrunedError(UserError):
    """The fraction is too small for one unit: the model would stay as it is."""


@dataclass(frozen=True)
class Rows:
    """Outputs of a layer that belong to units: unit u has the rows start + u * width to start + (u + 1) * width."""

    layer: str
    start: int
    width: int


@dataclass(frozen=True)
class Site:
    """Where one decoder layer holds its units: rows of the layers that make them, columns of the one that reads them."""

    units: int
    made: tuple[Rows, ...]  # of one layer: by rising start, together all of its rows
    reader: str
    width: int  # columns of the reader that a unit has


def indices(keep_U: Tensor, width: int, start: int = 0) -> Tensor:
    """The rows or columns of the units that stay."""
    return (start + keep_U[:, None] * width + torch.arange(width, device=keep_U.device)).flatten()


def site(layer: nn.Module, what: What, config: Any) -> Site:
    """The units of a decoder layer; UserError in one sentence for an architecture whose units are not known to be apart."""
    found = mlp_site(layer) if what == "mlp" else head_site(layer, config)
    if found is None:
        raise UserError(
            f"prune.what={what}: {type(layer).__name__} does not have the layers of a Llama, Phi-3"
            + (" or OPT" if what == "mlp" else "")
            + f" {'MLP' if what == 'mlp' else 'attention'}; prune.what=input and output take any linear layers"
        )
    for name in {rows.layer for rows in found.made} | {found.reader}:
        if not isinstance(layer.get_submodule(name), nn.Linear | CodedLinear):
            raise UserError(f"prune.what={what}: {name} is pruned already; put {what} before input and output in the recipes")
    return found


def mlp_site(layer: nn.Module) -> Site | None:
    mlp = getattr(layer, "mlp", None)
    holders = set() if mlp is None else owners(mlp)
    if holders == {"gate_proj", "up_proj", "down_proj"}:
        units = int(mlp.down_proj.in_features)  # type: ignore[union-attr]
        return Site(units, (Rows("mlp.gate_proj", 0, 1), Rows("mlp.up_proj", 0, 1)), "mlp.down_proj", 1)
    if holders == {"gate_up_proj", "down_proj"}:
        units = int(mlp.down_proj.in_features)  # type: ignore[union-attr]
        return Site(units, (Rows("mlp.gate_up_proj", 0, 1), Rows("mlp.gate_up_proj", units, 1)), "mlp.down_proj", 1)
    if {"fc1", "fc2"} <= owners(layer) and mlp is None:  # OPT
        units = int(layer.get_submodule("fc2").in_features)  # type: ignore[arg-type]
        return Site(units, (Rows("fc1", 0, 1),), "fc2", 1)
    return None


def head_site(layer: nn.Module, config: Any) -> Site | None:
    attention = getattr(layer, "self_attn", None)
    if attention is None or not hasattr(attention, "head_dim") or not hasattr(config, "num_key_value_heads"):
        return None
    size = int(attention.head_dim)
    units = int(config.num_key_value_heads)
    wide = size * int(config.num_attention_heads) // units  # query heads that share a KV head lie side by side
    holders = owners(attention)
    # Norms of each head's own entries are the same for all heads; others would mix what goes with what stays.
    norms = {name for name in holders if getattr(getattr(attention, name, None), "weight", torch.empty(0)).shape == (size,)}
    if holders - norms == {"q_proj", "k_proj", "v_proj", "o_proj"}:
        keys = tuple(Rows(f"self_attn.{name}", 0, size) for name in ("k_proj", "v_proj"))
        return Site(units, (Rows("self_attn.q_proj", 0, wide), *keys), "self_attn.o_proj", wide)
    if holders - norms == {"qkv_proj", "o_proj"}:
        starts = ((0, wide), (units * wide, size), (units * (wide + size), size))
        return Site(units, tuple(Rows("self_attn.qkv_proj", *each) for each in starts), "self_attn.o_proj", wide)
    return None


def owners(module: nn.Module) -> set[str]:
    """The children that hold weights, and '' for the module's own."""
    names = [*dict(module.named_parameters()), *dict(module.named_buffers())]
    return {name.split(".", maxsplit=1)[0] if "." in name else "" for name in names}


def scores(layer: nn.Module, where: Site, magnitudes: Mapping[str, Tensor]) -> Tensor:
    """L1 norm of all weights of each unit [U]; weighted where `magnitudes` has the mean of each layer's inputs."""
    total_U: Tensor | int = 0
    for rows in where.made:
        own = layer.get_submodule(rows.layer)
        assert isinstance(own, nn.Linear | CodedLinear)
        of_N = prune.output_scores(prune.dense(own), magnitudes.get(rows.layer))
        total_U = total_U + of_N[rows.start : rows.start + where.units * rows.width].view(where.units, -1).sum(1)
    reader = layer.get_submodule(where.reader)
    assert isinstance(reader, nn.Linear | CodedLinear)
    of_K = prune.input_scores(prune.dense(reader), magnitudes.get(where.reader))
    return total_U + of_K.view(where.units, -1).sum(1)


def kept_channels(layer: nn.Module, where: Site, scores_U: Tensor, fraction: float, unit: int) -> Tensor:
    """The MLP channels that stay, a multiple of `unit` and of what codes need."""
    reader = layer.get_submodule(where.reader)
    made = [layer.get_submodule(rows.layer) for rows in where.made]
    for each in made:
        assert isinstance(each, nn.Linear | CodedLinear)
        unit = math.lcm(unit, prune.output_unit(each))
    assert isinstance(reader, nn.Linear | CodedLinear)
    if prune.is_grouped(reader):
        unit = math.lcm(unit, 2 * prune.BLOCK)  # blocks of both sizes then leave the same number, whichever a layer takes
    return prune.kept_inputs(reader, scores_U, fraction, unit)


def channel_unit(channels: int) -> int:
    """MLP channels stay in multiples of 64, or of a sixteenth of a small MLP's."""
    return max(1, min(64, 1 << max(channels // 16, 1).bit_length() - 1))


def heads_that_can_stay(config: PreTrainedConfig) -> list[int]:
    """Numbers of KV heads that the model's config admits: some want the hidden size to be a multiple of the heads."""
    settings: Any = config
    return [n for n in range(1, settings.num_key_value_heads + 1) if admits(config, head_counts(config, n))]


def head_counts(config: PreTrainedConfig, key_value: int) -> dict[str, int]:
    """What a config says of so many KV heads with their query heads; and of their size, which their number often implied."""
    settings: Any = config
    size = getattr(settings, "head_dim", None) or settings.hidden_size // settings.num_attention_heads
    query = key_value * (settings.num_attention_heads // settings.num_key_value_heads)
    return {"num_key_value_heads": key_value, "num_attention_heads": query, "head_dim": size}


def admits(config: PreTrainedConfig, changes: Mapping[str, int]) -> bool:
    changed = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(changed, name, value)
    try:
        type(config).from_dict(changed.to_dict())
    except Exception:  # noqa: BLE001 the libraries' validation errors share no base class
        return False
    return True


def heads_kept(config: PreTrainedConfig, fraction: float) -> int:
    """The admitted number of KV heads nearest to the wish, the smaller of two; NothingPrunedError where that is all of them."""
    able, total = heads_that_can_stay(config), int(config.num_key_value_heads)
    kept = min(able, key=lambda n: (abs(n - (1 - fraction) * total), n))
    if kept == total and fraction:
        others = ", ".join(str(n) for n in able if n != total)
        raise NothingPrunedError(
            f"prune.what=heads, fraction={fraction}: of {total} KV heads "
            + (f"{others} can stay; set the fraction to prune so many" if others else "none can go")
        )
    return kept


def smaller(layer: nn.Module, where: Site, keep_U: Tensor) -> dict[str, nn.Linear | CodedLinear]:
    """The layers, by name, with only the units that stay; UserError where codes would have to change for it."""
    rows_of: dict[str, list[Tensor]] = {}
    for rows in where.made:
        rows_of.setdefault(rows.layer, []).append(indices(keep_U, rows.width, rows.start))
    found: dict[str, nn.Linear | CodedLinear] = {}
    for name, parts in rows_of.items():
        own = layer.get_submodule(name)
        assert isinstance(own, nn.Linear | CodedLinear)
        found[name] = prune.with_outputs(own, torch.cat(parts))
    reader = layer.get_submodule(where.reader)
    assert isinstance(reader, nn.Linear | CodedLinear)
    found[where.reader] = read = prune.with_inputs(reader, indices(keep_U, where.width))
    if isinstance(read, CodedLinear) and read.group is not None:
        raise UserError(
            f"{where.reader}: units of {where.width} inputs do not fill its groups of codes; prune first, then quantize"
        )
    return found
