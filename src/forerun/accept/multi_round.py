"""`multi-round`: rejection sampling of trees with drawn children (SpecInfer, Miao et al. 2023; EAGLE, Li et al. 2024).

Shape suffixes: B rows, N nodes, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from forerun.accept.drafted import draft_law, from_root, ratio
from forerun.accept.rule import Law, at_node, normalize
from forerun.tree import Tree


@dataclass(frozen=True)
class MultiRound:
    """Children in turn: accept x with min(1, p(x)/q(x)), else p becomes norm((p - q)+) for the next one. Lossless.

    q is the law that the child was drawn from: the same for all children drawn i.i.d., without its elder siblings for children
    drawn without replacement, one-hot for chosen ones. On a chain it is `standard`.
    """

    name = "multi-round"
    lossless = True
    trees = True
    meaningless = False

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        row_B = torch.arange(tree.rows, device=p_BNV.device)
        left_BNV = p_BNV.clone()  # of each node: its law after the children before this one were refused
        accept = [torch.ones_like(p_BNV[:, 0, 0])]
        for node in range(1, tree.size):
            parent_B, token_B = tree.parents_BN[:, node].clamp_min(0), tree.tokens_BN[:, node]
            p_BV = left_BNV[row_B, parent_B]
            q_BV = draft_law(tree, torch.full_like(parent_B, node), p_BV)
            accept.append(ratio(p_BV[row_B, token_B], q_BV[row_B, token_B]))
            refused_BV = normalize((p_BV - q_BV).clamp_min(0), p_BV)
            left_BNV[row_B, parent_B] = torch.where(tree.valid_BN[:, node, None], refused_BV, p_BV)
        return Law(from_root(torch.stack(accept, 1), tree), lambda end_B: at_node(left_BNV, end_B))
