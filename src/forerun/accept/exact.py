"""The exact law of what rounds of speculation emit, computed from a rule's own statement of it: nothing is drawn.

Shape suffixes: B trees (each with a weight, the probability that it is drafted), N nodes, V vocabulary, D depth.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from forerun.accept.rule import Law
from forerun.tree import PADDING, Tree, chain_parents


@dataclass(frozen=True)
class Process:
    """A law of token sequences: `laws[d]`, of shape [V] * (d + 1), is the next token's law after each prefix of d tokens."""

    laws: tuple[Tensor, ...]

    @property
    def vocabulary(self) -> int:
        return self.laws[0].shape[0]

    def after(self, prefix_BD: Tensor) -> Tensor:
        """[B, V]: the next token's law after each prefix."""
        return self.laws[prefix_BD.shape[1]][tuple(prefix_BD.unbind(1))].expand(len(prefix_BD), self.vocabulary)

    def joint(self, given: int = 0) -> Tensor:
        """[V] * len(laws): the law of the tokens after the first `given` ones, for every such beginning."""
        joint = torch.ones((self.vocabulary,) * given, dtype=self.laws[0].dtype)
        for law in self.laws[given:]:
            joint = joint[..., None] * law
        return joint


def random_process(vocabulary: int, length: int, generator: torch.Generator, sharpness: float = 1.5) -> Process:
    """Softmax of normal logits after every prefix, float64; with infinite sharpness every law is one-hot."""
    laws = []
    for depth in range(length):
        logits = torch.randn((vocabulary,) * (depth + 1), generator=generator, dtype=torch.float64)
        hot = torch.nn.functional.one_hot(logits.argmax(-1), vocabulary).double()
        laws.append(hot if sharpness == float("inf") else (sharpness * logits).softmax(-1))
    return Process(tuple(laws))


def every_chain(vocabulary: int, depth: int) -> Tensor:
    """[V ** depth, depth + 1]: all drafts of so many tokens below a pending token 0."""
    drafts = torch.tensor(list(itertools.product(range(vocabulary), repeat=depth)), dtype=torch.long)
    return torch.cat([torch.zeros(len(drafts), 1, dtype=torch.long), drafts.view(-1, depth)], 1)


def drawn_chains(draft: Process, depth: int, confidence: float = 0.0) -> tuple[Tree, Tensor]:
    """All chains that a drafter can draw, and their probabilities; it stops after a token less probable than `confidence`."""
    tokens_BN = every_chain(draft.vocabulary, depth)
    laws = [draft.after(tokens_BN[:, 1 : 1 + i]) for i in range(depth)]
    own_BD = torch.stack([law.gather(1, tokens_BN[:, 1 + i, None])[:, 0] for i, law in enumerate(laws)], 1)
    unsure_BD = own_BD < confidence
    lengths = torch.where(unsure_BD.any(1), unsure_BD.int().argmax(1) + 1, depth).tolist()
    probs_BNV = torch.stack([torch.zeros_like(laws[0]), *laws], 1)
    parents_BN = chain_parents(lengths, depth, tokens_BN.device)
    return Tree(tokens_BN, parents_BN, depth, probs_BNV, is_chain=True), own_BD.prod(1)


def drawn_trees(draft: Process, parents: Sequence[int], replacement: bool) -> tuple[Tree, Tensor]:
    """All trees of one shape whose children a drafter can draw, with or without replacement, and their probabilities.

    Without replacement a child's law is the draft's without its elder siblings; where none is left, it is padding.
    """
    vocabulary, size = draft.vocabulary, len(parents)
    tokens_BN = every_chain(vocabulary, size - 1)
    rows = len(tokens_BN)
    parents_BN = torch.tensor(parents).repeat(rows, 1)
    weights_B, laws = torch.ones(rows, dtype=torch.float64), [torch.zeros(rows, vocabulary, dtype=torch.float64)]
    prefixes = [tokens_BN[:, :0]]
    for node in range(1, size):
        law_BV = draft.after(prefixes[parents[node]])
        elder = [other for other in range(1, node) if parents[other] == parents[node]]
        if elder and not replacement:
            law_BV = law_BV.scatter(1, tokens_BN[:, elder], 0.0)
        total_B1 = law_BV.sum(1, keepdim=True)
        lost_B = (total_B1[:, 0] <= 0) | (parents_BN[:, parents[node]] == PADDING)
        parents_BN[lost_B, node] = PADDING
        certain_BV = torch.nn.functional.one_hot(torch.zeros(rows, dtype=torch.long), vocabulary).double()
        law_BV = torch.where(lost_B[:, None], certain_BV, law_BV / total_B1.clamp_min(torch.finfo(torch.float64).tiny))
        laws.append(law_BV)
        weights_B = weights_B * law_BV.gather(1, tokens_BN[:, node, None])[:, 0]
        prefixes.append(torch.cat([prefixes[parents[node]], tokens_BN[:, node, None]], 1))
    depths = [0] * size
    for node in range(1, size):
        depths[node] = depths[parents[node]] + 1
    return Tree(tokens_BN, parents_BN, max(depths), torch.stack(laws, 1)), weights_B


def paths_to(tree: Tree, node: int) -> list[tuple[Tensor, Tensor]]:
    """The drafted tokens from below node 0 down to a node: (rows [R], path [R, D]) for the rows of each shape of tree."""
    if tree.is_chain:
        return [(torch.arange(tree.rows), tree.tokens_BN[:, 1 : 1 + node])]
    shapes, of_row = tree.parents_BN.unique(dim=0, return_inverse=True)
    found = []
    for shape, parents in enumerate(shapes.tolist()):
        path: list[int] = []
        at = node
        while at > 0:  # a padding node counts as node 0
            path = [at, *path] if parents[at] != PADDING else []
            at = parents[at]
        rows = (of_row == shape).nonzero()[:, 0]
        found.append((rows, tree.tokens_BN[rows][:, path]))
    return found


def score(tree: Tree, target: Process) -> Tensor:
    """[B, N, V]: what the target says after every node (after a padding node: what it says after node 0)."""
    scores = torch.zeros(tree.rows, tree.size, target.vocabulary, dtype=target.laws[0].dtype)
    for node in range(tree.size):
        for rows, path_RD in paths_to(tree, node):
            scores[rows, node] = target.after(path_RD)
    return scores


def ends(tree: Tree, law: Law) -> Tensor:
    """[B, N]: the probability that the walk ends at each node: reached, and every child of it refused in turn."""
    if law.last:  # its coin came up, and none after it did
        refused_BN = torch.where(tree.valid_BN, 1 - law.accept_BN, 1.0)
        after_BN = torch.cat([refused_BN[:, 1:].flip(1).cumprod(1).flip(1), torch.ones_like(refused_BN[:, :1])], 1)
        return law.accept_BN * tree.valid_BN * after_BN
    left_BN = torch.zeros_like(law.accept_BN)
    left_BN[:, 0] = 1.0
    for node in range(1, tree.size):
        valid_B1 = tree.valid_BN[:, node, None]
        parent_B1 = tree.parents_BN[:, node, None].clamp_min(0)
        at_parent_B1 = left_BN.gather(1, parent_B1)
        moved_B1 = at_parent_B1 * law.accept_BN[:, node, None] * valid_B1
        left_BN = left_BN.scatter(1, parent_B1, at_parent_B1 - moved_B1)
        left_BN[:, node] = moved_B1[:, 0]
    return left_BN


def first_tokens(tree: Tree, law: Law, target: Process, weights_B: Tensor) -> Tensor:
    """[V] * len(target.laws): the law of the first tokens that come out, where the target goes on by itself after one round."""
    length, vocabulary = len(target.laws), target.vocabulary
    end_BN = ends(tree, law)
    joint = torch.zeros((vocabulary,) * length, dtype=torch.float64)
    for node in range(tree.size):
        mass_BV = (weights_B * end_BN[:, node])[:, None] * law.residual(torch.full((tree.rows,), node))
        for rows, path_RD in paths_to(tree, node):
            depth = path_RD.shape[1]
            emitted = torch.zeros(vocabulary**depth, vocabulary, dtype=torch.float64)  # the path, then the token after it
            place = torch.zeros(len(rows), dtype=torch.long)
            for token_R in path_RD.unbind(1):
                place = place * vocabulary + token_R
            emitted.index_add_(0, place, mass_BV[rows])
            joint += emitted.view((vocabulary,) * (depth + 1) + (1,) * (length - depth - 1)) * target.joint(given=depth + 1)
    return joint


def accepted(tree: Tree, law: Law, weights_B: Tensor) -> Tensor:
    """[D]: the law of the number of accepted drafts."""
    of_depth_D = torch.zeros(tree.depth + 1, dtype=torch.float64)
    depths_BN = torch.where(tree.valid_BN, tree.depths_BN(), 0)
    return of_depth_D.index_add_(0, depths_BN.flatten(), (weights_B[:, None] * ends(tree, law)).flatten())


def distance(one: Tensor, other: Tensor) -> float:
    """Total variation; lost or invented mass counts, and what is no number is infinitely far."""
    half = float((one - other).abs().sum() / 2)
    return math.inf if math.isnan(half) else half
