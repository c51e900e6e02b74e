"""Drop-in linear layers that decode faster: sibling projections in one product, weights laid out for the CPU's matrix kernels.

`pack` is the one entry. A packed model is for inference: it cannot be trained, saved, moved or deep-copied.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))
"""Names of projections of one parent that read the same tensor; a wrong guess costs time, never correctness (`Part`)."""

# The one piece of state outside objects: a compiled program cannot hold an opaque tensor, so it names its layer by number.
_layouts: weakref.WeakValueDictionary[int, Prepacked] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def pack(model: nn.Module) -> int:
    """Replace the `nn.Linear` layers of a model, in place, by equal and faster ones; returns how many it replaced.

    Siblings such as q/k/v become one product everywhere. On the CPU in bfloat16 and float32 the weights are laid out for
    oneDNN; other dtypes, other devices, subclasses of nn.Linear and layers with hooks keep their plain products. Results
    differ from `F.linear` by rounding alone. Packing twice changes nothing. Memory: bfloat16 weights move into their new
    layout, float32 weights are kept in both layouts (see `Prepacked`), and an output head that is tied to the embedding
    gets a copy of its own, since the embedding table must stay as it is.
    """
    replaced = 0
    for parent in list(model.modules()):
        for names in SIBLINGS:
            layers: list[object] = [getattr(parent, name, None) for name in names]
            linears = [layer for layer in layers if is_plain(layer)]
            if len(linears) == len(names) and can_fuse(linears):
                shared = Shared(fuse(linears), [layer.out_features for layer in linears])
                for index, name in enumerate(names):
                    setattr(parent, name, Part(shared, index))
                replaced += len(names)
        for name, layer in list(parent.named_children()):
            if is_plain(layer) and can_prepack(layer.weight):
                setattr(parent, name, Prepacked(layer))
                replaced += 1
    return replaced


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all distinct weights, packed ones included (`model.parameters()` does not see those)."""
    held = {p.data_ptr(): p.nbytes for p in model.parameters()}
    return sum(held.values()) + sum(module.packed_bytes for module in model.modules() if isinstance(module, Prepacked))


def is_plain(layer: object) -> TypeGuard[nn.Linear]:
    """A bare nn.Linear: a subclass, a hook or a parametrization means more than a product."""
    return type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks or layer.weight.is_meta)


def can_fuse(layers: list[nn.Linear]) -> bool:
    return len({(layer.in_features, layer.weight.dtype, layer.weight.device) for layer in layers}) == 1


def can_prepack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def fuse(layers: list[nn.Linear]) -> nn.Linear | Prepacked:
    """One layer whose output is the outputs of all, side by side."""
    with torch.device("meta"):
        fused = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), bias=False)
    fused.weight = frozen(torch.cat([layer.weight.detach() for layer in layers]))
    biases: list[Tensor | None] = [layer.bias for layer in layers]
    if any(bias is not None for bias in biases):
        rows = [layer.weight.new_zeros(layer.out_features) for layer in layers]
        biases_or_zeros = [row if bias is None else bias.detach() for bias, row in zip(biases, rows, strict=True)]
        fused.bias = frozen(torch.cat(biases_or_zeros))
    return Prepacked(fused) if can_prepack(fused.weight) else fused


def frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


class Prepacked(nn.Module):
    """A linear layer whose weight [out, in] lies in oneDNN's own blocked layout.

    float32 also keeps the plain weight, because for a single row the plain product is the faster one; in bfloat16 the blocked
    layout is the faster one for few rows and no slower for many.
    """

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        weight = layer.weight.detach()
        self.plain = frozen(weight) if weight.dtype == torch.float32 else None
        bias: Tensor | None = layer.bias
        self.bias = None if bias is None else frozen(bias.detach())
        self.packed_bytes = weight.nbytes
        # An opaque tensor: neither a parameter nor a buffer, since it cannot be moved, cast, copied or saved.
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)
        self.number = next(_numbers)
        _layouts[self.number] = self

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] in the plain layout; a fresh copy in bfloat16."""
        return self._packed.to_dense() if self.plain is None else self.plain

    def forward(self, states: Tensor) -> Tensor:
        if self.plain is not None and states.numel() == self.in_features:
            return functional.linear(states, self.plain, self.bias)
        if torch.compiler.is_compiling():
            # A compiler cannot trace an opaque tensor, so the compiled program names it by number.
            named: Tensor = prepacked_linear(states, self.number, self.out_features)
            return named
        return self.product(states)

    def product(self, states: Tensor) -> Tensor:
        if states.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("a packed layer has no gradient; train the model first and pack it afterwards")
        product: Tensor = torch.ops.mkldnn._linear_pointwise(states, self._packed, self.bias, "none", [], "")
        return product

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


@dataclass
class Memo:
    """The parts of the last product that are still to be taken; apart from its module, whose attributes are slow to set."""

    parts: list[Tensor | None]
    source: Tensor | None = None
    version: int = 0


class Shared(nn.Module):
    """One product for several layers that are called, one after another, with the same tensor."""

    def __init__(self, product: nn.Module, sizes: list[int]) -> None:
        super().__init__()
        self.product, self.sizes = product, sizes
        self.memo = Memo([None] * len(sizes))

    def take(self, index: int, states: Tensor) -> Tensor:
        """A part of the product of `states`; computed at the first call, handed out once a layer, then forgotten.

        Each layer may be called in any order, any number of times, with any tensor. Only a tensor that is overwritten in
        place between its siblings' calls goes unnoticed, and that only in inference mode, where tensors have no version.
        """
        memo = self.memo
        part = memo.parts[index]
        if part is None or states is not memo.source or version_of(states) != memo.version:
            memo.parts = list(self.product(states).split(self.sizes, -1))
            memo.source, memo.version = states, version_of(states)
            part = memo.parts[index]
        assert part is not None
        memo.parts[index] = None
        if all(other is None for other in memo.parts):
            memo.source = None  # or the activation would outlive the pass
        return part


def version_of(tensor: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


class Part(nn.Module):
    """One of the layers that a `Shared` product replaces."""

    def __init__(self, shared: Shared, index: int) -> None:
        super().__init__()
        self.shared, self.index = shared, index
        product = shared.product
        assert isinstance(product, nn.Linear | Prepacked)
        self.in_features, self.out_features = product.in_features, shared.sizes[index]

    @property
    def weight(self) -> Tensor:
        """This layer's rows [out, in] of the shared weight, in the plain layout."""
        product = self.shared.product
        assert isinstance(product, nn.Linear | Prepacked)
        rows: Tensor = product.weight.split(self.shared.sizes)[self.index]
        return rows

    def forward(self, states: Tensor) -> Tensor:
        part: Tensor = self.shared.take(self.index, states)
        return part

    def extra_repr(self) -> str:
        return f"part {self.index} of {self.shared.sizes}"


@torch.library.custom_op("forerun::prepacked_linear", mutates_args=())
def prepacked_linear(states: Tensor, number: int, out_features: int) -> Tensor:
    """The product of the `Prepacked` layer of that number; what a compiled graph calls."""
    product = _layouts[number].product(states)
    assert product.shape[-1] == out_features
    return product


@prepacked_linear.register_fake
def _(states: Tensor, number: int, out_features: int) -> Tensor:  # noqa: ARG001 one signature for both
    return states.new_empty(*states.shape[:-1], out_features)
