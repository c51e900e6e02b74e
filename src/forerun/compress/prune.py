"""L1 structured pruning of single linear layers: scores, what is kept, and the smaller layer. Pure functions.

Shape suffixes: N outputs, K inputs, G groups, L blocks of inputs in a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from forerun.packed.codes import CodedLinear
from forerun.packed.pruned import L1PrunedInputLinear, L1PrunedOutputLinear
from forerun.types import UserError

Layer = nn.Linear | CodedLinear
BLOCK = 32
"""Inputs that leave a group of codes together: the smallest group that the 4-bit kernels take."""
SCALE_BITS = 32
"""A group's scale and zero point, as the 4-bit kernels hold them."""
COARSE = 0.95
"""Blocks of 64, which need half as many scales, are taken where they keep this share of the score that blocks of 32 keep."""


def dense(layer: Layer) -> Tensor:
    """The weight [out, in] in float32, or float64 where it is that already."""
    weight_NK = layer.weight.detach()
    return weight_NK if weight_NK.dtype == torch.float64 else weight_NK.float()


def input_scores(weight_NK: Tensor, magnitude_K: Tensor | None = None) -> Tensor:
    """L1 norm of each input's column, times the mean magnitude of that input where it is known."""
    scores_K = weight_NK.abs().sum(0)
    return scores_K if magnitude_K is None else scores_K * magnitude_K.to(scores_K)


def output_scores(weight_NK: Tensor, magnitude_K: Tensor | None = None) -> Tensor:
    """L1 norm of each output's row, its entries weighted by the mean magnitude of their inputs where it is known."""
    size_NK = weight_NK.abs()
    return size_NK.sum(1) if magnitude_K is None else size_NK @ magnitude_K.to(size_NK)


def count(total: int, fraction: float, unit: int = 1) -> int:
    """How many of `total` stay: the multiple of `unit` nearest to the wish, at least one unit, and all where one is more."""
    wished = math.floor((1 - fraction) * total / unit + 0.5) * unit
    return min(max(wished, unit), total)


def shares(scores: Sequence[Tensor], costs: Sequence[int], fraction: float) -> list[float]:
    """The fraction that each layer loses where the lowest scores of all layers go first.

    Scores are divided by their layer's mean, so that layers of large and of small weights compare. `costs`: weights that go
    with one entry of a layer; `fraction` is of all weights together.
    """
    flat = torch.cat([(each / each.mean()).double() for each in scores])
    weight = torch.cat([torch.full((len(each),), float(cost)) for each, cost in zip(scores, costs, strict=True)]).double()
    order = flat.argsort(stable=True)
    gone = torch.zeros_like(flat)
    gone[order] = (weight[order].cumsum(0) <= fraction * weight.sum() * (1 + 1e-12)).double()
    return [float(part.mean()) for part in gone.split([len(each) for each in scores])]


def best(scores: Tensor, kept: int) -> Tensor:
    """The indices of the highest scores, ascending."""
    return scores.argsort(descending=True, stable=True)[:kept].sort().values


def best_blocks(scores_K: Tensor, fraction: float, groups_K: Tensor, bits: int, unit: int = 1) -> Tensor:
    """The inputs that stay, of which every group keeps a multiple of 32, so that the codes stay as they are.

    Inputs are ranked within each group and leave it in blocks, lowest first; which blocks leave is decided over all groups
    together. Smaller blocks choose better and need more scales: those are taken that leave the layer smaller than it was, and
    blocks of 64 instead of 32 where they keep nearly as much. All groups have the same multiple of 32 inputs. The result is
    ordered by group.
    """
    order_K = groups_K.argsort(stable=True)
    groups, total = int(groups_K.max()) + 1, len(scores_K)
    scores_GK = scores_K[order_K].view(groups, -1)
    size = scores_GK.shape[1]

    def bits_a_row(kept: int, block: int) -> float:
        return kept * (bits + SCALE_BITS / block)

    found: list[tuple[float, Tensor]] = []
    for block in sorted({BLOCK, 2 * BLOCK, size}):
        kept = count(total, fraction, math.lcm(unit, block))
        grows = kept < total and bits_a_row(kept, block) >= bits_a_row(total, size)
        if size % block or grows or (found and block == size):
            continue
        found.append((bits_a_row(kept, block if kept < total else size), chosen_blocks(scores_GK, kept, block)))
    bits_held, mask_K = found[0]
    if len(found) > 1 and found[1][0] < bits_held:
        sums = [float(scores_GK.flatten()[each].sum()) for _, each in found]
        mask_K = found[1][1] if sums[1] >= COARSE * sums[0] else mask_K
    return order_K[mask_K]


def chosen_blocks(scores_GK: Tensor, kept: int, block: int) -> Tensor:
    """Which inputs [groups * size] are in the `kept` / `block` blocks of the highest sums."""
    ranked_GK = scores_GK.argsort(dim=1, descending=True, stable=True)
    sums_GL = scores_GK.gather(1, ranked_GK).unflatten(1, (-1, block)).sum(2)
    chosen = torch.zeros_like(sums_GL, dtype=torch.bool).flatten()
    # Sums fall along a group, and a stable sort keeps the earlier of equal ones, so each group keeps its first blocks.
    chosen[sums_GL.flatten().argsort(descending=True, stable=True)[: kept // block]] = True
    mask_GK = torch.zeros_like(scores_GK, dtype=torch.bool)
    return mask_GK.scatter_(1, ranked_GK, chosen.view_as(sums_GL).repeat_interleave(block, 1)).flatten()


def is_grouped(layer: Layer) -> bool:
    """Whether its inputs have scales of their own, group by group."""
    return isinstance(layer, CodedLinear) and layer.scales.shape[1] > 1


def input_unit(layer: Layer) -> int:
    """Inputs of a layer without groups must stay in multiples of this, for its kernel's sake."""
    if not isinstance(layer, CodedLinear):
        return 1
    return BLOCK if layer.bits == 4 else 16


def output_unit(layer: Layer) -> int:
    """Outputs of a layer must stay in multiples of this, for its kernel's sake; a small layer does with less."""
    if not isinstance(layer, CodedLinear):
        return 1
    return BLOCK if layer.out_features % BLOCK == 0 and layer.out_features > 4 * BLOCK else 16


def kept_inputs(layer: Layer, scores_K: Tensor, fraction: float, unit: int = 1) -> Tensor:
    """The inputs that stay, where `fraction` of them should go; their number is a multiple of `unit`."""
    if not is_grouped(layer):
        return best(scores_K, count(layer.in_features, fraction, math.lcm(unit, input_unit(layer))))
    assert isinstance(layer, CodedLinear)
    groups_K = layer.codes().groups_K()
    sizes = groups_K.bincount()
    if int(sizes.min()) != int(sizes.max()) or int(sizes[0]) % BLOCK:
        raise UserError(
            f"prune: codes in groups of {int(sizes[0])} of {layer.in_features} inputs cannot lose inputs in blocks of {BLOCK}; "
            "prune first and quantize afterwards, or quantize with a group size of 32, 64, 128 or -1"
        )
    return best_blocks(scores_K, fraction, groups_K, layer.bits, unit)


def kept_outputs(layer: Layer, scores_N: Tensor, fraction: float, unit: int = 1) -> Tensor:
    """The outputs that stay, where `fraction` of them should go; their number is a multiple of `unit`."""
    return best(scores_N, count(layer.out_features, fraction, math.lcm(unit, output_unit(layer))))


def with_inputs(layer: Layer, keep_K: Tensor) -> Layer:
    """The layer of some inputs: its columns, or its codes bit for bit."""
    if isinstance(layer, CodedLinear):
        return CodedLinear.of(layer.codes().select_inputs(keep_K), layer.bias)
    return linear(layer.weight.detach().index_select(1, keep_K), layer.bias)


def with_outputs(layer: Layer, keep_N: Tensor) -> Layer:
    """The layer of some outputs: its rows, or its codes bit for bit; the bias of the others goes too."""
    bias = None if layer.bias is None else layer.bias.detach().index_select(0, keep_N)
    if isinstance(layer, CodedLinear):
        return CodedLinear.of(layer.codes().select_outputs(keep_N), bias)
    return linear(layer.weight.detach().index_select(0, keep_N), bias)


def linear(weight_NK: Tensor, bias: Tensor | None) -> nn.Linear:
    outputs, inputs = weight_NK.shape
    with torch.device("meta"):
        layer = nn.Linear(inputs, outputs, bias=bias is not None)
    layer.weight = nn.Parameter(weight_NK, requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    return layer


def prune_inputs(layer: Layer, keep_K: Tensor) -> L1PrunedInputLinear:
    return L1PrunedInputLinear(with_inputs(layer, keep_K), keep_K, layer.in_features)


def prune_outputs(layer: Layer, keep_N: Tensor) -> L1PrunedOutputLinear:
    return L1PrunedOutputLinear(with_outputs(layer, keep_N), keep_N, layer.out_features)


def lost(weight_NK: Tensor, kept_NK: Tensor, hessian_KK: Tensor | None = None) -> float:
    """Relative error of a layer's output, ||WX - W'X|| / ||WX|| with H = X X^T; of its weight where H is not known."""
    gone_NK = weight_NK - kept_NK.to(weight_NK)
    if hessian_KK is None:
        return float(gone_NK.norm() / weight_NK.norm().clamp_min(torch.finfo(weight_NK.dtype).tiny))
    hessian = hessian_KK.to(weight_NK)
    error, whole = (float(((part @ hessian) * part).sum().clamp_min(0)) for part in (gone_NK, weight_NK))
    return math.sqrt(error / whole) if whole else 0.0
