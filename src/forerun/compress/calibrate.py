"""What each linear layer of a model sees when calibration tokens run through it, layer by layer.

Shape suffixes: S samples, T tokens, H hidden size, K inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from forerun.compress.prune import linear
from forerun.model import kv_bytes
from forerun.packed.codes import CodedLinear
from forerun.sampling import exponentials, race
from forerun.types import UserError

Statistic = Literal["hessian", "magnitude"]
Replacements = Mapping[str, nn.Module]
"""New modules of one decoder layer by their names within it, such as `mlp.down_proj`."""
HALVED = 256
"""Rows of a Hessian that are summed in one product."""
CACHE_BYTES = 2 << 30
"""Most that the KV cache of texts being written takes, where that leaves room for eight."""


@dataclass
class Seen:
    """What one tensor that linear layers read has been so far, in float32; q/k/v share one."""

    statistic: Statistic
    inputs: int
    device: torch.device
    rows: int = 0

    def __post_init__(self) -> None:
        shape = (self.inputs, self.inputs) if self.statistic == "hessian" else (self.inputs,)
        self.total = torch.zeros(shape, device=self.device)

    def add(self, states: Tensor) -> None:
        states_RK = states.reshape(-1, self.inputs).float()
        self.rows += len(states_RK)
        if self.statistic == "hessian":
            for start in range(0, self.inputs, HALVED):  # symmetric: the blocks below the diagonal are mirrored at the end
                part_RB = states_RK[:, start : start + HALVED]
                self.total[start : start + HALVED, start:].addmm_(part_RB.T, states_RK[:, start:])
        else:
            self.total.add_(states_RK.abs().sum(0))

    def result(self) -> Tensor:
        """The Hessian sum of x^T x [K, K], or the mean magnitude of each input [K]; once, at the end."""
        if self.statistic == "magnitude":
            return self.total / max(self.rows, 1)
        return self.total.triu_().add_(self.total.triu(1).T)


Linear = nn.Linear | CodedLinear
Observed = dict[str, tuple[Linear, Tensor]]
"""The linear layers of a decoder layer by name, and what each sees; those that read one tensor share one statistic (`is`)."""
Visit = Callable[[int, Observed], Replacements]
"""Gets a decoder layer's number and its linear layers, and returns what takes their places."""


def windows(texts: Sequence[Sequence[int]], samples: int, length: int, seed: int = 0) -> Tensor:
    """Token ids [S, T]: texts in a seeded order, laid end to end and cut; fewer than `samples` where the texts end."""
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(seed)).tolist()
    laid: list[int] = []
    for i in order:
        laid += texts[i]
        if len(laid) >= samples * length:
            break
    whole = min(len(laid) // length, samples)
    if not whole:
        raise UserError(
            f"calibration: all texts together have {len(laid)} tokens, fewer than one window of calibration.length={length}"
        )
    return torch.tensor(laid[: whole * length]).view(whole, length)


@torch.inference_mode()
def written(
    model: PreTrainedModel,
    samples: int,
    length: int,
    seed: int = 0,
    rows: int | None = None,
    tell: Callable[[int, int], None] = lambda _done, _all: None,
) -> Tensor:
    """Token ids [S, T] that the model itself writes at temperature 1, after its BOS token or a random one.

    `rows` texts at a time, by default as many as `rows_at_once` says; `tell` hears how many of how many tokens are written.
    """
    vocabulary, bos = model.get_output_embeddings().out_features, model.config.get_text_config(decoder=True).bos_token_id
    low, high = (0, vocabulary) if bos is None else (bos, bos + 1)
    rows = rows or rows_at_once(model, length)
    stream = torch.Generator(model.device).manual_seed(seed)
    parts = []
    for start in range(0, samples, rows):
        count = min(rows, samples - start)
        tokens = [torch.randint(low, high, (count, 1), generator=stream, device=model.device)]
        cache: Any = None
        while len(tokens) < length:
            out = model(input_ids=tokens[-1], past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, laws_SV = out.past_key_values, out.logits[:, -1].float().softmax(-1)
            drawn_SV = exponentials([stream], laws_SV.numel(), laws_SV.device).view_as(laws_SV)
            tokens.append(race(laws_SV, drawn_SV)[:, None])
            tell(start * length + count * len(tokens), samples * length)
        parts.append(torch.cat(tokens, 1).cpu())
    return torch.cat(parts)


def rows_at_once(model: PreTrainedModel, length: int) -> int:
    """How many texts are written at a time: many, since a pass costs little more for them, while their KV cache is small."""
    return max(8, min(128, CACHE_BYTES // (kv_bytes(model.config, model.dtype) * length)))


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """The name and the list of a model's decoder layers; UserError where they cannot be found or have no linear layers."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise UserError(f"{type(model).__name__}: its {count} decoder layers were not found, so it cannot be compressed")
    name, layers = found[0]
    if not any(isinstance(module, Linear) for module in layers.modules()):
        kinds = sorted({type(m).__name__ for m in layers.modules() if isinstance(getattr(m, "weight", None), nn.Parameter)})
        raise UserError(
            f"{type(model).__name__} cannot be compressed: its decoder layers have {', '.join(kinds)} in place of nn.Linear"
        )
    return name, layers


def linears(model: PreTrainedModel) -> dict[str, Linear]:
    """The linear layers of the decoder layers by their full names; embeddings and output head are not among them."""
    prefix, layers = decoder_layers(model)
    return {f"{prefix}.{name}": module for name, module in layers.named_modules() if isinstance(module, Linear)}


class Reached(Exception):  # noqa: N818 not an error: the rest of the forward pass is not wanted
    """A forward pass came to the first decoder layer."""


@dataclass(frozen=True)
class Call:
    """Arguments of a decoder layer, apart from the hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
        if args:
            return args[0], cls(args[1:], kwargs)
        return kwargs["hidden_states"], cls((), {name: value for name, value in kwargs.items() if name != "hidden_states"})

    def run(self, layer: nn.Module, states: Tensor) -> Tensor:
        out = layer(states, *self.args, **self.kwargs)
        result: Tensor = out[0] if isinstance(out, tuple) else out
        return result

    def equals(self, other: Call) -> bool:
        return same(self.args, other.args) and same(self.kwargs, other.kwargs)


def same(one: Any, other: Any) -> bool:
    """Whether two arguments are equal, tensors inside them by value; objects of other kinds (a cache, a config) pass."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other)


def calls_of(model: PreTrainedModel, layers: nn.ModuleList, ids_ST: Tensor) -> list[Call]:
    """How the model itself calls each of its layers on some tokens: masks, positions and rotary embeddings included."""
    calls: list[Call] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(Call.of(args, kwargs)[1])

    hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in layers]
    try:
        model(input_ids=ids_ST, use_cache=False, logits_to_keep=1)
    finally:
        for hook in hooks:
            hook.remove()
    if len(calls) != len(layers):
        raise UserError(f"{type(model).__name__} cannot be compressed: it runs {len(layers)} decoder layers {len(calls)} times")
    return calls


def embedded(model: PreTrainedModel, first: nn.Module, ids_ST: Tensor) -> Tensor:
    """What reaches the first decoder layer."""
    states: list[Tensor] = []

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states.append(Call.of(args, kwargs)[0])
        raise Reached

    hook = first.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(input_ids=ids_ST, use_cache=False)
    except Reached:
        pass
    finally:
        hook.remove()
    return states[0]


class Single(nn.Module):
    """A linear layer that computes in float32, whatever it is given and gives back."""

    def __init__(self, layer: Linear) -> None:
        super().__init__()
        bias: Tensor | None = layer.bias
        self.weight, self.bias = layer.weight.detach().float(), None if bias is None else bias.detach().float()

    def forward(self, states: Tensor) -> Tensor:
        return functional.linear(states.float(), self.weight, self.bias).to(states.dtype)


@contextmanager
def expanded(layer: nn.Module, states: Tensor) -> Iterator[dict[str, Linear]]:
    """Faster linear layers in a decoder layer for a while; tells the layers as they are.

    Dense ones in place of coded ones, which would dequantize anew for every sample. On a CPU without matrix units float32 in
    place of bfloat16, since products of many rows are faster in it (AVX-512: 143 against 83 GFLOP/s a core).
    """
    linears: dict[str, Linear] = {name: module for name, module in layer.named_modules() if isinstance(module, Linear)}
    single = states.device.type == "cpu" and states.dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported()
    try:
        for name, module in linears.items():
            if single:
                layer.set_submodule(name, Single(module))
            elif isinstance(module, CodedLinear):
                bias = None if module.bias is None else module.bias.to(states.dtype)
                layer.set_submodule(name, linear(module.codes().dequantize(states.dtype), bias))
        yield linears
    finally:
        for name, module in linears.items():
            layer.set_submodule(name, module)


def observe(
    layer: nn.Module, names: Iterable[str], call: Call, states_STH: list[Tensor], statistic: Statistic
) -> dict[str, Tensor]:
    """What each of the named modules of a decoder layer reads when all samples run through it."""
    source: dict[str, Seen] = {}  # by linear layer; found in the first pass
    leaders: dict[str, Seen] = {}
    read: list[tuple[Tensor, Seen]] = []  # of one pass; holds the tensors, so that `is` tells them apart

    def look(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if name not in source:
                known = next((seen for tensor, seen in read if tensor is args[0]), None)
                source[name] = known or Seen(statistic, args[0].shape[-1], args[0].device)
                read.append((args[0], source[name]))
                if known is None:
                    leaders[name] = source[name]
            if name in leaders:
                leaders[name].add(args[0])

        return hook

    hooks = [layer.get_submodule(name).register_forward_pre_hook(look(name)) for name in names]
    try:
        for states_TH in states_STH:
            call.run(layer, states_TH)
            read.clear()
    finally:
        for hook in hooks:
            hook.remove()
    values = {id(seen): seen.result() for seen in leaders.values()}
    return {name: values[id(seen)] for name, seen in source.items()}


@torch.no_grad()
def sequential(
    model: PreTrainedModel,
    tokens_ST: Tensor,
    visit: Visit,
    statistic: Statistic = "hessian",
    done: Callable[[int], Replacements | None] = lambda _: None,
    tell: Callable[[int, int], None] = lambda _done, _all: None,
) -> None:
    """Visit each decoder layer with what its linear layers see, put in what `visit` returns, and go on with its new outputs.

    Beside the model, memory holds the hidden states of all samples and one layer's statistics. Where `done` knows a layer's
    replacements from an earlier run, they go in unvisited. `tell` hears how many of how many layers are finished.
    Embeddings and output head are left alone. UserError where the model's layers cannot be run one by one.
    """
    _, layers = decoder_layers(model)
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit and tokens_ST.shape[1] > limit:
        raise UserError(f"calibration.length={tokens_ST.shape[1]}: {type(model).__name__} takes at most {limit} tokens")
    ids = tokens_ST.to(model.device)
    calls = calls_of(model, layers, ids[:1])
    if len(ids) > 1 and not all(map(Call.equals, calls, calls_of(model, layers, ids[-1:]))):
        raise UserError(f"{type(model).__name__} cannot be compressed: its layers read more of a text than hidden states")
    states = [embedded(model, layers[0], row_T[None]) for row_T in ids]
    for index, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        new = done(index)
        if new is None:
            with expanded(layer, states[0]) as linears:
                seen = observe(layer, linears, call, states, statistic)
            new = visit(index, {name: (linears[name], seen.pop(name)) for name in list(seen)})
        for name, module in new.items():
            layer.set_submodule(name, module)
        if index + 1 < len(layers):
            with expanded(layer, states[0]):
                for sample, states_TH in enumerate(states):
                    states[sample] = call.run(layer, states_TH)
        tell(index + 1, len(layers))
