"""Log-likelihoods of continuations under a transformers model: in padded batches, a context that several share computed once.

Shape suffixes: B contexts, R continuations, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from forerun.types import Score, UserError

Pair = tuple[Sequence[int], Sequence[int]]
LOGITS = 2**28
"""Most logits of a forward pass; they are what fills the memory where the vocabulary is large."""
CHUNK = 256
"""Positions whose logits are widened to float32 at a time."""


@dataclass(frozen=True)
class Group:
    """A context and the continuations that follow it, each with its place among the pairs that were asked for."""

    context: tuple[int, ...]
    continuations: list[Sequence[int]]
    places: list[int]

    @property
    def longest(self) -> int:
        return max(map(len, self.continuations))


@dataclass(frozen=True)
class ModelScorer:
    """Scores with ordinary forward passes over texts of similar length, together at most `tokens` tokens, padding counted."""

    model: PreTrainedModel
    tokens: int = 8192

    @property
    def limit(self) -> int | None:
        """Most tokens that the model reads at once; None where its configuration does not say."""
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return int(limit) if limit else None

    @torch.inference_mode()
    def score(self, pairs: Sequence[Pair]) -> list[Score]:
        """As Scorer says; a context that does not fit loses its start, and a continuation that does not fit is a UserError."""
        groups: dict[tuple[int, ...], Group] = {}
        for place, pair in enumerate(pairs):
            context, continuation = self.clip(*pair)
            group = groups.setdefault(context, Group(context, [], []))
            group.continuations.append(continuation)
            group.places.append(place)
        found: dict[int, Score] = {}
        for together, wanted in ((self.whole, False), (self.shared, True)):
            chosen = [group for group in groups.values() if (len(group.places) > 1) == wanted]
            chosen.sort(key=lambda group: -len(group.context) - group.longest)
            for batch in self.batches(chosen):
                scores = together(batch)
                found |= zip((place for group in batch for place in group.places), scores, strict=True)
        return [found[place] for place in range(len(pairs))]

    def clip(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[tuple[int, ...], Sequence[int]]:
        """What the model can read of a pair; the last token of a continuation is told, never read."""
        if self.limit is None:
            return tuple(context), continuation
        if len(continuation) > self.limit:
            raise UserError(
                f"a continuation of {len(continuation)} tokens cannot be scored: the model reads {self.limit} at once"
            )
        return tuple(context[-(self.limit + 1 - len(continuation)) :]), continuation

    def batches(self, groups: Sequence[Group]) -> Iterator[list[Group]]:
        """Groups, the longest first, as many at a time as `tokens` and LOGITS allow, at least one."""
        vocabulary = self.model.config.get_text_config(decoder=True).vocab_size
        batch: list[Group] = []
        for group in groups:
            grown = [*batch, group]
            rows = sum(len(one.places) for one in grown)
            longest = max(len(one.context) + one.longest for one in grown)
            kept = longest - min(len(one.context) for one in grown) + 1
            if batch and (rows * longest > self.tokens or rows * kept * vocabulary > LOGITS):
                yield batch
                grown = [group]
            batch = grown
        if batch:
            yield batch

    def whole(self, batch: Sequence[Group]) -> list[Score]:
        """Contexts with one continuation each, in one pass; no token sees the padding on its right."""
        texts = [[*group.context, *group.continuations[0]][:-1] for group in batch]
        longest, first = max(map(len, texts)), min(len(group.context) for group in batch) - 1
        ids_BT = self.tensor([text + [0] * (longest - len(text)) for text in texts])
        logits_BTV = self.model(input_ids=ids_BT, use_cache=False, logits_to_keep=longest - first).logits
        starts = [len(group.context) - 1 - first for group in batch]
        rows = zip(logits_BTV, starts, batch, strict=True)
        return [read(row_TV[start:], group.continuations[0]) for row_TV, start, group in rows]

    def shared(self, batch: Sequence[Group]) -> list[Score]:
        """Each context once, padded on the left, then all continuations behind copies of its keys and values."""
        longest = max(len(group.context) for group in batch)
        pads = [longest - len(group.context) for group in batch]
        ids_BT = self.tensor([[0] * pad + list(group.context) for pad, group in zip(pads, batch, strict=True)])
        seen_BT = torch.arange(longest, device=ids_BT.device) >= self.tensor(pads)[:, None]
        out = self.model(
            input_ids=ids_BT, attention_mask=seen_BT.long(), position_ids=(seen_BT.cumsum(1) - 1).clamp(min=0),
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        owner_R = self.tensor([row for row, group in enumerate(batch) for _ in group.places])
        logits_RTV = out.logits[owner_R]
        continuations = [continuation for group in batch for continuation in group.continuations]
        width = max(map(len, continuations)) - 1
        if width:
            cache = out.past_key_values
            cache.batch_select_indices(owner_R)
            ids_RT = self.tensor([[*one[:-1], *[0] * (width + 1 - len(one))] for one in continuations])
            lengths_R = longest - self.tensor(pads)[owner_R]
            tails = self.model(
                input_ids=ids_RT, attention_mask=torch.cat([seen_BT[owner_R].long(), torch.ones_like(ids_RT)], 1),
                position_ids=lengths_R[:, None] + torch.arange(width, device=ids_RT.device),
                past_key_values=cache, use_cache=True,
            )  # fmt: skip
            logits_RTV = torch.cat([logits_RTV, tails.logits], 1)
        return [read(row_TV, continuation) for row_TV, continuation in zip(logits_RTV, continuations, strict=True)]

    def tensor(self, numbers: Sequence[object]) -> Tensor:
        return torch.tensor(numbers, device=self.model.device)


def read(logits_TV: Tensor, continuation: Sequence[int]) -> Score:
    """What logits say of a continuation; the first of them are of its first token, and those behind its end are not read."""
    told_T = torch.tensor(list(continuation), device=logits_TV.device)
    logprobs, hits = [], []
    for start in range(0, len(told_T), CHUNK):
        told_C = told_T[start : start + CHUNK]
        part_CV = logits_TV[start : start + len(told_C)]
        part_CV = part_CV.to(torch.promote_types(part_CV.dtype, torch.float32))
        chosen_C = part_CV.gather(1, told_C[:, None])[:, 0]
        logprobs.append((chosen_C.double() - part_CV.logsumexp(1).double()).sum())
        hits.append((part_CV.argmax(1) == told_C).all())
    return Score(float(torch.stack(logprobs).sum()), bool(torch.stack(hits).all()))
