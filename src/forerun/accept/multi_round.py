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
        mass_BNV = p_BNV.clone()  # of each node: what its children so far leave of its law, not normalized
        total_BN = torch.ones_like(p_BNV[..., 0])  # its sum
        accept = [torch.ones_like(p_BNV[:, 0, 0])]
        for node in range(1, tree.size):
            parent_B, token_B = tree.parents_BN[:, node].clamp_min(0), tree.tokens_BN[:, node]
            mass_BV, total_B = mass_BNV[row_B, parent_B], total_BN[row_B, parent_B]
            q_BV = draft_law(tree, node, mass_BV)
            accept.append(ratio(mass_BV[row_B, token_B], total_B * q_BV[row_B, token_B]))
            left_BV = mass_BV.addcmul_(q_BV, total_B[:, None], value=-1).clamp_min_(0)
            goal_B = torch.where(tree.valid_BN[:, node], parent_B, node)  # a padding node takes from nobody but itself
            mass_BNV[row_B, goal_B], total_BN[row_B, goal_B] = left_BV, left_BV.sum(1)
        accept_BN = from_root(torch.stack(accept, 1), tree)
        return Law(accept_BN, lambda end_B: normalize(at_node(mass_BNV, end_B), at_node(p_BNV, end_B)))
