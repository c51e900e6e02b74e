"""`synthetic`: accept at a configured rate, whatever was drafted. The text is meaningless; it serves to load-test a system."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from forerun.accept.drafted import from_root
from forerun.accept.rule import Law, at_node
from forerun.tree import Tree


@dataclass(frozen=True)
class Synthetic:
    """The i-th drafted token of a path is accepted, once reached, with rates[i] (the last rate holds for all deeper ones).

    Of a tree, the first child of a node has the rate and the others 0, so that a rate means the same for every drafter.
    """

    rates: tuple[float, ...]

    name = "synthetic"
    lossless = False
    trees = True
    meaningless = True

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        rates = torch.tensor((1.0, *self.rates), dtype=p_BNV.dtype, device=p_BNV.device)
        accept_BN = rates[tree.depths_BN().clamp(0, len(self.rates))]
        number_N = torch.arange(tree.size, device=p_BNV.device)
        elder_BNN = (
            (tree.parents_BN[:, :, None] == tree.parents_BN[:, None, :]) & (number_N[:, None] > number_N) & (number_N > 0)
        )
        return Law(from_root(accept_BN.masked_fill(elder_BNN.any(-1), 0.0), tree), lambda end_B: at_node(p_BNV, end_B))
