"""Three rules that bend `standard`: `temperature-relaxed`, `top-p-residual`, `min-p-ratio`; and `ensemble`. None is lossless.

The first three have lossless twins that are no rules: the request's temperature, top-p or min-p with `standard` or `block`.
Shape suffixes: B rows, N nodes, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from forerun.accept.drafted import chain_law, of_draft, of_target, ratio
from forerun.accept.rule import Law
from forerun.tree import Tree


@dataclass(frozen=True)
class TemperatureRelaxed:
    """Accept with min(1, (p/q)^(1/temperature)): above 1 more than `standard` does, below 1 less; residual norm((p - q)+).

    Where p = q there is no residual: the ratio is 1 and always accepted. 0/0 is refused.
    """

    temperature: float

    name = "temperature-relaxed"
    lossless = False
    trees = False
    meaningless = False

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        ratio_BN = ratio(of_target(tree, p_BNV), of_draft(tree, p_BNV)).clamp_max(1.0)
        return chain_law(tree, p_BNV, ratio_BN ** (1 / self.temperature))


@dataclass(frozen=True)
class TopPResidual:
    """Accept as `standard`; after a refusal keep of (p - q)+ the largest masses that reach top_p together, at least one.

    The cut is made before normalizing: nothing is cut unless the residual's mass, TV(p, q), exceeds top_p. An empty residual
    (p = q) is never drawn from.
    """

    top_p: float

    name = "top-p-residual"
    lossless = False
    trees = False
    meaningless = False

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        return chain_law(tree, p_BNV, ratio(of_target(tree, p_BNV), of_draft(tree, p_BNV)), self._cut)

    def _cut(self, p_BV: Tensor, q_BV: Tensor) -> Tensor:
        mass_BV, order_BV = (p_BV - q_BV).clamp_min(0).sort(-1, descending=True)
        kept_BV = mass_BV.masked_fill(mass_BV.cumsum(-1) - mass_BV >= self.top_p, 0.0)
        return torch.zeros_like(p_BV).scatter_(1, order_BV, kept_BV)


@dataclass(frozen=True)
class MinPRatio:
    """Accept with the ratio of the laws after a min-p filter of either; residual norm((p - q)+) of the unfiltered laws.

    Tokens less probable than min_p times the best get the log-probability filter_value (-inf: none) before renormalizing. A
    token filtered out of both laws is 0/0: refused. Filtered out of q only, it is accepted.
    """

    min_p: float
    filter_value: float = -math.inf

    name = "min-p-ratio"
    lossless = False
    trees = False
    meaningless = False

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        q_BNV = tree.probs_BNV  # one-hot laws of chosen drafts have nothing to filter
        drawn = tree if q_BNV is None else Tree(tree.tokens_BN, tree.parents_BN, tree.depth, self._filter(q_BNV), tree.is_chain)
        return chain_law(tree, p_BNV, ratio(of_target(tree, self._filter(p_BNV)), of_draft(drawn, p_BNV)))

    def _filter(self, p_BNV: Tensor) -> Tensor:
        low_BNV = p_BNV < self.min_p * p_BNV.amax(-1, keepdim=True)
        kept_BNV = p_BNV.masked_fill(low_BNV, math.exp(self.filter_value))
        return kept_BNV / kept_BNV.sum(-1, keepdim=True).clamp_min(torch.finfo(p_BNV.dtype).tiny)


@dataclass(frozen=True)
class Ensemble:
    """`standard` for the mixture weight * p + (1 - weight) * q, the token after the last draft from p.

    Off by (1 - weight) TV(p, q) a token. Its residual, norm((mixture - q)+), is that of `standard`.
    """

    weight: float

    name = "ensemble"
    lossless = False
    trees = False
    meaningless = False

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        ratio_BN = ratio(of_target(tree, p_BNV), of_draft(tree, p_BNV))
        return chain_law(tree, p_BNV, self.weight * ratio_BN + 1 - self.weight)
