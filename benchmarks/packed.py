"""What packed layers save: decoding, prefill, scoring several tokens at once and bytes, on random weights of a Llama geometry.

    python benchmarks/packed.py --threads 2

Every variant holds weights made from the same bfloat16 model and runs through the same loop (`Target` and its cache), turn by
turn in one process; only the linear layers of the decoder differ. Codes are rounded to nearest, which takes as long to run as
any others. Ratios are of times that were measured in the same round. The output head stays dense and unpruned everywhere.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from forerun.bench.hardware import environment
from forerun.cache import KVCache
from forerun.compress.rounding import quantize
from forerun.model import Target
from forerun.packed import CodedLinear, L1PrunedInputLinear, pack, weight_bytes
from forerun.tree import chain

GEOMETRIES = {
    "llama-394m": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 8, "num_attention_heads": 16}
    | {"num_key_value_heads": 16, "vocab_size": 4096},
    "tiny": {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    | {"num_key_value_heads": 2, "vocab_size": 512},
}
SPECIAL = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None, "max_position_embeddings": 4096}
PROMPT = 128
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("o_proj",), ("down_proj",))
PLAIN = "bf16, F.linear"


def build(geometry: str, **sizes: int) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**GEOMETRIES[geometry] | sizes, **SPECIAL)).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for name, parameter in model.named_parameters():
        parameter.data.fill_(1) if "norm" in name else parameter.data.normal_(std=0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)  # its frequencies are computed, not drawn
    return model.eval().requires_grad_(False)


def each_family(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, nn.Linear]]]:
    """The linear layers of the decoder by those that read the same tensor, with the module that holds them."""
    for parent in list(model.model.modules()):
        for names in SIBLINGS:
            if hasattr(parent, names[0]):
                yield parent, {name: getattr(parent, name) for name in names}


def coded(model: nn.Module, bits: int, group_size: int, pruned: float = 0.0) -> nn.Module:
    """Codes in place of the decoder's weights; with `pruned`, of the inputs with the largest L1 norm over all siblings."""
    for parent, layers in each_family(model):
        keep_K = best_inputs([layer.weight for layer in layers.values()], pruned)
        for name, layer in layers.items():
            weight = layer.weight if keep_K is None else layer.weight[:, keep_K]
            inner = CodedLinear.of(quantize(weight, bits, group_size))
            setattr(parent, name, inner if keep_K is None else L1PrunedInputLinear(inner, keep_K, layer.in_features))
    return model


def best_inputs(weights: list[Tensor], pruned: float) -> Tensor | None:
    """The inputs that stay, a multiple of 128 of them."""
    if pruned == 0:
        return None
    norms_K = torch.stack([weight.float().abs().sum(0) for weight in weights]).sum(0)
    return norms_K.topk(round(len(norms_K) * (1 - pruned) / 128) * 128).indices.sort().values


def nf4(model: nn.Module) -> nn.Module:
    import bitsandbytes as bnb

    for parent, layers in each_family(model):
        for name, layer in layers.items():
            small = bnb.nn.Linear4bit(
                layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
            )
            small.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True)
            setattr(parent, name, small.to("cpu"))
    return model.eval()  # in training mode it dequantizes at each call


def packed(model: nn.Module) -> nn.Module:
    pack(model)
    return model


def variants(geometry: str) -> dict[str, Callable[[], nn.Module]]:
    """Builders, so that only those that are asked for take memory."""

    def base(**sizes: int) -> PreTrainedModel:
        return build(geometry, **sizes)

    wide = int(GEOMETRIES[geometry]["intermediate_size"] * 0.65) // 64 * 64
    return {
        PLAIN: base,
        "bf16": lambda: packed(base()),
        "int8": lambda: packed(coded(base(), 8, -1)),
        "int4 g128": lambda: packed(coded(base(), 4, 128)),
        "nf4": lambda: nf4(base()),
        "int8, 35 % of inputs pruned": lambda: packed(coded(base(), 8, -1, 0.35)),
        "int4 g128, 25 % of inputs pruned": lambda: packed(coded(base(), 4, 128, 0.25)),
        "bf16, F.linear, 35 % of MLP channels pruned": lambda: base(intermediate_size=wide),
        "bf16, 35 % of MLP channels pruned": lambda: packed(base(intermediate_size=wide)),
    }


class Subject:
    """One variant, ready to be timed."""

    def __init__(self, model: nn.Module, rows: Sequence[int]) -> None:
        self.target = Target(model, compile=False)
        self.cache: KVCache = self.target.new_cache(1, 512)
        self.prompt = torch.arange(PROMPT).tolist()
        self.trees = {nodes: chain(torch.tensor([1]), [list(range(2, nodes + 1))]) for nodes in (1, *rows)}
        self.target.prefill(self.prompt, self.cache, 0)
        self.bytes = weight_bytes(model)  # NF4 lays out its scales anew in the first pass

    def score(self, nodes: int) -> float:
        """Seconds of one pass over a chain of so many tokens after the prompt."""
        began = time.perf_counter()
        self.target.verify(self.trees[nodes], self.cache)
        return time.perf_counter() - began

    def prefill(self) -> float:
        self.cache.lengths[0] = 0
        began = time.perf_counter()
        self.target.prefill(self.prompt, self.cache, 0)
        return time.perf_counter() - began


def timed(subject: Subject, calls: int) -> dict[str, float]:
    """One turn of a variant: medians in milliseconds."""
    subject.score(1)
    found = {str(nodes): statistics.median(subject.score(nodes) for _ in range(calls)) * 1e3 for nodes in subject.trees}
    return found | {"decode": found["1"], "prefill": min(subject.prefill() for _ in range(2)) * 1e3}


def ratios(rounds: list[dict[str, dict[str, float]]], top: tuple[str, str], below: tuple[str, str]) -> list[float]:
    """A time over another, [variant, quantity] each, round by round."""
    return [each[top[0]][top[1]] / each[below[0]][below[1]] for each in rounds]


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def table(rounds: list[dict[str, dict[str, float]]], held: dict[str, int], rows: Sequence[int]) -> Iterator[str]:
    over_one = "".join(f" {nodes} tokens over one |" for nodes in rows)
    yield f"| weights | bytes of plain | decode, ms | speed-up | over bf16 packed | prefill, plain / this |{over_one}"
    yield "|---" * (6 + len(rows)) + "|"
    for name, size in held.items():
        cells = [name, f"{size / held[PLAIN]:.3f}", spread([each[name]["decode"] for each in rounds])]
        cells.append(spread(ratios(rounds, (PLAIN, "decode"), (name, "decode"))))
        cells.append(spread(ratios(rounds, ("bf16", "decode"), (name, "decode"))) if "bf16" in held else "")
        cells.append(spread(ratios(rounds, (PLAIN, "prefill"), (name, "prefill"))))
        cells += [spread(ratios(rounds, (name, str(nodes)), (name, "decode"))) for nodes in rows]
        yield f"| {' | '.join(cells)} |"


def pruned_lines(rounds: list[dict[str, dict[str, float]]], held: dict[str, int]) -> Iterator[str]:
    for name, size in held.items():
        whole = name.rpartition(", ")[0]
        if "pruned" in name and whole in held:
            time_ratio = spread(ratios(rounds, (name, "decode"), (whole, "decode")))
            yield f"{name} over {whole}: decode time {time_ratio}, bytes {size / held[whole]:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, default="llama-394m")
    parser.add_argument("--only", nargs="*", default=[], help="starts of variants' names; plain bf16 is always there")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=10, help="of each kind, in a variant's turn of a round")
    parser.add_argument("--rows", type=int, nargs="+", default=[5], help="tokens that are scored in one pass, beside one")
    parser.add_argument("--json", default="benchmarks/results/packed.json", help="where every measurement is written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    subjects: dict[str, Subject] = {}
    with torch.inference_mode():
        for name, make in variants(options.geometry).items():
            if name == PLAIN or not options.only or name.startswith(tuple(options.only)):
                try:
                    subjects[name] = Subject(make(), options.rows)
                except ImportError as error:
                    print(f"left out {name}: {error}")
                gc.collect()
        rounds = []
        for turn in range(options.rounds):
            order = list(subjects)[:: 1 if turn % 2 == 0 else -1]
            rounds.append({name: timed(subjects[name], options.calls) for name in order})
    held = {name: subject.bytes for name, subject in subjects.items()}
    print(f"{options.geometry}, batch 1, {PROMPT} tokens in the cache, {options.threads} threads, torch {torch.__version__}")
    print(
        f"{environment()['cpu']}, load when done {os.getloadavg()[0]:.1f}; median (lowest to highest) of {len(rounds)} rounds"
    )
    print(*table(rounds, held, options.rows), *pruned_lines(rounds, held), sep="\n")
    found = {"environment": environment(), "options": vars(options), "bytes": held, "rounds_ms": rounds}
    Path(options.json).write_text(json.dumps(found, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
