"""`block`: block verification of a chain (Sun et al. 2024, "Block Verification Accelerates Speculative Decoding").

Shape suffixes: B rows, N nodes, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from forerun.accept.drafted import child_of, draft_law, of_draft, of_target, ratio
from forerun.accept.rule import Law, at_node, normalize
from forerun.tree import Tree


@dataclass(frozen=True)
class Block:
    """The whole draft is judged at once, which accepts at least as many tokens as `standard`. Lossless.

    With r_0 = 1 and r_i = min(1, r_{i-1} p(x_i) / q(x_i)), node i before the last is taken with R_i / (R_i + 1 - r_i), where
    R_i = sum_x (r_i p(x) - q(x))+ over the law of node i + 1, and the last node with r. The walk ends at the last node taken;
    what follows is drawn from norm((r p - q)+), after the whole draft from p.
    """

    name = "block"
    lossless = True
    trees = False
    meaningless = False

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        assert tree.is_chain or tree.size == 1, "block admits chains only"
        ratio_BN = ratio(of_target(tree, p_BNV), of_draft(tree, p_BNV))
        reach_B = torch.ones_like(ratio_BN[:, 0])
        reach, accept = [reach_B], [reach_B]
        for node in range(1, tree.size):
            reach_B = (reach_B * ratio_BN[:, node]).clamp_max(1.0)
            reach.append(reach_B)
            if node + 1 == tree.size:
                accept.append(reach_B)
                break
            next_B = torch.full_like(tree.tokens_BN[:, 0], node + 1)
            left_B = (reach_B[:, None] * p_BNV[:, node]).sub_(draft_law(tree, next_B, p_BNV[:, node])).clamp_min_(0).sum(1)
            accept.append(torch.where(tree.valid_BN[:, node + 1], ratio(left_B, left_B + (1 - reach_B)), reach_B))
        reach_BN, accept_BN = torch.stack(reach, 1), torch.stack(accept, 1).masked_fill(~tree.valid_BN, 0.0)

        def residual(end_B: Tensor) -> Tensor:
            p_BV = at_node(p_BNV, end_B)
            child_B, has_child_B = child_of(tree, end_B)
            mass_BV = (reach_BN.gather(1, end_B[:, None]) * p_BV - draft_law(tree, child_B, p_BV)).clamp_min(0)
            return torch.where(has_child_B[:, None], normalize(mass_BV, p_BV), p_BV)

        return Law(accept_BN, residual, last=True)
