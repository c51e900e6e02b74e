"""Compressed models on disk: a transformers folder whose quantized layers are in the standard GPTQ layout.

Layers with pruned inputs or outputs keep their tensors' usual names, and beside them are `keep_inputs` or `keep_outputs`;
config.json then lists them under `forerun`, and no other library reads the folder. Everything is written from codes, so that a
model that was loaded is saved as the same files again.
"""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from forerun import __version__
from forerun.compress import layout
from forerun.compress.restore import is_coded, load
from forerun.model import first_line
from forerun.packed.codes import CodedLinear, Codes
from forerun.packed.pruned import L1PrunedInputLinear, L1PrunedOutputLinear
from forerun.types import UserError

__all__ = ["is_coded", "load", "save"]


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    folder: Path,
    extra: Mapping[str, Any] | None = None,
    max_shard_size: str = "5GB",
) -> None:
    """Write a model with CodedLinear, pruned or plain layers, whole or not at all; config.json has `extra` under `forerun`.

    UserError where the folder holds files, the disk is full, a layer has no GPTQ layout, or the model was not made here.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is there already; give another folder, or remove it")
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and str(quantizer.quantization_config.quant_method).lower().endswith("gptq"):
        raise UserError(
            "this model was loaded by transformers from a GPTQ checkpoint, whose files it cannot write; copy its folder"
        )
    if any(getattr(getattr(each, "quant_state", None), "packing_format_for_cpu", False) for each in model.parameters()):
        raise UserError(
            "bitsandbytes repacked this model in its first forward pass and would write another one; save it before that"
        )
    groups = uniform_groups(model)
    settings = quantization_config(model, groups)
    inward = reversed(list(model.named_modules()))  # of pruned layers inside each other the outermost comes last and stays
    pruned = {plain_name(model, name): facts(module) for name, module in inward if is_pruned(module)}
    own = dict(getattr(model.config, "forerun", {})) | dict(extra or {})
    own = {key: value for key, value in own.items() if key != "pruned"} | ({"pruned": pruned} if pruned else {})
    tensors = dict(stored(model, groups, 1 if settings.get("sym") else 2)) if groups or pruned else None
    half_done = folder.with_name(folder.name + ".part")
    shutil.rmtree(half_done, ignore_errors=True)
    try:
        model.save_pretrained(half_done, state_dict=tensors, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(half_done)
        path = half_done / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        config |= ({"quantization_config": settings} if settings else {}) | ({"forerun": own} if own else {})
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        half_done.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(half_done, ignore_errors=True)
        raise UserError(f"{folder} cannot be written: {first_line(error)}") from error


def uniform_groups(model: nn.Module) -> dict[str, int]:
    """The group size to store each quantized layer with.

    Other libraries take one size for all layers, so where sizes differ in a model without pruned layers, all are stored with
    the largest size that divides them, their scales repeated.
    """
    coded = {name: module for name, module in model.named_modules() if isinstance(module, CodedLinear)}
    sizes = {name: module.in_features if module.group_size == -1 else module.group_size for name, module in coded.items()}
    declared = {module.group_size for module in coded.values()}
    if len(declared) > 1 and not any(map(is_pruned, model.modules())):
        if any(module.group is not None for module in coded.values()):
            raise UserError("layers with groups of several sizes and in an order of their own have no common GPTQ layout")
        return dict.fromkeys(coded, math.gcd(*sizes.values()))
    return {name: module.group_size for name, module in coded.items()}


def regrouped(codes: Codes, group_size: int) -> Codes:
    """The same weights with smaller groups."""
    if group_size == codes.group_size:
        return codes
    first_G = torch.arange(0, codes.in_features, group_size, device=codes.codes_NK.device)
    old_G = codes.groups_K()[first_G]
    return Codes(codes.codes_NK, codes.scales_NG[:, old_G], codes.zeros_NG[:, old_G], codes.bits, group_size)


def is_pruned(module: object) -> bool:
    return isinstance(module, L1PrunedInputLinear | L1PrunedOutputLinear)


def facts(module: nn.Module) -> list[list[Any]]:
    """What config.json says of a pruned layer, outermost first: inputs or outputs, how many are kept, of how many."""
    said: list[list[Any]] = []
    while isinstance(module, L1PrunedInputLinear | L1PrunedOutputLinear):
        of_inputs = isinstance(module, L1PrunedInputLinear)
        said.append(
            ["inputs", len(module.keep), module.in_features]
            if of_inputs
            else ["outputs", len(module.keep), module.out_features]
        )
        module = module.inner
    return said


def plain_name(model: nn.Module, name: str) -> str:
    """A module's name without the `inner` of the pruned layers around it."""
    parts: list[str] = []
    module = model
    for part in name.split("."):
        if not is_pruned(module):
            parts.append(part)
        module = module.get_submodule(part)
    return ".".join(parts)


def quantization_config(model: nn.Module, groups: Mapping[str, int]) -> dict[str, Any]:
    """What other libraries must know of the quantized layers; empty where there are none."""
    if not groups:
        return {}
    coded = [model.get_submodule(name) for name in groups]
    assert all(isinstance(module, CodedLinear) for module in coded)
    widths = sorted({int(module.bits) for module in coded})  # type: ignore[arg-type]
    if len(widths) > 1:
        raise UserError("layers of 4 and of 8 bits have no common GPTQ layout; quantize all layers with the same bits")
    symmetric = all(bool((module.zeros == 2 ** (widths[0] - 1)).all()) for module in coded)
    return {
        "quant_method": "gptq",
        "bits": widths[0],
        "group_size": Counter(groups.values()).most_common(1)[0][0],
        "desc_act": any(module.group is not None for module in coded),
        "sym": symmetric,
        "lm_head": False,
        # Version 1 cannot say a zero point of 0, and gptqmodel takes it with sym=false from its own writer alone.
        "checkpoint_format": "gptq" if symmetric else "gptq_v2",
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"forerun:{__version__}"]},
    }


def stored(model: PreTrainedModel, groups: Mapping[str, int], version: int) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint by name."""
    for key, tensor in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        module, name = model.get_submodule(owner), plain_name(model, owner)
        if isinstance(module, L1PrunedInputLinear | L1PrunedOutputLinear):
            yield f"{name}.keep_{'inputs' if isinstance(module, L1PrunedInputLinear) else 'outputs'}", tensor.int()
        elif not isinstance(module, CodedLinear) or leaf == "bias":
            yield f"{name}.{leaf}" if owner else leaf, tensor
        elif leaf == "packed":
            yield from layout.write(name, regrouped(module.codes(), groups[owner]), version).items()
