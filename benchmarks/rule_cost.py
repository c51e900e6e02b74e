"""What an acceptance rule costs within a step: everything between the target's logits and the tokens on the host.

    python benchmarks/rule_cost.py --geometry smollm2-135m --threads 2 --rows 8 --k 5

Random weights of a known geometry, sharpened so that the laws are about as peaked as a trained model's. Every turn verifies
rows of k + 1 nodes and judges their logits with one rule, as `Engine` does. A step is taken to be the verification alone:
drafting would only lower the shares. The judged drafts were drawn from a law near the target's at the same logits; they are not
the tokens that were verified, which changes no cost. `greedy`: rows at temperature 0; `tree`: a binary tree, not a chain.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from decode import GEOMETRIES, build
from torch import Tensor

from forerun.accept import Rule, Verdict, choose, walk
from forerun.bench.hardware import environment
from forerun.cache import KVCache
from forerun.config import Variant, parse
from forerun.draft import Batch, NoDraft, Row
from forerun.engine import Engine
from forerun.model import Target
from forerun.packed import pack
from forerun.sampling import Randomness, build_warp, exponentials, law, penalize, uniforms
from forerun.tree import Tree, chain
from forerun.types import Sampling

SHARPNESS = 6.0  # of the final norm: logits with a standard deviation near 3
TEMPERATURE, UNLIKENESS = 0.7, 0.77  # of the draft: standard deviation of its log-ratio to the target; accepts about 0.7
WARM = Sampling(temperature=TEMPERATURE)
RULES = {name: {"kind": name} for name in ("match", "standard", "block", "multi-round")} | {
    "temperature-relaxed": {"kind": "temperature-relaxed", "temperature": 1.5},
    "top-p-residual": {"kind": "top-p-residual", "top_p": 0.5},
    "min-p-ratio": {"kind": "min-p-ratio", "min_p": 0.05},
    "typical": {"kind": "typical", "epsilon": 0.09, "delta": 0.3},
    "relaxed": {"kind": "relaxed", "top_k": 10, "delta": 0.6},
    "ensemble": {"kind": "ensemble", "weight": 0.7},
    "synthetic": {"kind": "synthetic", "rates": [0.7]},
}
WARPS = {
    "temperature": {},
    "+ top_k=50": {"top_k": 50},
    "+ top_p=0.9": {"top_p": 0.9},
    "+ min_p=0.05": {"min_p": 0.05},
    "+ repetition_penalty=1.1": {"repetition_penalty": 1.1},
}


class Clock:
    """Milliseconds between calls, by name."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self.last = time.perf_counter()

    def __call__(self, name: str) -> None:
        now = time.perf_counter()
        self.spent[name] = (now - self.last) * 1e3
        self.last = time.perf_counter()


class Bench:
    """One target with filled rows, the tree that it verifies, and the tree whose drafts are judged."""

    def __init__(self, geometry: str, rows: int, k: int) -> None:
        model = build(geometry, torch.bfloat16)
        model.model.norm.weight.mul_(SHARPNESS)
        pack(model)
        self.target = Target(model, compile=False)
        self.engine = Engine(self.target, NoDraft(), choose("match"), rows=rows, capacity=512)
        self.engine.drafter.size = k + 1
        self.rows, self.k, self.draw = rows, k, torch.Generator().manual_seed(1)
        for row, length in enumerate(torch.linspace(64, 256, rows).int().tolist()):
            self.target.prefill(self.tokens(length), self.cache, row)
        self.verified = chain(torch.tensor(self.tokens(rows)), [self.tokens(k) for _ in range(rows)])
        logits_BNV = self.target.verify(self.verified, self.cache).logits
        q_BNV, self.overlap = self.near(logits_BNV)
        self.chain = self.drafts(q_BNV, [max(0, node - 1) for node in range(k + 1)])
        self.tree = self.drafts(q_BNV, [max(0, node - 1) // 2 for node in range(k + 1)])

    @property
    def cache(self) -> KVCache:
        return self.engine.cache

    def tokens(self, count: int) -> list[int]:
        return torch.randint(0, self.target.vocabulary, (count,), generator=self.draw).tolist()

    def near(self, logits_BNV: Tensor) -> tuple[Tensor, float]:
        """Laws near the target's, and how likely `standard` is to accept a token drawn from one."""
        scaled_BNV = logits_BNV.float() / TEMPERATURE
        q_BNV = (scaled_BNV + UNLIKENESS * torch.randn(scaled_BNV.shape, generator=self.draw)).softmax(-1)
        return q_BNV, float(torch.minimum(scaled_BNV.softmax(-1), q_BNV).sum(-1).mean())

    def drafts(self, q_BNV: Tensor, parents: list[int]) -> Tree:
        """Trees of one shape, every node drawn from the law at its parent."""
        probs_BNV = q_BNV[:, parents].contiguous()
        tokens_BN = torch.multinomial(probs_BNV.flatten(0, 1), 1, generator=self.draw).view(self.rows, -1)
        depths = [0]
        for parent in parents[1:]:
            depths.append(depths[parent] + 1)
        is_chain = depths == list(range(len(parents)))
        return Tree(tokens_BN, torch.tensor([parents] * self.rows), max(depths), probs_BNV, is_chain)

    def batch(self, sampling: Sampling) -> Batch:
        device = self.target.device
        rows = [Row(sampling, self.tokens(64 + row), 32, Randomness(row, device)) for row in range(self.rows)]
        warp = build_warp([sampling] * self.rows, self.target.vocabulary, device)
        return Batch(rows, warp, self.engine._counts(rows) if warp.penalties_B3 is not None else None, device)

    def verify(self, clock: Clock) -> Tensor:
        logits_BNV = self.target.verify(self.verified, self.cache).logits
        clock("verify")
        return logits_BNV

    def greedy(self, rule: Rule) -> dict[str, float]:
        """Judged by the engine itself: every row at temperature 0."""
        batch, self.engine.rule, clock = self.batch(Sampling()), rule, Clock()
        logits_BNV = self.verify(clock)
        verdict = self.engine._judge(self.chain, logits_BNV, batch)
        clock("judge")
        tell(self.chain, logits_BNV, verdict)
        clock("copy")
        return clock.spent

    def sampled(self, rule: Rule, tree: Tree) -> dict[str, float]:
        """As `Engine._judge` does it, part by part."""
        batch, device, clock = self.batch(WARM), self.target.device, Clock()
        streams = [row.randomness.verify for row in batch.rows]
        logits_BNV = self.verify(clock)
        probs_BNV = law(penalize(logits_BNV, batch.warp, batch.counts, None), batch.warp)
        clock("warps")
        uniforms_BN = uniforms(streams, tree.size, device)
        exponentials_BV = exponentials(streams, self.target.vocabulary, device)
        clock("numbers")
        stated = rule.law(tree, probs_BNV)
        clock("law")
        verdict = walk(tree, stated, uniforms_BN, exponentials_BV)
        clock("walk")
        tell(tree, logits_BNV, verdict)
        clock("copy")
        self.engine.rule = rule
        whole = self.engine._judge(tree, logits_BNV, self.batch(WARM))
        assert whole.bonus_B.equal(verdict.bonus_B), "the parts do not draw what the engine draws"
        return clock.spent

    def warps(self, sampling: Sampling) -> dict[str, float]:
        batch, clock = self.batch(sampling), Clock()
        logits_BNV = self.verify(clock)
        law(penalize(logits_BNV, batch.warp, batch.counts, None), batch.warp)
        clock("warps")
        return clock.spent


def tell(tree: Tree, logits_BNV: Tensor, verdict: Verdict) -> list[list[int]]:
    """The one copy to the host, as a round of the engine makes it."""
    drafted_B = torch.where(tree.valid_BN, tree.depths_BN(), 0).amax(1)
    healthy_B = torch.isfinite(logits_BNV.amax((1, 2))).long()
    taken_BD = torch.cat([tree.tokens_BN.gather(1, verdict.path_BD)[:, 1:], verdict.bonus_B[:, None]], 1)
    return torch.cat([torch.stack([verdict.accepted_B, drafted_B, healthy_B], 1), verdict.path_BD, taken_BD], 1).tolist()


def turns(bench: Bench) -> dict[str, Callable[[], dict[str, float]]]:
    """Every measurement by name: one verification and what follows it."""
    rules = {name: choose(parse(Variant, {"rule": options}, name).rule) for name, options in RULES.items()}
    return (
        {"greedy, any lossless rule": lambda: bench.greedy(rules["match"])}
        | {"greedy, typical": lambda: bench.greedy(rules["typical"])}
        | {name: lambda rule=rule: bench.sampled(rule, bench.chain) for name, rule in rules.items()}
        | {f"{name}, tree": lambda name=name: bench.sampled(rules[name], bench.tree) for name in ("match", "multi-round")}
        | {name: lambda more=more: bench.warps(Sampling(temperature=TEMPERATURE, **more)) for name, more in WARPS.items()}
    )


def take_turns(repeats: int, sides: dict[str, Callable[[], dict[str, float]]]) -> dict[str, list[dict[str, float]]]:
    """Every side once a repeat, in alternating order, after one turn each that does not count."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name in list(sides)[:: 1 if repeat % 2 == 0 else -1]:
            spent = sides[name]()
            if repeat:
                found[name].append(spent)
    return found


def share(turn: dict[str, float]) -> float:
    """Of the verification, in per cent: all that is not verification, and for sampled rows not the forming of their laws."""
    apart = {"verify", "warps"} if len(turn) > 2 else {"verify"}
    return 100 * sum(spent for name, spent in turn.items() if name not in apart) / turn["verify"]


def show(found: dict[str, list[dict[str, float]]]) -> None:
    parts = ["verify", "warps", "numbers", "law", "walk", "judge", "copy"]
    print(f"{'':26}" + "".join(f"{part:>9}" for part in parts) + "   % of verify: median (lowest to highest)")
    for name, turns in found.items():
        cells = [f"{statistics.median(t[part] for t in turns):9.2f}" if part in turns[0] else " " * 9 for part in parts]
        shares = [share(turn) for turn in turns]
        print(f"{name:26}{''.join(cells)}   {statistics.median(shares):5.2f} ({min(shares):.2f} to {max(shares):.2f})")


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--geometry", choices=GEOMETRIES, default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--k", type=int, default=5, help="drafted tokens a row")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", help="also write every measurement to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    bench = Bench(options.geometry, options.rows, options.k)
    before = environment()
    found = take_turns(options.repeats, turns(bench))
    print(f"{options.geometry}, random bfloat16 weights, {options.rows} rows, k = {options.k}, temperature {TEMPERATURE}")
    print(f"{before['cpu']}, {options.threads} threads of {before['cpu_count']} cores, torch {torch.__version__}")
    print(f"load {before['load_average'][0]:.2f} at first, {os.getloadavg()[0]:.2f} at last", end="; ")
    print(f"drafts: sum min(p, q) = {bench.overlap:.2f} a token")
    print("milliseconds, median of", options.repeats, "interleaved repeats")
    show(found)
    if options.out:
        facts = {"options": vars(options), "machine": before, "load_after": os.getloadavg(), "overlap": bench.overlap}
        Path(options.out).write_text(json.dumps(facts | {"turns_ms": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
