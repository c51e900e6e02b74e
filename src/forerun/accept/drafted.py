"""What the ratio rules share: the probabilities of drafted tokens under both laws, and the law of a chain.

Shape suffixes: B rows, N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from forerun.accept.rule import Law, at_node, normalize
from forerun.tree import Tree


def of_target(tree: Tree, p_BNV: Tensor) -> Tensor:
    """[B, N]: what the target gives to each node's token after the node's parent; of node 0 and padding nodes meaningless."""
    parents_BN = tree.parents_BN.clamp_min(0)
    return p_BNV.flatten(1).gather(1, parents_BN * p_BNV.shape[2] + tree.tokens_BN)


def of_draft(tree: Tree, p_BNV: Tensor) -> Tensor:
    """[B, N]: what the drafter gave to each node's token; 1 where it was chosen."""
    if tree.probs_BNV is None:
        return torch.ones_like(p_BNV[..., 0])
    return tree.probs_BNV.gather(2, tree.tokens_BN[..., None])[..., 0].to(p_BNV.dtype)


def draft_law(tree: Tree, node_B: Tensor | int, p_BV: Tensor) -> Tensor:
    """[B, V]: the law that a node of each row (or one node of all) was drawn from, one-hot where it was chosen; typed as p_BV.

    May be a view of the tree's laws: not to be written to.
    """
    if tree.probs_BNV is not None:
        return (tree.probs_BNV[:, node_B] if isinstance(node_B, int) else at_node(tree.probs_BNV, node_B)).to(p_BV.dtype)
    token_B = tree.tokens_BN[:, node_B] if isinstance(node_B, int) else tree.tokens_BN.gather(1, node_B[:, None])[:, 0]
    return torch.zeros_like(p_BV).scatter_(1, token_B[:, None], 1.0)


def ratio(over: Tensor, under: Tensor) -> Tensor:
    """over / under with two outcomes defined: x/0 is huge (accepted), 0/0 is 0 (refused)."""
    return over / under.clamp_min(torch.finfo(over.dtype).tiny)


def from_root(accept_BN: Tensor, tree: Tree) -> Tensor:
    """Acceptances with node 0, which is committed already, at 1 and padding nodes at 0."""
    accept_BN = accept_BN.clamp(0, 1).masked_fill(~tree.valid_BN, 0.0)
    return torch.cat([torch.ones_like(accept_BN[:, :1]), accept_BN[:, 1:]], 1)


def child_of(tree: Tree, end_B: Tensor) -> tuple[Tensor, Tensor]:
    """Of a chain: the node after each end, and whether there is one (bool)."""
    child_B = (end_B + 1).clamp_max(tree.size - 1)
    return child_B, (end_B + 1 < tree.size) & tree.valid_BN.gather(1, child_B[:, None])[:, 0]


def chain_law(tree: Tree, p_BNV: Tensor, accept_BN: Tensor, left: Callable[[Tensor, Tensor], Tensor] | None = None) -> Law:
    """The law of a ratio rule: its acceptances, and after a refusal the target's mass that the draft did not cover.

    left: (p_BV, q_BV) -> mass_BV, to be normalized; default (p - q)+. Where no draft is left the token comes from p.
    """
    assert tree.is_chain or tree.size == 1, "the rule admits chains only"

    def residual(end_B: Tensor) -> Tensor:
        p_BV = at_node(p_BNV, end_B)
        child_B, has_child_B = child_of(tree, end_B)
        q_BV = draft_law(tree, child_B, p_BV)
        mass_BV = (p_BV - q_BV).clamp_min_(0) if left is None else left(p_BV, q_BV)
        return torch.where(has_child_B[:, None], normalize(mass_BV, p_BV), p_BV)

    return Law(from_root(accept_BN, tree), residual)
