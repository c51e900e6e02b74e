"""Reads compressed checkpoints: GPTQ layouts, ours and others', and layers that forerun pruned; `checkpoint` is the way in."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from forerun.compress import layout
from forerun.compress.prune import linear
from forerun.model import first_line
from forerun.packed.codes import CodedLinear
from forerun.packed.pruned import L1PrunedInputLinear, L1PrunedOutputLinear
from forerun.types import UserError

OLD_BUFFERS = re.compile(r"(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)$")
"""Buffers that old checkpoints hold and that models make for themselves."""
LAYER_PARTS = (*layout.PARTS, "bias", "keep_inputs", "keep_outputs")


@dataclass(frozen=True)
class Declared:
    """What config.json says of the quantized layers."""

    bits: int
    group_size: int
    version: int


def is_coded(folder: Path) -> bool:
    """Whether `load` is the one to read a model folder: GPTQ layers, or layers that forerun pruned."""
    try:
        settings = read_settings(folder)
    except UserError:
        return False
    method = (settings.get("quantization_config") or {}).get("quant_method")
    return method == "gptq" or (method is None and bool(pruned_layers(settings)))


def pruned_layers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a config.json says of layers that forerun pruned, which no other library reads; by their names."""
    found: dict[str, Any] = (settings.get("forerun") or {}).get("pruned") or {}
    return found


def read_settings(folder: Path) -> dict[str, Any]:
    """config.json, with the quantize_config.json that old GPTQ checkpoints have beside it."""
    try:
        settings: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        beside = folder / "quantize_config.json"
        if "quantization_config" not in settings and beside.is_file():
            settings["quantization_config"] = {"quant_method": "gptq"} | json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"model folder {folder} cannot be read: {first_line(error)}") from error
    return settings


def declared(folder: Path, settings: Mapping[str, Any]) -> Declared | None:
    """UserError for a quantization that is not ours to read."""
    told = settings.get("quantization_config")
    if told is None:
        return None
    method, form = told.get("quant_method"), told.get("checkpoint_format") or told.get("format") or "gptq"
    if method != "gptq" or form not in ("gptq", "gptq_v2"):
        raise UserError(
            f"model folder {folder}: quantized by {method} as {form}, which is not read; the layouts gptq and gptq_v2 are"
        )
    if told.get("bits") not in (4, 8):
        raise UserError(f"model folder {folder}: GPTQ with {told.get('bits')} bits is not read; 4 and 8 bits are")
    size = told.get("group_size", -1)
    if type(size) is not int:
        raise UserError(f"model folder {folder}: quantization_config.group_size is {size!r}; give a number, or -1 for all")
    return Declared(told["bits"], size, 2 if form == "gptq_v2" else 1)


class Meta(TorchFunctionMode):
    """Makes large tensors without memory: weights come from `torch.empty`, the buffers that no file holds do not."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@dataclass
class Files:
    """The tensors of a folder, each to be taken once."""

    where: dict[str, tuple[Path, str]]  # the file, and the name in it
    taken: set[str] = field(default_factory=set)

    @classmethod
    def of(cls, folder: Path) -> Files:
        index = folder / "model.safetensors.index.json"
        whole = (
            [folder / "model.safetensors"] if (folder / "model.safetensors").is_file() else sorted(folder.glob("*.safetensors"))
        )
        if index.is_file():
            told: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            whole = sorted({folder / file for file in told.values()})
        elif len(whole) != 1:
            raise ValueError("no model.safetensors and no model.safetensors.index.json; only safetensors files are read")
        where: dict[str, tuple[Path, str]] = {}
        for path in whole:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118 not a mapping
                    if name in where:
                        raise ValueError(f"{name} is in {where[name][0].name} and in {path.name}")
                    where[name] = path, name
        if index.is_file() and where.keys() != told.keys():
            odd = sorted(where.keys() ^ told.keys())[0]
            raise ValueError(f"{odd} is {'in no file' if odd in told else 'in a file but not in the index'}")
        return cls(where)

    def take(self, name: str) -> Tensor:
        """A copy, since the tensor in the file lives only as long as the file stays as it is; the file is closed again."""
        if name not in self.where:
            raise ValueError(f"{name} is missing")
        self.taken.add(name)
        path, called = self.where[name]
        with safe_open(path, "pt") as file:
            tensor: Tensor = file.get_tensor(called)
            return tensor.clone()

    def rename(self, model: PreTrainedModel) -> None:
        """Call tensors as the model does where transformers writes them under other names, such as GPT-NeoX's head."""
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        names = [*model.state_dict(), *(f"{name}.{part}" for name in linears for part in LAYER_PARTS)]
        # The numbers of elements tell which name became which.
        numbered = {name: torch.empty(number, device="meta") for number, name in enumerate(dict.fromkeys(names), 1)}
        try:
            called = {len(tensor): name for name, tensor in revert_weight_conversion(model, dict(numbered)).items()}
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            raise ValueError(f"{type(model).__name__} stores its tensors merged ({first_line(error)})") from error
        for name, tensor in numbered.items():
            if name not in self.where and (other := called.get(len(tensor))) in self.where:
                self.where[name] = self.where.pop(other)

    @property
    def left(self) -> list[str]:
        return sorted(self.where.keys() - self.taken)


def load(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype | None = None, attention: str | None = None
) -> PreTrainedModel:
    """Read a folder with GPTQ or pruned layers, tensor by tensor, so that no dense copy of a quantized layer outlives its turn.

    `dtype`: of what is not quantized; None is the checkpoint's own. Besides our own folders, those of gptqmodel and AutoGPTQ
    are read: 4 and 8 bit, any group size, with and without desc_act, both versions. UserError for anything missing, left over,
    cut short or out of range.
    """
    settings = read_settings(folder)
    quantized = declared(folder, settings)
    try:
        model = skeleton(folder, dtype, attention)
        files = Files.of(folder)
        if not model.state_dict().keys() <= files.where.keys():
            files.rename(model)
        fill(model, files, quantized, pruned_layers(settings), torch.device(device))
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint {folder}: {first_line(error)}; fetch or write it again") from error
    if "forerun" in settings:
        model.config.forerun = settings["forerun"]
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.eval().requires_grad_(False)
    return model


def skeleton(folder: Path, dtype: torch.dtype | None, attention: str | None) -> PreTrainedModel:
    """The model with empty weights; its buffers that are in no file are real."""
    config = AutoConfig.from_pretrained(folder)
    for name in ("quantization_config", "forerun"):
        if hasattr(config, name):
            delattr(config, name)
    wanted = dtype or getattr(config, "dtype", None) or torch.float32
    kwargs: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    with Meta():
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=wanted, **kwargs)
    return model


def fill(
    model: PreTrainedModel, files: Files, quantized: Declared | None, pruned: Mapping[str, Any], device: torch.device
) -> None:
    """Put every tensor of the files in its place; ValueError where tensors and places do not match one to one."""
    kept = {name.rpartition(".")[0] for name in files.where if name.endswith((".keep_inputs", ".keep_outputs"))}
    if kept != pruned.keys():
        raise ValueError(f"{sorted(kept ^ pruned.keys())[0]}: config.json and the tensors disagree on whether it is pruned")
    layers = {
        name: read_layer(name, module, files, quantized, pruned.get(name, []), device)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and (name in pruned or any(f"{name}.{part}" in files.where for part in layout.PARTS))
    }
    filled: dict[str, Tensor] = {}
    absent = []
    for key, empty in model.state_dict().items():
        owner, _, leaf = key.rpartition(".")
        if owner in layers:
            continue
        if key not in files.where:
            absent.append(key)
            continue
        tensor = files.take(key).to(device)
        if tensor.shape != empty.shape:
            raise ValueError(f"{key} is {list(tensor.shape)}, not {list(empty.shape)}")
        filled[key] = tensor.to(empty.dtype)
        is_parameter = isinstance(getattr(model.get_submodule(owner), leaf), nn.Parameter)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(filled[key], False) if is_parameter else filled[key])
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    finish(model, files, filled, absent, device)


def finish(model: PreTrainedModel, files: Files, filled: Mapping[str, Tensor], absent: list[str], device: torch.device) -> None:
    """Tie what is tied, move the buffers that were in no file, and see that nothing is missing, doubtful or left over."""
    model.tie_weights()
    state = model.state_dict()
    places = {state[key].data_ptr() for key in filled}
    for key in absent:
        if state[key].is_meta or state[key].data_ptr() not in places:
            raise ValueError(f"{key} is missing")
    for key, tensor in filled.items():
        if state[key].data_ptr() != tensor.data_ptr() and not torch.equal(state[key], tensor):
            raise ValueError(f"{key} is tied to another tensor by config.json and differs from it")
    expected = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    for name in files.left:
        if not OLD_BUFFERS.search(name) and not any(re.search(pattern, name) for pattern in expected):
            raise ValueError(f"{name} is in the files and has no place in the model")
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))


def read_layer(
    name: str, empty: nn.Linear, files: Files, quantized: Declared | None, pruned: list[Any], device: torch.device
) -> nn.Module:
    """A layer from its tensors: quantized, pruned, or both."""
    size = {"inputs": empty.in_features, "outputs": empty.out_features}
    keeps: list[tuple[str, int, Tensor]] = []
    for kind, kept, total in pruned:
        keep = files.take(f"{name}.keep_{kind}")
        layout.demand(name, f"keep_{kind}", keep, (kept,), torch.int32)
        if total != size[kind] or keep.min() < 0 or keep.max() >= total or len(keep.unique()) != kept:
            raise ValueError(f"{name}.keep_{kind} does not name {kept} different ones of {size[kind]} {kind}")
        keeps.append((kind, total, keep))
        size[kind] = kept
    place: Tensor | None = empty.bias
    bias = files.take(f"{name}.bias") if place is not None or f"{name}.bias" in files.where else None
    if bias is not None:
        layout.demand(name, "bias", bias, (size["outputs"],))
        if place is None and bias.any():
            raise ValueError(f"{name}.bias is not zero, and the model has no place for it")
        bias = None if place is None else bias.to(empty.weight.dtype)
    layer: nn.Module
    if any(f"{name}.{part}" in files.where for part in layout.PARTS):
        if quantized is None:
            raise ValueError(f"{name} is quantized, and config.json does not say how")
        parts = {
            part: files.take(f"{name}.{part}") for part in layout.PARTS if part != "g_idx" or f"{name}.g_idx" in files.where
        }
        shape = size["outputs"], size["inputs"]
        layer = CodedLinear.of(layout.read(name, parts, shape, quantized.bits, quantized.group_size, quantized.version), bias)
    else:
        weight_NK = files.take(f"{name}.weight")
        layout.demand(name, "weight", weight_NK, (size["outputs"], size["inputs"]))
        layer = linear(weight_NK.to(empty.weight.dtype), bias)
    for kind, total, keep in reversed(keeps):
        layer = (L1PrunedInputLinear if kind == "inputs" else L1PrunedOutputLinear)(layer, keep, total)
    return layer.to(device)
