"""EAGLE drafts from the target's hidden states: a layer with a cache of its own grows a chain or a tree.

Li et al. 2024 (EAGLE, EAGLE-2) and 2025 (EAGLE-3). Entry j of the layer is (the target's features at position j, token j + 1)
at rotary position j; it guesses token j + 2. Entries of committed tokens have the target's own features; drafted ones take the
state that the entry above them gave, and are rubbish by right once the round is over.

Shape suffixes: B rows, N nodes, W width of the first pass, T tokens, E drafted entries, S slots, F features, H hidden size,
D draft's vocabulary, 1 one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from forerun.cache import BUCKET, KVCache
from forerun.draft.choices import Choices, chain_choices
from forerun.draft.expand import Dynamic, Front, Plan, check, grow, plan_for, search, take
from forerun.draft.policy import LengthPolicy, useful
from forerun.draft.protocol import Batch, Outcome, Row
from forerun.draft.shapes import ShapePolicy
from forerun.graph import Graph, Mode
from forerun.heads import Eagle
from forerun.tree import Tree, chain

LATE = 64
"""Entries that wait before they are entered in rounds that draft nothing."""


class EagleDraft:
    """One pass a depth. The first one enters what the last rounds left (true features) and gives the first guess.

    head, and the target's own `embedding` and `output` (version 1 guesses through it). tree: of a fixed form or searched for,
    as deep and large as a ShapePolicy says; None is a chain, by a LengthPolicy. drawn: chains and trees of a fixed form are
    drawn where the request samples; else, and in a tree that is searched for, the most probable tokens are taken. `capacity`:
    tokens a row, as the engine has it.
    """

    def __init__(
        self,
        head: Eagle,
        embedding: nn.Module,
        output: nn.Module,
        policy: LengthPolicy | ShapePolicy,
        rows: int,
        capacity: int,
        tree: Choices | Dynamic | None = None,
        drawn: bool = True,
        chunk: int = 512,
        compile: Mode = "auto",
    ) -> None:
        self.head, self.embedding, self.output, self.policy, self.chunk = head, embedding, output, policy, chunk
        shape, weight = head.shape, head.after_attention.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.features = tuple(shape.features)
        self.token_ids = head.token_ids if shape.version == 3 and shape.draft_vocab_size else None
        self.trees = tree is not None
        depth, nodes = (policy.limit, policy.limit + 1) if hasattr(policy, "limit") else (policy.depth, policy.nodes)
        self.plans: dict[tuple[int, int], Plan] = {}  # by depth and nodes
        self.tree: Choices | Dynamic
        if isinstance(tree, Dynamic):
            self.tree = Dynamic(min(tree.branches, shape.draft_vocabulary))
            self.drawn, self.depth, self.size = False, depth, self.tree.size(depth, nodes)
            entries = self.tree.entries(depth)
        else:
            self.tree = choices = (chain_choices(depth) if tree is None else tree).cut(depth, nodes)
            check(choices, shape.draft_vocabulary, drawn)
            self.drawn, self.depth, self.size = drawn, choices.deepest(choices.size), choices.size
            entries = len(set(choices.parents)) - 1  # nodes with children, but node 0
        self.entries = entries
        self.cache = KVCache(shape.llama(), rows, capacity + entries)
        # What the next first pass enters after the cache's entries, in each row from the left; the rest is padding.
        self.waiting_BWF = torch.zeros(rows, 1, len(self.features) * shape.hidden_size, dtype=self.dtype, device=self.device)
        self.entered = False  # the round's first pass was made
        self.steps_S = torch.arange(self.cache.capacity, device=self.device)
        self.first_B1 = (torch.arange(rows, device=self.device) * self.cache.capacity)[:, None]
        self.first, self.further = Graph(self._first, compile), Graph(self._further, compile)

    def admit(self, row: int, prompt: Sequence[int], hidden_TH: Tensor | None) -> None:
        """Enter the prompt; the last token's features wait for the token after it."""
        assert hidden_TH is not None, "the target must deliver the layers of `features`"
        self.cache.clear(row)  # the row before may have left what is not a number
        last = len(prompt) - 1
        for start in range(0, last, self.chunk):
            end = min(start + self.chunk, last)
            tokens_1T = torch.tensor([prompt[start + 1 : end + 1]], device=self.device)
            positions_1T = self.steps_S[None, start:end]
            mask_1TS = self._mask(positions_1T, end)
            self.cache.plan.row, self.cache.plan.start = row, start
            try:
                states_1TH = self.head.enter(hidden_TH[None, start:end])
                self.head(self.embedding(tokens_1T), states_1TH, positions_1T, mask_1TS[:, None], self.cache)
            finally:
                self.cache.plan.row, self.cache.plan.start = None, 0
        self.cache.lengths[row] = last
        self.waiting_BWF[row] = hidden_TH[-1]  # and all its padding: the same reason
        self.policy.admit(row)

    def propose(self, batch: Batch) -> Tree:
        depths, nodes = self._limits(batch.rows)
        depth = max(depths)
        self.entered = False  # a round that broke off has entered nothing
        if depth == 0 and self.waiting_BWF.shape[1] < LATE:
            return chain(batch.pending_B, [[] for _ in batch.rows])
        front = self._enter(batch)
        if depth == 0:
            return chain(batch.pending_B, [[] for _ in batch.rows])
        if isinstance(self.tree, Dynamic):
            return search(front, self.tree.branches, self.tree.size(depth, nodes), batch.pending_B, depths)
        if (depth, nodes) not in self.plans:
            self.plans[depth, nodes] = plan_for(self.tree.cut(depth, nodes), self.device)
        return grow(front, self.plans[depth, nodes], batch.pending_B, depths, self.drawn and not batch.warp.all_greedy)

    def _limits(self, rows: Sequence[Row | None]) -> tuple[list[int], int]:
        """How deep each row's tree may be, and how many nodes all of them have, node 0 among them."""
        if hasattr(self.policy, "depths"):
            depths = self.policy.depths(rows)
            return depths, max(depths) + 1
        depth, nodes = self.policy.shape(rows)
        return useful(rows, [depth] * len(rows)), nodes

    def _enter(self, batch: Batch) -> Front:
        """Enter every committed token that the cache lacks, up to the pending one; returns what that one's entry guesses."""
        lengths = self.cache.lengths
        parts = [row.tokens[length + 1 :] if row else [] for row, length in zip(batch.rows, lengths, strict=True)]
        lost = max(map(len, parts)) - self.waiting_BWF.shape[1]
        if lost > 0:  # a round broke off before its features were told: zeros, which cost acceptance alone
            self.waiting_BWF = functional.pad(self.waiting_BWF, (0, 0, 0, lost))
        width = self.waiting_BWF.shape[1]
        told = torch.tensor(
            [
                [length, length + len(part), max(len(part) - 1, 0), *part, *[0] * (width - len(part))]
                for length, part in zip(lengths, parts, strict=True)
            ],
            device=self.device,
        )
        start_B1, committed_B1, last_B1, tokens_BW = told[:, :1], told[:, 1:2], told[:, 2:3], told[:, 3:]
        most = max(length + len(part) for length, part in zip(lengths, parts, strict=True)) + self.entries
        read = min(self.cache.capacity, -(-most // BUCKET) * BUCKET)
        positions_BW = start_B1 + torch.arange(width, device=self.device)  # padding may run past the cache's end
        slots_BE = committed_B1 + self.steps_S[: self.entries]
        mask_BWS = self._mask(positions_BW, read)
        places_BW = positions_BW.clamp_max(self.cache.capacity - 1) + self.first_B1
        logits_B1D, states_B1H = self.first(self.waiting_BWF, tokens_BW, positions_BW, places_BW, mask_BWS[:, None], last_B1)
        self.entered = True
        return Front(
            self.further, batch, logits_B1D, states_B1H, take(mask_BWS, last_B1), slots_BE, slots_BE + self.first_B1,
            self.token_ids, self.head.shape.vocab_size,
        )  # fmt: skip

    def _mask(self, positions_BN: Tensor, read: int) -> Tensor:
        """[B, N, S], additive: each entry sees the slots up to its own."""
        hidden_BNS = self.steps_S[:read] > positions_BN[..., None]
        return hidden_BNS.to(self.dtype).mul_(torch.finfo(self.dtype).min)

    def _first(
        self, features_BWF: Tensor, tokens_BW: Tensor, positions_BW: Tensor, places_BW: Tensor, mask: Tensor, last_B1: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The pass over committed tokens, for a graph to capture; what is guessed after the last one of each row."""
        states_BWH = self._pass(self.head.enter(features_BWF), tokens_BW, positions_BW, places_BW, mask)
        states_B1H = take(states_BWH, last_B1)
        return self.head.logits(states_B1H, self.output), states_B1H

    def _further(
        self, states_BNH: Tensor, tokens_BN: Tensor, positions_BN: Tensor, places_BN: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """A pass over drafted tokens."""
        states_BNH = self._pass(states_BNH, tokens_BN, positions_BN, places_BN, mask)
        return self.head.logits(states_BNH, self.output), states_BNH

    def _pass(self, states_BNH: Tensor, tokens_BN: Tensor, positions_BN: Tensor, places_BN: Tensor, mask: Tensor) -> Tensor:
        self.cache.plan.places, self.cache.plan.read = places_BN.flatten(), mask.shape[-1]
        states: Tensor = self.head(self.embedding(tokens_BN), states_BNH, positions_BN, mask, self.cache)
        return states

    def observe(self, batch: Batch, outcome: Outcome) -> None:
        """Keep the features along the accepted paths: they are entered with the tokens after them, by the next first pass."""
        assert outcome.hidden_BNH is not None, "the target must deliver the layers of `features`"
        told_BMF, old = outcome.hidden_BNH, 0
        if not self.entered:  # what waited still does
            told_BMF, old = torch.cat([self.waiting_BWF, told_BMF], 1), self.waiting_BWF.shape[1]
        places: list[list[int]] = []
        for i, (row, path) in enumerate(zip(batch.rows, outcome.paths, strict=True)):
            if row is None:
                places.append([])
                continue
            before = len(row.tokens) - 1 - len(path)  # entries of the tokens that were committed before this round
            if self.entered:
                self.cache.lengths[i] = before
            kept = range(before - self.cache.lengths[i])
            places.append([*(min(place, old - 1) for place in kept), *(old + node for node in path)])
        width = max(1, *map(len, places))
        width = width if width <= 2 else 1 << (width - 1).bit_length()  # few shapes
        index_BW = torch.tensor([own + [0] * (width - len(own)) for own in places], device=self.device)
        self.waiting_BWF = take(told_BMF, index_BW)
        self.entered = False
        self.policy.observe(outcome)

    def release(self, row: int) -> None:
        self.cache.release(row)
