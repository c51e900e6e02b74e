"""Variants take turns: every one runs the same prompts, chunk by chunk, so that drift of the machine hits all alike."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from forerun import workload
from forerun.bench import kept
from forerun.bench.lanes import Lane, guarded
from forerun.bench.metrics import losses
from forerun.bench.serve import Arrivals, poisson, request, reseed, serve, to_lost, to_record, was_lost
from forerun.config import Experiment
from forerun.types import Backend, Phases, Request, UserError
from forerun.workload import Prompt

COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
UNSAID = "the backend gave it up and does not say why"


def rotate(lanes: Sequence[Lane], baseline: str, experiment: Experiment, console: Console) -> None:
    """Each repeat goes through the prompts chunk by chunk; on each chunk every variant runs, another one first each time.

    An open loop is one chunk: its load would begin anew with each.
    """
    count = max(len(lane.prompts) for lane in lanes)
    flying = max(in_flight(lane, experiment) for lane in lanes)
    chunk = count if experiment.workload.rate else 2 * flying if flying > 1 else 1
    with Progress(*COLUMNS, console=console, transient=True) as progress, record_files(lanes) as files:
        bars = {lane.name: progress.add_task(lane.name, total=experiment.repeats * len(lane.prompts)) for lane in lanes}
        turn = 0
        for repeat in range(experiment.repeats):
            for start in range(0, count, chunk):
                shift = turn % len(lanes)
                turn += 1
                for lane in (*lanes[shift:], *lanes[:shift]):
                    if lane.backend is None:
                        continue
                    prompts = lane.prompts[start : start + chunk]
                    with guarded(lane, baseline):
                        measure_chunk(lane, prompts, experiment, repeat, files[lane.name])
                    progress.advance(bars[lane.name], len(prompts))
    for lane in lanes:
        if lane.backend is not None and lane.lost and not lane.records:
            with guarded(lane, baseline):
                raise UserError(f"all {len(lane.lost)} requests were lost: {losses(lane.lost)['why']}")


def in_flight(lane: Lane, experiment: Experiment) -> int:
    """Requests in flight in a closed loop."""
    return experiment.workload.concurrency or lane.variant.engine.rows


@contextmanager
def record_files(lanes: Sequence[Lane]) -> Iterator[dict[str, TextIO]]:
    files: dict[str, TextIO] = {lane.name: (lane.folder / kept.RECORDS).open("w", encoding="utf-8") for lane in lanes}
    try:
        yield files
    finally:
        for file in files.values():
            file.close()


def measure_chunk(lane: Lane, prompts: Sequence[Prompt], experiment: Experiment, repeat: int, file: TextIO) -> None:
    """Serve some prompts and keep what came, on disk too. Only the serving is on the clock."""
    backend, config = lane.backend, experiment.workload
    assert backend is not None
    asked: dict[str, tuple[Prompt, Request, int]] = {}  # by request id, with the turn of the conversation

    def ask(prompt: Prompt, turn: int) -> Request:
        one = reseed(request(prompt, lane.variant, experiment, f"{prompt.id}#{repeat}"), repeat)
        asked[one.id] = prompt, one, turn
        return one

    def follow(id: str, answer: str) -> Request | None:
        prompt, _, turn = asked[id]
        after = workload.follow(prompt, answer, config, backend.tokenizer)
        if after is not None and len(after.tokens) > lane.room:
            raise UserError(
                f"workload: turn {turn + 1} of {prompt.id!r} has {len(after.tokens)} tokens and {lane.room} fit beside "
                "sampling.max_new; raise engine.capacity or set workload.max_prompt_tokens"
            )
        return None if after is None else ask(after, turn + 1)

    requests = [ask(prompt, 1) for prompt in prompts]
    due = poisson(config.rate, len(requests), repeat) if config.rate else ()
    on = follow if config.turns == "all" else None
    before = backend.phases
    lane.meter.start()
    try:
        served = serve(backend, requests, in_flight(lane, experiment), due=due, follow=on)
    finally:
        reading = lane.meter.stop()
    lane.readings.append(reading)
    lane.wall_seconds += reading.seconds
    lane.phases = added(lane.phases, before, backend.phases)
    why = reasons(backend, served)
    for prompt, one, turn in asked.values():
        for index in range(one.sampling.n):
            if was_lost(served[one.id, index]):
                lost = to_lost(prompt, repeat, index, served[one.id, index], turn, why.get((one.id, index), UNSAID))
                lane.lost.append(lost)
                with (lane.folder / kept.LOST).open("a", encoding="utf-8") as lines:
                    lines.write(json.dumps(dataclasses.asdict(lost), ensure_ascii=False) + "\n")
                continue
            record = to_record(prompt, repeat, index, served[one.id, index], turn)
            lane.records.append(record)
            file.write(json.dumps(record.to_json(), ensure_ascii=False) + "\n")
    file.flush()


def reasons(backend: Backend, served: Mapping[tuple[str, int], Arrivals]) -> dict[tuple[str, int], str]:
    """Why completions were lost, by request id and index; asked only where one was, for a server is asked for its facts."""
    if not any(map(was_lost, served.values())):
        return {}
    return {(one["id"], one["index"]): one["reason"] for one in backend.facts.get("lost") or ()}


def added(total: Phases | None, before: Phases | None, after: Phases | None) -> Phases | None:
    """Seconds by part with what was spent between two moments; unchanged where the backend does not tell."""
    if before is None or after is None:
        return total
    old, start = dataclasses.asdict(total or Phases()), dataclasses.asdict(before)
    return Phases(**{key: old[key] + value - start[key] for key, value in dataclasses.asdict(after).items()})
