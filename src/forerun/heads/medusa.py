"""Medusa heads: head k guesses the token k + 1 places after the next one (Cai et al. 2024).

Shape suffixes: K heads, H hidden size, V vocabulary; `...` any leading dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class MedusaShape:
    hidden_size: int
    vocab_size: int
    heads: int = 4
    layers: int = 1  # residual blocks a head
    kind: Literal["medusa"] = "medusa"


class Block(nn.Module):
    """x + SiLU(W x + b)."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, states: Tensor) -> Tensor:
        mixed: Tensor = states + functional.silu(self.linear(states))
        return mixed


class Medusa(nn.Module):
    """Each head has its own blocks and its own output layer, and reads the target's last hidden state (after the last norm)."""

    def __init__(self, shape: MedusaShape) -> None:
        super().__init__()
        self.shape = shape
        size = shape.hidden_size
        self.blocks = nn.ModuleList(nn.Sequential(*[Block(size) for _ in range(shape.layers)]) for _ in range(shape.heads))
        self.outputs = nn.ModuleList(nn.Linear(size, shape.vocab_size, bias=False) for _ in range(shape.heads))

    def start(self, output: nn.Linear) -> None:
        """Before training: every head says what the target's own output layer says (blocks that add nothing)."""
        for blocks, head in zip(self.blocks, self.outputs, strict=True):
            for parameter in blocks.parameters():
                nn.init.zeros_(parameter)
            head.load_state_dict({"weight": output.weight})

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [..., H] at position t -> logits [..., K, V]: head k (from 0) guesses token t + 2 + k."""
        return torch.stack([head(blocks(hidden)) for blocks, head in zip(self.blocks, self.outputs, strict=True)], -2)
