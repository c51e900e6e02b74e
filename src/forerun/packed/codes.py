"""Weights as small integers with a scale and a zero point a group of inputs, and the plain layer that holds them.

Shape suffixes: N outputs, K inputs, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class Codes:
    """A quantized weight [out, in]: weight = (code - zero) * scale, where scale and zero are those of the input's group."""

    codes_NK: Tensor  # uint8, 0 to 2^bits - 1, one a byte
    scales_NG: Tensor  # floating point
    zeros_NG: Tensor  # uint8
    bits: int  # 4 or 8
    group_size: int = -1  # consecutive inputs of a group; -1: one group of all inputs; without meaning beside group_K
    group_K: Tensor | None = None  # int32, the group of each input, where groups are not runs of inputs

    def __post_init__(self) -> None:
        (outputs, inputs), groups = self.codes_NK.shape, self.scales_NG.shape[1]
        assert self.bits in (4, 8) and self.codes_NK.dtype == torch.uint8
        assert self.scales_NG.shape == self.zeros_NG.shape == (outputs, groups)
        if self.group_K is None:
            size = inputs if self.group_size == -1 else self.group_size
            assert groups == -(-inputs // size), f"{inputs} inputs in groups of {size} are not {groups} groups"
        else:
            assert self.group_K.shape == (inputs,)

    @property
    def in_features(self) -> int:
        return self.codes_NK.shape[1]

    @property
    def out_features(self) -> int:
        return self.codes_NK.shape[0]

    def groups_K(self) -> Tensor:
        """The group of each input, int32."""
        if self.group_K is not None:
            return self.group_K
        inputs_K = torch.arange(self.in_features, device=self.codes_NK.device, dtype=torch.int32)
        return inputs_K // (self.in_features if self.group_size == -1 else self.group_size)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in], computed in float32 (float64 for a float64 weight) and rounded once to `dtype`."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        groups_K = self.groups_K()
        scales_NK = self.scales_NG.to(exact).index_select(1, groups_K)
        zeros_NK = self.zeros_NG.to(exact).index_select(1, groups_K)
        return ((self.codes_NK.to(exact) - zeros_NK) * scales_NK).to(dtype)

    def select_outputs(self, keep_N: Tensor) -> Codes:
        """The codes of some outputs; groups are untouched."""
        kept = (each.index_select(0, keep_N) for each in (self.codes_NK, self.scales_NG, self.zeros_NG))
        codes_NK, scales_NG, zeros_NG = kept
        return replace(self, codes_NK=codes_NK, scales_NG=scales_NG, zeros_NG=zeros_NG)

    def select_inputs(self, keep_K: Tensor) -> Codes:
        """The codes of some inputs, in the order of `keep_K`, bit for bit.

        Groups stay runs of inputs, with the largest size of 128, 64 and 32 at which every run lies in one old group (scales are
        repeated then); where none does, the result has `group_K`, which kernels do not take.
        """
        codes_NK, old_K = self.codes_NK.index_select(1, keep_K), self.groups_K().index_select(0, keep_K)
        if self.scales_NG.shape[1] == 1:
            return replace(self, codes_NK=codes_NK, group_size=-1, group_K=None)
        for size in (128, 64, 32):
            if len(old_K) % size == 0 and (runs := old_K.view(-1, size)).eq(runs[:, :1]).all():
                scales_NG, zeros_NG = (each.index_select(1, runs[:, 0]) for each in (self.scales_NG, self.zeros_NG))
                return Codes(codes_NK, scales_NG, zeros_NG, self.bits, size)
        return replace(self, codes_NK=codes_NK, group_K=old_K)


def pack_nibbles(codes_NK: Tensor) -> Tensor:
    """Two 4-bit codes a byte [out, ceil(in / 2)]: the input of even number in the low half."""
    padded_NK = functional.pad(codes_NK, (0, codes_NK.shape[1] % 2))
    return padded_NK[:, ::2] | padded_NK[:, 1::2] << 4


def unpack_nibbles(packed_NB: Tensor, inputs: int) -> Tensor:
    """What `pack_nibbles` packed, uint8 [out, in]."""
    return torch.stack((packed_NB & 15, packed_NB >> 4), dim=-1).flatten(1)[:, :inputs]


class CodedLinear(nn.Module):
    """A linear layer that holds codes: saves, loads and moves like any module, and computes exactly but slowly.

    It dequantizes at each call; `forerun.packed.pack` replaces it by a layer with a kernel. 4-bit codes lie two in a byte.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor
    group: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int = -1,
        bias: bool = False,
        groups: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> None:
        """An empty layer, to be filled by `load_state_dict`; `groups`: their number, where a `group` index says which."""
        super().__init__()
        assert bits in (4, 8)
        self.in_features, self.out_features, self.bits, self.group_size = in_features, out_features, bits, group_size
        runs = 1 if group_size == -1 else -(-in_features // group_size)
        shape = (out_features, runs if groups is None else groups)
        bytes_a_row = in_features if bits == 8 else -(-in_features // 2)
        self.register_buffer("packed", torch.zeros(out_features, bytes_a_row, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.zeros(shape, dtype=dtype, device=device))
        self.register_buffer("zeros", torch.zeros(shape, dtype=torch.uint8, device=device))
        group = None if groups is None else torch.zeros(in_features, dtype=torch.int32, device=device)
        self.register_buffer("group", group)
        self.register_buffer("bias", torch.zeros(out_features, dtype=dtype, device=device) if bias else None)

    @classmethod
    def of(cls, codes: Codes, bias: Tensor | None = None) -> Self:
        """The layer of these codes; it holds them without a copy where they are 8-bit."""
        with torch.device("meta"):
            layer = cls(codes.in_features, codes.out_features, codes.bits, codes.group_size)
        layer.packed = pack_nibbles(codes.codes_NK) if codes.bits == 4 else codes.codes_NK
        layer.scales, layer.zeros, layer.group = codes.scales_NG, codes.zeros_NG.to(torch.uint8), codes.group_K
        layer.bias = None if bias is None else bias.detach()
        return layer

    def codes(self) -> Codes:
        codes_NK = unpack_nibbles(self.packed, self.in_features) if self.bits == 4 else self.packed
        return Codes(codes_NK, self.scales, self.zeros, self.bits, self.group_size, self.group)

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] in the dtype of the scales; a fresh tensor."""
        return self.codes().dequantize(self.scales.dtype)

    def forward(self, states: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(states.dtype)
        return functional.linear(states, self.codes().dequantize(states.dtype), bias)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, group={self.group_size}"
