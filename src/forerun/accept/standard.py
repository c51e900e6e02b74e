"""`standard`: speculative sampling of a drawn chain (Leviathan et al. 2023, Chen et al. 2023)."""

from __future__ import annotations

import torch
from torch import Tensor

from forerun.accept.rule import Law, at_node, normalize
from forerun.tree import Tree


class Standard:
    """Accept x with min(1, p(x)/q(x)); after a refusal draw from norm((p - q)+), after the last draft from p. Lossless."""

    name = "standard"
    lossless = True

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        if tree.size == 1:  # nothing was drafted
            return Law(torch.ones_like(p_BNV[..., 0]), lambda end_B: at_node(p_BNV, end_B))
        assert tree.is_chain and tree.probs_BNV is not None, "standard needs a drawn chain"
        q_BNV = tree.probs_BNV.to(p_BNV.dtype)
        p_x_BN = p_BNV[:, :-1].gather(2, tree.tokens_BN[:, 1:, None])[..., 0]
        q_x_BN = q_BNV[:, 1:].gather(2, tree.tokens_BN[:, 1:, None])[..., 0]
        ratio_BN = (p_x_BN / q_x_BN.clamp_min(torch.finfo(p_BNV.dtype).tiny)).clamp_max(1.0)
        accept_BN = torch.cat([torch.ones_like(p_BNV[:, :1, 0]), ratio_BN], 1).masked_fill(~tree.valid_BN, 0.0)

        def residual(end_B: Tensor) -> Tensor:
            p_BV = at_node(p_BNV, end_B)
            child_B = (end_B + 1).clamp_max(tree.size - 1)
            has_child_B = (end_B + 1 < tree.size) & tree.valid_BN.gather(1, child_B[:, None])[:, 0]
            q_BV = at_node(q_BNV, child_B) * has_child_B[:, None]
            return normalize((p_BV - q_BV).clamp_min(0), p_BV)

        return Law(accept_BN, residual)
