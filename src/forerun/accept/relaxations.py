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
        p_BN, q_BN = of_target(tree, p_BNV), of_draft(tree, p_BNV)
        p_BN = self._filter(p_BN, p_BNV, tree.parents_BN.clamp_min(0))
        if tree.probs_BNV is not None:  # one-hot laws of chosen drafts have nothing to filter
            q_BN = self._filter(q_BN, tree.probs_BNV, torch.arange(tree.size, device=q_BN.device).expand_as(q_BN))
        return chain_law(tree, p_BNV, ratio(p_BN, q_BN))

    def _filter(self, own_BN: Tensor, law_BNV: Tensor, at_BN: Tensor) -> Tensor:
        """What the filter makes of some tokens' probabilities, each under the law of a node."""
        floor_BN, filtered = self.min_p * law_BNV.amax(-1), math.exp(self.filter_value)
        total_BN = torch.where(law_BNV < floor_BN[..., None], filtered, law_BNV).sum(-1)
        kept_BN = torch.where(own_BN < floor_BN.gather(1, at_BN), filtered, own_BN)
        return kept_BN / total_BN.gather(1, at_BN).clamp_min(torch.finfo(law_BNV.dtype).tiny)


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
