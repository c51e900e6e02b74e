"""Round to nearest: codes without calibration, and the grids of scales and zero points that GPTQ rounds to as well.

Shape suffixes: N outputs, K inputs, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor

from forerun.packed.codes import Codes
from forerun.types import UserError


def quantize(weight_NK: Tensor, bits: int, group_size: int, symmetric: bool = True, name: str = "the layer") -> Codes:
    """The nearest codes on a grid from each group's smallest to its largest weight; UserError where groups do not divide."""
    size = group_length(name, weight_NK.shape[1], group_size)
    values_NGk = weight_NK.detach().float().unflatten(1, (-1, size))
    scales_NG, zeros_NG = grid(values_NGk, bits, symmetric)
    codes_NGk = nearest(values_NGk, scales_NG[..., None], zeros_NG[..., None], bits)
    return Codes(codes_NGk.flatten(1).to(torch.uint8), scales_NG.half(), zeros_NG.to(torch.uint8), bits, group_size)


def group_length(name: str, inputs: int, group_size: int) -> int:
    """Inputs that share a scale; -1 is all of them. UserError where groups do not divide the inputs."""
    if group_size == -1:
        return inputs
    if inputs % group_size:
        fitting = [str(size) for size in (32, 64, 128) if inputs % size == 0]
        raise UserError(
            f"{name} has {inputs} inputs, which group_size={group_size} does not divide; take {' or '.join([*fitting, '-1'])}"
        )
    return group_size


def grid(values: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    """Scales and zero points over the last dimension: the grid that reaches from the smallest to the largest value.

    float32, but the scales are exact in float16, in which they are stored. A zero point is at least 1, because the common
    layout stores one less and readers differ in what they make of -1.
    """
    most = 2**bits - 1
    if symmetric:
        scales = values.abs().amax(-1) * (2 / most)
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        high = values.amax(-1).clamp_min(0)
        low = values.amin(-1).minimum(-high / (most - 1))
        scales = (high - low) / most
        zeros = -low / scales
    scales = scales.half().float()
    scales = torch.where(scales == 0, 1.0, scales)  # all weights are zero, or vanish in float16
    return scales, torch.where(zeros.isnan(), 1.0, zeros.round().clamp(1, most))


def nearest(values: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The codes of the nearest points of a grid, as floats."""
    return (values / scales).round_().add_(zeros).clamp_(0, 2**bits - 1)
