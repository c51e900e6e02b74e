"""Drawing the next token of a drafted chain by each request's own law.

Shape suffixes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from forerun.draft.protocol import Batch, Row
from forerun.sampling import exponentials, law, path_counts, penalize, race
from forerun.tree import Tree, chain_parents


@dataclass(frozen=True)
class Drawn:
    """One token of every row, the law it was drawn from (None: chosen), and the logits after bias and penalties."""

    token_B: Tensor
    probs_BV: Tensor | None
    logits_BV: Tensor


def draw(logits_BV: Tensor, batch: Batch, drawing: Sequence[Row | None], chain: Sequence[Tensor], wants_probs: bool) -> Drawn:
    """Draw after a chain (token_B of the pending token, then of each drafted one); without `wants_probs` take the best token.

    Only the rows of `drawing` use up random numbers, so that a row's stream does not depend on its neighbours' depths.
    """
    warp, path_BNV = batch.warp, None
    if warp.penalties_B3 is not None and len(chain) > 1:
        drafted, width = torch.stack(list(chain), 1), len(chain) - 1
        so_far = Tree(drafted, chain_parents([width] * len(drafted), width, drafted.device), width, None, True)
        path_BNV = path_counts(so_far, logits_BV.shape[1])[:, -1:]
    logits_BV = penalize(logits_BV[:, None], warp, batch.counts, path_BNV)[:, 0]
    if not wants_probs:
        return Drawn(logits_BV.argmax(-1), None, logits_BV)
    probs_BV = law(logits_BV[:, None], warp)[:, 0]
    streams = [row.randomness.draft if row and not row.sampling.greedy else None for row in drawing]
    return Drawn(race(probs_BV, exponentials(streams, probs_BV.shape[1], probs_BV.device)), probs_BV, logits_BV)


def drawn_chain(tokens: Sequence[Tensor], lengths: list[int], probs: Sequence[Tensor]) -> Tree:
    """The chain of tokens so far, pending first; each row keeps `lengths` drafted ones. `probs` are of those, or empty."""
    depth = len(tokens) - 1
    probs_BNV = torch.stack([torch.zeros_like(probs[0]), *probs], 1) if probs else None
    return Tree(torch.stack(list(tokens), 1), chain_parents(lengths, depth, tokens[0].device), depth, probs_BNV, True)
