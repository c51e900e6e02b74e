"""One round of a batch under a rule of ours, on chains as vLLM hands them over. Torch only: both adapters end here.

Shape suffixes: B requests, K most drafts of a request, N = K + 1 (node 0 is the pending token), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from forerun.accept import Rule, choose, describe, walk, walk_greedy
from forerun.config import RuleConfig
from forerun.sampling import best, exponentials, one_hot, uniforms
from forerun.tree import PADDING, Tree


@dataclass(frozen=True)
class Rules:
    """A configured rule for drafts that were drawn and for chosen ones; they differ where the configuration says `auto`."""

    drawn: Rule
    chosen: Rule

    def __str__(self) -> str:
        names = dict.fromkeys((describe(self.drawn), describe(self.chosen)))
        return " or ".join(names)


def rules(config: RuleConfig) -> Rules:
    return Rules(choose(config, drawn=True), choose(config))


@dataclass(frozen=True)
class Dice:
    """Random numbers; `own` are the streams of requests with a seed, by their place in the batch, the others share one."""

    shared: torch.Generator
    own: Mapping[int, torch.Generator]

    def uniforms(self, rows: int, width: int) -> Tensor:
        numbers_BN = uniforms([self.shared], rows * width, self.shared.device).view(rows, width)
        for row, stream in self.own.items():
            numbers_BN[row] = uniforms([stream], width, stream.device)[0]
        return numbers_BN

    def exponentials(self, rows: int, width: int) -> Tensor:
        numbers_BV = exponentials([self.shared], rows * width, self.shared.device).view(rows, width)
        for row, stream in self.own.items():
            numbers_BV[row] = exponentials([stream], width, stream.device)[0]
        return numbers_BV


def judge(
    rules: Rules, tokens_BN: Tensor, lengths_B: Tensor, logits_BNV: Tensor, probs_BNV: Tensor | None,
    greedy_B: Tensor | None, all_greedy: bool, dice: Dice,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """How many drafts of each request are kept, and the token that follows them.

    tokens_BN: drafts from node 1 on, what is there of them (lengths_B; one below 0 ends them) is judged. logits_BNV: the
    target's after each node, warped by the request's sampling. probs_BNV: the laws that the drafts were drawn from (node 0's is
    not read); None where they were chosen. Rows of greedy_B (bool; None: no row) have one-hot laws.
    """
    rows, size = tokens_BN.shape
    rule = rules.chosen if probs_BNV is None else rules.drawn
    node_N = torch.arange(size, device=tokens_BN.device)
    valid_BN = ((tokens_BN >= 0) & (node_N <= lengths_B[:, None])) | (node_N == 0)
    parents_BN = torch.where(valid_BN.cumprod(1) > 0, (node_N - 1).clamp_min(0), PADDING)
    tree = Tree(tokens_BN.clamp_min(0), parents_BN, size - 1, probs_BNV, is_chain=True)
    if all_greedy and rule.lossless:
        verdict = walk_greedy(tree, best(logits_BNV))
        return verdict.accepted_B - 1, verdict.bonus_B
    law_BNV = one_hot(logits_BNV) if all_greedy else logits_BNV.softmax(-1)
    if all_greedy:  # a greedy request's draft was chosen, whatever its scores were
        tree = replace(tree, probs_BNV=None)
    elif greedy_B is not None:
        law_BNV = torch.where(greedy_B[:, None, None], one_hot(logits_BNV), law_BNV)
        if probs_BNV is not None:
            hot_BNV = torch.zeros_like(probs_BNV).scatter_(2, tree.tokens_BN[..., None], 1.0)
            tree = replace(tree, probs_BNV=torch.where(greedy_B[:, None, None], hot_BNV, probs_BNV))
    law, width = rule.law(tree, law_BNV), law_BNV.shape[2]
    exponentials_BV = law_BNV.new_ones(rows, width) if all_greedy else dice.exponentials(rows, width)
    verdict = walk(tree, law, dice.uniforms(rows, size), exponentials_BV)
    return verdict.accepted_B - 1, verdict.bonus_B


def emitted(tokens_BN: Tensor, kept_B: Tensor, next_B: Tensor) -> Tensor:
    """[B, N]: the drafts kept, the token after them, and -1."""
    node_N = torch.arange(tokens_BN.shape[1], device=tokens_BN.device)
    drafts_BN = tokens_BN.roll(-1, 1)  # node 1's token comes first
    after_BN = torch.where(node_N == kept_B[:, None], next_B[:, None], -1)
    return torch.where(node_N < kept_B[:, None], drafts_BN, after_BN)
