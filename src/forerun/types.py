"""The words that every part of forerun shares: requests, what a step emits, and the seams. Frozen data, no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Finish = Literal["stop", "length", "cancelled"]
"""Why a completion ended: a stop id, stop string or end-of-sequence token; its token limit; or a cancel."""


class UserError(Exception):
    """Something that the user can mend; the message is one line that says what, where and what to do."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one request draws its tokens; names and meanings as in transformers, penalties on output tokens as in vLLM."""

    temperature: float = 0.0  # 0 is greedy
    top_k: int = 0  # 0 is off
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output
    presence_penalty: float = 0.0  # over output only
    frequency_penalty: float = 0.0  # over output only
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    max_new: int = 128
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = None
    n: int = 1

    def __post_init__(self) -> None:
        checks = {
            "temperature": self.temperature >= 0,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
            "max_new": self.max_new >= 1,
            "n": self.n >= 1,
        }
        for name, fine in checks.items():
            if not fine:
                raise UserError(f"sampling.{name}={getattr(self, name)} is out of range; see `forerun generate --help`")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalized(self) -> bool:
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt in token ids and how to continue it; `id` must be unique among the requests in flight."""

    id: str
    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, slots=True)
class Round:
    """What one verification did for one row: drafted depth, accepted drafts, positions that the target computed."""

    drafted: int
    accepted: int
    nodes: int


@dataclass(frozen=True, slots=True)
class Delta:
    """What one step added to completion `index` of request `id`.

    `round` is None for the token that prefill yields and for backends that do not tell. `text` holds whole characters only.
    `at` is when it was made (time.perf_counter), where that is earlier than the step's return; None: at the return.
    """

    id: str
    index: int
    tokens: tuple[int, ...]
    text: str
    finish: Finish | None = None
    round: Round | None = None
    at: float | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished completion: the sum of its deltas."""

    id: str
    index: int
    tokens: tuple[int, ...]
    text: str
    finish: Finish
    rounds: tuple[Round, ...]


@dataclass(frozen=True, slots=True)
class Phases:
    """Seconds spent so far in each part of the steps, on the host's clock; prefill is no part of a round."""

    draft: float = 0.0
    verify: float = 0.0
    accept: float = 0.0
    other: float = 0.0
    prefill: float = 0.0


@dataclass(frozen=True, slots=True)
class Score:
    """What a model says of a continuation: its log-probability in nats, and whether greedy decoding would have written it."""

    logprob: float
    greedy: bool


class Scorer(Protocol):
    """Log-likelihoods, for multiple choice and perplexity."""

    @property
    def limit(self) -> int | None:
        """The most tokens that the model reads at once; None where it has no limit."""

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        """One score for each (context, continuation) of token ids; neither may be empty."""


class Backend(Protocol):
    """Anything that continues prompts; measurement, evaluation and serving see nothing else."""

    tokenizer: PreTrainedTokenizerBase | None

    def submit(self, request: Request) -> None:
        """Queue a request; raises UserError where it can never be served."""

    def step(self) -> list[Delta]:
        """Advance every running row once and tell what was added."""

    def cancel(self, id: str) -> None:
        """End a request; its completions that still run get a last delta with finish `cancelled`."""

    @property
    def busy(self) -> bool:
        """Whether any request is waiting or running."""

    @property
    def phases(self) -> Phases | None:
        """Seconds by part since the start; None where the backend does not tell."""

    @property
    def scorer(self) -> Scorer | None:
        """The same weights as a scorer; None where the backend cannot score."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a report should say of this backend: rule, lossless, weight_bytes, kv_bytes, compile, policy, ..."""


def complete(backend: Backend, requests: list[Request]) -> list[Completion]:
    """Run requests to their end; completions come in the order of the requests, then of their index."""
    deltas: dict[tuple[str, int], list[Delta]] = {}
    for request in requests:
        backend.submit(request)
        deltas |= {(request.id, index): [] for index in range(request.sampling.n)}
    while backend.busy:
        for delta in backend.step():
            deltas[delta.id, delta.index].append(delta)
    return [join(parts) for parts in deltas.values()]


def join(deltas: list[Delta]) -> Completion:
    """The completion that a finished list of deltas adds up to."""
    last = deltas[-1]
    assert last.finish is not None, "the completion has not ended"
    return Completion(
        id=last.id,
        index=last.index,
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        text="".join(delta.text for delta in deltas),
        finish=last.finish,
        rounds=tuple(delta.round for delta in deltas if delta.round is not None),
    )
