"""Distance of guesses from the target's laws, and how often they would be accepted.

Shape suffixes: B sequences, A anchors, K kept tokens of a law, S guesses, R ranks, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from forerun.train.students import Student
from forerun.train.teacher import Lesson

RANKS = 10  # most probable guesses whose hit rates are counted


def anchors(lesson: Lesson, share: float = 1.0, random: torch.Generator | None = None) -> Tensor:
    """[A]: the positions from the last prompt token to the one before the last, or a random share of them, in order."""
    first, last = lesson.prompt - 1, lesson.tokens_BT.shape[1] - 1
    places = torch.arange(first, last)
    if share < 1:
        drawn = torch.randperm(last - first, generator=random)[: max(1, round(share * (last - first)))]
        places = places[drawn.sort().values]
    return places.to(lesson.tokens_BT.device)


class Distance(torch.autograd.Function):
    """Cross-entropy under a law, as log_softmax and gather have it, in half their time and memory.

    logits [B, A, V], the law's tokens [B, A, K] (None: the vocabulary) and probabilities [B, A, K] -> nats [B, A].
    """

    @staticmethod
    def forward(ctx: Any, logits_BAV: Tensor, ids_BAK: Tensor | None, probs_BAK: Tensor) -> Tensor:
        said = logits_BAV.to(probs_BAK.dtype).log_softmax(-1)
        kept = said if ids_BAK is None else said.gather(-1, ids_BAK)
        ctx.save_for_backward(said, ids_BAK, probs_BAK)
        ctx.dtype = logits_BAV.dtype
        return -(kept * probs_BAK).sum(-1)

    @staticmethod
    def backward(ctx: Any, grad_BA: Tensor) -> tuple[Tensor, None, None]:
        said, ids_BAK, probs_BAK = ctx.saved_tensors
        slope = said.exp_().mul_(probs_BAK.sum(-1, keepdim=True))  # in place: nobody else holds it
        if ids_BAK is None:
            slope -= probs_BAK
        else:
            slope.scatter_add_(-1, ids_BAK, -probs_BAK)
        return slope.mul_(grad_BA[..., None]).to(ctx.dtype), None, None


def law(lesson: Lesson, places_A: Tensor, token_ids: Tensor | None) -> tuple[Tensor | None, Tensor]:
    """The target's law after some positions: its tokens (None: all) and probabilities, over a student's own tokens.

    A law of which the student has no token comes out as zeros, and counts nothing.
    """
    ids = None if lesson.ids_BTK is None else lesson.ids_BTK[:, places_A]
    probs = lesson.probs_BTK[:, places_A]
    if token_ids is None:
        return ids, probs
    if ids is None:
        probs = probs[..., token_ids]
    else:
        own = torch.full((int(max(token_ids.max(), ids.max())) + 1,), -1, device=ids.device)
        own[token_ids] = torch.arange(len(token_ids), device=ids.device)
        ids = own[ids]
        probs = probs * (ids >= 0)
        ids = ids.clamp(min=0)
    return ids, probs / probs.sum(-1, keepdim=True).clamp(min=1e-9)


def loss(student: Student, lesson: Lesson, anchors_A: Tensor, random: torch.Generator, weight: float) -> tuple[Tensor, Tensor]:
    """The mean cross-entropy, each guess counting `weight` times the one before, with penalties; and [S] each guess's nats."""
    total, weights, each = torch.zeros((), device=lesson.tokens_BT.device), 0.0, []
    for s, guess in enumerate(student.guesses(lesson, anchors_A, random)):
        places_A = (anchors_A + s + 1).clamp(max=lesson.tokens_BT.shape[1] - 1)
        counted_BA = anchors_A + s + 1 < lesson.lengths_B[:, None]
        nats_BA: Tensor = Distance.apply(guess.logits_BAV, *law(lesson, places_A, student.token_ids))  # type: ignore[no-untyped-call]
        nats = (nats_BA * counted_BA).sum() / counted_BA.sum().clamp(min=1)
        each.append(nats.detach())
        total = total + weight**s * (nats if guess.penalty is None else nats + guess.penalty)
        weights += weight**s
    return total / weights, torch.stack(each)


@dataclass(frozen=True)
class Hits:
    """Counts over anchors, one entry a guess, added up batch by batch."""

    counted_S: Tensor  # guesses that lie in their sequence
    ranks_SR: Tensor  # of those, how often the target's greedy choice was the guess of rank r
    alive_S: Tensor  # guesses before which all guesses were the text's own tokens
    taken_S: Tensor  # of those, how many were the target's greedy choice

    def __add__(self, other: Hits) -> Hits:
        return Hits(
            self.counted_S + other.counted_S, self.ranks_SR + other.ranks_SR,
            self.alive_S + other.alive_S, self.taken_S + other.taken_S,
        )  # fmt: skip

    def report(self) -> dict[str, Any]:
        """`ranks` [S][R]: rates of each rank; `top1` their first; `acceptance`: of a guess whose forerunners were all accepted;

        `efficiency`: tokens a round of a chain, 1 + a1 + a1 a2 + ...
        """
        ranks_SR = self.ranks_SR.double() / self.counted_S[:, None].clamp(min=1)
        given_S = self.taken_S.double() / self.alive_S.clamp(min=1)
        return {
            "top1": ranks_SR[:, 0].tolist(), "acceptance": given_S.tolist(),
            "efficiency": 1.0 + float(given_S.cumprod(0).sum()), "ranks": ranks_SR.tolist(),
        }  # fmt: skip


@torch.no_grad()
def hits(student: Student, lesson: Lesson) -> Hits:
    """What would be accepted from every anchor of a text, greedily.

    A chain goes on while its guesses are the text's tokens, since what follows others is not known from the text.
    """
    counted, ranks, alive, taken = [], [], [], []
    best_BT = lesson.probs_BTK.argmax(-1) if lesson.ids_BTK is None else lesson.ids_BTK[..., 0]
    last, anchors_A = best_BT.shape[1] - 1, anchors(lesson)
    going_BA = torch.ones((), dtype=torch.bool, device=best_BT.device)
    for s, guess in enumerate(student.guesses(lesson, anchors_A, None)):
        inside_BA = anchors_A + s + 1 < lesson.lengths_B[:, None]
        going_BA = going_BA & inside_BA
        top_BAR = guess.logits_BAV.topk(min(RANKS, guess.logits_BAV.shape[-1]), -1).indices
        top_BAR = top_BAR if student.token_ids is None else student.token_ids[top_BAR]
        right_BAR = top_BAR == best_BT[:, (anchors_A + s + 1).clamp(max=last)][..., None]
        counted.append(inside_BA.sum())
        ranks.append((right_BAR & inside_BA[..., None]).sum((0, 1)))
        alive.append(going_BA.sum())
        taken.append((right_BAR[..., 0] & going_BA).sum())
        next_BA = lesson.tokens_BT[:, (anchors_A + s + 2).clamp(max=last)]
        going_BA = going_BA & (anchors_A + s + 2 < lesson.lengths_B[:, None]) & (top_BAR[..., 0] == next_BA)
    return Hits(*(torch.stack(part).cpu() for part in (counted, ranks, alive, taken)))
