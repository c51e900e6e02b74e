"""What learns: each kind as guesses, one after another, from every position of a sequence.

From anchor a (a position whose next token is known) guess s is about token a + s + 2, and its law is the target's after
position a + s + 1. Guess s may read the tokens up to a + s + 1, and the target's hidden states up to a.
Shape suffixes: B sequences, A anchors, T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel

from forerun.heads import Eagle, Medusa, MLPSpeculator
from forerun.train.teacher import Lesson


@dataclass(frozen=True)
class Guess:
    """What a student says of one further token."""

    logits_BAV: Tensor
    penalty: Tensor | None = None  # learned beside the law


class Student(Protocol):
    """A module and the guesses that it makes."""

    @property
    def module(self) -> nn.Module: ...

    @property
    def token_ids(self) -> Tensor | None:
        """The tokens that its logits stand for; None: the target's vocabulary."""

    def guesses(self, lesson: Lesson, anchors_A: Tensor, random: torch.Generator | None) -> Iterator[Guess]:
        """For s = 0, 1, ...: guess s from every anchor. With `random`: what is learned, noise and all; without: as in use."""


def tokens_after(lesson: Lesson, anchors_A: Tensor, s: int) -> Tensor:
    """[B, A]: token a + s + 1, the last that guess s reads; past the end, where nothing counts, the last token."""
    return lesson.tokens_BT[:, (anchors_A + s + 1).clamp(max=lesson.tokens_BT.shape[1] - 1)]


@dataclass(frozen=True)
class MedusaStudent:
    module: Medusa
    token_ids: Tensor | None = None

    def guesses(self, lesson: Lesson, anchors_A: Tensor, random: torch.Generator | None) -> Iterator[Guess]:
        hidden_BAH = lesson.features_BTF[:, anchors_A]
        for blocks, output in zip(self.module.blocks, self.module.outputs, strict=True):
            yield Guess(output(blocks(hidden_BAH)))


@dataclass(frozen=True)
class MLPStudent:
    module: MLPSpeculator
    token_ids: Tensor | None = None

    def guesses(self, lesson: Lesson, anchors_A: Tensor, random: torch.Generator | None) -> Iterator[Guess]:
        state = self.module.first(lesson.features_BTF[:, anchors_A])
        for s in range(self.module.shape.heads):
            state, logits_BAV = self.module.step(s, state, tokens_after(lesson, anchors_A, s))
            yield Guess(logits_BAV)


@dataclass(frozen=True)
class DraftStudent:
    """A small language model; it reads tokens alone, so one pass over the text makes the guesses from all anchors."""

    module: LlamaForCausalLM
    depth: int  # guesses in validation
    token_ids: Tensor | None = None

    def guesses(self, lesson: Lesson, anchors_A: Tensor, random: torch.Generator | None) -> Iterator[Guess]:
        model: Any = self.module
        logits_BTV = model(input_ids=lesson.tokens_BT, use_cache=False).logits
        for s in range(self.depth if random is None else 1):
            yield Guess(logits_BTV[:, (anchors_A + s + 1).clamp(max=logits_BTV.shape[1] - 1)])


@dataclass(frozen=True)
class EagleStudent:
    """The layer drafts on from its own states: guess s attends to the target's entries up to its anchor, then to its own.

    All anchors draft side by side (EAGLE-3's training-time test). The chains of different anchors do not see each other, so
    each pass adds one key an anchor, which no other anchor may read.
    """

    module: Eagle
    target: PreTrainedModel
    depth: int  # version 1 learns the first guess only
    noise: float
    feature_weight: float

    @property
    def token_ids(self) -> Tensor | None:
        return self.module.token_ids if self.module.shape.draft_vocab_size else None

    def guesses(self, lesson: Lesson, anchors_A: Tensor, random: torch.Generator | None) -> Iterator[Guess]:
        head, features_BTF = self.module, lesson.features_BTF
        first, size = head.shape.version == 1, lesson.tokens_BT.shape[1] - 1
        if random is not None and first:
            drawn = torch.rand(features_BTF.shape, generator=random).to(features_BTF.device)
            features_BTF = features_BTF + self.noise * (2 * drawn - 1)
        cache = DynamicCache(config=head.shape.llama())
        places_T = torch.arange(size, device=lesson.tokens_BT.device)
        states = head(self.embed(lesson.tokens_BT[:, 1:]), head.enter(features_BTF[:, :-1]), places_T[None], None, cache)
        states = states[:, anchors_A]
        missed = functional.smooth_l1_loss(states, lesson.features_BTF[:, anchors_A + 1]) if first else None
        yield self.guess(states, None if missed is None else self.feature_weight * missed)
        seen = additive(places_T <= anchors_A[:, None], states.dtype)
        own = additive(torch.eye(len(anchors_A), dtype=torch.bool, device=seen.device), states.dtype)
        for s in range(1, 1 if first and random is not None else self.depth):
            seen = torch.cat([seen, own], 1)
            read = self.embed(tokens_after(lesson, anchors_A, s))
            states = head(read, states, (anchors_A + s)[None], seen[None, None], cache)
            yield self.guess(states)

    def guess(self, states_BAH: Tensor, penalty: Tensor | None = None) -> Guess:
        output = self.target.get_output_embeddings()
        weight: Any = output.weight
        if self.module.shape.version == 1:
            states_BAH = states_BAH.to(weight.dtype)
        return Guess(self.module.logits(states_BAH, output), penalty)

    def embed(self, tokens: Tensor) -> Tensor:
        embeds: Tensor = self.target.get_input_embeddings()(tokens)
        return embeds.float() if embeds.dtype in (torch.bfloat16, torch.float16) else embeds


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
