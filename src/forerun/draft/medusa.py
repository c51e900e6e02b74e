"""Medusa: heads over the target's last hidden state guess a static tree at once (Cai et al. 2024).

Shape suffixes: B rows, N nodes, K heads, V vocabulary, X all heads' guesses, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from forerun.draft.choices import Choices
from forerun.draft.hidden import EndState
from forerun.draft.protocol import Batch, Outcome, Row
from forerun.draft.shapes import ShapePolicy
from forerun.heads import Medusa
from forerun.tree import PADDING, Tree, chain
from forerun.types import UserError


class MedusaDraft:
    """A node's token is its head's rank-th most probable one, whatever its parent is: chosen, not drawn.

    The policy cuts the tree to its first nodes, which are its best. UserError where the tree asks for what the head lacks.
    """

    features: tuple[int, ...] = (-1,)
    drawn = False
    trees = True

    def __init__(self, head: Medusa, choices: Choices, policy: ShapePolicy, rows: int) -> None:
        self.head, self.policy = head, policy
        self.choices = choices = choices.cut(policy.depth, policy.nodes)
        self.size, self.depth = choices.size, max(choices.depths)
        self.width = max(choices.ranks) + 1
        deep = next((path for path in choices.paths if len(path) > head.shape.heads), None)
        if deep is not None:
            raise UserError(f"drafter.choices: path {list(deep)} is deeper than the {head.shape.heads} heads; leave it out")
        wide = next((path for path in choices.paths if path and path[-1] >= head.shape.vocab_size), None)
        if wide is not None:
            raise UserError(f"drafter.choices: path {list(wide)} ranks beyond the {head.shape.vocab_size} tokens; leave it out")
        self.parents_N, self.depths_N, ranks_N = choices.tensors(next(head.parameters()).device)
        self.place_N = (self.depths_N - 1).clamp_min(0) * self.width + ranks_N  # of a node's token among all heads' guesses
        self.end = EndState(rows)

    def admit(self, row: int, prompt: Sequence[int], hidden_TH: Tensor | None) -> None:
        self.end.admit(row, hidden_TH)
        self.policy.admit(row)

    def propose(self, batch: Batch) -> Tree:
        depth, nodes = self.policy.shape(batch.rows)
        nodes = min(nodes, self.size)
        depth = min(depth, self.choices.deepest(nodes))
        if depth == 0:
            return chain(batch.pending_B, [[] for _ in batch.rows])
        state_BH, head = self.end.read(), self.head
        logits_BKV = torch.stack([head.outputs[k](head.blocks[k](state_BH)) for k in range(depth)], 1)
        guesses_BX = logits_BKV.topk(self.width).indices.flatten(1)
        # Where `depth` was cut, deeper nodes are padding in every row: their place is out of range, and any token will do.
        place_N = self.place_N[1:nodes].clamp_max(depth * self.width - 1)
        tokens_BN = torch.cat([batch.pending_B[:, None], guesses_BX[:, place_N]], 1)
        return Tree(tokens_BN, self._parents(batch, nodes, depth), depth, None, self.choices.is_chain(nodes))

    def _parents(self, batch: Batch, nodes: int, depth: int) -> Tensor:
        """Nodes deeper than `depth`, or than a row can still use, are padding."""
        rooms = [min(room(row), depth) for row in batch.rows]
        parents_N = self.parents_N[:nodes]
        if min(rooms) >= self.choices.deepest(nodes):  # nothing to copy to the device
            return parents_N.expand(len(rooms), -1)
        room_B = torch.tensor(rooms, device=parents_N.device)
        return torch.where(self.depths_N[:nodes] <= room_B[:, None], parents_N, PADDING)

    def observe(self, batch: Batch, outcome: Outcome) -> None:
        self.end.observe(outcome)
        self.policy.observe(outcome)

    def release(self, row: int) -> None:
        pass


def room(row: Row | None) -> int:
    """How deep a row can still use a tree: a round emits one token more than it accepts."""
    return row.remaining - 1 if row else 0
