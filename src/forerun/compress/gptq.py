"""GPTQ (Frantar et al. 2022, arXiv 2210.17323): round input by input, and let the later inputs make up for each error.

Shape suffixes: N outputs, K inputs, B inputs of a block, G groups.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from forerun.compress.rounding import grid, group_length, nearest
from forerun.packed.codes import Codes
from forerun.types import UserError

BLOCK = 128
"""Inputs whose errors reach the inputs behind them in one product; every group size up to it divides it."""


def quantize(
    weight_NK: Tensor,
    hessian_KK: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    act_order: bool = False,
    damping: float = 0.01,
    name: str = "the layer",
) -> Codes:
    """Codes that keep the layer's outputs on the calibration inputs X; hessian = X^T X, at any scale.

    A group's grid is that of its weights when its turn comes, corrected for earlier errors; with `act_order` (largest
    diagonal first) all grids are those of the given weights, so that groups stay runs of inputs. An input that calibration
    never saw is rounded to nearest. UserError where groups do not divide the inputs or the Hessian has no inverse.
    """
    inputs = weight_NK.shape[1]
    size = group_length(name, inputs, group_size)
    diagonal_K = hessian_KK.diagonal()
    order_K = diagonal_K.argsort(descending=True, stable=True) if act_order else torch.arange(inputs, device=diagonal_K.device)
    factor_KK = inverse_factor(hessian_KK[order_K][:, order_K] if act_order else hessian_KK, damping, name)
    work_KN = weight_NK.detach().float().T[order_K]  # a copy; a row is an input, so that a step reads and writes runs
    grids = [grid(weight_NK.detach().float().unflatten(1, (-1, size)), bits, symmetric)] if act_order else []
    scales_GN, zeros_GN = (
        (each.T.contiguous() for each in grids[0]) if grids else work_KN.new_empty(2, inputs // size, len(weight_NK)).unbind()
    )
    codes_KN = torch.empty_like(work_KN, dtype=torch.uint8)
    groups = (order_K // size).tolist()
    for start in range(0, inputs, BLOCK):
        end = min(start + BLOCK, inputs)
        errors_BN = torch.empty_like(work_KN[start:end])
        for k in range(start, end):
            group = groups[k]
            if not act_order and k % size == 0:
                scales_GN[group], zeros_GN[group] = grid(work_KN[k : k + size].T, bits, symmetric)
            scale_N, zero_N, weight_N = scales_GN[group], zeros_GN[group], work_KN[k]
            code_N = nearest(weight_N, scale_N, zero_N, bits)
            codes_KN[k] = code_N
            error_N = weight_N.sub((code_N - zero_N) * scale_N).div_(factor_KK[k, k])
            errors_BN[k - start] = error_N
            work_KN[k + 1 : end].addr_(factor_KK[k, k + 1 : end], error_N, alpha=-1)
        work_KN[end:].addmm_(factor_KK[start:end, end:].T, errors_BN, alpha=-1)
    codes_NK = torch.empty_like(weight_NK, dtype=torch.uint8)
    codes_NK[:, order_K] = codes_KN.T
    return Codes(codes_NK, scales_GN.T.half().contiguous(), zeros_GN.T.to(torch.uint8).contiguous(), bits, group_size)


def quantize_together(
    weights: Mapping[str, Tensor],
    hessian_KK: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool = True,
    act_order: bool = False,
    damping: float = 0.01,
) -> dict[str, Codes]:
    """`quantize` for layers that read the same inputs, such as q/k/v: outputs are independent, so one pass does for all."""
    stacked_NK = torch.cat([weight_NK.detach().float() for weight_NK in weights.values()])
    whole = quantize(stacked_NK, hessian_KK, bits, group_size, symmetric, act_order, damping, " and ".join(weights))
    sizes = [len(weight_NK) for weight_NK in weights.values()]
    codes, scales, zeros = (each.split(sizes) for each in (whole.codes_NK, whole.scales_NG, whole.zeros_NG))
    # Copies, or each layer would keep the tensors of all alive.
    return {
        name: Codes(codes[i].clone(), scales[i].clone(), zeros[i].clone(), bits, group_size) for i, name in enumerate(weights)
    }


def inverse_factor(hessian_KK: Tensor, damping: float, name: str) -> Tensor:
    """The upper triangular U with U^T U = (H + damping * mean(diag H) I)^-1, in float32.

    From one Cholesky factor: with the order of inputs reversed, H = L L^T, so U is L^-1 reversed back. Damping grows tenfold
    until there is a factor. Inputs that were always zero get a diagonal of their own, which leaves them alone.
    """
    hessian = hessian_KK.float().flip(0, 1)
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    mean = diagonal.mean()
    if not mean.isfinite():
        raise UserError(f"{name}: its calibration inputs are not finite; load the model in bfloat16 or float32")
    hessian.diagonal()[dead] = 1.0 if mean == 0 else mean
    added = 0.0
    for growth in (1, 10, 100, 1000):
        hessian.diagonal().add_((growth - added) * damping * mean)
        added = growth
        lower, failed = torch.linalg.cholesky_ex(hessian)
        if not failed:
            del hessian  # of a wide layer each of these is as large as the layer
            identity = torch.eye(len(lower), device=lower.device)
            inverse: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False)
            return inverse.flip(0, 1)
    raise UserError(f"{name}: its Hessian has no inverse; take more calibration texts, or kind: rtn, which needs none")
