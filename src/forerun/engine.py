"""The decode loop: a drafter proposes a tree, the target scores it, a rule walks it, the cache keeps the path.

Plain decoding is the tree with one node. Rows join and leave: each row has its own request, length and pace.
Shape suffixes: B rows, N nodes, D depth + 1, V vocabulary.
"""

from __future__ import annotations

import random
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from forerun.accept import Rule, Verdict, describe, walk, walk_greedy
from forerun.draft import Batch, Drafter, Outcome, Row
from forerun.model import Target
from forerun.packed import weight_bytes
from forerun.sampling import Counts, Randomness, best, build_warp, exponentials, law, path_counts, penalize, race, uniforms
from forerun.scoring import ModelScorer
from forerun.text import Detokenizer, cut
from forerun.tree import Tree
from forerun.types import Delta, Phases, Request, Round, UserError


@dataclass(frozen=True)
class Waiting:
    """One completion of a request, not yet admitted."""

    request: Request
    index: int


@dataclass
class Running(Row):
    """A row at work."""

    request: Request
    index: int
    text: Detokenizer
    ends: frozenset[int]  # tokens that end the completion


class Engine:
    """A Backend around one target, one drafter and one rule, with `rows` rows of `capacity` slots.

    Invariants (asserted every step with debug=True): len(row.tokens) == cache.lengths[row] + 1; an idle row has length 0;
    capacity >= prompt + max_new + drafter.size.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        rule: Rule,
        *,
        rows: int = 1,
        capacity: int = 1024,
        tokenizer: PreTrainedTokenizerBase | None = None,
        eos: frozenset[int] = frozenset(),
        chunk: int = 512,
        seed: int | None = None,
        debug: bool = False,
    ) -> None:
        self.target, self.drafter, self.rule = target, drafter, rule
        self.capacity, self.tokenizer, self.eos, self.chunk, self.debug = capacity, tokenizer, eos, chunk, debug
        self.cache = target.new_cache(rows, capacity)
        self.rows: list[Running | None] = [None] * rows
        self.waiting: deque[Waiting] = deque()
        self.cancelled: list[Delta] = []
        self.seeds = random.Random(seed)  # for requests without a seed
        self.warp = build_warp([None] * rows, target.vocabulary, target.device)
        self.warp_is_stale = False  # a row joined or left since the warp was built
        self.fault: UserError | None = None  # raised by the next step, so that this one's deltas are not lost
        self._phases = Phases()

    # The Backend protocol.

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.cancelled or any(self.rows) or self.fault)

    @property
    def phases(self) -> Phases:
        return self._phases

    @property
    def scorer(self) -> ModelScorer:
        return ModelScorer(self.target.model)

    @property
    def facts(self) -> dict[str, Any]:
        return {
            "rule": describe(self.rule),
            "lossless": self.rule.lossless,
            "meaningless": self.rule.meaningless,
            "drafter": type(self.drafter).__name__,
            "policy": type(policy).__name__.lower() if (policy := getattr(self.drafter, "policy", None)) else None,
            "rows": len(self.rows),
            "capacity": self.capacity,
            "tree_size": self.drafter.size,
            "compile": self.target.mode,
            "weight_bytes": weight_bytes(self.target.model),
            "kv_bytes": self.cache.nbytes or None,
            "dtype": str(self.target.dtype).removeprefix("torch."),
            "device": str(self.target.device),
        }

    def submit(self, request: Request) -> None:
        sampling, prompt = request.sampling, request.prompt
        if not prompt:
            raise UserError(f"request {request.id}: the prompt is empty; give at least one token")
        needed = len(prompt) + sampling.max_new + self.drafter.size
        if needed > self.capacity:
            raise UserError(
                f"request {request.id}: {len(prompt)} prompt + {sampling.max_new} new + {self.drafter.size} tree tokens are "
                f"{needed}, more than the capacity of {self.capacity}; shorten the prompt or max_new, or raise engine.capacity "
                "(max_position_embeddings of target and draft bound it)"
            )
        outside = [token for token in (*prompt, *sampling.logit_bias) if not 0 <= token < self.target.vocabulary]
        if outside:
            raise UserError(f"request {request.id}: token {outside[0]} is not in the vocabulary of {self.target.vocabulary}")
        if any(waiting.request.id == request.id for waiting in self.waiting) or any(
            row and row.request.id == request.id for row in self.rows
        ):
            raise UserError(f"request {request.id}: this id is in flight already")
        self.waiting.extend(Waiting(request, index) for index in range(sampling.n))

    def cancel(self, id: str) -> None:
        self.cancelled += [Delta(id, w.index, (), "", "cancelled") for w in self.waiting if w.request.id == id]
        self.waiting = deque(w for w in self.waiting if w.request.id != id)
        for i, row in enumerate(self.rows):
            if row and row.request.id == id:
                self.cancelled.append(Delta(id, row.index, (), row.text.take(last=True), "cancelled"))
                self._release(i)

    @torch.inference_mode()
    def step(self) -> list[Delta]:
        if self.fault is not None:
            fault, self.fault = self.fault, None
            raise fault
        deltas, self.cancelled = self.cancelled, []
        began = time.perf_counter()
        deltas += self._admit()
        self._phases = replace(self._phases, prefill=self._phases.prefill + time.perf_counter() - began)
        if not deltas and any(self.rows):  # a first token is told at once: it must not wait for a round
            deltas += self._round()
        if self.debug:
            self._check()
        return deltas

    def _round(self) -> list[Delta]:
        """Propose, verify, judge, commit: one round of every running row."""
        batch = self._batch()
        drafting = time.perf_counter()
        tree = self.drafter.propose(batch)
        verifying = time.perf_counter()
        scores = self.target.verify(tree, self.cache)
        self._wait()
        judging = time.perf_counter()
        verdict = self._judge(tree, scores.logits, batch)
        # The one copy to the host: accepted counts, drafted depths, whether the scores are numbers, the paths and the tokens.
        drafted_B = torch.where(tree.valid_BN, tree.depths_BN(), 0).amax(1)
        healthy_B = torch.isfinite(scores.logits.amax((1, 2))).long()
        taken_BD = torch.cat([tree.tokens_BN.gather(1, verdict.path_BD)[:, 1:], verdict.bonus_B[:, None]], 1)
        told = torch.cat([torch.stack([verdict.accepted_B, drafted_B, healthy_B], 1), verdict.path_BD, taken_BD], 1).tolist()
        judged = time.perf_counter()
        rounds = self._advance(tree, verdict, told)
        committed = time.perf_counter()
        outcome = Outcome(
            drafted=[round.drafted if round else 0 for round in rounds],
            accepted=[round.accepted if round else 0 for round in rounds],
            nodes=tree.size,
            draft_seconds=verifying - drafting,
            verify_seconds=judging - verifying,
            other_seconds=committed - judging,
            verdict=verdict,
            hidden_BNH=scores.hidden,
            paths=[path[:count] for count, _, _, *path in told],
        )
        self.drafter.observe(batch, outcome)
        deltas = [self._emit(i, round.accepted + 1, round) for i, round in enumerate(rounds) if round]
        deltas += [self._fail(i) for i, row in enumerate(self.rows) if row and not rounds[i]]
        old = self._phases
        self._phases = replace(
            old,
            draft=old.draft + verifying - drafting,
            verify=old.verify + judging - verifying,
            accept=old.accept + judged - judging,
            other=old.other + time.perf_counter() - judged,
        )
        return deltas

    def _batch(self) -> Batch:
        if self.warp_is_stale:
            samplings = [row.sampling if row else None for row in self.rows]
            self.warp, self.warp_is_stale = build_warp(samplings, self.target.vocabulary, self.target.device), False
        counts = self._counts(self.rows) if self.warp.penalties_B3 is not None else None
        return Batch(self.rows, self.warp, counts, self.target.device)

    def _advance(self, tree: Tree, verdict: Verdict, told: list[list[int]]) -> list[Round | None]:
        """Commit the paths and give every running row its tokens; idle rows are rewound, a row without healthy scores stays."""
        self.cache.commit(tree, verdict, [count for count, *_ in told])
        rounds: list[Round | None] = [None] * len(told)
        for i, (count, drafted, healthy, *rest) in enumerate(told):
            taken = rest[tree.depth + 1 :]
            if (row := self.rows[i]) is None:
                self.cache.release(i)
            elif healthy:
                row.tokens += [*taken[: count - 1], taken[-1]]
                rounds[i] = Round(drafted, count - 1, tree.size)
        return rounds

    # Parts of a step.

    def _admit(self) -> list[Delta]:
        """Fill idle rows with waiting requests; prefill yields each one's first token."""
        deltas = []
        for i, row in enumerate(self.rows):
            while row is None and self.waiting and self.fault is None:
                try:
                    deltas.append(self._start(i, self.waiting.popleft()))
                except BaseException:
                    self.cancelled += deltas  # what the others were given is told by the next step
                    raise
                row = self.rows[i]
        return deltas

    def _start(self, i: int, waiting: Waiting) -> Delta:
        request, sampling = waiting.request, waiting.request.sampling
        scores = self.target.prefill(request.prompt, self.cache, i, self.chunk)
        seed = self.seeds.getrandbits(62) if sampling.seed is None else sampling.seed + waiting.index
        row = Running(
            sampling=sampling,
            tokens=list(request.prompt),
            prompt_length=len(request.prompt),
            randomness=Randomness(seed, self.target.device),
            request=request,
            index=waiting.index,
            text=Detokenizer(self.tokenizer, sampling.stop),
            ends=frozenset(sampling.stop_ids) | (frozenset() if sampling.ignore_eos else self.eos),
        )
        self.rows[i] = row
        if not bool(torch.isfinite(scores.logits.max())):
            return self._fail(i)
        try:
            row.tokens.append(self._first(row, scores.logits))
            self.drafter.admit(i, request.prompt, scores.hidden)
        except BaseException:
            self._release(i)
            raise
        self.warp_is_stale = True
        return self._emit(i, 1, None)

    def _fail(self, i: int) -> Delta:
        """End a row whose scores are not numbers; the next step raises why."""
        row = self.rows[i]
        assert row is not None
        self.fault = UserError(
            f"request {row.request.id}: the scores are not finite; try model.dtype=float32 or check the weights"
        )
        self._release(i)
        self.cache.clear(i)
        return Delta(row.request.id, row.index, (), row.text.take(last=True), "cancelled")

    def _first(self, row: Running, logits_V: Tensor) -> int:
        """Draw the token after the prompt, by the same law as any other."""
        warp = build_warp([row.sampling], self.target.vocabulary, self.target.device)
        logits_BNV = penalize(logits_V[None, None], warp, self._counts([row]) if row.sampling.penalized else None, None)
        if row.sampling.greedy:
            return int(logits_BNV.argmax())
        probs_BV = law(logits_BNV, warp)[:, 0]
        return int(race(probs_BV, exponentials([row.randomness.verify], probs_BV.shape[1], probs_BV.device)))

    def _judge(self, tree: Tree, logits_BNV: Tensor, batch: Batch) -> Verdict:
        """Walk the tree; without drawing where every row is greedy, since all lossless rules agree there."""
        warp = batch.warp
        if not warp.plain:
            path_BNV = path_counts(tree, logits_BNV.shape[2]) if warp.penalties_B3 is not None else None
            logits_BNV = penalize(logits_BNV, warp, batch.counts, path_BNV)
        if warp.all_greedy and self.rule.lossless:
            return walk_greedy(tree, best(logits_BNV))
        # A greedy row's law is one-hot: no lossless rule needs numbers for it, but a lossy one may still toss coins.
        streams = [row.randomness.verify if row and not row.sampling.greedy else None for row in batch.rows]
        tosses = streams if self.rule.lossless else [row.randomness.verify if row else None for row in batch.rows]
        # As many numbers every round, whatever the neighbours draft: a row's stream must not depend on its batch.
        uniforms_BN = uniforms(tosses, self.drafter.size, logits_BNV.device)[:, : tree.size]
        exponentials_BV = exponentials(streams, logits_BNV.shape[2], logits_BNV.device)
        return walk(tree, self.rule.law(tree, law(logits_BNV, warp)), uniforms_BN, exponentials_BV)

    def _emit(self, i: int, count: int, round: Round | None) -> Delta:
        """What the last `count` tokens of a row mean outside: cut at the first end, decoded; a finished row is released."""
        row = self.rows[i]
        assert row is not None
        room = row.remaining + count  # before the new tokens came
        kept, finish = cut(row.tokens[-count:], room, row.ends, row.text)
        delta = Delta(row.request.id, row.index, kept, row.text.take(last=finish is not None), finish, round)
        if finish is not None:
            self._release(i)
        return delta

    def _release(self, i: int) -> None:
        self.rows[i] = None
        self.cache.release(i)
        self.drafter.release(i)
        self.warp_is_stale = True

    def _counts(self, rows: list[Running] | list[Running | None]) -> Counts:
        """Token counts of rows; recounted from the host's tokens, which are the truth."""
        vocabulary, device = self.target.vocabulary, self.target.device
        output_BV = torch.zeros(len(rows), vocabulary)
        prompt_BV = torch.zeros(len(rows), vocabulary, dtype=torch.bool)
        for i, row in enumerate(rows):
            if row is not None:
                output = torch.tensor(row.tokens[row.prompt_length :], dtype=torch.long)
                output_BV[i] = torch.bincount(output, minlength=vocabulary).float()
                prompt_BV[i, row.tokens[: row.prompt_length]] = True
        return Counts(output_BV.to(device), prompt_BV.to(device))

    def _wait(self) -> None:
        """Phases are read off the host's clock: a GPU must have finished by then. The copy that follows waits anyway."""
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)

    def _check(self) -> None:
        for i, row in enumerate(self.rows):
            length = self.cache.lengths[i]
            committed = len(row.tokens) - 1 if row else 0
            assert length == committed, f"row {i}: {length} slots for {committed} committed tokens"
