"""What a drafter sees and what it must do.

Shape suffixes: B rows, N nodes, T tokens, V vocabulary, H hidden size of the wanted layers together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from forerun.accept import Verdict
from forerun.sampling import Counts, Randomness, Warp
from forerun.tree import Tree
from forerun.types import Sampling


@dataclass
class Row:
    """A running completion as drafters see it. Invariant: len(tokens) == cache.lengths[row] + 1, the last one pending."""

    sampling: Sampling
    tokens: list[int]  # prompt and output
    prompt_length: int
    randomness: Randomness

    @property
    def remaining(self) -> int:
        """Output tokens still allowed."""
        return self.prompt_length + self.sampling.max_new - len(self.tokens)


@dataclass(frozen=True)
class Batch:
    """The state of all rows at the start of a round; an idle row is None."""

    rows: Sequence[Row | None]
    warp: Warp
    counts: Counts | None  # where a row has penalties
    device: torch.device

    @property
    def pending_B(self) -> Tensor:
        return torch.tensor([row.tokens[-1] if row else 0 for row in self.rows], device=self.device)


@dataclass(frozen=True)
class Outcome:
    """How a round ended; idle rows have zeros. Counts are of drafted tokens, without node 0."""

    drafted: Sequence[int]
    accepted: Sequence[int]
    nodes: int  # nodes a row that the target computed
    draft_seconds: float
    verify_seconds: float
    other_seconds: float
    verdict: Verdict
    hidden_BNH: Tensor | None  # the layers that the drafter's `features` name, at every node
    paths: Sequence[Sequence[int]] = ()  # the accepted path of each row: node numbers, node 0 first


class Drafter(Protocol):
    """Proposes trees. `depth` is the longest path it may propose, `size` the most nodes, `features` the target layers it wants.

    `drawn`: its trees carry the laws that they were drawn from (wherever a row samples). `trees`: they may branch.
    """

    depth: int
    size: int
    features: tuple[int, ...]
    drawn: bool
    trees: bool

    def admit(self, row: int, prompt: Sequence[int], hidden_TH: Tensor | None) -> None:
        """A request starts in a row; `hidden_TH` are the wanted layers' states over its prompt."""

    def propose(self, batch: Batch) -> Tree:
        """The tree of the next round, its node 0 each row's pending token."""

    def observe(self, batch: Batch, outcome: Outcome) -> None:
        """The round's end, before any row is released; the rows' tokens have the accepted ones and the new pending one."""

    def release(self, row: int) -> None:
        """The row's request is over."""
