"""The tree of tokens that one step verifies.

Shape suffixes: B rows, N nodes, D depth + 1, V vocabulary. Node 0 is the pending token: committed, but not yet in the cache.
Parents precede their children. A padding node has parent -1: it is computed, and never accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PADDING = -1


@dataclass(frozen=True)
class Tree:
    """Drafted tokens of every row; `depth` is the longest path below node 0 (a host number, so that shapes stay static)."""

    tokens_BN: Tensor
    parents_BN: Tensor  # parents_BN[:, 0] is 0
    depth: int
    probs_BNV: Tensor | None = None  # law that each node was drawn from, float32; None: chosen, not drawn
    is_chain: bool = False  # parent of node n is n - 1 (or padding, at the end of a row)

    @property
    def rows(self) -> int:
        return self.tokens_BN.shape[0]

    @property
    def size(self) -> int:
        return self.tokens_BN.shape[1]

    @property
    def valid_BN(self) -> Tensor:
        return self.parents_BN != PADDING

    def ancestors_BNN(self) -> Tensor:
        """[b, n, m]: is node m on the path from node 0 to node n, both ends included (bool)."""
        size = self.size
        if self.is_chain:
            chain_NN = torch.ones(size, size, dtype=torch.bool, device=self.tokens_BN.device).tril()
            return chain_NN.expand(self.rows, size, size)
        # A padding node points to itself. Repeated squaring reaches paths of length 2^i.
        itself_N = torch.arange(size, device=self.tokens_BN.device)
        parents_BN = torch.where(self.valid_BN, self.parents_BN, itself_N)
        reach_BNN = (parents_BN[:, :, None] == itself_N) | (itself_N[:, None] == itself_N)
        for _ in range(max(1, self.depth.bit_length())):
            reach_BNN = (reach_BNN.float() @ reach_BNN.float()) > 0
        return reach_BNN

    def depths_BN(self) -> Tensor:
        if self.is_chain:
            return torch.arange(self.size, device=self.tokens_BN.device).expand(self.rows, self.size)
        return self.ancestors_BNN().sum(-1) - 1


def chain(pending_B: Tensor, drafts: list[list[int]], width: int | None = None) -> Tree:
    """The tree of chosen tokens, one chain a row, padded to the longest (or to `width` drafts)."""
    depth = max(map(len, drafts)) if width is None else width
    device = pending_B.device
    padded = torch.tensor([row + [0] * (depth - len(row)) for row in drafts], dtype=torch.long, device=device)
    tokens_BN = torch.cat([pending_B[:, None], padded.view(len(drafts), depth)], 1)
    return Tree(tokens_BN, chain_parents([len(row) for row in drafts], depth, device), depth, None, True)


def chain_parents(lengths: list[int], depth: int, device: torch.device) -> Tensor:
    """Parents [B, depth + 1] of chains of so many drafts each; the rest is padding."""
    if min(lengths) == depth:  # no padding: nothing to copy to the device
        return (torch.arange(depth + 1, device=device) - 1).clamp_min(0).expand(len(lengths), -1)
    rows = [[0, *range(length), *[PADDING] * (depth - length)] for length in lengths]
    return torch.tensor(rows, dtype=torch.long, device=device)
