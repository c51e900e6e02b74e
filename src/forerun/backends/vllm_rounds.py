"""What vLLM tells of its rounds, in our words."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from typing import Any, Self

from forerun.types import Delta, Round

Told = tuple[int, int]
"""Drafted and accepted tokens of one round."""


@dataclass(frozen=True, slots=True)
class Counters:
    """Sums over rounds, as `vllm:spec_decode_*` counts them: a draft is a round in which something was drafted."""

    drafts: int
    drafted: int
    accepted: int
    per_position: tuple[int, ...]  # rounds that accepted the token at each place of the draft

    @classmethod
    def none(cls, k: int) -> Self:
        return cls(0, 0, 0, (0,) * k)

    def plus(self, rounds: Sequence[Told]) -> Counters:
        reached = [accepted for _, accepted in rounds]
        places = tuple(sum(one > place for one in reached) for place in range(max(reached, default=0)))
        return self.joined(Counters(len(rounds), sum(drafted for drafted, _ in rounds), sum(reached), places))

    def joined(self, other: Counters) -> Counters:
        places = zip_longest(self.per_position, other.per_position, fillvalue=0)
        return Counters(
            self.drafts + other.drafts, self.drafted + other.drafted, self.accepted + other.accepted, tuple(map(sum, places))
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def match(deltas: Sequence[Delta], told: Sequence[Told] | None, first: bool) -> list[Delta]:
    """The deltas with their rounds; `told` are those with drafts, in order, and None where nothing tells.

    A round that accepted a tokens gives a + 1, in the end of a text fewer; one without drafts gives 1. Of several rounds of one
    token, which was drafted for and which was not may be told in the wrong order, their number never. `first`: the first delta
    is prefill's.
    """
    if told is None:
        return list(deltas)
    waiting, found = deque(told), []
    for place, delta in enumerate(deltas):
        if not delta.tokens or (first and place == 0):
            found.append(delta)
            continue
        ends = place == len(deltas) - 1
        fits = waiting and (waiting[0][1] + 1 == len(delta.tokens) or (ends and waiting[0][1] + 1 >= len(delta.tokens)))
        drafted, accepted = waiting.popleft() if fits else (0, len(delta.tokens) - 1)
        found.append(replace(delta, round=Round(drafted, accepted, drafted + 1)))
    return found


@dataclass
class StepStats:
    """A logger as vLLM calls them (vllm/v1/metrics/loggers.py, StatLoggerBase) that adds up what each step counted."""

    sums: Counters

    @classmethod
    def maker(cls, into: list[StepStats]) -> Callable[..., StepStats]:
        """What vLLM calls once for each of its engines."""

        def make(_config: Any, _engine_index: int = 0) -> StepStats:
            into.append(cls(Counters.none(0)))
            return into[-1]

        return make

    def record(self, scheduler_stats: Any = None, *_: Any, **__: Any) -> None:
        stats = getattr(scheduler_stats, "spec_decoding_stats", None)
        if stats is not None:
            places = tuple(stats.num_accepted_tokens_per_pos)
            found = Counters(stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens, places)
            self.sums = self.sums.joined(found)

    def log_engine_initialized(self) -> None:
        pass

    def log(self) -> None:
        pass

    def record_sleep_state(self, *_: Any) -> None:
        pass
