"""Requests against a backend, on the clock: a closed loop at a given concurrency, or an open loop at given arrivals."""

from __future__ import annotations

import dataclasses
import itertools
import random
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from forerun.bench.metrics import Lost, Record, RoundRecord
from forerun.config import Experiment, Variant
from forerun.types import Backend, Delta, Request, Sampling
from forerun.workload import Prompt

STALL_S = 900.0  # steps that yield nothing for this long are a fault of the backend

Arrivals = list[tuple[float, Delta]]
"""The deltas of one completion, each with its seconds since the request's clock began."""
Follow = Callable[[str, str], Request | None]
"""The request that follows one that ended, given its id and the text of its (first) completion."""


def request(prompt: Prompt, variant: Variant, experiment: Experiment, id: str) -> Request:
    sampling: Sampling = variant.sampling.build()
    if experiment.workload.kind == "synthetic":  # random prompts have no end
        sampling = dataclasses.replace(sampling, ignore_eos=True)
    return Request(id, prompt.tokens, sampling)


def reseed(one: Request, repeat: int) -> Request:
    """Every prompt and repeat draws numbers of its own, the same ones in every run and variant."""
    if one.sampling.seed is None:
        return one
    own = zlib.crc32(one.id.encode()) + one.sampling.seed + repeat
    return dataclasses.replace(one, sampling=dataclasses.replace(one.sampling, seed=own))


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Seconds at which `count` requests arrive, `rate` a second; the same for every variant."""
    draw = random.Random(seed)
    return list(itertools.accumulate(draw.expovariate(rate) for _ in range(count)))


@dataclass
class Desk:
    """Requests on their way through a backend.

    In a closed loop at most `rows` are in flight and a clock begins with the submission; one with a due time is submitted
    as soon as that has come, whatever is in flight, and its clock begins at that time, even if the backend was busy then.
    """

    backend: Backend
    rows: int
    open: bool
    tell: Callable[[Delta], None] | None
    follow: Follow | None
    waiting: deque[tuple[float | None, Request]]
    began: dict[str, float] = field(default_factory=dict)
    left: dict[str, int] = field(default_factory=dict)  # completions still to end
    got: dict[tuple[str, int], Arrivals] = field(default_factory=dict)
    flying: int = 0

    def submit(self) -> float | None:
        """Everything whose turn it is; returns when the next one is due where only that is waited for."""
        while self.waiting:
            due, one = self.waiting[0]
            now = time.perf_counter()
            if self.flying >= self.rows if due is None else due > now:
                break
            self.waiting.popleft()
            self.began[one.id] = now if due is None else due
            self.left[one.id] = one.sampling.n
            self.got |= {(one.id, index): [] for index in range(one.sampling.n)}
            self.backend.submit(one)
            self.flying += 1
        return self.waiting[0][0] if self.waiting and not self.flying and not self.backend.busy else None

    def take(self, deltas: Iterable[Delta], now: float) -> None:
        for delta in deltas:
            if delta.id not in self.began:  # the end of a request that an earlier call had to leave
                continue
            made = now if delta.at is None else delta.at
            self.got[delta.id, delta.index].append((made - self.began[delta.id], delta))
            self.left[delta.id] -= delta.finish is not None
            if self.tell is not None:
                self.tell(delta)
            if delta.finish is not None and not self.left[delta.id]:
                self.flying -= 1
                self.continue_from(delta.id, now)

    def continue_from(self, id: str, now: float) -> None:
        """A conversation goes on before a new one begins; not after an answer that was lost."""
        if was_lost(self.got[id, 0]):
            return
        text = "".join(delta.text for _, delta in self.got[id, 0])
        after = self.follow(id, text) if self.follow is not None else None
        if after is not None:
            self.waiting.appendleft((now if self.open else None, after))

    def cancel(self) -> None:
        for id, left in self.left.items():
            if left:
                self.backend.cancel(id)


def serve(
    backend: Backend,
    requests: Sequence[Request],
    rows: int,
    tell: Callable[[Delta], None] | None = None,
    *,
    due: Sequence[float] = (),
    follow: Follow | None = None,
) -> dict[tuple[str, int], Arrivals]:
    """Serve all requests, and what follows them, to their end; the deltas of each completion by request id and index.

    Closed loop with `rows` requests in flight; with `due`, the seconds from now at which each request arrives, an open loop.
    `tell` sees each delta as it comes. If anything interrupts, the requests in flight are cancelled, so that the backend
    stays usable.
    """
    start = stirred = time.perf_counter()
    times = [start + due[i] if due else None for i in range(len(requests))]
    desk = Desk(backend, rows, bool(due), tell, follow, deque(zip(times, requests, strict=True)))
    try:
        while desk.waiting or desk.flying or backend.busy:  # a backend may still have a fault to tell after its last delta
            if (next_due := desk.submit()) is not None:
                time.sleep(max(0.0, next_due - time.perf_counter()))
                stirred = time.perf_counter()
                continue
            deltas = backend.step()
            now = time.perf_counter()
            desk.take(deltas, now)
            if deltas:
                stirred = now
            elif now - stirred > STALL_S or not backend.busy:
                raise RuntimeError(f"the backend stopped giving tokens while {desk.flying} requests were in flight")
    except BaseException:
        desk.cancel()
        raise
    return desk.got


def was_lost(arrivals: Arrivals) -> bool:
    """Whether the backend gave a completion up, as one does whose server went away; its `facts["lost"]` says why."""
    return bool(arrivals) and arrivals[-1][1].finish == "cancelled"


def to_lost(prompt: Prompt, repeat: int, index: int, arrivals: Arrivals, turn: int, reason: str) -> Lost:
    return Lost(prompt.id, prompt.category, repeat, index, turn, sum(len(delta.tokens) for _, delta in arrivals), reason)


def to_record(prompt: Prompt, repeat: int, index: int, arrivals: Arrivals, turn: int = 1) -> Record:
    came = [(at, delta) for at, delta in arrivals if delta.tokens]
    if not came or (finish := arrivals[-1][1].finish) is None or finish == "cancelled":
        raise RuntimeError(f"prompt {prompt.id!r}: the backend ended it without a token or a reason")
    told = [(delta.round, len(delta.tokens)) for _, delta in came if delta.round is not None]
    # The token that prefill yields has no round; every later delta has one where the backend tells.
    tells = len(told) >= len(came) - 1 and (bool(told) or len(came) == 1)
    rounds = tuple(RoundRecord(r.drafted, r.accepted, r.nodes, emitted) for r, emitted in told) if tells else None
    return Record(
        id=prompt.id,
        category=prompt.category,
        repeat=repeat,
        index=index,
        prompt_tokens=len(prompt.tokens),
        tokens=tuple(token for _, delta in came for token in delta.tokens),
        text="".join(delta.text for _, delta in arrivals),
        finish=finish,
        first_s=came[0][0],
        total_s=arrivals[-1][0],
        arrivals=tuple((at, len(delta.tokens)) for at, delta in came),
        drafted=None if rounds is None else sum(round.drafted for round in rounds),
        accepted=None if rounds is None else sum(round.accepted for round in rounds),
        rounds=rounds,
        turn=turn,
    )
