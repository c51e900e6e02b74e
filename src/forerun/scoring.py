"""Log-likelihoods of continuations under a transformers model, in batches.

Shape suffixes: B texts, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from forerun.types import Score

Pair = tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class ModelScorer:
    """Scores with ordinary forward passes over `batch` texts of similar length at a time, padded on the right."""

    model: PreTrainedModel
    batch: int = 8

    @torch.inference_mode()
    def score(self, pairs: Sequence[Pair]) -> list[Score]:
        found: list[Score | None] = [None] * len(pairs)
        longest_first = sorted(range(len(pairs)), key=lambda i: -len(pairs[i][0]) - len(pairs[i][1]))
        for start in range(0, len(pairs), self.batch):
            chosen = longest_first[start : start + self.batch]
            for i, score in zip(chosen, self.together([pairs[i] for i in chosen]), strict=True):
                found[i] = score
        return [score for score in found if score is not None]

    def together(self, pairs: Sequence[Pair]) -> list[Score]:
        """One forward pass: what stands right of a text's end cannot be seen by a causal model."""
        rows = [[*context, *continuation][:-1] for context, continuation in pairs]  # the last token predicts nothing
        longest = max(map(len, rows))
        ids_BT = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=self.model.device)
        # Only continuations are read, so only the last positions of the batch need the output head.
        first = min(len(context) - 1 for context, _ in pairs)
        logits_BTV = self.model(input_ids=ids_BT, use_cache=False, logits_to_keep=longest - first).logits
        scores = []
        for row_TV, (context, continuation) in zip(logits_BTV, pairs, strict=True):
            start = len(context) - 1 - first
            laws_TV = row_TV[start : start + len(continuation)].float().log_softmax(-1)
            told_T = torch.tensor(list(continuation), device=laws_TV.device)
            logprob = laws_TV.gather(1, told_T[:, None]).double().sum()
            scores.append(Score(float(logprob), bool((laws_TV.argmax(-1) == told_T).all())))
        return scores
