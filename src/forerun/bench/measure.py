"""Run every variant on the same prompts, interleaved chunk by chunk, so that drift of the machine hits all alike."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from forerun import workload
from forerun.bench import hardware, labels, memory, report
from forerun.bench.metrics import Record, RoundRecord, Run, summarize
from forerun.config import Experiment, NoDraftConfig, Variant, save
from forerun.types import Backend, Delta, Phases, Request, Sampling, UserError
from forerun.workload import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from forerun.accept.evidence import Evidence

STALL_S = 900.0  # steps that yield nothing for this long are a fault of the backend


@dataclass(frozen=True)
class Maker:
    """How variants become backends: `build` makes one; the target's tokenizer and number of token ids are told before that."""

    build: Callable[[Variant], Backend]
    vocabulary: Callable[[Variant], int]
    tokenizer: Callable[[Variant], PreTrainedTokenizerBase | None]


@dataclass
class Lane:
    """One variant at work, and what it has left behind so far."""

    name: str
    variant: Variant
    folder: Path
    backend: Backend | None = None
    prompts: list[Prompt] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    wall_seconds: float = 0.0
    phases: Phases | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    utilization: list[tuple[float, float]] = field(default_factory=list)  # percent, seconds that it stands for
    peak_memory_bytes: int | None = None
    error: str | None = None

    def run(self) -> Run:
        watched = sum(seconds for _, seconds in self.utilization)
        mean = sum(percent * seconds for percent, seconds in self.utilization) / watched if watched else None
        drafter_random = getattr(self.variant.drafter, "weights", "pretrained") == "random"
        return Run(
            records=self.records,
            wall_seconds=self.wall_seconds,
            phases=self.phases,
            facts=self.facts,
            greedy=self.variant.sampling.temperature == 0,
            drafts=not isinstance(self.variant.drafter, NoDraftConfig),
            random_weights=self.variant.model.weights == "random" or drafter_random,
            peak_memory_bytes=self.peak_memory_bytes,
            utilization_percent=mean,
            error=self.error,
        )


def run(experiment: Experiment, maker: Maker, out: Path, console: Console, measure_memory: bool = True) -> dict[str, Any]:
    """Measure an experiment into the folder `out` and return its summary.

    Raises UserError for what makes the baseline impossible; any other variant that fails becomes a row with its error.
    An interrupt keeps what was measured and sets `status` to "interrupted" in the summary and the reports.
    """
    variants = experiment.expand()
    baseline = experiment.baseline_name()
    out.mkdir(parents=True, exist_ok=True)
    save(experiment, out / "config.yaml")
    lanes = [Lane(name, variants[name], out / folder) for name, folder in folders(list(variants)).items()]
    status = "failed"
    try:
        with terminable():
            try:
                prepare(lanes, baseline, experiment, maker, console)
                hardware.write(out / "environment.json", {lane.name: lane.facts for lane in lanes})
                rotate(lanes, baseline, experiment, console)
                if measure_memory:
                    weigh(lanes, experiment, console)
                status = "complete"
            except KeyboardInterrupt:
                status = "interrupted"
    finally:
        summary = {"status": status} | summarize({lane.name: lane.run() for lane in lanes}, baseline)
        if status != "failed" or any(lane.records for lane in lanes):
            report.write(summary, experiment, out)
    return summary


def folders(names: Sequence[str]) -> dict[str, str]:
    """A folder name for each variant: its own name as far as a file system takes it."""
    found: dict[str, str] = {}
    for name in names:
        plain = re.sub(r"[^\w.,=+-]+", "_", name).strip(".")[:100] or "variant"
        found[name] = plain if plain not in found.values() else f"{plain}-{len(found)}"
    return found


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM interrupts as Ctrl-C does, so that what was measured is kept."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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


def prepare(lanes: list[Lane], baseline: str, experiment: Experiment, maker: Maker, console: Console) -> None:
    """Build every backend, label its rule, load its prompts in its own tokens, and warm it up; the baseline first."""
    examined: dict[str, Evidence] = {}
    for lane in sorted(lanes, key=lambda lane: lane.name != baseline):
        lane.folder.mkdir(exist_ok=True)
        with console.status(f"{lane.name}: building and warming up"), guarded(lane, baseline):
            lane.backend = maker.build(lane.variant)
            told = labels.of(lane.backend, lane.variant, examined)
            room = room_for_prompts(lane.backend.facts, lane.variant)
            vocabulary = maker.vocabulary(lane.variant)
            lane.prompts = workload.load(experiment.workload, lane.backend.tokenizer, vocabulary, room)
            for i in range(experiment.warmup):
                prompt = lane.prompts[i % len(lane.prompts)]
                serve(lane.backend, [request(prompt, lane.variant, experiment, f"warm-up {i}")], 1)
            lane.facts = lane.backend.facts | told


def room_for_prompts(facts: dict[str, Any], variant: Variant) -> int:
    """Prompt tokens that fit: what the model and the tree leave of the capacity."""
    capacity = facts.get("capacity", variant.engine.capacity)
    return int(capacity) - variant.sampling.max_new - int(facts.get("tree_size", 0))


def rotate(lanes: list[Lane], baseline: str, experiment: Experiment, console: Console) -> None:
    """Each repeat goes through the prompts chunk by chunk; on each chunk every variant runs, another one first each time."""
    chunk = max(2 * lane.variant.engine.rows if lane.variant.engine.rows > 1 else 1 for lane in lanes)
    count = max(len(lane.prompts) for lane in lanes)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress, record_files(lanes) as files:
        bars = {lane.name: progress.add_task(lane.name, total=experiment.repeats * len(lane.prompts)) for lane in lanes}
        turn = 0
        for repeat in range(experiment.repeats):
            for start in range(0, count, chunk):
                shift = turn % len(lanes)
                turn += 1
                for lane in lanes[shift:] + lanes[:shift]:
                    if lane.backend is None:
                        continue
                    prompts = lane.prompts[start : start + chunk]
                    with guarded(lane, baseline):
                        measure_chunk(lane, prompts, experiment, repeat, files[lane.name])
                    progress.advance(bars[lane.name], len(prompts))


@contextmanager
def record_files(lanes: list[Lane]) -> Iterator[dict[str, TextIO]]:
    files: dict[str, TextIO] = {lane.name: (lane.folder / "records.jsonl").open("w", encoding="utf-8") for lane in lanes}
    try:
        yield files
    finally:
        for file in files.values():
            file.close()


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


def measure_chunk(lane: Lane, prompts: Sequence[Prompt], experiment: Experiment, repeat: int, file: TextIO) -> None:
    """Serve some prompts and keep what came, on disk too. Only the serving is on the clock."""
    assert lane.backend is not None
    requests = [reseed(request(p, lane.variant, experiment, f"{p.id}#{repeat}"), repeat) for p in prompts]
    before, meter = lane.backend.phases, hardware.Meter(str(lane.facts.get("device", "cpu")))
    began = time.perf_counter()
    served = serve(lane.backend, requests, lane.variant.engine.rows)
    wall = time.perf_counter() - began
    after = lane.backend.phases
    if (percent := meter.percent()) is not None:
        lane.utilization.append((percent, wall))
    lane.wall_seconds += wall
    if before is not None and after is not None:
        spent = {key: value - getattr(before, key) for key, value in dataclasses.asdict(after).items()}
        old = dataclasses.asdict(lane.phases or Phases())
        lane.phases = Phases(**{key: old[key] + value for key, value in spent.items()})
    for prompt, one in zip(prompts, requests, strict=True):
        for index in range(one.sampling.n):
            record = to_record(prompt, repeat, index, served[one.id, index])
            lane.records.append(record)
            file.write(json.dumps(record.to_json(), ensure_ascii=False) + "\n")
    file.flush()


Arrivals = list[tuple[float, Delta]]


def serve(
    backend: Backend, requests: Sequence[Request], rows: int, tell: Callable[[Delta], None] | None = None
) -> dict[tuple[str, int], Arrivals]:
    """Closed loop: `rows` requests in flight until all are done; each delta with its seconds since its request's submission.

    `tell` sees each delta as it comes. If anything interrupts, the requests in flight are cancelled, so that the backend
    stays usable.
    """
    waiting = deque(requests)
    sent: dict[str, float] = {}
    left = {one.id: one.sampling.n for one in requests}
    got: dict[tuple[str, int], Arrivals] = {(one.id, index): [] for one in requests for index in range(one.sampling.n)}
    flying = 0
    stirred = time.perf_counter()
    try:
        while waiting or flying or backend.busy:  # a backend may still have a fault to tell after its last delta
            while waiting and flying < rows:
                one = waiting.popleft()
                sent[one.id] = time.perf_counter()
                backend.submit(one)
                flying += 1
            deltas = backend.step()
            now = time.perf_counter()
            for delta in deltas:
                if delta.id not in sent:  # the end of a request that an earlier call had to leave
                    continue
                made = now if delta.at is None else delta.at
                got[delta.id, delta.index].append((made - sent[delta.id], delta))
                left[delta.id] -= delta.finish is not None
                flying -= delta.finish is not None and left[delta.id] == 0
                if tell is not None:
                    tell(delta)
            if deltas:
                stirred = now
            elif now - stirred > STALL_S or not backend.busy:
                raise RuntimeError(f"the backend stopped giving tokens while {flying} requests were in flight")
    except BaseException:
        for id in sent:
            if left[id]:
                backend.cancel(id)
        raise
    return got


def to_record(prompt: Prompt, repeat: int, index: int, arrivals: Arrivals) -> Record:
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
    )


def weigh(lanes: list[Lane], experiment: Experiment, console: Console) -> None:
    """Peak memory of each variant that ran, in a process of its own."""
    for lane in lanes:
        if lane.error is None:
            with console.status(f"{lane.name}: peak memory in a process of its own"):
                lane.peak_memory_bytes = memory.measure(lane.variant, experiment)
