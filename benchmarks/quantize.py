"""How long GPTQ takes, all included: what the layers see, codes, errors, and the checkpoint on disk.

    python benchmarks/quantize.py --threads 2

A Llama of hidden 1024, intermediate 2816, 8 layers, 16 heads and vocabulary 4096 in bfloat16, with random weights, and 32 texts
of 512 random tokens: neither changes the work. Memory is the most that was resident above the level with the model loaded.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.utils import logging

from forerun.bench.hardware import environment
from forerun.bench.memory import resident
from forerun.compress import calibrate, checkpoint
from forerun.compress.apply import Task, quantize
from forerun.compress.recipes import Units
from forerun.config import GPTQConfig


def main() -> None:
    options = read_options()
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    model = build(options)
    tokens_ST = torch.randint(options.vocabulary, (options.texts, options.length), generator=torch.Generator().manual_seed(1))
    settings = {"bits": options.bits, "group_size": options.group_size, "act_order": options.act_order}
    found = {"environment": environment(), "options": vars(options) | {"json": None}, "settings": settings}
    before = resident() or 0
    found |= measure(model, tokens_ST, GPTQConfig(**settings))
    found["most_memory_above_model_bytes"] = (resident() or 0) - before
    print(json.dumps({name: value for name, value in found.items() if name != "environment"}, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


def measure(model: PreTrainedModel, tokens_ST: torch.Tensor, recipe: GPTQConfig) -> dict[str, float]:
    """Seconds of each part; `watching`: the same pass through the layers without any quantization."""
    began = time.perf_counter()
    calibrate.sequential(model, tokens_ST, lambda _number, _observed: {})
    watched, busy = time.perf_counter(), time.process_time()
    with torch.no_grad():
        rows = quantize(Task(0, model, tokens_ST, Units(), lambda *_: None), recipe)
    done = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint.save(model, None, Path(folder) / "model")
        written, busy = time.perf_counter(), time.process_time() - busy
        loaded = checkpoint.load(Path(folder) / "model")
        read = time.perf_counter()
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())
    errors = [row.error for row in rows if row.error is not None]
    return {
        "watching_s": watched - began,
        "quantizing_s": done - watched,  # watching included
        "saving_s": written - done,
        "loading_s": read - written,
        "all_s": written - watched,
        "all_cpu_s": busy,  # of all threads together: what others on the machine do not lengthen
        "mean_error": sum(errors) / len(errors),
    }


def build(options: argparse.Namespace) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": options.hidden, "intermediate_size": options.intermediate, "num_hidden_layers": options.layers}
    heads = {"num_attention_heads": options.heads, "num_key_value_heads": options.heads, "vocab_size": options.vocabulary}
    model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=None, eos_token_id=None))
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"hidden": 1024, "intermediate": 2816, "layers": 8, "heads": 16, "vocabulary": 4096, "texts": 32, "length": 512}
    for name, size in (sizes | {"bits": 4, "group-size": 128, "threads": 2}).items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--act-order", action="store_true")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    main()
