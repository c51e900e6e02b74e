"""Medusa heads as their project and as vLLM store them.

Sources: FasterDecoding/Medusa, medusa/model/medusa_model_legacy.py and medusa_model.py (names, settings, medusa_lm_head.pt; the
heads' prefix where they lie beside their model); huggingface/text-generation-inference,
server/text_generation_server/layers/medusa.py (medusa_lm_head.safetensors); vllm-project/vllm,
vllm/model_executor/models/medusa.py and vllm/transformers_utils/configs/medusa.py.
"""

from __future__ import annotations

import re

import torch

from forerun.heads.formats.files import Found, Parts, Source, type_name
from forerun.heads.medusa import Medusa, MedusaShape

NAME = re.compile(r"(\d+)\.(\d+)\.(linear\.weight|linear\.bias|weight)")


def read(source: Source) -> Found:
    """The project's own layout. All heads in the file count: config.json often says fewer, or leaves sizes out."""
    numbers = [int(match[1]) for match in map(NAME.fullmatch, source.tensors) if match]
    heads = max(max(numbers) + 1, source.settings.get("medusa_num_heads", 0))
    layers = source.settings.get("medusa_num_layers", 1)
    output = source.tensors.get(f"0.{layers}.weight")
    if output is None:
        raise source.error(f"lacks 0.{layers}.weight; forerun reads Medusa heads that have output layers of their own")
    shape = MedusaShape(hidden_size=output.shape[-1], vocab_size=output.shape[0], heads=heads, layers=layers)
    return Found(shape, lambda name: own_name(name, shape), source.tensors)


def own_name(name: str, shape: MedusaShape) -> str:
    """blocks.K.L.linear.weight -> K.L.linear.weight; outputs.K.weight -> K.LAYERS.weight."""
    kind, head, rest = name.split(".", 2)
    return f"{head}.{rest}" if kind == "blocks" else f"{head}.{shape.layers}.{rest}"


def read_vllm(source: Source) -> Found:
    """vLLM's layout; its blocks may have no bias (medusa_fc_bias), which is a bias of zero."""
    settings, tensors = source.settings, dict(source.tensors)
    shape = MedusaShape(settings["hidden_size"], settings["vocab_size"], settings["num_heads"], settings["num_hidden_layers"])
    if (settings.get("truncated_vocab_size") or shape.vocab_size) != shape.vocab_size:
        raise source.error("truncated_vocab_size: forerun reads Medusa heads that speak the whole vocabulary")
    if not settings.get("medusa_fc_bias", False):
        for name, weight in source.tensors.items():
            if name.startswith("blocks."):
                tensors.setdefault(name.removesuffix("weight") + "bias", torch.zeros(shape.hidden_size, dtype=weight.dtype))
    return Found(shape, vllm_name, tensors)


def vllm_name(name: str) -> str:
    """blocks.K.L.linear.weight -> blocks.K.layers.L.weight; outputs.K.weight -> lm_heads.K.weight."""
    kind, head, rest = name.split(".", 2)
    return f"blocks.{head}.layers.{rest.replace('.linear.', '.')}" if kind == "blocks" else f"lm_heads.{head}.{rest}"


def write(head: Medusa, target_name: str) -> Parts:
    shape = head.shape
    settings = {
        "base_model_name_or_path": target_name,
        "medusa_num_heads": shape.heads,
        "medusa_num_layers": shape.layers,
        "torch_dtype": type_name(head),
    }
    tensors = {own_name(name, shape): tensor for name, tensor in head.state_dict().items()}
    return Parts(settings, tensors, "medusa_lm_head.pt")  # the one file that the project itself looks for


def write_vllm(head: Medusa) -> Parts:
    shape = head.shape
    settings = {
        "architectures": ["MedusaModel"],
        "model_type": "medusa",
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "truncated_vocab_size": shape.vocab_size,
        "num_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "medusa_fc_bias": True,
        "torch_dtype": type_name(head),
    }
    return Parts(settings, {vllm_name(name): tensor for name, tensor in head.state_dict().items()})
