"""`match`: the law of drawing a token from the target at every node and following the child that carries it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from forerun.accept.drafted import of_target
from forerun.accept.rule import Law, at_node, normalize
from forerun.tree import Tree


@dataclass(frozen=True)
class Match:
    """Lossless for any tree that does not depend on the target's draws; for chosen drafts no rule accepts more.

    Written as sequential coins: child x, its earlier siblings X refused, is taken with p(x) / (1 - p(X)); after all, the
    token comes from p without the children. Siblings that carry the same token are taken once.
    """

    name = "match"
    lossless = True
    trees = True
    meaningless = False

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        parents_BN = tree.parents_BN.clamp_min(0)
        size = tree.size
        own_BN = of_target(tree, p_BNV).masked_fill(~tree.valid_BN, 0.0)
        first = torch.arange(size, device=own_BN.device)
        own_BN = torch.where(first == 0, 1.0, own_BN)
        if tree.is_chain:
            return Law(own_BN, lambda end_B: self._residual(tree, p_BNV, end_B))
        earlier_NN = first[:, None] > first[None, :]
        sibling_BNN = (parents_BN[:, :, None] == parents_BN[:, None, :]) & earlier_NN & tree.valid_BN[:, None, :]
        sibling_BNN &= first[None, :] > 0
        twin_BNN = sibling_BNN & (tree.tokens_BN[:, :, None] == tree.tokens_BN[:, None, :])
        own_BN = own_BN.masked_fill(twin_BNN.any(-1), 0.0)
        refused_BN = (sibling_BNN * own_BN[:, None, :]).sum(-1)
        left_BN = (1 - refused_BN).clamp_min(torch.finfo(own_BN.dtype).tiny)
        accept_BN = torch.where(first == 0, 1.0, (own_BN / left_BN).clamp_max(1.0))
        return Law(accept_BN, lambda end_B: self._residual(tree, p_BNV, end_B))

    def _residual(self, tree: Tree, p_BNV: Tensor, end_B: Tensor) -> Tensor:
        p_BV = at_node(p_BNV, end_B)
        is_child_BN = (tree.parents_BN == end_B[:, None]) & tree.valid_BN
        is_child_BN[:, 0] = False
        # The least of a token's entries: it is 0 if any child carries it.
        left_BN = p_BV.gather(1, tree.tokens_BN).masked_fill(is_child_BN, 0.0)
        return normalize(p_BV.scatter_reduce(1, tree.tokens_BN, left_BN, "amin"), p_BV)
