"""The bnb recipe: what bitsandbytes made of each layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from forerun.compress import bnb, prune
from forerun.compress.apply import Tell
from forerun.compress.opened import read_tokenizer
from forerun.compress.recipes import Row, named
from forerun.compress.restore import Files, is_coded
from forerun.config import BnbConfig, ModelConfig
from forerun.model import Loaded, read_config, verify_attention
from forerun.packed import scales_beside
from forerun.types import UserError


def quantized_by_bnb(config: ModelConfig, recipe: BnbConfig, index: int, tell: Tell) -> tuple[Loaded, list[Row], int]:
    """The model of a plain folder, quantized as it is read; a row a layer, and the bytes that all weights had before."""
    settings: Any = plain_settings(config.path)
    with torch.device("meta"):
        bnb.refuse_misfit(AutoModelForCausalLM.from_config(settings), recipe)
    dtype = getattr(torch, config.dtype) if config.dtype != "auto" else settings.dtype or torch.float32
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device in ("auto", "balanced") else config.device
    tell(f"recipe {index + 1}: {named(recipe)}", 0, 1)
    model = bnb.load(config.path, recipe, dtype, device, verify_attention(settings, config.attention))
    rows, before = [], 0
    plain: dict[int, int] = {}
    try:
        files = Files.of(Path(config.path))
    except (OSError, ValueError, KeyError, SafetensorError):  # an older kind of file: errors are left out
        files = Files({})
    for name, module in model.named_modules():
        if not is_quantized(module):
            plain |= {tensor.data_ptr(): tensor.nbytes for tensor in module.parameters(recurse=False)}  # tied ones once
            continue
        own: Any = module
        size = own.in_features * own.out_features * dtype.itemsize
        before += size
        known = f"{name}.weight" in files.where
        error = None
        if known:
            weight = files.take(f"{name}.weight").float()
            error = prune.lost(weight.T if issubclass(own.source_cls, Conv1D) else weight, dequantized(own))
        after = held(own)
        rows.append(Row(index, name, named(recipe), own.in_features, own.in_features, size, after, error, "weights"))
    tell(f"recipe {index + 1}: {named(recipe)}", 1, 1)
    return Loaded(model, read_tokenizer(config.path)), rows, before + sum(plain.values())


def plain_settings(path: str) -> PreTrainedConfig:
    """The settings of a model that bitsandbytes can read; UserError where config.json is damaged or the model is not plain."""
    settings = read_config(path)
    if getattr(settings, "quantization_config", None) is not None:
        raise UserError(f"model {path!r} is quantized already; recipes take the original model")
    if is_coded(Path(path)):
        raise UserError(f"model {path!r} has pruned layers of forerun's own, which bitsandbytes cannot read; take gptq or rtn")
    return settings


def is_quantized(module: nn.Module) -> bool:
    return type(module).__name__ in ("Linear4bit", "Linear8bitLt")


def dequantized(layer: Any) -> Tensor:
    """The weight [out, in] that a layer of bitsandbytes stands for; before its first forward pass."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight  # which imports bitsandbytes

    weight: Tensor = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
    return weight.float().view(layer.out_features, layer.in_features).cpu()


def held(layer: Any) -> int:
    """Bytes of codes and scales."""
    return sum(tensor.nbytes for tensor in (*layer.parameters(), *scales_beside(layer)))
