"""Workloads, the closed loop, rotation, failures and interrupts, and the run folder: on a backend without a model."""

import gzip
import html.parser
import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fakes import Fake, Fakes, Letters
from forerun import workload
from forerun.bench import folder, lanes, measure, memory, serve
from forerun.bench.metrics import Record
from forerun.config import Experiment, WorkloadConfig, load
from forerun.types import Request, Sampling, UserError

COMPARED = {"variants.plain.drafter.kind": "none", "variants.ngram.drafter.kind": "ngram", "variants.ngram.drafter.k": 3}
SMALL = {"workload.kind": "synthetic", "workload.prompts": 4, "workload.prompt_tokens": 5, "sampling.max_new": 9, "repeats": 2}
QUIET = Console(quiet=True)


def experiment(**more: object) -> Experiment:
    return load(None, [], COMPARED | SMALL | {key.replace("__", "."): value for key, value in more.items()})


def bench(out: Path, fakes: Fakes | None = None, **more: object) -> dict[str, Any]:
    return measure.run(experiment(**more), (fakes or Fakes()).maker(), out, QUIET, measure_memory=False)


def records(folder: Path) -> list[Record]:
    return [Record.from_json(json.loads(line)) for line in (folder / "records.jsonl").read_text().splitlines()]


# Workloads.


def prompts(tokenizer: Any = None, room: int = 100, **config: Any) -> list[workload.Prompt]:
    return workload.load(WorkloadConfig(**config), tokenizer or Letters(), 97, room)


def test_the_demo_ships() -> None:
    found = prompts(room=10**6)
    assert len(found) >= 12
    assert len({prompt.category for prompt in found}) >= 3
    only = found[0].category
    assert {prompt.category for prompt in prompts(room=10**6, categories=(only,), limit=2)} == {only}
    assert len(prompts(room=10**6, limit=2)) == 2


def test_synthetic_prompts_need_no_tokenizer() -> None:
    config = WorkloadConfig(kind="synthetic", prompts=3, prompt_tokens=6)
    found = workload.load(config, None, 50, 100)
    assert [len(prompt.tokens) for prompt in found] == [6, 6, 6]
    assert all(0 <= token < 50 for prompt in found for token in prompt.tokens)
    assert len({prompt.tokens for prompt in found}) == 3
    assert workload.load(config, None, 50, 100) == found, "the same on every run"
    with pytest.raises(UserError, match="no tokenizer"):
        workload.load(WorkloadConfig(), None, 50, 100)


def test_text_jsonl_and_questions(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one\n\n  two \n")
    assert [(p.id, p.text) for p in prompts(kind="text", path=str(text))] == [("line-1", "one"), ("line-3", "two")]
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"id": "x", "body": "hello", "category": "c"}\n{"body": "world"}\n')
    found = prompts(kind="jsonl", path=str(lines), field="body", max_prompt_tokens=2)
    assert [(p.id, p.category, p.text, len(p.tokens)) for p in found] == [("x", "c", "hello", 2), ("2", "jsonl", "world", 2)]
    questions = tmp_path / "q.jsonl.gz"
    with gzip.open(questions, "wt") as file:
        file.write('{"question_id": 81, "category": "writing", "turns": ["first", "second"]}\n')
    found = prompts(kind="spec-bench", path=str(questions))
    assert [(p.id, p.category, p.text) for p in found] == [("81", "writing", "first")]


@pytest.mark.parametrize(
    ("config", "content", "message"),
    [
        ({"kind": "text"}, "", "no prompt"),
        ({"kind": "jsonl"}, '{"id": 1, "text": "x"}', "line 1: no field 'prompt'; there are 'id', 'text'"),
        ({"kind": "jsonl"}, '{"prompt": "x"}\n{"prompt": ', "line 2: not JSON"),
        ({"kind": "jsonl"}, '{"prompt": "x"}\n\n[1]', "line 3: expected an object, found list"),
        ({"kind": "jsonl"}, '{"prompt": 5, "id": "five"}', "prompt 'five' holds no text"),
        ({"kind": "jsonl"}, '{"prompt": "x"}\n{"prompt": " ", "id": "blank"}', "line 2: prompt 'blank' is empty"),
        ({"kind": "jsonl"}, '{"prompt": "x", "id": 1}\n{"prompt": "y", "id": 1}', "the id '1' is there twice"),
        ({"kind": "jsonl"}, '{"prompt": "' + "x" * 101 + '"}', "prompt '1' has 101 tokens and 100 fit.*engine.capacity"),
        ({"kind": "jsonl", "categories": ("code",)}, '{"prompt": "x"}', "no prompt in the categories code"),
    ],
)
def test_mistakes_in_a_workload_name_the_place(tmp_path: Path, config: dict[str, Any], content: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        prompts(**config, path=str(path))
    assert "\n" not in str(caught.value)


def test_missing_workload_files() -> None:
    with pytest.raises(UserError, match="no such file"):
        prompts(kind="text", path="nowhere.txt")
    with pytest.raises(UserError, match="needs workload"):
        prompts(kind="text")


# The closed loop.


def test_serve_keeps_as_many_requests_in_flight_as_there_are_rows() -> None:
    fake = Fake(rows=3)
    lengths = [5, 2, 7, 1, 3]
    requests = [Request(str(i), (i,), Sampling(max_new=length)) for i, length in enumerate(lengths)]
    served = serve.serve(fake, requests, 3)
    assert fake.most_in_flight == 3
    assert [sum(len(d.tokens) for _, d in served[str(i), 0]) for i in range(5)] == lengths
    for arrivals in served.values():
        times = [at for at, _ in arrivals]
        assert times == sorted(times)
        assert times[0] >= 0


def test_serve_cancels_what_it_leaves() -> None:
    fake = Fake(fail_at=3)
    with pytest.raises(RuntimeError, match="broke"):
        serve.serve(fake, [Request("a", (1,), Sampling(max_new=9))], 1)
    assert not fake.busy


def test_a_backend_that_forgets_a_request_is_no_endless_loop() -> None:
    fake = Fake()
    fake.on_step = fake.waiting.clear
    with pytest.raises(RuntimeError, match="stopped giving tokens"):
        serve.serve(fake, [Request("a", (1,), Sampling(max_new=9))], 1)


def test_records_hold_what_came() -> None:
    fake = Fake(width=3)
    arrivals = serve.serve(fake, [Request("a", (10,), Sampling(max_new=6))], 1)["a", 0]
    record = serve.to_record(workload.Prompt("a", "c", (10,), "x"), 1, 0, arrivals)
    assert record.tokens == (11, 12, 13, 14, 15, 16)
    assert [count for _, count in record.arrivals] == [1, 3, 2]
    assert record.rounds == ((2, 2, 3, 3), (2, 2, 3, 2)), "the second is cut by the token limit"
    assert (record.drafted, record.accepted, record.finish, record.repeat) == (4, 4, "length", 1)
    assert record.first_s == record.arrivals[0][0] < record.total_s == record.arrivals[-1][0]


# Whole runs.


def test_a_run_folder(tmp_path: Path) -> None:
    summary = bench(tmp_path / "run")
    out = tmp_path / "run"
    assert {path.name for path in out.iterdir()} == {
        "config.yaml", "environment.json", "summary.json", "summary.csv", "requests.csv", "report.md", "report.html",
        "plain", "ngram",
    }  # fmt: skip
    assert json.loads((out / "summary.json").read_text()) == summary
    assert (summary["status"], summary["baseline"], list(summary["variants"])) == ("complete", "plain", ["plain", "ngram"])
    plain, ngram = summary["variants"]["plain"], summary["variants"]["ngram"]
    assert (plain["requests"], plain["tokens"], plain["rounds"]) == (8, 72, 64)
    assert (ngram["rounds"], ngram["block_efficiency"], ngram["exact_share"]) == (16, 4.0, 1.0)
    assert ngram["acceptance_rate"] == 1.0
    assert ngram["overhead"] == 1.0, "the fake's rounds cost a second each, warm-up apart"
    assert plain["seconds"]["verify"] == 64
    assert plain["peak_memory_bytes"] is None
    assert len(records(out / "plain")) == 8
    assert load(str(out / "config.yaml"), []) == experiment()
    environment = json.loads((out / "environment.json").read_text())
    assert environment["packages"]["torch"]
    assert environment["threads"] >= 1
    assert environment["variants"]["ngram"]["rule"] == "fake"


def test_variants_take_turns_and_the_warm_up_is_not_counted(tmp_path: Path) -> None:
    fakes = Fakes()
    order: list[tuple[str, str]] = []
    build = fakes.build

    def spying(variant: Any) -> Fake:
        fake = build(variant)
        submit = fake.submit

        def noted(request: Request) -> None:
            order.append((variant.drafter.kind, request.id))
            submit(request)

        fake.submit = noted  # type: ignore[method-assign]
        return fake

    maker = lanes.Maker(spying, lambda _: 97, lambda _: None)
    measure.run(experiment(workload__prompts=3), maker, tmp_path, QUIET, measure_memory=False)
    assert order[:2] == [("none", "warm-up 0"), ("ngram", "warm-up 0")]
    assert order[2:8] == [
        ("none", "synthetic-0#0"), ("ngram", "synthetic-0#0"),
        ("ngram", "synthetic-1#0"), ("none", "synthetic-1#0"),
        ("none", "synthetic-2#0"), ("ngram", "synthetic-2#0"),
    ]  # fmt: skip
    assert order[8] == ("ngram", "synthetic-0#1"), "the next repeat begins with the other one"
    assert all("warm" not in record.id for record in records(tmp_path / "plain"))


def test_a_failing_variant_is_a_row(tmp_path: Path) -> None:
    for fakes, message in [
        (Fakes(broken="ngram"), "cannot be built"),
        (Fakes(drafting={"fail_at": 8}), "RuntimeError: broke"),
        (Fakes(drafting={"fail_at": 8, "error": MemoryError()}), "out of memory"),
    ]:
        summary = bench(tmp_path, fakes)
        assert message in summary["variants"]["ngram"]["error"]
        assert "\n" not in summary["variants"]["ngram"]["error"]
        assert summary["variants"]["ngram"]["speedup"]["value"] is None
        assert summary["variants"]["plain"]["requests"] == 8
        assert summary["status"] == "complete"
        assert message in (tmp_path / "report.md").read_text()
        assert message in (tmp_path / "report.html").read_text()


def test_a_failing_baseline_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="baseline 'plain': cannot be built"):
        bench(tmp_path / "a", Fakes(broken="none"))
    assert not (tmp_path / "a" / "summary.json").exists(), "nothing was measured"
    with pytest.raises(UserError, match="baseline 'plain': RuntimeError: broke"):
        bench(tmp_path / "b", Fakes(settings={"fail_at": 20}))
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["status"] == "failed"


@pytest.fixture
def _heard() -> Iterator[None]:
    """A shell starts what runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_heard")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_keeps_what_was_measured(tmp_path: Path, how: signal.Signals) -> None:
    fakes = Fakes()
    build = fakes.build

    def interrupting(variant: Any) -> Fake:
        fake = build(variant)
        fake.on_step = lambda: os.kill(os.getpid(), how) if fake.steps == 30 else None
        return fake

    fakes.build = interrupting  # type: ignore[method-assign]
    summary = bench(tmp_path, fakes)
    assert summary["status"] == "interrupted"
    kept = records(tmp_path / "plain")
    assert 0 < len(kept) < 8
    assert summary["variants"]["plain"]["requests"] == len(kept)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert "interrupted" in (tmp_path / "report.md").read_text()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "the handler is put back"


def test_out_of_memory_names_the_cache(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    geometry = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    LlamaConfig(hidden_size=64, **geometry).save_pretrained(tmp_path)
    overrides = [f"model.path={tmp_path}", "model.dtype=bfloat16", "engine.rows=8", "engine.capacity=1000"]
    variant = load(None, overrides).expand()["base"]
    size = 8 * 1000 * 2 * 3 * 2 * 16 * 2  # rows, slots, keys and values, layers, heads, head size, bytes
    text = lanes.explain(MemoryError(), variant)
    assert f"engine.rows 8 x engine.capacity 1000 is {size:,} bytes of KV cache" in text
    allocator = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    assert lanes.explain(allocator, variant) == text
    assert not lanes.out_of_memory(RuntimeError("shapes differ"))


def test_requests_of_synthetic_prompts_ignore_the_end() -> None:
    prompt = workload.Prompt("a", "c", (1, 2), None)
    variant = experiment().expand()["plain"]
    assert serve.request(prompt, variant, experiment(), "a").sampling.ignore_eos
    assert not serve.request(prompt, variant, experiment(workload__kind="demo"), "a").sampling.ignore_eos


def test_folder_names_are_safe_and_unlike() -> None:
    found = folder.folders(["a/b", "a:b", "drafter.k=3,engine.rows=2", "..", "x" * 300])
    assert len(set(found.values())) == 5
    assert found["drafter.k=3,engine.rows=2"] == "drafter.k=3,engine.rows=2"
    assert all("/" not in name and name not in {"", ".", ".."} and len(name) < 120 for name in found.values())


def test_the_page_is_whole_and_escaped(tmp_path: Path) -> None:
    bench(tmp_path, **{"variants.<mark>&.drafter.kind": "ngram"})
    text = (tmp_path / "report.html").read_text()
    assert "<mark>" not in text
    assert "&lt;mark&gt;&amp;" in text
    assert "prefers-color-scheme: dark" in text
    assert "http" not in text.replace("http-equiv", ""), "nothing is fetched from elsewhere"
    open_tags: list[str] = []

    class Checker(html.parser.HTMLParser):
        def handle_starttag(self, tag: str, attrs: object) -> None:
            if tag not in {"meta", "line", "rect"}:
                open_tags.append(tag)

        def handle_endtag(self, tag: str) -> None:
            if tag not in {"line", "rect"}:
                assert open_tags.pop() == tag

    Checker().feed(text)
    assert open_tags == []


# Memory and load.


def test_the_peak_is_this_process_own() -> None:
    before, device = memory.peaks("cpu")
    assert before is not None
    assert device is None
    block = bytearray(random.Random(0).randbytes(1)) * (before + 2**27)  # more than ever was resident
    after, _ = memory.peaks("cpu")
    assert after is not None
    assert after >= len(block)
