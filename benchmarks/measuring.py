"""What measuring itself costs, and whether repeated runs agree.

    python benchmarks/measuring.py cost --turns 20 --threads 2
    python benchmarks/measuring.py repeat --runs 5 --threads 2

`cost` decodes the same prompts with the embedded target, turn by turn in one process, once as `forerun bench` does (meter,
clock of every delta, records written) and once by a bare loop over `backend.step()`. Beside that ratio, which holds the
machine's noise, it replays recorded deltas from a backend that takes no time: all that then takes time is the measuring.
`repeat` runs one small `forerun bench` again and again, each in a process of its own, and counts the pairs of runs whose
speed-up intervals overlap. Both write into benchmarks/results/measuring.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import torch
from rich.console import Console

from forerun.bench import hardware, methods
from forerun.bench.lanes import Lane, prepare
from forerun.bench.serve import request, reseed
from forerun.bench.turns import measure_chunk
from forerun.config import Experiment, load
from forerun.types import Backend, Delta, Phases, Request

RESULTS = Path(__file__).parent / "results" / "measuring.json"
SETTINGS = {"sampling.ignore_eos": True, "engine.capacity": 512, "variants.plain.drafter.kind": "none", "repeats": 1}
DRAFTING = {"variants.ngram.drafter.kind": "ngram", "variants.model.drafter.kind": "model", "variants.model.drafter.k": 4}


def bare(backend: Backend, requests: Sequence[Request]) -> float:
    """Seconds of a loop that does nothing but decode, one request at a time."""
    began = time.perf_counter()
    for one in requests:
        backend.submit(one)
        while backend.busy:
            backend.step()
    return time.perf_counter() - began


def measured(lane: Lane, experiment: Experiment, file: TextIO) -> float:
    """Seconds of the same through everything that `forerun bench` does with a chunk of prompts."""
    began = time.perf_counter()
    measure_chunk(lane, lane.prompts, experiment, 0, file)
    return time.perf_counter() - began


class Replay:
    """A backend that gives recorded steps again and takes no time for it."""

    tokenizer = None
    scorer = None
    phases: Phases | None = Phases()

    def __init__(self, steps: Sequence[list[Delta]]) -> None:
        self.left = deque(steps)
        self.facts: dict[str, Any] = {}
        self.busy = False

    def submit(self, request: Request) -> None:
        self.busy = True

    def cancel(self, id: str) -> None:
        self.busy = False

    def step(self) -> list[Delta]:
        deltas = self.left.popleft()
        self.busy = not any(delta.finish for delta in deltas)
        return deltas


def recorded(backend: Backend, requests: Sequence[Request]) -> list[list[Delta]]:
    steps = []
    for one in requests:
        backend.submit(one)
        while backend.busy:
            steps.append(backend.step())
    return steps


def cost(options: argparse.Namespace) -> dict[str, Any]:
    experiment = load(None, [], SETTINGS | {"sampling.max_new": options.tokens, "workload.limit": options.prompts})
    [(name, variant)] = experiment.expand().items()
    ratios, bares, replays = [], [], []
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "records.jsonl").open("w") as file:
        lane = Lane(name, variant, Path(folder))
        prepare([lane], name, experiment, methods.maker(), Console(quiet=True))
        backend = lane.backend
        assert backend is not None
        requests = [reseed(request(prompt, variant, experiment, f"{prompt.id}#0"), 0) for prompt in lane.prompts]
        steps = recorded(backend, requests)
        for turn in range(options.turns):
            first = measured(lane, experiment, file) if turn % 2 else None
            bares.append(bare(backend, requests))
            ratios.append((first or measured(lane, experiment, file)) / bares[-1])
            lane.backend = Replay(steps)
            replays.append(measured(lane, experiment, file))
            lane.backend = backend
    ordered = sorted(ratios)
    share = statistics.median(replays) / statistics.median(bares)
    print(f"measured over bare: median {statistics.median(ratios):.4f}, {ordered[0]:.4f} to {ordered[-1]:.4f}")
    print(f"measuring alone: {100 * share:.3f} % of the bare decode")
    return {
        "turns": options.turns, "prompts": len(requests), "tokens": len(requests) * options.tokens,
        "bare_seconds": bares, "measured_over_bare": ratios, "median": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, n=4) if len(ratios) > 1 else None,
        "measuring_alone_seconds": replays, "measuring_alone_share": share,
        "microseconds_a_step": 1e6 * statistics.median(replays) / len(steps),
    }  # fmt: skip


def repeat(options: argparse.Namespace) -> dict[str, Any]:
    settings = SETTINGS | DRAFTING | {"sampling.max_new": options.tokens, "workload.limit": options.prompts}
    words = [f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in settings.items()]
    intervals: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "none.yaml"
        config.write_text("{}\n")
        for number in range(options.runs):
            command = [sys.executable, "-m", "forerun.cli", "bench", str(config), *words, "--no-memory", "--json", "-q"]
            done = subprocess.run(
                [*command, "--out", f"{folder}/{number}"], capture_output=True, text=True, check=True,
                env=os.environ | {"OMP_NUM_THREADS": str(options.threads)},
            )  # fmt: skip
            summary = json.loads(done.stdout)
            for name, figures in summary["variants"].items():
                if name != summary["baseline"]:
                    intervals.setdefault(name, []).append(figures["speedup"])
                    print(f"run {number + 1}: {name} {figures['speedup']}")
    found = {name: overlapping(runs) for name, runs in intervals.items()}
    for name, (overlaps, pairs) in found.items():
        print(f"{name}: {overlaps} of {pairs} pairs of intervals overlap")
    return {
        "runs": options.runs, "prompts": options.prompts, "tokens": options.tokens, "intervals": intervals,
        "overlapping": {name: {"pairs": pairs, "overlap": overlaps} for name, (overlaps, pairs) in found.items()},
    }  # fmt: skip


def overlapping(intervals: Sequence[dict[str, float]]) -> tuple[int, int]:
    """How many pairs of intervals share a point, of how many."""
    pairs = list(itertools.combinations(intervals, 2))
    return sum(a["low"] <= b["high"] and b["low"] <= a["high"] for a, b in pairs), len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["cost", "repeat"])
    parser.add_argument("--turns", type=int, default=20, help="cost: pairs of measured and bare")
    parser.add_argument("--runs", type=int, default=5, help="repeat: runs of forerun bench")
    parser.add_argument("--prompts", type=int, help="default: 4 for cost, 12 for repeat")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", default=str(RESULTS))
    options = parser.parse_args()
    options.prompts = options.prompts or {"cost": 4, "repeat": 12}[options.what]
    torch.set_num_threads(options.threads)
    found = {"command": shlex.join(["python", *sys.argv]), "machine": hardware.environment()}
    found |= {"cost": cost, "repeat": repeat}[options.what](options)
    out = Path(options.out)
    kept = json.loads(out.read_text(encoding="utf-8")) if out.exists() else {}
    out.write_text(json.dumps(kept | {options.what: found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
