"""`standard`: speculative sampling of a chain (Leviathan et al. 2023, Chen et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from forerun.accept.drafted import chain_law, of_draft, of_target, ratio
from forerun.accept.rule import Law
from forerun.tree import Tree


@dataclass(frozen=True)
class Standard:
    """Accept x with min(1, p(x)/q(x)); after a refusal draw from norm((p - q)+), after the last draft from p. Lossless.

    With chosen drafts, whose law is one-hot, it is the law of `match`.
    """

    name = "standard"
    lossless = True
    trees = False
    meaningless = False

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        return chain_law(tree, p_BNV, ratio(of_target(tree, p_BNV), of_draft(tree, p_BNV)))
