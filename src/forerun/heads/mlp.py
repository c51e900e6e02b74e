"""The MLP speculator: a small recurrent state over hidden state and drafted tokens (Wertheimer et al. 2024).

Shape suffixes: H hidden size, I inner size, V vocabulary; `...` any leading dimensions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class MLPShape:
    hidden_size: int
    vocab_size: int
    heads: int = 3  # steps; each has weights of its own
    inner_size: int = 0  # 0: the hidden size
    scale_input: bool = False
    kind: Literal["mlp"] = "mlp"

    @property
    def inner(self) -> int:
        return self.inner_size or self.hidden_size


class Norm(nn.Module):
    """x / rms(x), scaled and shifted where wanted."""

    def __init__(self, size: int, scaled: bool = True) -> None:
        super().__init__()
        self.scaled = scaled
        if scaled:
            self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, states: Tensor) -> Tensor:
        normed = states * torch.rsqrt(states.pow(2).mean(-1, keepdim=True) + 1e-6)
        return normed * self.weight + self.bias if self.scaled else normed


class MLPSpeculator(nn.Module):
    """Step i: state <- GELU(Norm(P_i state + a E_i token)), logits <- O_i state.

    The first state is the target's last hidden state; a = emb_weight / state_weight with state_weight = 0.5^(1 / (2 heads))
    and emb_weight = sqrt((1 - state_weight^2) inner / 2), so that no step drowns the ones before it.
    """

    def __init__(self, shape: MLPShape) -> None:
        super().__init__()
        self.shape = shape
        inner, vocabulary, count = shape.inner, shape.vocab_size, shape.heads
        sizes = [shape.hidden_size] + [inner] * (count - 1)
        self.embeddings = nn.ModuleList(nn.Embedding(vocabulary, inner) for _ in range(count))
        self.projections = nn.ModuleList(nn.Linear(size, inner, bias=False) for size in sizes)
        self.norms = nn.ModuleList(Norm(inner) for _ in range(count))
        self.outputs = nn.ModuleList(nn.Linear(inner, vocabulary, bias=False) for _ in range(count))
        self.first_norm = Norm(shape.hidden_size, scaled=False) if shape.scale_input else None
        state_weight = 0.5 ** (0.5 / count)
        self.token_weight = math.sqrt((1 - state_weight**2) * inner / 2) / state_weight

    def first(self, hidden: Tensor) -> Tensor:
        """The state before the first step, from the target's hidden state [..., H]."""
        return hidden if self.first_norm is None else self.first_norm(hidden) / math.sqrt(2)

    def step(self, index: int, state: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(state, logits [..., V]) after `tokens` [...]: the index-th guess, after the token that it follows."""
        mixed = self.projections[index](state) + self.token_weight * self.embeddings[index](tokens)
        state = functional.gelu(self.norms[index](mixed))
        return state, self.outputs[index](state)
