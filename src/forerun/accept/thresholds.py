"""Rules that look at the target's law only and keep what is probable enough: `typical` and `relaxed`. Neither is lossless.

At temperature 0 the target's law is one-hot, and both accept exactly its best token.
Shape suffixes: B rows, N nodes, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from forerun.accept.drafted import from_root, of_target
from forerun.accept.rule import Law, at_node
from forerun.tree import Tree


@dataclass(frozen=True)
class Typical:
    """Accept x where p(x) > min(epsilon, delta exp(-H(p))), H the entropy in nats; then go on from p (Medusa, Cai et al. 2024).

    Of a tree, the longest path that is accepted throughout, the first of several.
    """

    epsilon: float
    delta: float

    name = "typical"
    lossless = False
    trees = True
    meaningless = False

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        floor_BN = (self.delta * torch.exp(-torch.special.entr(p_BNV).sum(-1))).clamp_max(self.epsilon)
        return longest(tree, p_BNV, of_target(tree, p_BNV) > floor_BN.gather(1, tree.parents_BN.clamp_min(0)))


@dataclass(frozen=True)
class Relaxed:
    """Accept x where it is among the target's top_k tokens and p(x) >= max p - delta; then go on from p.

    Relaxed acceptance as TensorRT-LLM has it. Of a tree, the longest path that is accepted throughout, the first of several.
    """

    top_k: int
    delta: float

    name = "relaxed"
    lossless = False
    trees = True
    meaningless = False

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        best_BNK = p_BNV.topk(min(self.top_k, p_BNV.shape[2])).values
        floor_BN = torch.maximum(best_BNK[..., -1], best_BNK[..., 0] - self.delta)
        return longest(tree, p_BNV, of_target(tree, p_BNV) >= floor_BN.gather(1, tree.parents_BN.clamp_min(0)))


def longest(tree: Tree, p_BNV: Tensor, keep_BN: Tensor) -> Law:
    """Certain acceptance along the longest path of kept nodes; what follows has the law p."""
    keep_BN = keep_BN & tree.valid_BN
    parents_BN = tree.parents_BN.clamp_min(0)
    height_BN = torch.zeros_like(tree.tokens_BN)  # kept nodes below each one, along the best path
    for node in range(tree.size - 1, 0, -1):
        through_B1 = (keep_BN[:, node] * (1 + height_BN[:, node]))[:, None]
        parent_B1 = parents_BN[:, node, None]
        height_BN.scatter_(1, parent_B1, torch.maximum(height_BN.gather(1, parent_B1), through_B1))
    on_best_BN = keep_BN & (height_BN + 1 == height_BN.gather(1, parents_BN))
    return Law(from_root(on_best_BN.to(p_BNV.dtype), tree), lambda end_B: at_node(p_BNV, end_B))
