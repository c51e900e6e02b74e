"""Plain decoding: the tree of one node."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from forerun.draft.protocol import Batch, Outcome
from forerun.tree import Tree, chain


class NoDraft:
    depth, size, drawn, trees = 0, 1, False, False
    features: tuple[int, ...] = ()

    def admit(self, row: int, prompt: Sequence[int], hidden_TH: Tensor | None) -> None:
        pass

    def propose(self, batch: Batch) -> Tree:
        return chain(batch.pending_B, [[] for _ in batch.rows])

    def observe(self, batch: Batch, outcome: Outcome) -> None:
        pass

    def release(self, row: int) -> None:
        pass
