"""The MLP speculator drafts a chain, one step of its recurrent state a token (Wertheimer et al. 2024).

Shape suffixes: B rows, T tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from forerun.draft.drawing import draw, drawn_chain
from forerun.draft.hidden import EndState
from forerun.draft.policy import LengthPolicy
from forerun.draft.protocol import Batch, Outcome
from forerun.heads import MLPSpeculator
from forerun.tree import Tree, chain


class MLPDraft:
    """Up to one token for each of the head's steps. `greedy` drafts the best token even where the request samples."""

    features: tuple[int, ...] = (-1,)
    trees = False

    def __init__(self, head: MLPSpeculator, policy: LengthPolicy, rows: int, greedy: bool = False) -> None:
        self.head, self.policy = head, policy
        self.depth = min(policy.limit, head.shape.heads)
        self.size, self.drawn = self.depth + 1, not greedy
        self.end = EndState(rows)

    def admit(self, row: int, prompt: Sequence[int], hidden_TH: Tensor | None) -> None:
        self.end.admit(row, hidden_TH)
        self.policy.admit(row)

    def propose(self, batch: Batch) -> Tree:
        lengths = [min(length, self.depth) for length in self.policy.depths(batch.rows)]
        if max(lengths) == 0:
            return chain(batch.pending_B, [[] for _ in batch.rows])
        wants_probs = self.drawn and not batch.warp.all_greedy
        state = self.head.first(self.end.read())
        tokens: list[Tensor] = [batch.pending_B]
        probs: list[Tensor] = []
        for i in range(max(lengths)):
            state, logits_BV = self.head.step(i, state, tokens[-1])
            drawing = [row if length > i else None for row, length in zip(batch.rows, lengths, strict=True)]
            drawn = draw(logits_BV, batch, drawing, tokens, wants_probs)
            tokens.append(drawn.token_B)
            if drawn.probs_BV is not None:
                probs.append(drawn.probs_BV)
        return drawn_chain(tokens, lengths, probs)

    def observe(self, batch: Batch, outcome: Outcome) -> None:
        self.end.observe(outcome)
        self.policy.observe(outcome)

    def release(self, row: int) -> None:
        pass
