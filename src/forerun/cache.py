"""A key-value cache with one length per row, for any transformers attention layer.

Shape suffixes: B rows, N nodes, D depth + 1, K key-value heads, S slots, H head size.
Slots past a row's length hold rubbish by right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from forerun.accept import Verdict
from forerun.graph import Graph
from forerun.tree import Tree

BUCKET = 256
"""Attention reads whole buckets of this many slots, so that few shapes occur."""


@dataclass
class Plan:
    """Where the next forward pass writes and how far it reads; set by Target before each pass."""

    rows: int
    capacity: int
    row: int | None = None  # prefill: the one row that is filled
    start: int = 0  # prefill: its length so far
    places: Tensor | None = None  # verification: [B x N], the place of every node among all rows' slots
    read: int = 0  # verification: slots that attention sees


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, allocated at the first write, where the layer's weights are.

    In memory slots lie before heads, [B x S, K, H], so that a step's nodes are written by one `index_copy_` of whole rows
    (a tenth of what `scatter_` costs in bfloat16); `keys` and `values` are views of that as attention wants it, [B, K, S, H].
    """

    is_compileable = True
    is_sliding = False  # windows are the mask's business: the cache keeps every slot
    supports_early_init = False

    def __init__(self, plan: Plan) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.plan = plan
        self.flat: list[Tensor] = []

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        rows, capacity = self.plan.rows, self.plan.capacity
        self.dtype, self.device = key_states.dtype, key_states.device
        states = (key_states, value_states)
        self.flat = [new.new_zeros(rows * capacity, new.shape[1], new.shape[3]) for new in states]
        self.keys, self.values = (flat.unflatten(0, (rows, capacity)).transpose(1, 2) for flat in self.flat)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values, plan = self.keys, self.values, self.plan
        assert keys is not None and values is not None
        if plan.row is not None:
            own, end = slice(plan.row, plan.row + 1), plan.start + key_states.shape[2]
            keys[own, :, plan.start : end] = key_states
            values[own, :, plan.start : end] = value_states
            return keys[own, :, :end], values[own, :, :end]
        assert plan.places is not None
        places = plan.places.to(keys.device)
        for flat, new in zip(self.flat, (key_states, value_states), strict=True):
            flat.index_copy_(0, places, new.transpose(1, 2).flatten(0, 1))
        # Views made here: a compiled pass that is handed two views of one memory copies all of it for each write.
        keys, values = (flat.view(plan.rows, plan.capacity, *flat.shape[1:])[:, : plan.read] for flat in self.flat)
        return keys.transpose(1, 2), values.transpose(1, 2)

    # transformers asks for these when it builds a mask itself, which it does in prefill only.
    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        return self.plan.start + int(query_length), 0

    def get_seq_length(self, *args: Any) -> int:
        return self.plan.start

    def get_max_length(self) -> int:
        return self.plan.capacity

    get_max_cache_shape = get_max_length


class KVCache(Cache):
    """Rows of `capacity` slots; `lengths[b]` counts the committed tokens of row b (its pending token is not among them).

    Lengths live on the host: the engine learns the accepted counts there anyway, and every step sends them along.
    """

    def __init__(self, config: PreTrainedConfig, rows: int, capacity: int) -> None:
        self.lengths = [0] * rows
        self.graph: Graph[tuple[Tensor, Tensor | None]] | None = None  # the forward pass that writes here; Target sets it
        self.plan = Plan(rows, capacity)
        self.slot_layers = [SlotLayer(self.plan) for _ in range(config.get_text_config(decoder=True).num_hidden_layers)]
        super().__init__(layers=list(self.slot_layers))

    @property
    def capacity(self) -> int:
        return self.plan.capacity

    @property
    def nbytes(self) -> int:
        """Bytes of the allocated keys and values."""
        tensors = [tensor for layer in self.slot_layers for tensor in (layer.keys, layer.values) if tensor is not None]
        return sum(tensor.nbytes for tensor in tensors)

    def place(self, nodes: int, device: torch.device) -> tuple[Tensor, int]:
        """Slots [B, N] of the next nodes, right after each row's committed tokens, and how many slots to read.

        The last slot never holds a token (the engine admits requests so), hence takes the padding that would run past it.
        """
        read = min(self.capacity, -(-(max(self.lengths) + nodes) // BUCKET) * BUCKET)
        lengths_B = torch.tensor(self.lengths, device=device)
        return (lengths_B[:, None] + torch.arange(nodes, device=device)).clamp_max(self.capacity - 1), read

    def commit(self, tree: Tree, verdict: Verdict, accepted: list[int]) -> None:
        """Make the accepted path (counts include node 0) part of the prefix: moves at most depth + 1 slots per layer."""
        if not tree.is_chain and max(accepted) > 1:  # an accepted chain is in its place already
            lengths_B = torch.tensor(self.lengths, device=verdict.path_BD.device)
            source_BD = lengths_B[:, None] + verdict.path_BD
            goal_BD = lengths_B[:, None] + torch.arange(verdict.path_BD.shape[1], device=source_BD.device)
            for layer in self.slot_layers:
                for states in (layer.keys, layer.values):
                    assert states is not None
                    shape = (-1, states.shape[1], -1, states.shape[3])
                    source, goal = (i.to(states.device)[:, None, :, None].expand(shape) for i in (source_BD, goal_BD))
                    states.scatter_(2, goal, states.gather(2, source))
        self.lengths = [length + count for length, count in zip(self.lengths, accepted, strict=True)]

    def release(self, row: int) -> None:
        self.lengths[row] = 0

    def clear(self, row: int) -> None:
        """Release a row and wipe it: masking does not help against slots that are not numbers."""
        self.release(row)
        for layer in self.slot_layers:
            for flat in layer.flat:
                flat[row * self.capacity : (row + 1) * self.capacity] = 0
