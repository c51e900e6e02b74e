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
        reach = [torch.ones_like(ratio_BN[:, 0])]
        for node in range(1, tree.size):
            reach.append((reach[-1] * ratio_BN[:, node]).clamp_max(1.0))
        reach_BN = torch.stack(reach, 1)
        accept_BN = reach_BN.clone()
        if tree.size > 2:  # the nodes between the pending one and the last
            inner_BN = reach_BN[:, 1:-1]
            left_BN = uncovered(tree, inner_BN, p_BNV)
            accept_BN[:, 1:-1] = torch.where(tree.valid_BN[:, 2:], ratio(left_BN, left_BN + (1 - inner_BN)), inner_BN)
        accept_BN = accept_BN.masked_fill(~tree.valid_BN, 0.0)

        def residual(end_B: Tensor) -> Tensor:
            p_BV = at_node(p_BNV, end_B)
            child_B, has_child_B = child_of(tree, end_B)
            mass_BV = (reach_BN.gather(1, end_B[:, None]) * p_BV - draft_law(tree, child_B, p_BV)).clamp_min(0)
            return torch.where(has_child_B[:, None], normalize(mass_BV, p_BV), p_BV)

        return Law(accept_BN, residual, last=True)


def uncovered(tree: Tree, reach_BN: Tensor, p_BNV: Tensor) -> Tensor:
    """sum_x (r p(x) - q(x))+ of each node between the pending one and the last, q the law of the node after it."""
    mass_BNV = reach_BN[..., None] * p_BNV[:, 1:-1]
    if tree.probs_BNV is None:
        mass_BNV.scatter_add_(2, tree.tokens_BN[:, 2:, None], -torch.ones_like(reach_BN)[..., None])
    else:
        mass_BNV.sub_(tree.probs_BNV[:, 2:])
    return mass_BNV.clamp_min_(0).sum(-1)
