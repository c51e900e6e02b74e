"""A deterministic backend without a model, and a tokenizer without a file, for tests of what is around them."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from forerun.bench.lanes import Maker
from forerun.config import NoDraftConfig, Variant
from forerun.types import Delta, Phases, Request, Round, UserError


class Letters:
    """Each character is a token."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 97 for letter in text]}

    def decode(self, tokens: list[int], **_: object) -> str:
        return "".join(chr(97 + token % 26) for token in tokens)


@dataclass
class Fake:
    """Counts upwards from the last prompt token; `width` tokens a round after the first, all drafts accepted."""

    rows: int = 1
    width: int = 1
    tokenizer: Any = field(default_factory=Letters)
    fail_at: int | None = None  # raise at this step
    error: Exception = field(default_factory=lambda: RuntimeError("broke\nin two lines"))
    told: list[str] = field(default_factory=list)  # ids in the order of their submission
    waiting: deque[Request] = field(default_factory=deque)
    running: dict[str, tuple[Request, int]] = field(default_factory=dict)
    most_in_flight: int = 0
    steps: int = 0
    spent: float = 0.0
    on_step: Callable[[], None] | None = None

    @property
    def busy(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def phases(self) -> Phases:
        return Phases(verify=self.spent)

    @property
    def scorer(self) -> None:
        return None

    @property
    def facts(self) -> dict[str, Any]:
        return {"lossless": True, "rule": "fake", "weight_bytes": 10, "device": "cpu"}

    def submit(self, request: Request) -> None:
        self.told.append(request.id)
        self.waiting.append(request)
        self.most_in_flight = max(self.most_in_flight, len(self.waiting) + len(self.running))

    def cancel(self, id: str) -> None:
        self.waiting = deque(one for one in self.waiting if one.id != id)
        self.running.pop(id, None)

    def step(self) -> list[Delta]:
        self.steps += 1
        if self.on_step is not None:
            self.on_step()
        if self.fail_at is not None and self.steps >= self.fail_at:
            raise self.error
        deltas = []
        for id, (request, done) in list(self.running.items()):
            deltas.append(self.grow(id, request, done, self.width, Round(self.width - 1, self.width - 1, self.width)))
            self.spent += 1.0
        while self.waiting and len(self.running) < self.rows:
            request = self.waiting.popleft()
            deltas.append(self.grow(request.id, request, 0, 1, None))
        return deltas

    def grow(self, id: str, request: Request, done: int, count: int, round: Round | None) -> Delta:
        count = min(count, request.sampling.max_new - done)
        tokens = tuple((request.prompt[-1] + done + i + 1) % 97 for i in range(count))
        ended = done + count >= request.sampling.max_new
        if ended:
            self.running.pop(id, None)
        else:
            self.running[id] = (request, done + count)
        return Delta(id, 0, tokens, self.tokenizer.decode(list(tokens)), "length" if ended else None, round)


@dataclass
class Fakes:
    """Builds a fake for each variant: one that drafts emits k + 1 tokens a round. `broken` says which fail to build."""

    broken: str | None = None
    made: list[Fake] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
    drafting: dict[str, Any] = field(default_factory=dict)  # for backends that draft

    def maker(self) -> Maker:
        return Maker(self.build, lambda _: 97, lambda _: Letters())

    def build(self, variant: Variant) -> Fake:
        drafts = not isinstance(variant.drafter, NoDraftConfig)
        if self.broken == variant.drafter.kind:
            raise UserError("cannot be built")
        width = 1 + getattr(variant.drafter, "k", 0)
        self.made.append(Fake(variant.engine.rows, width, **self.settings, **(self.drafting if drafts else {})))
        return self.made[-1]
