"""Several vLLM processes on the cores of one machine: a server of two engines that dies amid a benchmark, and two workers that
share a model."""

import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from forerun.config import WorkloadConfig
from forerun.workload import load
from models import redraw, wide_headed

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # of vLLM's own
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each of two engines needs a core of its own"),
]
VOCABULARY, NEW, PROMPTS, FLYING = 96, 300, 30, 5
WORKLOAD = {"kind": "synthetic", "prompts": PROMPTS, "prompt_tokens": 8, "concurrency": FLYING}
FORERUN = [sys.executable, "-c", "from forerun.cli import main; main()"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random target; an even number of all that is shared by two."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = wide_headed(vocab_size=VOCABULARY, num_hidden_layers=2, num_key_value_heads=2, max_position_embeddings=512)
        redraw(model, 2.0)
    place = tmp_path_factory.mktemp("model")
    model.save_pretrained(place)
    return place


def cores() -> str:
    """One for each of two, in vLLM's words."""
    return "|".join(map(str, sorted(os.sched_getaffinity(0))[:2]))


def environment(**more: str) -> dict[str, str]:
    """Without what the tests in this process ask of vLLM."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    return own | {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"} | more


def wanted(folder: Path, prompts: list[tuple[int, ...]], new: int) -> list[tuple[int, ...]]:
    """Greedy continuations by transformers; all prompts are of one length."""
    ids = torch.tensor(prompts)
    model = AutoModelForCausalLM.from_pretrained(folder)
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False)
    return [tuple(row[ids.shape[1] :].tolist()) for row in out]


@contextmanager
def server(folder: Path, port: int, log: Path) -> Iterator[None]:
    """The API server before two engines, ready; with SIGKILL for all of its processes at the end."""
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder, "--served-model-name", "tiny",
        "--host", "127.0.0.1", "--port", port, "--data-parallel-size", 2, "--dtype", "float32", "--enforce-eager",
        "--kv-cache-memory-bytes", 16 << 20, "--max-model-len", 512, "--max-num-seqs", 8, "--skip-tokenizer-init",
        "--generation-config", "vllm", "--disable-uvicorn-access-log",
    ]  # fmt: skip
    with log.open("ab") as out, subprocess.Popen(
        list(map(str, command)), stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
        env=environment(VLLM_CPU_OMP_THREADS_BIND=cores(), VLLM_LOGGING_LEVEL="WARNING"),
    ) as process:  # fmt: skip
        try:
            until = time.monotonic() + 400
            while page(port, "/health") is None:
                assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
                time.sleep(0.2)
            yield
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    nothing, pipe = subprocess.DEVNULL, subprocess.PIPE
    with subprocess.Popen(command, stdin=nothing, stdout=pipe, stderr=pipe, text=True, env=environment()) as process:
        try:
            yield process
        finally:
            process.kill()


def page(port: int, path: str) -> str | None:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
            return str(answer.read().decode())
    except (urllib.error.URLError, OSError):
        return None


def made(port: int) -> int:
    """Tokens that both engines have made so far."""
    values = re.findall(r"^vllm:generation_tokens_total\{.*\} ([\d.e+]+)$", page(port, "/metrics") or "", re.MULTILINE)
    return int(sum(map(float, values)))


def wait_for(tokens: int, port: int, bench: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 200
    while made(port) < tokens:
        assert bench.poll() is None and time.monotonic() < until, f"{made(port)} of {tokens} tokens"
        time.sleep(0.02)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_two_engines_die_amid_a_benchmark_and_come_back(folder: Path, tmp_path: Path) -> None:
    """What was on its way is lost and said so; the rest is measured, and what was measured is what transformers writes."""
    port, out = free_port(), tmp_path / "run"
    config = tmp_path / "config.yaml"  # JSON is YAML
    settings = {
        "model": {"path": str(folder)}, "backend": "endpoint", "endpoint": {"url": f"http://127.0.0.1:{port}"},
        "workload": WORKLOAD, "sampling": {"max_new": NEW}, "repeats": 1, "warmup": 1,
    }  # fmt: skip
    config.write_text(json.dumps(settings))
    command = [*FORERUN, "bench", str(config), "--out", str(out), "--no-memory", "--quiet"]
    chunk = 2 * FLYING  # requests after which it writes down what came
    with ExitStack() as later:
        with server(folder, port, tmp_path / "log"):
            bench = later.enter_context(started(command))
            wait_for((1 + chunk) * NEW + FLYING * 40, port, bench)
        with server(folder, port, tmp_path / "log"):
            told, errors = bench.communicate(timeout=200)
    assert bench.returncode == 0, errors
    recorded, lost = rows(out / "base" / "records.jsonl"), rows(out / "base" / "lost.jsonl")
    prompts = load(WorkloadConfig(**WORKLOAD), None, VOCABULARY, 512)
    assert sorted(row["id"] for row in recorded + lost) == sorted(prompt.id for prompt in prompts), "once each, or lost once"
    assert 1 <= len(lost) <= chunk
    assert len(recorded) > chunk, "it went on"
    for row in lost:
        assert (row["repeat"], row["index"], row["turn"]) == (0, 0, 1)
        assert 0 <= row["tokens"] < NEW
        assert row["reason"].startswith("the connection ended before the ")
    texts = dict(zip([prompt.id for prompt in prompts], wanted(folder, [one.tokens for one in prompts], NEW), strict=True))
    assert {row["id"]: tuple(row["tokens"]) for row in recorded} == {row["id"]: texts[row["id"]] for row in recorded}
    figures = json.loads((out / "summary.json").read_text())["variants"]["base"]
    assert (figures["error"], figures["requests"], figures["tokens"]) == (None, len(recorded), len(recorded) * NEW)
    assert figures["lost"]["requests"] == len(lost)
    for text in (told, (out / "report.md").read_text(), (out / "report.html").read_text()):
        assert f"base lost {len(lost)} of {PROMPTS} requests: " in text


SCRIPT = """
import json, sys
from forerun.build import Models, build
from forerun.config import Variant, parse
from forerun.types import Request, Sampling, complete

if __name__ == "__main__":
    job = json.load(sys.stdin)
    backend = build(parse(Variant, job["variant"], "test"), Models())
    sampling = Sampling(max_new=job["new"], temperature=job["temperature"])
    asked = [Request(str(i), tuple(prompt), sampling) for i, prompt in enumerate(job["prompts"])]
    found = complete(backend, asked)
    print(json.dumps([[one.tokens, [(each.drafted, each.accepted) for each in one.rounds]] for one in found]))
"""


def elsewhere(script: Path, settings: dict[str, Any], prompts: list[tuple[int, ...]], new: int, temperature: float) -> Any:
    """Tokens and rounds of each prompt, from a process of its own."""
    script.write_text(SCRIPT)
    job = json.dumps({"variant": settings, "prompts": prompts, "new": new, "temperature": temperature})
    command = [sys.executable, str(script)]
    done = subprocess.run(command, input=job, capture_output=True, text=True, check=False, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_two_workers_that_share_a_model_write_what_transformers_writes(folder: Path, tmp_path: Path) -> None:
    """Tensor parallel 2, with the cores that forerun gives each; the engine and its workers in processes of their own."""
    prompts = [(1, 2, 3, 4), (90, 5, 17, 33), (8, 8, 8, 9)]
    settings = {
        "model": {"path": str(folder), "dtype": "float32"}, "drafter": {"kind": "none"}, "backend": "vllm",
        "engine": {"rows": 3, "capacity": 256},
        "vllm": {
            "tensor_parallel_size": 2, "multiprocess": True, "enforce_eager": True, "kv_cache_memory_bytes": 16 << 20,
        },
    }  # fmt: skip
    found = elsewhere(tmp_path / "job.py", settings, prompts, 60, 0.0)
    assert [tuple(tokens) for tokens, _ in found] == wanted(folder, prompts, 60)


def test_two_workers_that_share_a_model_draw_alike(folder: Path, tmp_path: Path) -> None:
    """Drafts, and acceptance by a rule of forerun's: as one process draws alone, whose batches are the same."""
    draft = LlamaForCausalLM.from_pretrained(folder).requires_grad_(False)
    for weight, noise in zip(draft.parameters(), itertools.count(), strict=False):
        if weight.ndim > 1:
            draw = torch.Generator().manual_seed(noise)
            weight.add_(torch.randn(weight.shape, generator=draw) * (0.6 / weight.shape[1] ** 0.5))
    draft.save_pretrained(tmp_path / "draft")
    settings = {
        "model": {"path": str(folder), "dtype": "float32"}, "backend": "vllm", "rule": {"kind": "block"},
        "drafter": {"kind": "model", "path": str(tmp_path / "draft"), "k": 3}, "sampling": {"temperature": 0.7},
        "engine": {"rows": 40, "capacity": 64},
    }  # fmt: skip
    alone, two = (
        elsewhere(
            tmp_path / "job.py",
            settings | {"vllm": {"tensor_parallel_size": size, "enforce_eager": True, "kv_cache_memory_bytes": 16 << 20}},
            [(1, 2, 3, 4)] * 40, 20, 0.7,
        )
        for size in (1, 2)
    )  # fmt: skip
    assert two == alone
    assert len({tuple(tokens) for tokens, _ in two}) > 30, "they sample"
    accepted = [one for _, rounds in two for _, one in rounds]
    assert 0 < sum(accepted) < 3 * len(accepted), "drafts that are always or never kept would show nothing"
