"""What a rule does to the output, by exact enumeration over one standard grid: the source of every label that a report prints.

Shape suffixes: B trees, N nodes, V vocabulary, P pairs of laws.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from forerun.accept.exact import (
    Process,
    accepted,
    distance,
    drawn_chains,
    drawn_trees,
    ends,
    first_tokens,
    random_process,
    score,
)
from forerun.accept.rule import Rule, describe
from forerun.accept.standard import Standard
from forerun.tree import Tree

EXACT = 1e-12  # a lossless rule's worst total variation in float64
CHAINS = ((2, 4), (3, 3), (4, 2), (5, 1), (5, 4))  # vocabulary, drafts
SHAPES = ((3, (0, 0, 0, 0)), (2, (0, 0, 0, 1, 1)), (4, (0, 0, 0, 1, 2, 1)))  # vocabulary, parent of each node
PAIRS, PAIR_VOCABULARY = 2000, 20
SHARPNESS, LIKENESS = 1.75, 0.85  # of a pair: standard deviation of the logits, correlation of the draft's with the target's


@dataclass(frozen=True)
class Case:
    """Everything that a drafter may propose in one situation (trees with probabilities), and the target that judges it."""

    label: str
    tree: Tree
    weights_B: Tensor
    target: Process
    draft: Process


@dataclass(frozen=True)
class Evidence:
    """The grid's verdict on one rule. Total variations are of what comes out against the target's own law.

    worst_tv, mean_tv: of one token, over PAIRS random pairs of laws. joint_tv: worst of whole rounds with what follows them.
    accepted: mean drafts a round on drawn chains of 4; against_standard: its ratio to `standard` on the same pairs of laws, and
    the least ratio of any pair. identical: least acceptance of a draft whose law is the target's.
    """

    rule: str
    claims_lossless: bool
    meaningless: bool
    worst_tv: float
    mean_tv: float
    joint_tv: float
    worst_case: str
    accepted: float
    against_standard: float
    least_against_standard: float
    identical: float

    @property
    def lossless(self) -> bool:
        return max(self.worst_tv, self.joint_tv) < EXACT

    def label(self, law: str) -> str:
        """In a few words for a report; `law` says which law the request's sampling makes of the target's."""
        if self.meaningless:
            return "meaningless text (load test)"
        if self.lossless:
            return f"lossless for {law}"
        if self.worst_tv < EXACT:  # right on every pair of the grid, wrong further off
            return f"LOSSY: TV up to {self.joint_tv:.2g} a round"
        return f"LOSSY: TV up to {self.worst_tv:.2g} a token, {self.mean_tv:.2g} on average"


def examine(rule: Rule) -> Evidence:
    """Enumerate a rule over the grid; seconds."""
    one_token_P, pair = one_token(rule)
    joint_tv, worst_case = 0.0, pair
    for case in cases(rule.trees):
        law = rule.law(case.tree, score(case.tree, case.target))
        out, right = first_tokens(case.tree, law, case.target, case.weights_B), case.target.joint()
        if (off := distance(out, right)) > joint_tv:
            joint_tv, worst_case = off, show(case, out, right)
    ours, standard = drafts_accepted(rule), drafts_accepted(Standard())
    return Evidence(
        rule=describe(rule),
        claims_lossless=rule.lossless,
        meaningless=rule.meaningless,
        worst_tv=float(one_token_P.max()),
        mean_tv=float(one_token_P.mean()),
        joint_tv=joint_tv,
        worst_case=worst_case,
        accepted=float(ours.mean()),
        against_standard=float(ours.sum() / standard.sum()),
        least_against_standard=float((ours / standard).min()),
        identical=identical(rule),
    )


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one_token(rule: Rule) -> tuple[Tensor, str]:
    """[P]: total variation of the first token that comes out, one drawn draft, for random pairs of laws; and the worst pair."""
    draw, v = seeded(0), PAIR_VOCABULARY
    own_PV, other_PV = (torch.randn(PAIRS, v, generator=draw, dtype=torch.float64) for _ in range(2))
    mixed_PV = LIKENESS * own_PV + (1 - LIKENESS**2) ** 0.5 * other_PV
    p_PV, q_PV = (SHARPNESS * own_PV).softmax(-1), (SHARPNESS * mixed_PV).softmax(-1)
    tokens_BN = torch.stack([torch.zeros(PAIRS * v, dtype=torch.long), torch.arange(v).repeat(PAIRS)], 1)
    p_BV, q_BV = p_PV.repeat_interleave(v, 0), q_PV.repeat_interleave(v, 0)
    probs_BNV = torch.stack([torch.zeros_like(q_BV), q_BV], 1)
    tree = Tree(tokens_BN, torch.zeros_like(tokens_BN), 1, probs_BNV, is_chain=True)
    law = rule.law(tree, torch.stack([p_BV, p_BV], 1))
    end_BN = ends(tree, law) * q_PV.flatten()[:, None]
    out_BV = end_BN[:, :1] * law.residual(torch.zeros(PAIRS * v, dtype=torch.long))
    out_BV.scatter_add_(1, tokens_BN[:, 1:], end_BN[:, 1:])
    out_PV = out_BV.view(PAIRS, v, v).sum(1)
    error_P = (out_PV - p_PV).abs().sum(-1) / 2
    error_P = torch.where(error_P.isnan(), torch.inf, error_P)
    worst = int(error_P.argmax())
    return error_P, f"one drawn draft, {v} tokens: p = {numbers(p_PV[worst])}, q = {numbers(q_PV[worst])}"


def cases(trees: bool) -> Iterator[Case]:
    """Drawn and chosen chains, stopped early and not, with sharp, flat and one-hot laws; trees where the rule admits them."""
    for vocabulary, depth in CHAINS:
        for seed, (sharp_target, sharp_draft) in enumerate([(1.5, 1.5), (4.0, 1.0), (1.0, 4.0), (float("inf"), 1.5)]):
            target = random_process(vocabulary, depth + 1, seeded(seed), sharp_target)
            draft = random_process(vocabulary, depth, seeded(100 + seed), sharp_draft)
            for confidence in (0.0, 0.35):
                tree, weights_B = drawn_chains(draft, depth, confidence)
                stop = f", stopped below {confidence}" if confidence else ""
                yield Case(f"{depth} drawn drafts{stop}, {vocabulary} tokens, seed {seed}", tree, weights_B, target, draft)
            best = Process(tuple(torch.nn.functional.one_hot(law.argmax(-1), vocabulary).double() for law in draft.laws))
            tree, weights_B = drawn_chains(best, depth)
            chosen = Tree(tree.tokens_BN, tree.parents_BN, depth, None, is_chain=True)
            yield Case(f"{depth} chosen drafts, {vocabulary} tokens, seed {seed}", chosen, weights_B, target, draft)
    for vocabulary, parents in SHAPES if trees else ():
        for seed, replacement in [(0, True), (0, False), (1, True), (1, False)]:
            draft = random_process(vocabulary, 2, seeded(100 + seed))
            tree, weights_B = drawn_trees(draft, parents, replacement)
            target = random_process(vocabulary, tree.depth + 1, seeded(seed))
            how = "with" if replacement else "without"
            label = f"tree {list(parents)} drawn {how} replacement, {vocabulary} tokens, seed {seed}"
            yield Case(label, tree, weights_B, target, draft)


def drafts_accepted(rule: Rule, drafts: int = 4) -> Tensor:
    """[24]: expected accepted drafts of drawn chains, over pairs of laws from unlike to alike."""
    expected = []
    for seed in range(24):
        target = random_process(5, drafts + 1, seeded(seed))
        other = random_process(5, drafts, seeded(1000 + seed))
        likeness = seed / 24
        mixed = [
            (likeness * p.log() + (1 - likeness) * q.log()).softmax(-1) for p, q in zip(target.laws, other.laws, strict=False)
        ]
        tree, weights_B = drawn_chains(Process(tuple(mixed)), drafts)
        counts_D = accepted(tree, rule.law(tree, score(tree, target)), weights_B)
        expected.append(float((counts_D * torch.arange(drafts + 1)).sum()))
    return torch.tensor(expected, dtype=torch.float64)


def identical(rule: Rule) -> float:
    """The least chance, over chains that can be drawn, of accepting all of a draft whose law is the target's."""
    same = random_process(4, 4, seeded(0))
    tree, weights_B = drawn_chains(Process(same.laws[:3]), 3)
    return float(ends(tree, rule.law(tree, score(tree, same)))[weights_B > 0, -1].min())


def show(case: Case, out: Tensor, right: Tensor) -> str:
    """A case with its first laws and the sequence whose probability is furthest off."""
    at = int((out - right).abs().argmax())
    sequence = [int(i) for i in torch.unravel_index(torch.tensor(at), out.shape)]
    return (
        f"{case.label}: p = {numbers(case.target.laws[0])}, q = {numbers(case.draft.laws[0])} for the first token; "
        f"{sequence} comes out with {out.flatten()[at]:.4g} instead of {right.flatten()[at]:.4g}"
    )


def numbers(law_V: Tensor) -> str:
    return "(" + " ".join(f"{value:.3f}" for value in law_V.tolist()) + ")"
