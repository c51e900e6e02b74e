"""Requests that a backend gives up: recorded once, in no figure, named in the reports; and processes that end with theirs."""

import io
import json
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import report_world as world
from fakes import Fake, Fakes
from forerun.bench import kept, measure, memory, metrics, report
from forerun.bench.lanes import Maker
from forerun.bench.metrics import Lost, Run
from forerun.bench.turns import UNSAID
from forerun.config import Experiment, Variant, load
from forerun.types import Delta, Phases, Request, UserError

BASE = {
    "workload.kind": "synthetic", "workload.prompts": 4, "workload.prompt_tokens": 5, "sampling.max_new": 9, "repeats": 2,
    "variants.plain.drafter.kind": "none", "variants.ngram.drafter.kind": "ngram", "variants.ngram.drafter.k": 3,
}  # fmt: skip
AWAY = "the server went away"
After = Callable[[str], int | None]


@dataclass
class Frail:
    """A fake that gives completions up once `after` of their deltas have come; None: not that one."""

    fake: Fake
    after: After
    says: bool = True
    told: Counter[str] = field(default_factory=Counter)
    lost: list[dict[str, Any]] = field(default_factory=list)

    @property
    def tokenizer(self) -> Any:
        return self.fake.tokenizer

    @property
    def busy(self) -> bool:
        return self.fake.busy

    @property
    def phases(self) -> Phases:
        return self.fake.phases

    @property
    def scorer(self) -> None:
        return None

    @property
    def facts(self) -> dict[str, Any]:
        return self.fake.facts | ({"lost": self.lost} if self.says else {})

    def submit(self, request: Request) -> None:
        self.fake.submit(request)

    def cancel(self, id: str) -> None:
        self.fake.cancel(id)

    def step(self) -> list[Delta]:
        found: list[Delta] = []
        for delta in self.fake.step():
            self.told[delta.id] += 1
            limit = self.after(delta.id)
            if limit is None or self.told[delta.id] <= limit:
                found.append(delta)
                continue
            self.fake.cancel(delta.id)
            self.lost.append({"id": delta.id, "index": 0, "reason": AWAY, "tokens": limit})
            found.append(Delta(delta.id, 0, (), "", "cancelled"))
        return found


def losing(plain: After = lambda _: None, ngram: After = lambda _: None, *, says: bool = True) -> Maker:
    """Backends that lose what these say."""
    fakes = Fakes()

    def build(variant: Variant) -> Frail:
        return Frail(fakes.build(variant), plain if variant.drafter.kind == "none" else ngram, says)

    return replace(fakes.maker(), build=build)


def of(**deltas: int) -> After:
    """Loses these requests, after so many deltas."""
    return lambda one: deltas.get(one.replace("synthetic-", "s").replace("#", "_"))


def experiment(**more: object) -> Experiment:
    return load(None, [], BASE | {key.replace("__", "."): value for key, value in more.items()})


def bench(out: Path, maker: Maker, *, resume: bool = False, **more: object) -> dict[str, Any]:
    return measure.run(experiment(**more), maker, out, Console(quiet=True), measure_memory=False, resume=resume)


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def places(rows: Sequence[dict[str, Any]]) -> list[tuple[str, int]]:
    return [(row["id"], row["repeat"]) for row in rows]


ALL = [(f"synthetic-{i}", repeat) for repeat in range(2) for i in range(4)]
SOME = losing(of(s1_0=2), of(s1_0=1, s2_1=0))


# What is recorded.


def test_each_request_is_recorded_once_or_lost_once(tmp_path: Path) -> None:
    found = bench(tmp_path, SOME)["variants"]
    assert [figures["error"] for figures in found.values()] == [None, None]
    lost = {name: lines(tmp_path / name / kept.LOST) for name in ("plain", "ngram")}
    common = {"category": "synthetic", "index": 0, "turn": 1, "reason": AWAY}
    first = {"id": "synthetic-1", "repeat": 0} | common
    assert lost["plain"] == [first | {"tokens": 2}]
    assert lost["ngram"] == [first | {"tokens": 1}, {"id": "synthetic-2", "repeat": 1, "tokens": 0} | common]
    for name, rows in lost.items():
        assert sorted(places(lines(tmp_path / name / kept.RECORDS)) + places(rows)) == sorted(ALL)
    assert "lost" not in json.loads((tmp_path / "environment.json").read_text())["variants"]["plain"], "one place has them"


def test_a_backend_that_does_not_say_why(tmp_path: Path) -> None:
    bench(tmp_path, losing(ngram=of(s0_0=1), says=False))
    [row] = lines(tmp_path / "ngram" / kept.LOST)
    assert row["reason"] == UNSAID


def test_where_nothing_is_lost_nothing_is_said(tmp_path: Path) -> None:
    found = bench(tmp_path, losing())["variants"]["ngram"]
    assert found["lost"] == {"requests": 0, "tokens": 0, "why": None}
    assert found["tokens_per_second"]["total"] is not None
    assert not list(tmp_path.glob(f"*/{kept.LOST}"))
    assert "lost" not in (tmp_path / "report.md").read_text()


def test_a_conversation_ends_with_an_answer_that_was_lost(tmp_path: Path) -> None:
    questions = tmp_path / "q.jsonl"
    turns = ["Write.", "Now shorter.", "And now?"]
    rows = [{"question_id": id, "category": "writing", "turns": turns} for id in (1, 2)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    workload = {"workload.kind": "mt-bench", "workload.path": str(questions), "workload.turns": "all", "repeats": 1}
    bench(tmp_path / "run", losing(ngram=lambda one: 1 if one == "1/2#0" else None), **workload)
    [row] = lines(tmp_path / "run" / "ngram" / kept.LOST)
    assert (row["id"], row["turn"], row["tokens"]) == ("1/2", 2, 1)
    kept_ids = [row["id"] for row in lines(tmp_path / "run" / "ngram" / kept.RECORDS)]
    assert kept_ids == ["1", "2", "2/2", "2/3"], "its third turn was not asked"


# What is counted.


def without(run: Run, lost: set[tuple[str, int]]) -> Run:
    return replace(run, records=[one for one in run.records if (one.id, one.repeat) not in lost], lost=())


def test_no_figure_counts_what_was_lost(tmp_path: Path) -> None:
    """Figures are those of the records alone; paired ones leave out what either side lost."""
    found = bench(tmp_path, SOME)["variants"]
    assert found["plain"]["lost"] == {"requests": 1, "tokens": 2, "why": AWAY}
    assert found["ngram"]["lost"] == {"requests": 2, "tokens": 1, "why": AWAY}
    runs = {name: kept.read(tmp_path / name) for name in found}
    plain, ngram = runs["plain"], runs["ngram"]
    assert plain is not None and ngram is not None
    either = {("synthetic-1", 0), ("synthetic-2", 1)}
    both = metrics.variant(without(ngram, either), without(plain, either))
    for name in ("speedup", "speedup_e2e", "exact_share"):
        assert found["ngram"][name] == both[name], name
    assert found["ngram"]["exact_share"] == 1.0
    totals = dict.fromkeys(("wall_seconds", "phases", "energy_joules", "cpu_percent", "utilization_percent"))
    own = metrics.variant(*(replace(without(run, set()), **totals) for run in (ngram, plain)))
    assert (own["requests"], own["tokens"], own["rounds"]) == (6, 54, 12)
    assert found["ngram"] == own | {"lost": found["ngram"]["lost"]}, "their time is in the totals"
    assert (own["tokens_per_second"]["total"], own["overhead"], own["seconds"]["verify"]) == (None, None, None)
    assert own["tokens_per_second"]["decode"] is not None


def test_reasons_are_counted_and_few() -> None:
    def one(reason: str) -> Lost:
        return Lost("a", "c", 0, 0, 1, 3, reason)

    assert metrics.losses([one("x")] * 2) == {"requests": 2, "tokens": 6, "why": "x"}
    told = metrics.losses([one(reason) for reason in "abbccdef"])["why"]
    assert told == "b (2); c (2); a (1); and 3 other reasons"


@pytest.mark.parametrize("name", ["plain", "ngram"])
def test_a_variant_that_lost_all_has_failed(tmp_path: Path, name: str) -> None:
    maker = losing(**{name: lambda one: None if "warm" in one else 1})
    told = f"all 8 requests were lost: {AWAY}"
    if name == "plain":
        with pytest.raises(UserError, match=f"baseline 'plain': {told}"):
            bench(tmp_path, maker)
    else:
        found = bench(tmp_path, maker)["variants"]
        assert found["ngram"]["error"] == told
        assert (found["ngram"]["requests"], found["ngram"]["lost"]["requests"]) == (0, 8)
        assert f"failed: {told}" in (tmp_path / "report.md").read_text()
        assert found["plain"]["requests"] == 8
    assert sorted(places(lines(tmp_path / name / kept.LOST))) == sorted(ALL)


def test_a_resumed_run_counts_nothing_twice(tmp_path: Path) -> None:
    """A finished variant stays as it is with what it lost; one that is measured again begins with nothing."""
    first = bench(tmp_path, SOME)
    assert bench(tmp_path, losing(), resume=True)["variants"] == first["variants"]
    assert len(lines(tmp_path / "ngram" / kept.LOST)) == 2
    again = bench(tmp_path, losing(ngram=of(s3_0=1)), resume=True, variants__ngram__drafter__k=4)
    assert again["variants"]["ngram"]["lost"]["requests"] == 1
    assert places(lines(tmp_path / "ngram" / kept.LOST)) == [("synthetic-3", 0)]
    assert len(lines(tmp_path / "ngram" / kept.RECORDS)) == 7
    assert len(lines(tmp_path / "plain" / kept.LOST)) == 1
    fresh = bench(tmp_path, losing())
    assert fresh["variants"]["plain"]["lost"]["requests"] == 0
    assert not list(tmp_path.glob(f"*/{kept.LOST}"))


def test_a_damaged_list_is_measured_again(tmp_path: Path) -> None:
    bench(tmp_path, SOME)
    (tmp_path / "ngram" / kept.LOST).write_text('{"id": ')
    found = bench(tmp_path, losing(), resume=True)["variants"]
    assert (found["ngram"]["lost"]["requests"], found["plain"]["lost"]["requests"]) == (0, 1)


# What is said.


def test_the_reports_name_how_many_and_why(tmp_path: Path) -> None:
    summary = bench(tmp_path, SOME)
    told = [f"plain lost 1 of 8 requests: {AWAY}", f"ngram lost 2 of 8 requests: {AWAY}"]
    markdown, page = ((tmp_path / f"report.{kind}").read_text() for kind in ("md", "html"))
    for line in told:
        assert f"\n{line}. No figure counts them" in markdown
        assert page.count(f"{line}. No figure counts them") == 1
    console = Console(width=80, file=io.StringIO())
    with console.capture() as caught:
        console.print(report.table(summary, experiment()))
    shown = [line.strip() for line in caught.get().splitlines()]
    assert [line for line in shown if " lost " in line] == told
    saved = json.loads((tmp_path / "summary.json").read_text())
    assert report.rows(saved) == report.rows(summary)


def test_long_reasons_stay_within_the_terminal_and_older_runs_are_readable() -> None:
    made = world.summary_of(world.RICH)
    for figures in made["variants"].values():
        del figures["lost"]
    made["variants"]["plain"]["lost"] = {"requests": 1, "tokens": 0, "why": "http://a.b/v1 says [bold]" + "no " * 60}
    console = Console(width=80, file=io.StringIO())
    with console.capture() as caught:
        console.print(report.table(made))
    assert max(len(line.rstrip()) for line in caught.get().splitlines()) <= 80
    assert "[bold]" in caught.get()


# Processes that end with the process that started them.

GRANDCHILD = "import socket, sys, time; s = socket.create_connection(('127.0.0.1', {port})); s.send(b'x'); time.sleep(600)"
PARENT = """
import os, subprocess, sys, time
nothing = subprocess.DEVNULL
subprocess.Popen([sys.executable, "-c", {code!r}], stdin=nothing, stdout=nothing, stderr=nothing)
time.sleep({seconds})
print("done", sys.stdin.read(), flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("ends", [True, False])
def test_what_a_process_started_ends_with_it(ends: bool) -> None:
    """Whether it ends by itself or by the time limit; its own child waits for ten minutes and would go on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        code = GRANDCHILD.format(port=server.getsockname()[1])
        script = PARENT.format(code=code, seconds=1.5 if ends else 600)
        if ends:
            assert memory.apart([sys.executable, "-c", script], "job").stdout == "done job\n"
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                memory.apart([sys.executable, "-c", script], "job", 1.5)
        connection, _ = server.accept()
        with connection:
            connection.settimeout(30)
            assert connection.recv(1) == b"x"
            assert connection.recv(1) == b"", "it lives on"
