"""Faults that an audit must find, as rules from outside: `rule.kind=import rule.path=planted:Name` with tests/ on the path.

Two of them reach into the drafter when they are made, as a faulty drafter would be faulty by itself.
"""

from collections import deque
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from forerun.accept import Law, Standard
from forerun.accept.drafted import chain_law, child_of, draft_law, of_target, ratio
from forerun.accept.rule import at_node
from forerun.draft import Batch, DraftModel, Outcome, drawing
from forerun.tree import Tree

EXPONENTIALS, FIRST_PASS, OBSERVE = drawing.exponentials, DraftModel._first_pass, DraftModel.observe


@dataclass(frozen=True)
class FullDraftLaw:
    """Judges a chosen draft by the drafter's whole law, as if it had been drawn; a flattened target law stands in for that."""

    name = "full-draft-law"
    lossless = True
    trees = False
    meaningless = False

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        if tree.probs_BNV is not None:
            return Standard().law(tree, p_BNV)
        flat_BNV = p_BNV.sqrt() / p_BNV.sqrt().sum(-1, keepdim=True)
        accept_BN = ratio(of_target(tree, p_BNV), of_target(tree, flat_BNV))
        return chain_law(tree, p_BNV, accept_BN, lambda p_BV, _: (p_BV - p_BV.sqrt() / p_BV.sqrt().sum(-1, True)).clamp_min(0))


@dataclass(frozen=True)
class UnnormalizedResidual:
    """Forgets to divide the residual (p - q)+ by its sum. A race between tokens does not see that; enumeration does."""

    name = "unnormalized-residual"
    lossless = True
    trees = False
    meaningless = False

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        right = Standard().law(tree, p_BNV)

        def residual(end_B: Tensor) -> Tensor:
            child_B, has_child_B = child_of(tree, end_B)
            p_BV = at_node(p_BNV, end_B)
            left_BV = (p_BV - draft_law(tree, child_B, p_BV)).clamp_min(0)
            return torch.where(has_child_B[:, None] & (left_BV.sum(-1, True) > 0), left_BV, p_BV)

        return replace(right, residual=residual)


class SharedNoise:
    """Draws from the residual with the very random numbers that the refused token was drafted with."""

    name = "shared-noise"
    lossless = True
    trees = False
    meaningless = False

    def __init__(self) -> None:
        self.noise: deque[Tensor] = deque(maxlen=64)  # of every drafted position of this round

        def remembered(streams, width, device):  # type: ignore[no-untyped-def]
            self.noise.append(EXPONENTIALS(streams, width, device))
            return self.noise[-1]

        drawing.exponentials = remembered

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        right, noise = Standard().law(tree, p_BNV), list(self.noise)
        self.noise.clear()
        if tree.probs_BNV is None or len(noise) != tree.depth or noise[0].shape != p_BNV[:, 0].shape:
            return right
        noise_BNV = torch.stack([*noise, torch.ones_like(noise[0])], 1)  # at the node before the drafted one

        def residual(end_B: Tensor) -> Tensor:
            drawn_B = (right.residual(end_B) / at_node(noise_BNV, end_B)).argmax(-1)
            law_BV = torch.nn.functional.one_hot(drawn_B, p_BNV.shape[2]).to(p_BNV.dtype)
            return torch.where(child_of(tree, end_B)[1][:, None], law_BV, right.residual(end_B))

        return replace(right, residual=residual)


class OffByOne:
    """`standard`, beside a draft model whose cache keeps one token too many after a round of some outcome.

    after="acceptance": all drafts were accepted, and the last of them counts as cached though it was never fed.
    after="rejection": the refused token stays, and what follows stands one place too far. The draft model trims its cache to
    the committed tokens before its first pass, so the pass is shown a row that has the refused token.
    """

    name = "off-by-one"
    lossless = True
    trees = False
    meaningless = False

    def __init__(self, after: str = "acceptance") -> None:
        kept: set[int] = set()  # rows that hold a refused token

        def observe(drafter: DraftModel, batch: Batch, outcome: Outcome) -> None:
            OBSERVE(drafter, batch, outcome)
            for i, (drafted, accepted) in enumerate(zip(outcome.drafted, outcome.accepted, strict=True)):
                if batch.rows[i] is not None and drafted and (accepted == drafted) == (after == "acceptance"):
                    drafter.cache.lengths[i] += 1
                    kept.add(i)

        def first_pass(drafter: DraftModel, batch: Batch) -> Tensor:
            rows = [
                replace(row, tokens=[*row.tokens[:-1], 0, row.tokens[-1]]) if row and i in kept and len(row.tokens) > 1 else row
                for i, row in enumerate(batch.rows)
            ]
            kept.clear()
            return FIRST_PASS(drafter, batch if after == "acceptance" else replace(batch, rows=rows))

        DraftModel.observe = observe  # type: ignore[method-assign]
        DraftModel._first_pass = first_pass  # type: ignore[method-assign]

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        return Standard().law(tree, p_BNV)
