"""EAGLE's drafter in a world of its own, and what it should draft: explicit passes without a cache, trees as lists."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from forerun.accept import Verdict
from forerun.cache import KVCache
from forerun.draft import Batch, LengthPolicy, Outcome, Row
from forerun.draft.choices import Choices
from forerun.draft.eagle import EagleDraft
from forerun.draft.expand import Dynamic
from forerun.draft.shapes import ShapePolicy
from forerun.heads import Eagle, EagleShape
from forerun.sampling import Counts, Randomness, build_warp, penalize
from forerun.tree import Tree
from forerun.types import Sampling

V, H, CAPACITY, ROWS = 29, 16, 64, 3
CPU = torch.device("cpu")
GREEDY = Sampling(max_new=40)
Node = tuple[tuple[int, ...], int]
"""A node of a tree: its tokens from below node 0, and its parent (-1: padding)."""


def network(version: int, draft: int = 0, seed: int = 0) -> tuple[Eagle, nn.Embedding, nn.Linear]:
    """A random head with sharp guesses, and a target's embeddings and output layer, float64."""
    torch.manual_seed(seed)
    shape = EagleShape(
        H, V, 24, 4, 2, 4, version=version, features=(-1,) if version == 1 else (1, 2, 3), draft_vocab_size=draft
    )
    head, embedding, output = Eagle(shape), nn.Embedding(V, H), nn.Linear(H, V, bias=False)
    for part in (head, embedding, output):
        part.double().requires_grad_(False)
        for parameter in part.parameters():
            parameter.data.mul_(2.0 if parameter.ndim > 1 else 1.0)
    if draft:
        head.token_ids.copy_(torch.randperm(V)[:draft])
    return head, embedding, output


@dataclass
class World:
    """A drafter whose rounds go as the test says: features are a fixed function of text and position, no target is needed."""

    drafter: EagleDraft
    rows: list[Row | None] = field(default_factory=lambda: [None] * ROWS)
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(3))

    def features(self, tokens: list[int]) -> Tensor:
        """[T, F]"""
        table = torch.randn(V, len(self.drafter.features) * H, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        return table[tokens] + torch.arange(len(tokens))[:, None].sin()

    def random(self, below: int) -> int:
        return int(torch.randint(0, below, (1,), generator=self.generator))

    def join(self, i: int, length: int = 7, sampling: Sampling = GREEDY) -> None:
        prompt = [self.random(V) for _ in range(length)]
        self.rows[i] = Row(sampling, [*prompt, self.random(V)], length, Randomness(i, CPU))
        self.drafter.admit(i, prompt, self.features(prompt))

    def leave(self, i: int) -> None:
        self.rows[i] = None
        self.drafter.release(i)

    def batch(self) -> Batch:
        samplings = [row.sampling if row else None for row in self.rows]
        output_BV, prompt_BV = torch.zeros(len(self.rows), V), torch.zeros(len(self.rows), V, dtype=torch.bool)
        for i, row in enumerate(self.rows):
            if row:
                output_BV[i] = torch.bincount(torch.tensor(row.tokens[row.prompt_length :]), minlength=V).float()
                prompt_BV[i, row.tokens[: row.prompt_length]] = True
        return Batch(self.rows, build_warp(samplings, V, CPU), Counts(output_BV, prompt_BV), CPU)

    def finish(self, tree: Tree, eager: float = 0.8) -> None:
        """Accept some path of each row; what the target says elsewhere is not a number."""
        batch, paths = self.batch(), []
        hidden_BNF = torch.full((tree.rows, tree.size, len(self.drafter.features) * H), torch.nan, dtype=torch.float64)
        for i, row in enumerate(self.rows):
            path = [0]
            while row and float(torch.rand(1, generator=self.generator)) < eager:
                children = [n for n in range(1, tree.size) if int(tree.parents_BN[i, n]) == path[-1]]
                if not children:
                    break
                path.append(children[self.random(len(children))])
            paths.append(path)
            if row is not None:
                taken = [int(tree.tokens_BN[i, node]) for node in path[1:]]
                hidden_BNF[i, path] = self.features([*row.tokens, *taken])[-len(path) :]
                row.tokens += [*taken, self.random(V)]
        accepted = [len(path) - 1 for path in paths]
        nothing = Verdict(torch.zeros(0), torch.zeros(0), torch.zeros(0))  # paths say it all
        self.drafter.observe(batch, Outcome(accepted, accepted, tree.size, 0, 0, 0, nothing, hidden_BNF, paths))

    def guess(self, row: Row, path: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
        """Logits [D] and state [H] after some drafted tokens: one pass over all entries, without a cache."""
        head, tokens = self.drafter.head, [*row.tokens, *path]
        states = [head.enter(self.features(row.tokens[:-1]))]
        states += [self.guess(row, path[:i])[1][None] for i in range(len(path))]
        positions = torch.arange(len(tokens) - 1)[None]
        embeds = self.drafter.embedding(torch.tensor([tokens[1:]]))
        state = head(embeds, torch.cat(states)[None], positions, None)[0, -1]
        return head.logits(state, self.drafter.output), state

    def scores(self, row: Row, path: tuple[int, ...] = ()) -> Tensor:
        """[V]: the guess over the whole vocabulary, with the request's bias and penalties."""
        logits, _ = self.guess(row, path)
        whole = torch.full((V,), -torch.inf, dtype=torch.float64)
        whole[torch.arange(V) if self.drafter.token_ids is None else self.drafter.token_ids] = logits
        warp, told = build_warp([row.sampling], V, CPU), torch.zeros(1, V, dtype=torch.bool)
        told[0, row.tokens[: row.prompt_length]] = True
        output = torch.tensor([*row.tokens[row.prompt_length :], *path])
        return penalize(whole[None, None], warp, Counts(torch.bincount(output, minlength=V)[None].float(), told), None)[0, 0]


def world(
    version: int, policy: LengthPolicy | ShapePolicy, tree: Choices | Dynamic | None = None, drawn: bool = False, draft: int = 0
) -> World:
    return World(EagleDraft(*network(version, draft), policy, ROWS, CAPACITY, tree, drawn, chunk=4))


# What the trees should be, by lists and one fresh pass for each node.


def chosen(w: World, row: Row, choices: Choices, depth: int) -> list[Node]:
    """Of every node its tokens from below node 0, and its parent; -1 where it is too deep."""
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, choices.size):
        above = paths[choices.parents[node]]
        best = w.scores(row, above).sort(descending=True, stable=True).indices
        paths.append((*above, int(best[choices.ranks[node]])))
    return [
        (path, parent if own <= depth else -1) for path, parent, own in zip(paths, choices.parents, choices.depths, strict=True)
    ]


def searched(w: World, row: Row, branches: int, nodes: int, depth: int) -> list[Node]:
    """EAGLE-2: the best nodes of all that are found by expanding the best few of each depth."""
    found: list[tuple[float, tuple[int, ...]]] = []
    fed: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for _ in range(depth):
        level = []
        for score, path in fed:
            best = w.scores(row, path).log_softmax(-1).sort(descending=True, stable=True)
            level += [(score + float(best.values[i]), (*path, int(best.indices[i]))) for i in range(branches)]
        found += level
        fed = sorted(level, key=lambda one: -one[0])[:branches]
    kept = [path for _, path in sorted(found, key=lambda one: -one[0])[: nodes - 1]]
    number = {path: node for node, path in enumerate([(), *kept])}
    return [((), 0)] + [(path, number[path[:-1]]) for path in kept]  # a missing parent is a KeyError


def shown(tree: Tree, i: int) -> list[Node]:
    """The same of a drafted tree; a padding node's tokens are its parent's in a form without padding, so they are left out."""
    paths: list[tuple[int, ...]] = [()]
    for node, (token, parent) in enumerate(zip(tree.tokens_BN[i].tolist(), tree.parents_BN[i].tolist(), strict=True)):
        assert parent < max(node, 1), "parents precede their children"
        if node:
            paths.append((*paths[parent], token) if parent >= 0 else ())
    return [(path, parent) for path, parent in zip(paths, tree.parents_BN[i].tolist(), strict=True)]


def valid(nodes: list[Node]) -> list[Node | None]:
    listed = [None if parent < 0 else (path, parent) for path, parent in nodes]
    while listed[-1] is None:  # how much padding there is depends on the neighbours
        listed.pop()
    return listed


def check_entries(w: World) -> None:
    """The cache holds the entries of committed tokens, as a fresh pass makes them; what waits are the features after those."""
    drafter = w.drafter
    keys, values = drafter.cache.slot_layers[0].keys, drafter.cache.slot_layers[0].values
    for i, row in enumerate(w.rows):
        length = drafter.cache.lengths[i]
        if row is None:
            assert length == 0
            continue
        features, count = w.features(row.tokens[:-1]), len(row.tokens) - 1 - length
        assert count > 0
        torch.testing.assert_close(drafter.waiting_BWF[i, :count], features[length:])
        fresh = KVCache(drafter.head.shape.llama(), 1, CAPACITY)
        fresh.plan.row = 0
        positions = torch.arange(length)[None]
        mask = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1)[None, None]
        embeds = drafter.embedding(torch.tensor([row.tokens[1 : length + 1]]))
        drafter.head(embeds, drafter.head.enter(features[None, :length]), positions, mask, fresh)
        for ours, theirs in ((keys, fresh.slot_layers[0].keys), (values, fresh.slot_layers[0].values)):
            assert ours is not None and theirs is not None
            torch.testing.assert_close(ours[i, :, :length], theirs[0, :, :length], rtol=0, atol=1e-10)


def check_tree(w: World, tree: Tree, limit: int) -> None:
    drafter = w.drafter
    for i, row in enumerate(w.rows):
        if row is None:
            assert not bool(tree.valid_BN[i, 1:].any())
            continue
        assert int(tree.tokens_BN[i, 0]) == row.tokens[-1]
        depth = min(limit, row.remaining - 1)
        if isinstance(drafter.tree, Dynamic):
            expected = searched(w, row, drafter.tree.branches, tree.size, depth)
        else:
            expected = chosen(w, row, drafter.tree, depth)
        assert valid(shown(tree, i)) == valid(expected)
