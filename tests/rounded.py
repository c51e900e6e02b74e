"""Codes for tests of the packed layers: random weights rounded to nearest, groups of any size."""

import torch
from torch import Tensor

from forerun.packed import Codes


def rounded(weight_NK: Tensor, bits: int, group_size: int = -1, symmetric: bool = True) -> Codes:
    """The weight [out, in] in codes; the last group may be shorter than the others."""
    outputs, inputs = weight_NK.shape
    top, size = 2**bits - 1, inputs if group_size == -1 else group_size
    codes, scales, zeros = [], [], []
    for start in range(0, inputs, size):
        part = weight_NK[:, start : start + size].float()
        if symmetric:
            scale, zero = 2 * part.abs().amax(1, keepdim=True) / top, torch.full((outputs, 1), 2.0 ** (bits - 1))
        else:
            low, high = part.amin(1, keepdim=True).clamp(max=0), part.amax(1, keepdim=True).clamp(min=0)
            scale = (high - low) / top
            zero = (-low / scale).round()
        codes.append((part / scale + zero).round().clamp(0, top).to(torch.uint8))
        scales.append(scale.to(weight_NK.dtype))
        zeros.append(zero.to(torch.uint8))
    return Codes(torch.cat(codes, 1), torch.cat(scales, 1), torch.cat(zeros, 1), bits, group_size)


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())
