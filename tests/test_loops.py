"""Closed and open loops and conversations, on a clock that stands still unless a step or a sleep moves it."""

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fakes import Fake, Fakes
from forerun.bench import measure, serve
from forerun.bench.metrics import Record
from forerun.config import load
from forerun.types import Request, Sampling

SMALL = {"sampling.max_new": 4, "repeats": 2, "variants.plain.drafter.kind": "none", "variants.ngram.drafter.kind": "ngram"}


@dataclass
class Clock:
    """Stands in for the module `time`."""

    now: float = 100.0
    slept: float = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept += seconds
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(serve, "time", found)
    return found


def second_a_step(fake: Fake, clock: Clock) -> Fake:
    def pass_a_second() -> None:
        clock.now += 1.0

    fake.on_step = pass_a_second
    return fake


def asked(*ids: str, tokens: int = 3) -> list[Request]:
    return [Request(id, (7,), Sampling(max_new=tokens)) for id in ids]


def times(served: dict[tuple[str, int], serve.Arrivals], id: str) -> list[float]:
    return [at for at, _ in served[id, 0]]


def test_an_open_loop_counts_from_the_arrival(clock: Clock) -> None:
    """One row: b arrives while a is served and waits; nothing is there to do when c arrives at 10."""
    fake = second_a_step(Fake(rows=1), clock)
    served = serve.serve(fake, asked("a", "b", "c"), 1, due=[0.0, 2.5, 10.0])
    assert times(served, "a") == [1.0, 2.0, 3.0]
    assert times(served, "b") == [1.5, 2.5, 3.5], "its clock began at 2.5, its service at 3"
    assert times(served, "c") == [1.0, 2.0, 3.0]
    assert clock.slept == pytest.approx(4.0), "from 6 to 10"


def test_an_open_loop_knows_no_limit_of_its_own(clock: Clock) -> None:
    fake = second_a_step(Fake(rows=2), clock)
    serve.serve(fake, asked("a", "b", "c", "d"), 2, due=[0.0, 0.1, 0.2, 0.3])
    assert fake.most_in_flight == 4, "all have arrived by the first step; the backend keeps its own queue"


def test_arrivals_are_a_poisson_process_that_repeats() -> None:
    found = serve.poisson(5.0, 4000, seed=1)
    gaps = [after - before for before, after in zip([0.0, *found], found, strict=False)]
    assert min(gaps) >= 0
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.05), "as large as the mean: exponential"
    assert found == serve.poisson(5.0, 4000, seed=1)
    assert found != serve.poisson(5.0, 4000, seed=2)


def answered(texts: dict[str, str]) -> Callable[[str, str], Request | None]:
    """Lets each request but the second turns be followed by one, and notes the answers."""

    def follow(id: str, answer: str) -> Request | None:
        texts[id] = answer
        return None if id.endswith("/2") else Request(f"{id}/2", (9,), Sampling(max_new=2))

    return follow


@pytest.mark.parametrize("due", [(), (0.0, 0.0)])
def test_a_conversation_goes_on_before_another_begins(clock: Clock, due: tuple[float, ...]) -> None:
    fake, texts = second_a_step(Fake(rows=1), clock), {}
    served = serve.serve(fake, asked("a", "b"), 1, due=due, follow=answered(texts))
    assert set(texts) == {"a", "a/2", "b", "b/2"}
    assert texts["a"] == "".join(delta.text for _, delta in served["a", 0])
    if not due:
        assert fake.told == ["a", "a/2", "b", "b/2"]
        assert times(served, "a/2") == [1.0, 2.0]
    else:
        assert fake.told == ["a", "b", "a/2", "b/2"], "b had arrived before"
        assert times(served, "a/2") == [2.0, 3.0], "it arrives with the answer at 3, and b is served until 5"


# Whole runs.


def bench(out: Path, fakes: Fakes, **more: object) -> dict[str, Any]:
    experiment = load(None, [], SMALL | {key.replace("__", "."): value for key, value in more.items()})
    return measure.run(experiment, fakes.maker(), out, Console(quiet=True), measure_memory=False)


def records(folder: Path) -> list[Record]:
    return [Record.from_json(json.loads(line)) for line in (folder / "records.jsonl").read_text().splitlines()]


@pytest.fixture
def questions(tmp_path: Path) -> str:
    path = tmp_path / "questions.jsonl"
    lines = [{"question_id": i, "category": "chat", "turns": [f"first {i}", f"second {i}", "third"][: i + 1]} for i in range(3)]
    path.write_text("\n".join(map(json.dumps, lines)))
    return str(path)


def test_conversations_of_a_run(tmp_path: Path, questions: str) -> None:
    fakes = Fakes()
    both = {"workload.kind": "mt-bench", "workload.path": questions}
    summary = bench(tmp_path / "run", fakes, **both, workload__turns="all")
    found = records(tmp_path / "run" / "plain")
    assert sorted((one.id, one.turn, one.conversation) for one in found if one.repeat == 1) == [
        ("0", 1, "0"), ("1", 1, "1"), ("1/2", 2, "1"), ("2", 1, "2"), ("2/2", 2, "2"), ("2/3", 3, "2"),
    ]  # fmt: skip
    first, second = (next(one for one in found if one.id == id) for id in ("1", "1/2"))
    assert second.prompt_tokens > first.prompt_tokens + len(first.tokens), "all that was said is in it"
    assert summary["variants"]["ngram"]["requests"] == 12
    assert summary["variants"]["ngram"]["exact_share"] == 1.0
    assert summary["variants"]["plain"]["categories"]["chat"]["requests"] == 12
    alone = bench(tmp_path / "first", fakes, **both)
    assert alone["variants"]["plain"]["requests"] == 6


def test_a_conversation_that_outgrows_the_capacity_says_so(tmp_path: Path, questions: str) -> None:
    with pytest.raises(Exception, match=r"turn 2 of '1' has \d+ tokens and 16 fit.*workload.max_prompt_tokens"):
        bench(
            tmp_path, Fakes(), workload__kind="mt-bench", workload__path=questions, workload__turns="all",
            engine__capacity=20,
        )  # fmt: skip


def test_concurrency_is_not_the_rows(tmp_path: Path) -> None:
    fakes = Fakes()
    bench(tmp_path, fakes, workload__kind="synthetic", workload__concurrency=3, engine__rows=2, warmup=0)
    assert [fake.most_in_flight for fake in fakes.made] == [3, 3]


def test_a_rate_is_the_same_for_all_and_one_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[float]] = []
    real = serve.serve

    def noted(*args: Any, due: Any = (), **more: Any) -> Any:
        seen.append(list(due))
        return real(*args, due=due, **more)

    monkeypatch.setattr("forerun.bench.turns.serve", noted)
    summary = bench(tmp_path, Fakes(), workload__kind="synthetic", workload__prompts=5, workload__rate=2000.0)
    assert [len(due) for due in seen] == [5, 5, 5, 5], "two variants, two repeats"
    assert seen[0] == seen[1]
    assert seen[2] == seen[3] != seen[0]
    assert summary["variants"]["plain"]["requests"] == 10
