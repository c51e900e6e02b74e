"""Static trees in Medusa's notation: each node by the path of child ranks that leads to it (Cai et al. 2024).

((0,), (1,), (0, 0)) is node 0 with two children, the first of which has one: rank r is the r-th most probable guess at that
place, from 0. Nodes are counted with node 0, the pending token, everywhere. Shape suffix: N nodes.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from forerun.types import UserError

Path = tuple[int, ...]


@dataclass(frozen=True)
class Choices:
    """A static tree, best nodes first: its first n nodes are the tree of n nodes. Tuples go over all nodes, node 0 first."""

    paths: tuple[Path, ...]
    parents: tuple[int, ...]
    depths: tuple[int, ...]
    ranks: tuple[int, ...]  # of a node among the guesses at its place; 0 of node 0

    @property
    def size(self) -> int:
        return len(self.paths)

    def deepest(self, nodes: int) -> int:
        """The depth of the first so many nodes."""
        return max(self.depths[:nodes])

    def is_chain(self, nodes: int) -> bool:
        return all(parent == node - 1 for node, parent in enumerate(self.parents[:nodes]) if node)

    def cut(self, depth: int, nodes: int) -> Choices:
        """The first so many nodes, without those that are deeper."""
        return read_choices([path for path in self.paths[1:nodes] if len(path) <= depth])

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """parents_N, depths_N, ranks_N."""
        parents, depths, ranks = (torch.tensor(values, device=device) for values in (self.parents, self.depths, self.ranks))
        return parents, depths, ranks


def read_choices(paths: Iterable[Sequence[int]]) -> Choices:
    """Check a tree and number its nodes: in the order given, but parents before their children.

    UserError names the first path that is empty, negative, given twice or without its parent.
    """
    given: dict[Path, None] = {}
    for path in map(tuple, paths):
        if not path or min(path) < 0:
            raise UserError(f"drafter.choices: {list(path)} is no path; give ranks from 0, such as [0, 1]")
        if path in given:
            raise UserError(f"drafter.choices: path {list(path)} is given twice; leave one out")
        given[path] = None
    numbers: dict[Path, int] = {(): 0}
    for path in given:
        for end in range(1, len(path) + 1):
            if path[:end] not in given:
                raise UserError(f"drafter.choices: path {list(path)} lacks its parent {list(path[:end])}; add that one")
            numbers.setdefault(path[:end], len(numbers))
    return Choices(
        paths=tuple(numbers),
        parents=tuple(numbers[path[:-1]] for path in numbers),
        depths=tuple(map(len, numbers)),
        ranks=tuple(path[-1] if path else 0 for path in numbers),
    )


def default_choices(accuracies: Sequence[Sequence[float]], nodes: int) -> Choices:
    """The tree of up to `nodes` nodes (node 0 included) that accepts most: greedy expansion of the most probable paths.

    accuracies[k][i]: measured probability that guess i of head k is right; a path's is taken to be the product along it. No
    child beats its parent, so adding the best path whose parent is present is optimal for every size. Ties go to the shorter
    path, then to the smaller ranks; paths of probability 0 are never added.
    """
    frontier: list[tuple[float, int, Path]] = [(-1.0, 0, ())]
    paths: list[Path] = []
    while frontier and len(paths) < nodes:
        value, depth, path = heapq.heappop(frontier)
        paths.append(path)
        if depth < len(accuracies):
            for rank, accuracy in enumerate(accuracies[depth]):
                if accuracy > 0:
                    heapq.heappush(frontier, (value * accuracy, depth + 1, (*path, rank)))
    return read_choices(paths[1:])


def chain_choices(depth: int) -> Choices:
    """The best guess at every depth."""
    return read_choices([(0,) * length for length in range(1, depth + 1)])
