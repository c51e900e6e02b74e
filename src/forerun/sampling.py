"""From logits to laws: penalties and warpers as in transformers, and draws by the exponential race.

Shape suffixes: B rows, N nodes, V vocabulary. Everything here is per row, so that requests of any mixture share a batch.
The order is transformers': bias, repetition, presence and frequency penalties, temperature, top-k, top-p, min-p.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from forerun.tree import Tree
from forerun.types import Sampling

TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Warp:
    """The samplings of a batch as tensors; `None` where no row uses a warper, so that it costs nothing."""

    greedy_B: Tensor  # bool
    all_greedy: bool
    any_greedy: bool
    temperature_B: Tensor  # 1 where greedy
    top_k_B: Tensor | None  # vocabulary size where off
    top_k_most: int  # of the rows where it is on
    top_p_B: Tensor | None
    min_p_B: Tensor | None
    bias_BV: Tensor | None
    penalties_B3: Tensor | None  # repetition, presence, frequency

    @property
    def plain(self) -> bool:
        """Greedy without anything that moves the argmax: the logits can be used as they are."""
        return self.all_greedy and self.bias_BV is None and self.penalties_B3 is None


def build_warp(samplings: Sequence[Sampling | None], vocabulary: int, device: torch.device) -> Warp:
    """The warp of a batch; a row without a request is greedy."""
    rows = [sampling or Sampling() for sampling in samplings]

    def exact(values: Sequence[object]) -> Tensor:  # rounded where it is used, to the scores' own precision
        return torch.tensor(values, dtype=torch.float64, device=device)

    def column(values: list[float], off: float) -> Tensor | None:
        return None if all(value == off for value in values) else exact(values)

    bias_BV = None
    if any(row.logit_bias for row in rows):
        bias_BV = torch.zeros(len(rows), vocabulary, device=device)
        for i, row in enumerate(rows):
            for token, value in row.logit_bias.items():
                bias_BV[i, token] = value
    penalties = [[row.repetition_penalty, row.presence_penalty, row.frequency_penalty] for row in rows]
    return Warp(
        greedy_B=torch.tensor([row.greedy for row in rows], device=device),
        all_greedy=all(row.greedy for row in rows),
        any_greedy=any(row.greedy for row in rows),
        temperature_B=exact([row.temperature or 1.0 for row in rows]),
        top_k_B=None
        if all(row.top_k == 0 for row in rows)
        else torch.tensor([min(row.top_k or vocabulary, vocabulary) for row in rows], device=device),
        top_k_most=max((min(row.top_k, vocabulary) for row in rows), default=0),
        top_p_B=column([row.top_p for row in rows], 1.0),
        min_p_B=column([row.min_p for row in rows], 0.0),
        bias_BV=bias_BV,
        penalties_B3=exact(penalties) if any(row.penalized for row in rows) else None,
    )


@dataclass(frozen=True)
class Counts:
    """How often each token stands in the output (pending token included), and whether it stands in the prompt."""

    output_BV: Tensor  # float32
    prompt_BV: Tensor  # bool


def path_counts(tree: Tree, vocabulary: int) -> Tensor:
    """[B, N, V]: how often each token stands on the path below node 0 down to each node, itself included."""
    on_path_BNN = tree.ancestors_BNN().float()
    on_path_BNN = on_path_BNN * (torch.arange(tree.size, device=on_path_BNN.device) > 0)
    counts_BNV = on_path_BNN.new_zeros(tree.rows, tree.size, vocabulary)
    return counts_BNV.scatter_add_(2, tree.tokens_BN[:, None].expand(-1, tree.size, -1), on_path_BNN)


def penalize(logits_BNV: Tensor, warp: Warp, counts: Counts | None, path_BNV: Tensor | None) -> Tensor:
    """Logits (float32) with bias and penalties; `path_BNV` are the drafted tokens above each node."""
    logits_BNV = logits_BNV.float() if logits_BNV.dtype in (torch.bfloat16, torch.float16) else logits_BNV
    if warp.bias_BV is not None:
        logits_BNV = logits_BNV + warp.bias_BV[:, None]
    if warp.penalties_B3 is None or counts is None:
        return logits_BNV
    output_BNV = counts.output_BV[:, None] if path_BNV is None else counts.output_BV[:, None] + path_BNV
    repetition, presence, frequency = (column[:, None, None] for column in warp.penalties_B3.to(logits_BNV.dtype).unbind(1))
    seen_BNV = (output_BNV > 0) | counts.prompt_BV[:, None]
    scaled_BNV = torch.where(logits_BNV < 0, logits_BNV * repetition, logits_BNV / repetition)
    logits_BNV = torch.where(seen_BNV, scaled_BNV, logits_BNV)
    return logits_BNV - presence * (output_BNV > 0) - frequency * output_BNV


def law(logits_BNV: Tensor, warp: Warp) -> Tensor:
    """The probabilities that each row's request draws from; a greedy row's law is one-hot. Float32 (float64 stays)."""
    if warp.all_greedy:
        return one_hot(logits_BNV)
    scaled_BNV = logits_BNV / warp.temperature_B.to(logits_BNV.dtype)[:, None, None]
    if warp.top_k_B is not None:
        scaled_BNV = top_k(scaled_BNV, warp.top_k_B, warp.top_k_most)
    if warp.top_p_B is not None:
        scaled_BNV = top_p(scaled_BNV, warp.top_p_B)
    if warp.min_p_B is not None:
        scaled_BNV = min_p(scaled_BNV, warp.min_p_B)
    probs_BNV = scaled_BNV.softmax(-1)
    return torch.where(warp.greedy_B[:, None, None], one_hot(logits_BNV), probs_BNV) if warp.any_greedy else probs_BNV


def best(scores: Tensor) -> Tensor:
    """The argmax of the last dimension, the first of several; `max` finds it several times faster than `argmax` on a CPU."""
    return scores.max(-1).indices


def one_hot(logits_BNV: Tensor) -> Tensor:
    return torch.zeros_like(logits_BNV).scatter_(-1, best(logits_BNV)[..., None], 1.0)


def top_k(logits_BNV: Tensor, k_B: Tensor, most: int) -> Tensor:
    """Keep the k largest (ties with the k-th stay, as in transformers); a row whose k exceeds `most` keeps all."""
    largest_BNK = logits_BNV.topk(most, -1).values
    at_BN1 = (k_B.clamp_max(most) - 1)[:, None, None].expand(-1, logits_BNV.shape[1], 1)
    floor_BN1 = largest_BNK.gather(-1, at_BN1).masked_fill((k_B > most)[:, None, None], -torch.inf)
    return logits_BNV.masked_fill(logits_BNV < floor_BN1, -torch.inf)


def top_p(logits_BNV: Tensor, p_B: Tensor) -> Tensor:
    """Keep the smallest set of most probable tokens whose mass reaches p; at least one."""
    ordered_BNV, order_BNV = logits_BNV.sort(-1, descending=False)
    cut_BNV = ordered_BNV.softmax(-1).cumsum(-1) <= (1 - p_B).to(logits_BNV.dtype)[:, None, None]
    cut_BNV[..., -1] = False
    cut_BNV &= (p_B < 1)[:, None, None]
    return logits_BNV.masked_fill(torch.zeros_like(cut_BNV).scatter_(-1, order_BNV, cut_BNV), -torch.inf)


def min_p(logits_BNV: Tensor, p_B: Tensor) -> Tensor:
    """Keep the tokens at least p times as probable as the most probable one (Nguyen et al. 2024)."""
    probs_BNV = logits_BNV.softmax(-1)
    floor_BN1 = probs_BNV.amax(-1, keepdim=True) * p_B.to(probs_BNV.dtype)[:, None, None]
    return logits_BNV.masked_fill(probs_BNV < floor_BN1, -torch.inf)


def race(probs_BV: Tensor, exponentials_BV: Tensor) -> Tensor:
    """Draw one token a row: the argmax of p / Exp(1). A row of zero mass must not be raced."""
    return best(probs_BV / exponentials_BV.to(probs_BV.dtype).clamp_min(TINY))


class Randomness:
    """A row's two random streams, one for drafting and one for verification, so that neither shifts the other."""

    def __init__(self, seed: int, device: torch.device) -> None:
        # Two distinct 63-bit seeds from one: odd multipliers keep neighbouring seeds apart.
        mixed = (seed * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019) % 2**63
        self.draft = torch.Generator(device).manual_seed(mixed)
        self.verify = torch.Generator(device).manual_seed((mixed ^ 0x2545F4914F6CDD1D) % 2**63)


def uniforms(streams: Sequence[torch.Generator | None], width: int, device: torch.device) -> Tensor:
    """[B, width] in [0, 1), each row from its own stream; a row without one gets 0.5."""
    u_BN = torch.full((len(streams), width), 0.5, device=device)
    for row, stream in zip(u_BN, streams, strict=True):
        if stream is not None:
            row.uniform_(0, 1, generator=stream)
    return u_BN


def exponentials(streams: Sequence[torch.Generator | None], width: int, device: torch.device) -> Tensor:
    """[B, width] of Exp(1), each row from its own stream; a row without one gets ones, so that a race is an argmax.

    On a CPU `exponential_` takes one logarithm after the other: the same numbers come several times faster from its uniforms,
    which have to be float64 (in float32 one draw in 2^24 is 0, and a token that wins by it would win too often).
    """
    on_cpu = device.type == "cpu"
    one, dtype = (-math.expm1(-1), torch.float64) if on_cpu else (1.0, torch.float32)  # on a CPU what becomes 1
    e_BV = torch.full((len(streams), width), one, device=device, dtype=dtype)
    for row, stream in zip(e_BV, streams, strict=True):
        if stream is not None:
            row.uniform_(0, 1, generator=stream) if on_cpu else row.exponential_(1, generator=stream)
    return e_BV.neg_().log1p_().neg_().float() if on_cpu else e_BV
