"""Speculation where memory bounds decoding: targets in bf16, int8 and int4 beyond the cache, drafts in bf16 and 4 bit.

    python benchmarks/quantized_speculation.py --threads 2

A Llama of 394M parameters and a draft of a tenth of it, both with random weights: the times are real and the agreement would
not be, so the acceptance is IMPOSED. `rule.kind=synthetic` accepts the i-th drafted token at the i-th of `--rates`, by default
what the embedded draft model measured on the embedded target. All targets have the same rates, so what a real drafter loses on
a compressed target is not in these figures (docs/compression.md tells it). Variants take turns prompt by prompt in one run;
intervals are of the bootstrap over prompts. Models are made in `--models`, in a temporary folder where none is given.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import LlamaConfig

from forerun.bench import folder, hardware, measure, methods, why
from forerun.bench.material import gather
from forerun.bench.metrics import acceptance, rounds_of
from forerun.bench.show import Figures, interval, number, times
from forerun.config import Experiment, load

RATES = (0.808, 0.826, 0.863, 0.897)  # of `draft` in a run of configs/quantized.yaml: 2 threads, 24 prompts, 1,536 tokens
SPECIAL = {"vocab_size": 4096, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
GEOMETRIES = {
    "target": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16},
    "draft": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 2, "num_attention_heads": 16},
}
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
FORMATS = {"int8": [{"kind": "rtn", "bits": 8, "group_size": -1}], "int4": [{"kind": "rtn", "bits": 4, "group_size": 128}]}
PLAIN = "bf16"
HEADER = [
    "target, draft, k",
    "ms a token",
    "over bf16 plain",
    "over its own plain",
    "tokens a round",
    "c",
    "growth",
    "predicted",
]


def experiment(options: argparse.Namespace, models: Path) -> Experiment:
    """Every target plain and with both drafts; int4 with three drafted tokens too, whose four rows its kernel unpacks once."""
    paths = {name: models / name / "config.json" for name in GEOMETRIES}
    for name, path in paths.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        sizes = TINY if options.tiny else GEOMETRIES[name]
        settings = LlamaConfig(**sizes, **SPECIAL, max_position_embeddings=1024, dtype="bfloat16").to_json_string()
        if not path.exists() or path.read_text() != settings:  # a new time of change would compress anew
            path.write_text(settings)
    rule = {"kind": "synthetic", "rates": options.rates}
    variants: dict[str, Any] = {}
    for target, recipes in {PLAIN: [], **FORMATS}.items():
        model = {"recipes": recipes}
        variants[target] = {"model": model}
        for draft, own in {PLAIN: [], "int4": FORMATS["int4"]}.items():
            for k in (3, 4) if target == "int4" else (4,):
                drafter = {"kind": "model", "path": str(paths["draft"]), "weights": "random", "k": k, "recipes": own}
                variants[f"{target}, {draft} draft, {k}"] = {"model": model, "drafter": drafter, "rule": rule}
    return load(None, [], {
        "model": {"path": str(paths["target"]), "weights": "random", "dtype": "bfloat16", "device": "cpu"},
        "workload": {"kind": "synthetic", "prompts": options.prompts, "prompt_tokens": 64}, "engine": {"capacity": 512},
        "sampling": {"max_new": options.tokens, "ignore_eos": True}, "repeats": 1, "variants": variants, "baseline": PLAIN,
    })  # fmt: skip


def imposed(figures: Figures, records: list[Any]) -> Figures:
    """With the counts of its rounds, which a summary leaves out where weights are random: here the rule decides them."""
    found = acceptance(rounds_of(records))
    return figures | found | {"counts": figures["counts"] | {name: found[name] for name in ("accepted", "rollbacks")}}


def table(figures: dict[str, Figures], plains: dict[str, str]) -> Iterator[str]:
    yield f"| {' | '.join(HEADER)} |"
    yield "|---" * len(HEADER) + "|"
    for name, one in figures.items():
        cells = [name, number(one["ms_per_token"]["p50"], 1), interval(one["speedup"])]
        found = why.model(one, figures[plains[name]]) if name in plains else None
        if found is not None:
            cells += [interval(one["over_own_plain"]), number(one["block_efficiency"], 2)]
            cells += [number(found.draft_cost, 2), number(found.growth, 2), times(found.speedup())]
        yield f"| {' | '.join(cells + [''] * (len(HEADER) - len(cells)))} |"


def main() -> None:
    options = read_options()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        models = Path(options.models or scratch).absolute()
        os.environ["FORERUN_CACHE"] = str(models / "compressed")
        made, out = experiment(options, models), Path(options.runs or f"{scratch}/run")
        summary = measure.run(made, methods.maker(), out, Console(stderr=True), measure_memory=False)
        if failed := {name: one["error"] for name, one in summary["variants"].items() if one["error"]}:
            sys.exit(str(failed))
        if summary["status"] != "complete":
            sys.exit(f"{out}: {summary['status']}; {options.json} is left as it was")
        records = folder.records(out, list(summary["variants"]))
    material = gather(summary, made.expand(), records, None, ())
    figures = {name: imposed(one, records[name]) for name, one in material.variants.items()}
    print(
        f"acceptance imposed: {', '.join(map(str, options.rates))}; {hardware.environment()['cpu']}, {options.threads} threads"
    )
    print(*table(figures, material.own_plains), sep="\n")
    for name, beside in material.own_plains.items():
        print(f"{name}: {why.paragraph(name, figures[name], (beside, figures[beside]), own=True)}")
    found = {"command": shlex.join(["python", *sys.argv]), "environment": hardware.environment(), "variants": figures}
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=40)
    parser.add_argument(
        "--rates", type=float, nargs="+", default=list(RATES), help="of the first drafted token, the second, ..."
    )
    parser.add_argument("--models", help="folder for the models, which a second run then finds")
    parser.add_argument("--runs", help="folder for the run folder")
    parser.add_argument("--json", default="benchmarks/results/quantized_speculation.json", help="where figures are written")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the script")
    return parser.parse_args()


if __name__ == "__main__":
    main()
