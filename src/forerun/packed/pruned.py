"""Linear layers some of whose inputs or outputs are gone: the smaller product, and the index that makes up for it.

Shape suffixes: N outputs, K inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class L1PrunedInputLinear(nn.Module):
    """A linear layer on some of its inputs: the surviving ones are gathered, the others are not read.

    `inner` is any linear layer on as many inputs as `keep_K` [kept] numbers; `in_features` counts all of them.
    """

    keep: Tensor

    def __init__(self, inner: nn.Module, keep_K: Tensor, in_features: int) -> None:
        super().__init__()
        assert inner.in_features == len(keep_K) <= in_features
        self.inner, self.in_features = inner, in_features
        self.register_buffer("keep", keep_K.to(torch.int64))

    @property
    def out_features(self) -> int:
        return int(self.inner.out_features)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] with zeros for the inputs that are gone; a fresh tensor."""
        weight: Tensor = self.inner.weight  # type: ignore[assignment]
        return weight.new_zeros(self.out_features, self.in_features).index_copy(1, self.keep, weight.detach())

    def forward(self, states: Tensor) -> Tensor:
        kept = states.gather(-1, self.keep.expand(*states.shape[:-1], -1))  # index_select takes five times as long for few rows
        product: Tensor = self.inner(kept)
        return product

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, kept={len(self.keep)}"


class L1PrunedOutputLinear(nn.Module):
    """A linear layer with some of its outputs: the others are zeros.

    `inner` is any linear layer with as many outputs as `keep_N` [kept] numbers; `out_features` counts all of them.
    """

    keep: Tensor

    def __init__(self, inner: nn.Module, keep_N: Tensor, out_features: int) -> None:
        super().__init__()
        assert inner.out_features == len(keep_N) <= out_features
        self.inner, self.out_features = inner, out_features
        self.register_buffer("keep", keep_N.to(torch.int64))

    @property
    def in_features(self) -> int:
        return int(self.inner.in_features)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] with zeros for the outputs that are gone; a fresh tensor."""
        weight: Tensor = self.inner.weight  # type: ignore[assignment]
        return weight.new_zeros(self.out_features, self.in_features).index_copy(0, self.keep, weight.detach())

    def forward(self, states: Tensor) -> Tensor:
        kept: Tensor = self.inner(states)
        return kept.new_zeros(*kept.shape[:-1], self.out_features).index_copy(-1, self.keep, kept)

    def extra_repr(self) -> str:
        return f"out_features={self.out_features}, kept={len(self.keep)}"
