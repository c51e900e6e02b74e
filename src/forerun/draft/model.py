"""A smaller causal LM drafts a chain, greedily or by sampling, for all rows at once.

Shape suffixes: B rows, N nodes, W width of the first pass, V vocabulary, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from forerun.draft.policy import LengthPolicy
from forerun.draft.protocol import Batch, Outcome, Row
from forerun.model import Target
from forerun.sampling import exponentials, law, path_counts, penalize, race
from forerun.tree import Tree, chain, chain_parents


class DraftModel:
    """k passes of the draft model for k tokens: the first one takes every committed token that its cache lacks.

    After a fully accepted round these are two, after any other one, so no pass is spent on catching up.
    `confidence`: a row stops drafting after a token less probable than this. The token is kept (a stopping time of the
    draft), so the rule stays lossless. `greedy` drafts the draft's most probable token even where the request samples.
    """

    features: tuple[int, ...] = ()

    def __init__(
        self,
        target: Target,
        policy: LengthPolicy,
        rows: int,
        capacity: int,
        confidence: float = 0.0,
        greedy: bool = False,
        chunk: int = 512,
    ) -> None:
        self.target, self.policy, self.confidence, self.greedy = target, policy, confidence, greedy
        self.depth, self.size = policy.limit, policy.limit + 1
        self.drawn = not greedy
        self.cache, self.chunk = target.new_cache(rows, capacity), chunk

    def admit(self, row: int, prompt: Sequence[int], hidden_TH: Tensor | None) -> None:
        self.target.prefill(prompt, self.cache, row, self.chunk)
        self.policy.admit(row)

    def propose(self, batch: Batch) -> Tree:
        depths = self.policy.depths(batch.rows)
        depth = max(depths)
        if depth == 0:
            return chain(batch.pending_B, [[] for _ in batch.rows])
        pending_B = batch.pending_B
        wants_probs = self.drawn and not batch.warp.all_greedy
        logits_BV = self._first_pass(batch)
        tokens, probs = [pending_B], []
        for i in range(1, depth + 1):
            drawing = [row if own >= i else None for row, own in zip(batch.rows, depths, strict=True)]
            token_B, probs_BV, own_BV = self._draw(logits_BV, batch, drawing, tokens, wants_probs)
            tokens.append(token_B)
            if wants_probs:
                probs.append(probs_BV)
            if self.confidence > 0:
                sure = (own_BV.gather(1, token_B[:, None])[:, 0] >= self.confidence).tolist()
                depths = [own if fine else min(own, i) for own, fine in zip(depths, sure, strict=True)]
            if max(depths) <= i:
                break
            node = Tree(token_B[:, None], chain_parents([0] * len(depths), 0, token_B.device), 0, None, True)
            logits_BV = self.target.verify(node, self.cache).logits[:, -1]
            self.cache.lengths = [length + 1 for length in self.cache.lengths]
        depth = len(tokens) - 1
        self.cache.lengths = [length - (depth - 1) for length in self.cache.lengths]
        probs_BNV = torch.stack([torch.zeros_like(probs[0]), *probs], 1) if wants_probs else None
        return Tree(torch.stack(tokens, 1), chain_parents(depths, depth, pending_B.device), depth, probs_BNV, True)

    def _first_pass(self, batch: Batch) -> Tensor:
        """Feed what the cache lacks, up to and with the pending token; returns logits after it, [B, V]."""
        # A round that broke off may have left drafted tokens counted: at least the pending one is fed.
        ends = [len(row.tokens) - 1 if row else 0 for row in batch.rows]
        self.cache.lengths = [min(pair) for pair in zip(self.cache.lengths, ends, strict=True)]
        lacking = [row.tokens[length:] if row else [0] for row, length in zip(batch.rows, self.cache.lengths, strict=True)]
        width = max(map(len, lacking))
        width = width if width <= 2 else 1 << (width - 1).bit_length()  # few shapes
        device = self.target.device
        tokens_BW = torch.tensor([part + [0] * (width - len(part)) for part in lacking], device=device)
        tree = Tree(tokens_BW, chain_parents([width - 1] * len(lacking), width - 1, device), width - 1, None, True)
        logits_BWV = self.target.verify(tree, self.cache).logits
        self.cache.lengths = [length + len(part) for length, part in zip(self.cache.lengths, lacking, strict=True)]
        last_B = torch.tensor([len(part) - 1 for part in lacking], device=device)
        return logits_BWV.gather(1, last_B[:, None, None].expand(-1, 1, logits_BWV.shape[2]))[:, 0]

    def _draw(
        self, logits_BV: Tensor, batch: Batch, drawing: Sequence[Row | None], tokens: list[Tensor], wants_probs: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The next token of every row, the law that it is drawn from (where needed), and how sure the draft is of each.

        Only the rows of `drawing` use up random numbers, so that a row's stream does not depend on its neighbours' depths.
        """
        warp, path_BNV = batch.warp, None
        if warp.penalties_B3 is not None and len(tokens) > 1:
            drafted = torch.stack(tokens, 1)
            width = len(tokens) - 1
            so_far = Tree(drafted, chain_parents([width] * len(drafted), width, drafted.device), width, None, True)
            path_BNV = path_counts(so_far, logits_BV.shape[1])[:, -1:]
        logits_BV = penalize(logits_BV[:, None], warp, batch.counts, path_BNV)[:, 0]
        own_BV = logits_BV.softmax(-1) if self.confidence > 0 else logits_BV
        if not wants_probs:
            return logits_BV.argmax(-1), own_BV, own_BV
        probs_BV = law(logits_BV[:, None], warp)[:, 0]
        streams = [row.randomness.draft if row and not row.sampling.greedy else None for row in drawing]
        sure_BV = torch.where(warp.greedy_B[:, None], own_BV, probs_BV)  # a greedy row's law is one-hot, hence always sure
        return race(probs_BV, exponentials(streams, probs_BV.shape[1], probs_BV.device)), probs_BV, sure_BV

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
