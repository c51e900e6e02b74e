"""Tiny quantized and pruned models, and checkpoints with something changed."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from forerun.compress import calibrate, prune, rounding
from forerun.packed.codes import CodedLinear
from models import tiny

TOKENS = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(5))
Edit = Callable[[dict[str, Tensor], dict[str, Any]], object]


def coded(
    name: str = "llama", bits: int = 4, group_size: int = 32, symmetric: bool = True, **overrides: Any
) -> PreTrainedModel:
    """A tiny model with all layers quantized, biases that are not zero included."""
    model = copy.deepcopy(tiny(name, dtype=torch.float32, **overrides))
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    _, layers = calibrate.decoder_layers(model)
    for path, layer in list(layers.named_modules()):
        if isinstance(layer, nn.Linear):
            layers.set_submodule(path, CodedLinear.of(rounding.quantize(layer.weight, bits, group_size, symmetric), layer.bias))
    return model


def pruned(model: PreTrainedModel) -> PreTrainedModel:
    """Inputs of one layer, outputs of another, both of a third; the first two quantized where the model is."""
    mlp, attention = model.model.layers[0].mlp, model.model.layers[1].self_attn
    mlp.down_proj = prune.prune_inputs(mlp.down_proj, torch.arange(32, 64))
    attention.q_proj = prune.prune_outputs(attention.q_proj, torch.tensor([*range(8), *range(16, 32)]))
    mlp.gate_proj = prune.prune_inputs(mlp.gate_proj, torch.arange(32))
    outputs = torch.arange(0, 64, 2)
    mlp.gate_proj.inner = prune.prune_outputs(mlp.gate_proj.inner, outputs)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    return model(input_ids=TOKENS).logits


def edited(folder: Path, edit: Edit) -> Path:
    """The folder after a change of its tensors and its config."""
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    edit(tensors, config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder
