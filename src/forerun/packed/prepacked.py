"""A dense weight in oneDNN's own layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from forerun.packed.opaque import enroll, numbered_product, refuse_gradient


def can_prepack(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


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
        self.number = enroll(self)

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] in the plain layout; a fresh copy in bfloat16."""
        return self._packed.to_dense() if self.plain is None else self.plain

    def forward(self, states: Tensor) -> Tensor:
        if self.plain is not None and states.numel() == self.in_features:
            return functional.linear(states, self.plain, self.bias)
        if torch.compiler.is_compiling():
            # A compiler cannot trace an opaque tensor, so the compiled program names it by number.
            named: Tensor = numbered_product(states, self.number, self.out_features)
            return named
        return self.product(states)

    def product(self, states: Tensor) -> Tensor:
        refuse_gradient(states)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(states, self._packed, self.bias, "none", [], "")
        return product

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
