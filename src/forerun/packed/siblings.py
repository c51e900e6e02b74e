"""One product for projections that read the same tensor."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))
"""Names of projections of one parent that read the same tensor; a wrong guess costs time, never correctness (`Part`)."""


@dataclass
class Memo:
    """The parts of the last product that are still to be taken; apart from its module, whose attributes are slow to set."""

    parts: list[Tensor | None]
    source: Tensor | None = None
    version: int = 0


class Shared(nn.Module):
    """One product for several layers that are called, one after another, with the same tensor."""

    def __init__(self, product: nn.Module, sizes: list[int]) -> None:
        super().__init__()
        self.product, self.sizes = product, sizes
        self.memo = Memo([None] * len(sizes))

    def take(self, index: int, states: Tensor) -> Tensor:
        """A part of the product of `states`; computed at the first call, handed out once a layer, then forgotten.

        Each layer may be called in any order, any number of times, with any tensor. Only a tensor that is overwritten in
        place between its siblings' calls goes unnoticed, and that only in inference mode, where tensors have no version.
        """
        memo = self.memo
        part = memo.parts[index]
        if part is None or states is not memo.source or version_of(states) != memo.version:
            memo.parts = list(self.product(states).split(self.sizes, -1))
            memo.source, memo.version = states, version_of(states)
            part = memo.parts[index]
        assert part is not None
        memo.parts[index] = None
        if all(other is None for other in memo.parts):
            memo.source = None  # or the activation would outlive the pass
        return part


def version_of(tensor: Tensor) -> int:
    return 0 if torch.compiler.is_compiling() or tensor.is_inference() else tensor._version


class Part(nn.Module):
    """One of the layers that a `Shared` product replaces."""

    def __init__(self, shared: Shared, index: int) -> None:
        super().__init__()
        self.shared, self.index = shared, index
        self.in_features, self.out_features = int(shared.product.in_features), shared.sizes[index]  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """This layer's rows [out, in] of the shared weight, in the plain layout."""
        weight: Tensor = self.shared.product.weight  # type: ignore[assignment]
        rows: Tensor = weight.split(self.shared.sizes)[self.index]
        return rows

    def forward(self, states: Tensor) -> Tensor:
        part: Tensor = self.shared.take(self.index, states)
        return part

    def extra_repr(self) -> str:
        return f"part {self.index} of {self.shared.sizes}"
