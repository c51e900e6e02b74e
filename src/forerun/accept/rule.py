"""What an acceptance rule is, and the one walker that draws from it.

Shape suffixes: B rows, N nodes, D depth + 1, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from forerun.sampling import race
from forerun.tree import Tree


@dataclass(frozen=True)
class Law:
    """The law of one round.

    accept_BN: probability that the walk moves from the parent of node n to n, given that it stands at the parent and has
        refused the siblings before n.
    residual: end_B -> law_BV of the token that follows when the walk ends at node end_B (all of its children refused).
    last: of a chain, the walk ends at the last node whose coin comes up, whatever the coins before it said (block
        verification); accept_BN are then independent coins.
    """

    accept_BN: Tensor
    residual: Callable[[Tensor], Tensor]
    last: bool = False


@dataclass(frozen=True)
class Verdict:
    """The path that was accepted: nodes path_BD[b, :accepted_B[b]] (node 0 counts), then the token bonus_B[b]."""

    path_BD: Tensor
    accepted_B: Tensor
    bonus_B: Tensor


class Rule(Protocol):
    """A law over a tree, given what the target (p_BNV, after node n) and the drafter (tree.probs_BNV, of node n) say.

    Laws are probabilities after the request's warpers, float32 or float64, so a rule can be enumerated without drawing.
    Where tree.probs_BNV is None the drafts were chosen, and their law is one-hot. At temperature 0 all laws are one-hot.

    lossless: it claims that what comes out has the target's law; `forerun audit rule` says whether that is so.
    trees: it admits any tree; else chains only.
    meaningless: it accepts whatever was drafted, for load tests.
    """

    name: str
    lossless: bool
    trees: bool
    meaningless: bool

    def law(self, tree: Tree, p_BNV: Tensor) -> Law: ...


def walk(tree: Tree, law: Law, uniforms_BN: Tensor, exponentials_BV: Tensor) -> Verdict:
    """Draw a path and the token after it. Strict `<`: probability 1 always accepts and 0 never does."""
    coin_BN = (uniforms_BN < law.accept_BN) & tree.valid_BN
    path_BD, accepted_B = to_last(tree, coin_BN) if law.last else follow(tree, coin_BN)
    end_B = path_BD.gather(1, accepted_B[:, None] - 1)[:, 0]
    return Verdict(path_BD, accepted_B, race(law.residual(end_B), exponentials_BV))


def walk_greedy(tree: Tree, best_BN: Tensor) -> Verdict:
    """What every lossless rule does with one-hot laws: follow the target's best tokens, without forming any law."""
    parents_BN = tree.parents_BN.clamp_min(0)
    coin_BN = (tree.tokens_BN == best_BN.gather(1, parents_BN)) & tree.valid_BN
    path_BD, accepted_B = follow(tree, coin_BN)
    end_B = path_BD.gather(1, accepted_B[:, None] - 1)
    return Verdict(path_BD, accepted_B, best_BN.gather(1, end_B)[:, 0])


def follow(tree: Tree, coin_BN: Tensor) -> tuple[Tensor, Tensor]:
    """From node 0 to the first child whose coin came up, and on. Returns path_BD and accepted_B (node 0 counts)."""
    device = coin_BN.device
    steps_D = torch.arange(tree.depth + 1, device=device)
    if tree.is_chain:
        accepted_B = 1 + coin_BN[:, 1:].long().cumprod(1).sum(1)
        return torch.minimum(steps_D, accepted_B[:, None] - 1), accepted_B
    node_B = torch.zeros(tree.rows, dtype=torch.long, device=device)
    alive_B = torch.ones(tree.rows, dtype=torch.bool, device=device)
    is_draft_N = torch.arange(tree.size, device=device) > 0
    path, accepted_B = [node_B], torch.ones_like(node_B)
    for _ in range(tree.depth):
        hit_BN = (tree.parents_BN == node_B[:, None]) & coin_BN & is_draft_N
        alive_B = alive_B & hit_BN.any(1)
        node_B = torch.where(alive_B, hit_BN.int().argmax(1), node_B)
        accepted_B = accepted_B + alive_B
        path.append(node_B)
    return torch.stack(path, 1), accepted_B


def to_last(tree: Tree, coin_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Down a chain to the last node whose coin came up. Returns path_BD and accepted_B (node 0 counts)."""
    assert tree.is_chain, "only a chain has a last node"
    steps_D = torch.arange(tree.depth + 1, device=coin_BN.device)
    last_B = (coin_BN * steps_D).amax(1)
    return torch.minimum(steps_D, last_B[:, None]), last_B + 1


def at_node(values_BNV: Tensor, node_B: Tensor) -> Tensor:
    """[B, V]: the values at one node of each row."""
    return values_BNV[torch.arange(len(node_B), device=node_B.device), node_B]


def normalize(mass_BV: Tensor, otherwise_BV: Tensor) -> Tensor:
    """Divide by the sum; a row without mass (it was always accepted, up to rounding) takes `otherwise`."""
    total_B1 = mass_BV.sum(-1, keepdim=True)
    return torch.where(total_B1 > 0, mass_BV / total_B1.clamp_min(torch.finfo(mass_BV.dtype).tiny), otherwise_BV)


def describe(rule: Rule) -> str:
    """A rule's name with its parameters: `typical(epsilon=0.09, delta=0.3)`."""
    options = ", ".join(f"{name}={getattr(rule, name)}" for name in getattr(rule, "__dataclass_fields__", ()))
    return f"{rule.name}({options})" if options else rule.name
