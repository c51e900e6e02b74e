"""A smaller causal LM drafts a chain, greedily or by sampling, for all rows at once.

Shape suffixes: B rows, N nodes, W width of the first pass, V vocabulary, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from forerun.draft.drawing import Drawn, draw, drawn_chain
from forerun.draft.policy import LengthPolicy
from forerun.draft.protocol import Batch, Outcome
from forerun.model import Target
from forerun.tree import Tree, chain, chain_parents


class DraftModel:
    """k passes of the draft model for k tokens: the first one takes every committed token that its cache lacks.

    After a fully accepted round these are two, after any other one, so no pass is spent on catching up.
    `confidence`: a row stops drafting after a token less probable than this. The token is kept (a stopping time of the
    draft), so the rule stays lossless. `greedy` drafts the draft's most probable token even where the request samples.
    `vocabulary`: the target's number of token ids, where padding of the embeddings makes the draft's another one.
    """

    features: tuple[int, ...] = ()
    trees = False

    def __init__(
        self,
        target: Target,
        policy: LengthPolicy,
        rows: int,
        capacity: int,
        confidence: float = 0.0,
        greedy: bool = False,
        chunk: int = 512,
        vocabulary: int | None = None,
    ) -> None:
        self.vocabulary = target.vocabulary if vocabulary is None else vocabulary
        self.target, self.policy, self.confidence, self.greedy = target, policy, confidence, greedy
        self.depth, self.size = policy.limit, policy.limit + 1
        self.drawn = not greedy
        self.cache, self.chunk = target.new_cache(rows, capacity), chunk

    def admit(self, row: int, prompt: Sequence[int], hidden_TH: Tensor | None) -> None:
        self.target.prefill([self._known(token) for token in prompt], self.cache, row, self.chunk)
        self.policy.admit(row)

    def propose(self, batch: Batch) -> Tree:
        depths = self.policy.depths(batch.rows)
        depth = max(depths)
        if depth == 0:
            return chain(batch.pending_B, [[] for _ in batch.rows])
        wants_probs = self.drawn and not batch.warp.all_greedy
        logits_BV = self._first_pass(batch)
        tokens, probs = [batch.pending_B], []
        for i in range(1, depth + 1):
            drawing = [row if own >= i else None for row, own in zip(batch.rows, depths, strict=True)]
            drawn = draw(logits_BV, batch, drawing, tokens, wants_probs)
            tokens.append(drawn.token_B)
            if drawn.probs_BV is not None:
                probs.append(drawn.probs_BV)
            if self.confidence > 0:
                sure = (sureness(drawn, batch) >= self.confidence).tolist()
                depths = [own if fine else min(own, i) for own, fine in zip(depths, sure, strict=True)]
            if max(depths) <= i:
                break
            node = Tree(drawn.token_B[:, None], chain_parents([0] * len(depths), 0, self.target.device), 0, None, True)
            logits_BV = self._fitted(self.target.verify(node, self.cache).logits[:, -1])
            self.cache.lengths = [length + 1 for length in self.cache.lengths]
        self.cache.lengths = [length - (len(tokens) - 2) for length in self.cache.lengths]
        return drawn_chain(tokens, depths, probs)

    def _first_pass(self, batch: Batch) -> Tensor:
        """Feed what the cache lacks, up to and with the pending token; returns logits after it, [B, V]."""
        # A round that broke off may have left drafted tokens counted: at least the pending one is fed.
        ends = [len(row.tokens) - 1 if row else 0 for row in batch.rows]
        self.cache.lengths = [min(pair) for pair in zip(self.cache.lengths, ends, strict=True)]
        lacking = [
            [self._known(token) for token in row.tokens[length:]] if row else [0]
            for row, length in zip(batch.rows, self.cache.lengths, strict=True)
        ]
        width = max(map(len, lacking))
        width = width if width <= 2 else 1 << (width - 1).bit_length()  # few shapes
        device = self.target.device
        tokens_BW = torch.tensor([part + [0] * (width - len(part)) for part in lacking], device=device)
        tree = Tree(tokens_BW, chain_parents([width - 1] * len(lacking), width - 1, device), width - 1, None, True)
        logits_BWV = self.target.verify(tree, self.cache).logits
        self.cache.lengths = [length + len(part) for length, part in zip(self.cache.lengths, lacking, strict=True)]
        last_B = torch.tensor([len(part) - 1 for part in lacking], device=device)
        return self._fitted(logits_BWV.gather(1, last_B[:, None, None].expand(-1, 1, logits_BWV.shape[2]))[:, 0])

    def _known(self, token: int) -> int:
        """An id that the draft has an embedding for: padding ids stand for no text, so any will do."""
        return token if token < self.target.vocabulary else 0

    def _fitted(self, logits_BV: Tensor) -> Tensor:
        """As wide as the target's: ids that only the target has are never drafted, ids that only the draft has are cut off."""
        missing = self.vocabulary - logits_BV.shape[1]
        if missing == 0:
            return logits_BV
        return functional.pad(logits_BV, (0, missing), value=-torch.inf) if missing > 0 else logits_BV[:, : self.vocabulary]

    def observe(self, batch: Batch, outcome: Outcome) -> None:
        """Keep what was accepted and fed: the last drafted token was never fed."""
        fed = outcome.nodes - 2  # drafted tokens in the cache, beyond the pending one
        for row, accepted in enumerate(outcome.accepted):
            if outcome.nodes > 1:
                self.cache.lengths[row] += min(accepted, fed)
            if batch.rows[row] is None:
                self.cache.release(row)
        self.policy.observe(outcome)

    def release(self, row: int) -> None:
        self.cache.release(row)


def sureness(drawn: Drawn, batch: Batch) -> Tensor:
    """[B]: how probable the draft itself holds each token; of a drawn one, by the law that it was drawn from."""
    own_BV = drawn.logits_BV.softmax(-1)
    if drawn.probs_BV is not None:  # a greedy row's law is one-hot, hence always sure
        own_BV = torch.where(batch.warp.greedy_B[:, None], own_BV, drawn.probs_BV)
    return own_BV.gather(1, drawn.token_B[:, None])[:, 0]
