"""Log-likelihoods from vLLM's `prompt_logprobs`: prefill alone, so that neither drafter nor rule has a part in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from forerun.types import Score, UserError


@dataclass(frozen=True)
class Scoring:
    """A Scorer around an engine that is idle; `capacity` is how many tokens it takes, one of which it must write."""

    engine: Any
    capacity: int
    busy: Callable[[], bool]

    @property
    def limit(self) -> int:
        return self.capacity - 1

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """As Scorer says; a context that does not fit loses its start, and a continuation that does not fit is a UserError."""
        from vllm import SamplingParams

        assert not self.busy(), "score while nothing is being generated"
        params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, ignore_eos=True, detokenize=False)
        for place, (context, continuation) in enumerate(pairs):
            if len(continuation) >= self.limit:
                raise UserError(
                    f"a continuation of {len(continuation)} tokens cannot be scored: vLLM reads {self.limit} at once; raise "
                    "engine.capacity"
                )
            kept = list(context)[-(self.limit - len(continuation)) :]
            self.engine.add_request(f"score {place}", {"prompt_token_ids": [*kept, *continuation]}, params)
        found: dict[str, Any] = {}
        while self.engine.has_unfinished_requests():
            found |= {output.request_id: output.prompt_logprobs for output in self.engine.step() if output.finished}
        return [read(found[f"score {place}"], continuation) for place, (_, continuation) in enumerate(pairs)]


def read(told: Sequence[Any], continuation: Sequence[int]) -> Score:
    """Of the last positions of a prompt: each holds its own token's log-probability (nats) and rank (1: the most probable)."""
    own = [place[token] for place, token in zip(told[-len(continuation) :], continuation, strict=True)]
    return Score(sum(float(one.logprob) for one in own), all(one.rank == 1 for one in own))
