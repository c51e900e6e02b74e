"""Plain decoding against transformers' `generate`, and what scoring five tokens costs, on random weights of a known geometry.

    python benchmarks/decode.py --geometry smollm2-135m --threads 2

Both sides decode greedily from the same weights and prompt, turn by turn in one process. A time is that of the tokens after
the first two, so that neither prefill nor set-up counts.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from forerun.accept import choose
from forerun.cache import KVCache
from forerun.draft import NoDraft
from forerun.engine import Engine
from forerun.model import Target
from forerun.packed import pack
from forerun.tree import chain
from forerun.types import Request, Sampling

GEOMETRIES = {
    "smollm2-135m": {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
    | {"intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "rope_theta": 1e5},
    "tiny": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"intermediate_size": 128, "vocab_size": 512},
}


class Clock(BaseStreamer):
    """Notes when each token leaves `generate`."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def build(geometry: str, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "max_position_embeddings": 8192}
    model = LlamaForCausalLM(LlamaConfig(**GEOMETRIES[geometry], **special))
    return model.to(dtype).eval().requires_grad_(False)


def per_token(times: list[float]) -> float:
    """Milliseconds a token, the first two time stamps (prompt, set-up) left out."""
    return (times[-1] - times[1]) / (len(times) - 2) * 1e3


def reference_turn(model: PreTrainedModel, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
    clock, ids = Clock(), torch.tensor([prompt])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0, streamer=clock
    )
    return per_token(clock.times), out[0, len(prompt) :].tolist()


def engine_turn(engine: Engine, prompt: list[int], tokens: int) -> tuple[float, list[int]]:
    engine.submit(Request("a", tuple(prompt), Sampling(max_new=tokens)))
    out, times = [], []
    while engine.busy:
        for delta in engine.step():
            out += delta.tokens
        times.append(time.perf_counter())
    return per_token(times), out


def scoring_turn(target: Target, cache: KVCache, nodes: int, calls: int) -> float:
    """Milliseconds of one verification of a chain of so many nodes, the median of `calls`."""
    spent = []
    with torch.inference_mode():
        tree = chain(torch.tensor([1]), [list(range(2, nodes + 1))])
        for _ in range(calls + 1):
            began = time.perf_counter()
            target.verify(tree, cache)
            spent.append(time.perf_counter() - began)
    return statistics.median(spent[1:]) * 1e3


def interleave(repeats: int, sides: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Every side once a repeat, in alternating order."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats):
        for name in list(sides)[:: 1 if repeat % 2 == 0 else -1]:
            found[name].append(sides[name]())
    return found


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def ratio(numerator: list[float], denominator: list[float]) -> list[float]:
    return [a / b for a, b in zip(numerator, denominator, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, default="smollm2-135m")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=34)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile our forward pass (slow to start)")
    parser.add_argument("--json", help="also write every measurement to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    reference = build(options.geometry, dtype)
    own = copy.deepcopy(reference)
    vocabulary = reference.config.vocab_size
    prompt = torch.randint(0, vocabulary, (options.prompt_tokens,), generator=torch.Generator().manual_seed(1)).tolist()
    pack(own)
    target = Target(own, compile=True if options.compile else "auto")
    drafter = NoDraft()
    engine = Engine(target, drafter, choose("auto", drafter.drawn), rows=1, capacity=1024)
    same = reference_turn(reference, prompt, 8)[1] == engine_turn(engine, prompt, 8)[1]

    decoding = interleave(
        options.repeats,
        {
            "generate": lambda: reference_turn(reference, prompt, options.tokens)[0],
            "forerun": lambda: engine_turn(engine, prompt, options.tokens)[0],
        },
    )
    cache = engine.cache  # idle by now; another one would be compiled for again
    with torch.inference_mode():
        target.prefill(prompt, cache, 0)
    for nodes in (1, 5):
        scoring_turn(target, cache, nodes, 2)
    scoring = interleave(
        options.repeats, {str(nodes): lambda nodes=nodes: scoring_turn(target, cache, nodes, 12) for nodes in (1, 5)}
    )
    speedup, cost = ratio(decoding["generate"], decoding["forerun"]), ratio(scoring["5"], scoring["1"])
    print(f"{options.geometry}, random {options.dtype} weights, batch 1, {options.threads} threads, torch {torch.__version__}")
    print(f"machine: {platform.machine()}, {os.cpu_count()} cores; load when done {os.getloadavg()[0]:.1f}")
    print("median (lowest to highest) of", options.repeats, "interleaved repeats")
    print(f"transformers generate  {spread(decoding['generate'])} ms a token")
    print(f"forerun                {spread(decoding['forerun'])} ms a token")
    print(f"speedup                {spread(speedup)}")
    print(f"scoring 1 token        {spread(scoring['1'])} ms")
    print(f"scoring 5 tokens       {spread(scoring['5'])} ms")
    print(f"5 tokens / 1 token     {spread(cost)}")
    print(f"first 8 greedy tokens the same: {same} (near-ties may fall either way in bfloat16)")
    if options.json:
        found = {"options": vars(options), "decoding_ms": decoding, "scoring_ms": scoring}
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
