"""Prompt lookup: the continuation of an earlier occurrence of the last tokens is the draft."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from forerun.draft.policy import LengthPolicy
from forerun.draft.protocol import Batch, Outcome
from forerun.tree import Tree, chain


class Index:
    """Where each n-gram of one row's text was last followed by a token; grows with the text, never rescans it."""

    def __init__(self, shortest: int, longest: int) -> None:
        self.lengths = range(longest, shortest - 1, -1)
        self.followed_at: dict[tuple[int, ...], int] = {}
        self.done = 1  # tokens[:done] have been seen as followers

    def extend(self, tokens: Sequence[int]) -> None:
        for at in range(self.done, len(tokens)):
            for n in self.lengths:
                if n <= at:
                    self.followed_at[tuple(tokens[at - n : at])] = at
        self.done = max(self.done, len(tokens))

    def continuation(self, tokens: Sequence[int], k: int) -> list[int]:
        """Up to k tokens after the most recent earlier occurrence of the longest suffix that has one.

        Where the occurrence is so close that its continuation runs into the end of the text, the text is repeating itself
        with that period, and the draft goes on repeating.
        """
        for n in self.lengths:
            at = self.followed_at.get(tuple(tokens[-n:])) if n <= len(tokens) else None
            if at is not None:
                period = len(tokens) - at
                return [tokens[at + i % period] for i in range(k)]
        return []


class NGram:
    """Looks up suffixes of lookup_max down to lookup_min tokens in prompt and output (Saxena 2023)."""

    features: tuple[int, ...] = ()
    drawn = trees = False

    def __init__(self, policy: LengthPolicy, rows: int, lookup_min: int = 1, lookup_max: int = 3) -> None:
        self.policy = policy
        self.depth, self.size = policy.limit, policy.limit + 1
        self.range = (lookup_min, max(lookup_min, lookup_max))
        self.indexes = [Index(*self.range) for _ in range(rows)]

    def admit(self, row: int, prompt: Sequence[int], hidden_TH: Tensor | None) -> None:
        self.indexes[row] = Index(*self.range)
        self.policy.admit(row)

    def propose(self, batch: Batch) -> Tree:
        drafts: list[list[int]] = [[] for _ in batch.rows]
        for i, (row, depth) in enumerate(zip(batch.rows, self.policy.depths(batch.rows), strict=True)):
            if row is not None:
                self.indexes[i].extend(row.tokens)
                drafts[i] = self.indexes[i].continuation(row.tokens, depth)
        return chain(batch.pending_B, drafts)

    def observe(self, batch: Batch, outcome: Outcome) -> None:
        self.policy.observe(outcome)

    def release(self, row: int) -> None:
        pass
