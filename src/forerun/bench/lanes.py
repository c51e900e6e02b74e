"""Variants at work: how each becomes a backend, what it has left behind so far, and what its errors say."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from forerun import workload
from forerun.bench import hardware, labels
from forerun.bench.intervals import ratio
from forerun.bench.meter import Meter, Reading
from forerun.bench.metrics import Lost, Record, Run
from forerun.bench.quality import Finding
from forerun.bench.serve import request, serve
from forerun.config import Experiment, NoDraftConfig, Variant
from forerun.types import Backend, Phases, UserError
from forerun.workload import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from forerun.accept.evidence import Evidence


@dataclass(frozen=True)
class Maker:
    """How variants become backends: `build` makes one; the target's tokenizer and number of token ids are told before that."""

    build: Callable[[Variant], Backend]
    vocabulary: Callable[[Variant], int]
    tokenizer: Callable[[Variant], PreTrainedTokenizerBase | None]


@dataclass
class Lane:
    """One variant at work, and what it has left behind so far; `finished` is all that an earlier run has left of it."""

    name: str
    variant: Variant
    folder: Path
    hash: str | None = None
    finished: Run | None = None
    backend: Backend | None = None
    meter: Meter = field(default_factory=lambda: Meter("cpu"))
    room: int = 0  # tokens that a prompt may have
    prompts: list[Prompt] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    lost: list[Lost] = field(default_factory=list)
    wall_seconds: float = 0.0
    phases: Phases | None = None
    told: dict[str, Any] = field(default_factory=dict)  # of the rule
    facts: dict[str, Any] = field(default_factory=dict)
    warmed: dict[str, Any] | None = None  # counters of the warm-up
    readings: list[Reading] = field(default_factory=list)
    peak_memory_bytes: int | None = None
    peak_device_bytes: int | None = None
    quality: tuple[Finding, ...] = ()
    session: str | None = None
    error: str | None = None

    def run(self) -> Run:
        if self.finished is not None:
            return self.finished
        facts = {name: fact for name, fact in self.facts.items() if name != "lost"}  # lost.jsonl is the place for that
        if "counters" in facts:
            facts["counters"] = since(self.warmed, facts["counters"])
        drafter_random = getattr(self.variant.drafter, "weights", "pretrained") == "random"
        joules = [one.joules for one in self.readings if one.joules is not None]
        return Run(
            records=self.records,
            lost=self.lost,
            wall_seconds=self.wall_seconds,
            phases=self.phases,
            facts=facts,
            greedy=self.variant.sampling.temperature == 0,
            drafts=not isinstance(self.variant.drafter, NoDraftConfig),
            random_weights=self.variant.model.weights == "random" or drafter_random,
            peak_memory_bytes=self.peak_memory_bytes,
            peak_device_bytes=self.peak_device_bytes,
            cpu_percent=weighted([(one.cpu_percent, one.seconds) for one in self.readings]),
            utilization_percent=weighted([(one.gpu_percent, one.seconds) for one in self.readings]),
            energy_joules=sum(joules) if joules and len(joules) == len(self.readings) else None,
            quality=self.quality,
            hash=self.hash,
            session=self.session,
            error=self.error,
        )


def since(before: dict[str, Any] | None, now: dict[str, Any] | None) -> dict[str, Any] | None:
    """By how much a backend's counters (backends/vllm_rounds.py) grew; None where either is not known."""
    if before is None or now is None:
        return None
    places = zip_longest(now["per_position"], before["per_position"], fillvalue=0)
    grown = {name: now[name] - before[name] for name in ("drafts", "drafted", "accepted")}
    return grown | {"per_position": tuple(new - old for new, old in places)}


def weighted(shares: Sequence[tuple[float | None, float]]) -> float | None:
    """Mean percentage over the seconds that each stands for."""
    known = [(percent, seconds) for percent, seconds in shares if percent is not None]
    return ratio(sum(percent * seconds for percent, seconds in known), sum(seconds for _, seconds in known))


@contextmanager
def guarded(lane: Lane, baseline: str) -> Iterator[None]:
    """A failing variant is a row with its error; a failing baseline ends the run, since nothing can be compared."""
    try:
        yield
    except Exception as error:  # whatever a model, a kernel or a library raises
        lane.error = explain(error, lane.variant)
        lane.backend = None
        if lane.name == baseline:
            raise UserError(f"baseline {lane.name!r}: {lane.error}") from error


def explain(error: Exception, variant: Variant) -> str:
    """One line about what went wrong; running out of memory names what the KV cache of this variant asks for."""
    lines = str(error).strip().splitlines() or [""]
    if isinstance(error, UserError):
        return str(error)
    if out_of_memory(error):
        rows, capacity = variant.engine.rows, variant.engine.capacity
        per_token = hardware.kv_bytes_per_token(variant.model)
        size = f" is {rows * capacity * per_token:,} bytes of KV cache" if per_token else " tokens of KV cache"
        return f"out of memory: engine.rows {rows} x engine.capacity {capacity}{size}; lower either, or take a smaller model"
    return f"{type(error).__name__}: {lines[0]}"


def out_of_memory(error: BaseException) -> bool:
    """torch has its own error on accelerators and a RuntimeError of its CPU allocator; Python has MemoryError."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error))


def prepare(lanes: Sequence[Lane], baseline: str, experiment: Experiment, maker: Maker, console: Console) -> None:
    """Build every backend, label its rule, load its prompts in its own tokens, and warm it up; the baseline first."""
    examined: dict[str, Evidence] = {}
    commit = {"commit": hardware.commit()}
    for lane in sorted(lanes, key=lambda lane: lane.name != baseline):
        lane.folder.mkdir(exist_ok=True)
        with console.status(f"{lane.name}: building and warming up"), guarded(lane, baseline):
            lane.backend = maker.build(lane.variant)
            lane.told = labels.of(lane.backend, lane.variant, examined) | commit
            lane.room = room_for_prompts(lane.backend.facts, lane.variant)
            vocabulary = maker.vocabulary(lane.variant)
            lane.prompts = workload.load(experiment.workload, lane.backend.tokenizer, vocabulary, lane.room)
            for i in range(experiment.warmup):
                prompt = lane.prompts[i % len(lane.prompts)]
                serve(lane.backend, [request(prompt, lane.variant, experiment, f"warm-up {i}")], 1)
            lane.facts = lane.backend.facts | lane.told
            if "counters" in lane.facts:  # of the run they are known at its end
                lane.warmed, lane.facts["counters"] = lane.facts["counters"], None
            lane.meter = Meter(str(lane.facts.get("device", "cpu")), spread=lane.variant.model.device == "balanced")


def room_for_prompts(facts: dict[str, Any], variant: Variant) -> int:
    """Prompt tokens that fit: what the model and the tree leave of the capacity."""
    capacity = facts.get("capacity", variant.engine.capacity)
    return int(capacity) - variant.sampling.max_new - int(facts.get("tree_size", 0))
