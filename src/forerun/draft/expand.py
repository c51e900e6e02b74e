"""Growing a drafted tree level by level, from a drafter's passes: trees of a fixed form, and EAGLE-2's search for the best one.

Shape suffixes: B rows, N nodes, M nodes of one level, P entries of the last pass (the parents of that level), K children of
each, C candidates, E drafted entries of a round, S slots, H hidden size, D draft's vocabulary, V vocabulary, 1 one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from forerun.draft.choices import Choices
from forerun.draft.protocol import Batch
from forerun.sampling import TINY, exponentials, law, penalize
from forerun.tree import PADDING, Tree
from forerun.types import UserError

Pass = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(states_BMH, tokens_BM, positions_BM, places_BM, mask_B1MS) -> (logits_BMD, states_BMH)."""


@dataclass
class Front:
    """The entries of the last pass: what they guess, and what their children inherit from them."""

    run: Pass
    batch: Batch
    logits_BPD: Tensor
    states_BPH: Tensor
    mask_BPS: Tensor  # additive: what each entry saw, itself included
    slots_BE: Tensor  # where this round's drafted entries go, each row's right after its committed ones
    places_BE: Tensor  # the same among all rows' slots
    token_ids: Tensor | None  # token of the vocabulary that each of the draft's stands for; None: itself
    vocabulary: int
    path_BPV: Tensor | None = None  # how often each token was drafted on the way to an entry; where penalties ask
    depth: int = 0
    used: int = 0  # drafted entries so far

    def feed(self, tokens_BM: Tensor, parents: Tensor | None) -> None:
        """One pass with a token below each of some entries (`parents`, see `take`), which become the front."""
        count = tokens_BM.shape[1]
        own = slice(self.used, self.used + count)
        positions_BM = self.slots_BE[:, self.depth : self.depth + 1].expand(-1, count)
        self.mask_BPS = take(self.mask_BPS, parents).scatter_(2, self.slots_BE[:, own, None], 0.0)
        if self.batch.warp.penalties_B3 is not None:
            self._count(tokens_BM, parents)
        states_BMH = take(self.states_BPH, parents)
        self.logits_BPD, self.states_BPH = self.run(
            states_BMH, tokens_BM, positions_BM, self.places_BE[:, own], self.mask_BPS[:, None]
        )
        self.depth, self.used = self.depth + 1, self.used + count

    def _count(self, tokens_BM: Tensor, parents: Tensor | None) -> None:
        own_BMV = self.mask_BPS.new_zeros(*tokens_BM.shape, self.vocabulary, dtype=torch.float32)
        own_BMV.scatter_(2, tokens_BM[..., None], 1.0)
        self.path_BPV = own_BMV if self.path_BPV is None else take(self.path_BPV, parents) + own_BMV

    def scores(self, whole: bool = False) -> tuple[Tensor, Tensor | None]:
        """Logits after the requests' bias and penalties, and the token that each stands for (None: its place).

        They are over the draft's vocabulary unless those or the caller (`whole`) want all tokens.
        """
        warp, logits_BPV = self.batch.warp, self.logits_BPD
        if not whole and warp.bias_BV is None and warp.penalties_B3 is None:
            return self.logits_BPD, self.token_ids
        if self.token_ids is not None:
            none_BPV = logits_BPV.new_full((*logits_BPV.shape[:2], self.vocabulary), -torch.inf)
            logits_BPV = none_BPV.index_copy_(2, self.token_ids, logits_BPV)
        return penalize(logits_BPV, warp, self.batch.counts, self.path_BPV), None


def take(values: Tensor, index: Tensor | None) -> Tensor:
    """values[:, index] where all rows take the same (1-D), each row its own ones (2-D), or everything (None)."""
    if index is None:
        return values
    if index.ndim == 1:
        return values.index_select(1, index)
    shape = (*index.shape, *values.shape[2:])
    return values.gather(1, index.view(*index.shape, *[1] * (values.ndim - 2)).expand(shape))


# Trees of a fixed form.


def check(choices: Choices, vocabulary: int, drawn: bool) -> None:
    """UserError where a rank is beyond the draft's vocabulary, or a child is to be drawn whose elder sibling was not."""
    for node, path in enumerate(choices.paths[1:], 1):
        if path[-1] >= vocabulary:
            raise UserError(f"drafter.choices: path {list(path)} ranks beyond the draft's {vocabulary} tokens; leave it out")
        elder = (*path[:-1], path[-1] - 1)
        if drawn and path[-1] > 0 and elder not in choices.paths[:node]:
            raise UserError(f"drafter.choices: path {list(path)} is drawn after {list(elder)}; give that one before it")


@dataclass(frozen=True)
class Level:
    """One depth of a static tree, for the passes that make it. Index tensors are 1-D; None means all, in order."""

    children: int  # ranks that are looked at below each entry
    pick: Tensor | None  # [M]: parent x children + rank
    fed: Tensor | None  # those of the M that have children
    parents: Tensor | None  # the entries that those stand below


@dataclass(frozen=True)
class Plan:
    """A static tree as tensors."""

    levels: tuple[Level, ...]
    order_N: Tensor | None  # of each node among the nodes by depth
    parents_N: Tensor
    depths_N: Tensor
    is_chain: bool


def plan_for(choices: Choices, device: torch.device) -> Plan:
    def index(places: list[int], of: int) -> Tensor | None:
        return None if places == list(range(of)) else torch.tensor(places, dtype=torch.long, device=device)

    parents_N, depths_N, _ = choices.tensors(device)
    inner = set(choices.parents[1:])
    levels, entries, made = [], [0], [0]
    for depth in range(1, choices.deepest(choices.size) + 1):
        level = [node for node, own in enumerate(choices.depths) if own == depth]
        place = {node: i for i, node in enumerate(entries)}
        children = 1 + max(choices.ranks[node] for node in level)
        pick = [place[choices.parents[node]] * children + choices.ranks[node] for node in level]
        fed = [i for i, node in enumerate(level) if node in inner]
        below = [place[choices.parents[level[i]]] for i in fed]
        levels.append(Level(children, index(pick, len(entries) * children), index(fed, len(level)), index(below, len(entries))))
        entries = [level[i] for i in fed]
        made += level
    order = sorted(range(choices.size), key=made.__getitem__)
    return Plan(tuple(levels), index(order, choices.size), parents_N, depths_N, choices.is_chain(choices.size))


def grow(front: Front, plan: Plan, pending_B: Tensor, depths: Sequence[int], drawn: bool) -> Tree:
    """A static tree; `drawn`: children drawn without replacement, with their laws. A row gets nothing below its depth."""
    rows = front.batch.rows
    nodes, laws, alive, alive_BP = [pending_B[:, None]], [], [], None
    for depth, level in enumerate(plan.levels, 1):
        if drawn:
            drawing = [row if own >= depth else None for row, own in zip(rows, depths, strict=True)]
            streams = [row.randomness.draft if row and not row.sampling.greedy else None for row in drawing]
            tokens_BPK, laws_BPKV, alive_BPK = draw(front, level.children, streams)
            laws.append(take(laws_BPKV.flatten(1, 2), level.pick))
            if not plan.is_chain:
                alive_BPK = alive_BPK if alive_BP is None else alive_BPK & alive_BP[..., None]
                alive.append(take(alive_BPK.flatten(1), level.pick))
                alive_BP = take(alive[-1], level.fed)
        else:
            tokens_BPK = best(front, level.children)
        nodes.append(take(tokens_BPK.flatten(1), level.pick))
        if depth < len(plan.levels):
            front.feed(take(nodes[-1], level.fed), level.parents)
    parents_BN = plan.parents_N.expand(len(rows), -1)
    if min(depths) < len(plan.levels):
        own_B1 = torch.tensor(depths, device=pending_B.device)[:, None]
        parents_BN = torch.where(plan.depths_N <= own_B1, parents_BN, PADDING)
    if alive:
        alive_BN = take(torch.cat([torch.ones_like(alive[0][:, :1]), *alive], 1), plan.order_N)
        parents_BN = torch.where(alive_BN, parents_BN, PADDING)
    probs_BNV = take(torch.cat([torch.zeros_like(laws[0][:, :1]), *laws], 1), plan.order_N) if drawn else None
    return Tree(take(torch.cat(nodes, 1), plan.order_N), parents_BN, len(plan.levels), probs_BNV, plan.is_chain)


def best(front: Front, children: int) -> Tensor:
    """[B, P, K]: the most probable tokens after each entry."""
    scores_BPD, ids = front.scores()
    place_BPK = scores_BPD.argmax(-1, keepdim=True) if children == 1 else scores_BPD.topk(children).indices
    return place_BPK if ids is None else ids[place_BPK]


def draw(front: Front, children: int, streams: Sequence[torch.Generator | None]) -> tuple[Tensor, Tensor, Tensor]:
    """Children in the order of their drawing: tokens [B, P, K], their laws [B, P, K, V], and whether any token was left.

    The K winners of one exponential race are K draws without replacement, so a child's law is the entry's without its elder
    siblings. Greedy rows do not draw: theirs are the best tokens, each certain.
    """
    logits_BPV, _ = front.scores(whole=True)
    rows, parents, vocabulary = logits_BPV.shape
    left_BPV = law(logits_BPV, front.batch.warp)
    raced_BPV = exponentials(streams, parents * vocabulary, left_BPV.device).view(rows, parents, vocabulary)
    keys_BPV = left_BPV / raced_BPV.to(left_BPV.dtype).clamp_min(TINY)
    if children == 1:
        token_BP1 = keys_BPV.argmax(-1, keepdim=True)
        return token_BP1, left_BPV[:, :, None], torch.ones_like(token_BP1, dtype=torch.bool)
    greedy_B11 = front.batch.warp.greedy_B[:, None, None]
    tokens_BPK = torch.where(greedy_B11, logits_BPV, keys_BPV).topk(children).indices
    alive_BPK = (left_BPV.gather(2, tokens_BPK) > 0) | greedy_B11
    laws = []
    for token_BP1 in tokens_BPK.split(1, 2):
        laws.append(left_BPV / left_BPV.sum(-1, keepdim=True).clamp_min(TINY))
        left_BPV = left_BPV.scatter(2, token_BP1, 0.0)
    certain_BPKV = torch.zeros_like(laws_BPKV := torch.stack(laws, 2)).scatter_(3, tokens_BPK[..., None], 1.0)
    return tokens_BPK, torch.where(greedy_B11[..., None], certain_BPKV, laws_BPKV), alive_BPK


# EAGLE-2's search.


@dataclass(frozen=True)
class Dynamic:
    """Each pass feeds the `branches` most probable nodes of the last level and gives each as many children; the most probable
    nodes of all levels become the tree (Li et al. 2024, EAGLE-2)."""

    branches: int = 8

    def size(self, depth: int, nodes: int) -> int:
        """Nodes, with node 0, of a tree of so many passes, if it is to have at most so many."""
        return min(nodes, 1 + (self.branches + (depth - 1) * self.branches**2 if depth else 0))

    def entries(self, depth: int) -> int:
        return max(depth - 1, 0) * self.branches


def search(front: Front, branches: int, size: int, pending_B: Tensor, depths: Sequence[int]) -> Tree:
    """The `size` - 1 best candidates by cumulative log-probability; of equals the earlier one, so that parents come first."""
    depth, device = max(depths), pending_B.device
    score_BM, token_BM = (one.flatten(1) for one in likely(front, branches))
    scores, tokens, parents = [score_BM], [token_BM], [torch.zeros_like(token_BM)]
    first = 1  # candidates are numbered through all levels; 0 is the pending token
    for _ in range(1, depth):
        fed_BP = score_BM.sort(dim=1, descending=True, stable=True).indices[:, :branches]
        front.feed(token_BM.gather(1, fed_BP), fed_BP // branches)
        parents.append((fed_BP + first).repeat_interleave(branches, 1))
        first += score_BM.shape[1]
        own_BPK, token_BPK = likely(front, branches)
        score_BM = (score_BM.gather(1, fed_BP)[..., None] + own_BPK).flatten(1)
        token_BM = token_BPK.flatten(1)
        scores.append(score_BM)
        tokens.append(token_BM)
    score_BC = torch.cat(scores, 1)
    if min(depths) < depth:
        level_C = torch.tensor([level for level, one in enumerate(scores, 1) for _ in range(one.shape[1])], device=device)
        own_B1 = torch.tensor(depths, device=device)[:, None]
        score_BC = score_BC.masked_fill(level_C > own_B1, -torch.inf)
    score_BC, order_BC = score_BC.sort(dim=1, descending=True, stable=True)
    order_BN, node_N = order_BC[:, : size - 1], torch.arange(1, size, device=device)
    number_BC = torch.zeros(len(order_BN), first + scores[-1].shape[1], dtype=torch.long, device=device)
    number_BC.scatter_(1, order_BN + 1, node_N.expand_as(order_BN))
    parents_BN = number_BC.gather(1, torch.cat(parents, 1).gather(1, order_BN))
    kept_BN = score_BC[:, : size - 1] > -torch.inf  # nor what is not a number, which sorts first
    parents_BN = torch.cat([torch.zeros_like(parents_BN[:, :1]), parents_BN.masked_fill(~kept_BN, PADDING)], 1)
    tokens_BN = torch.cat([pending_B[:, None], torch.cat(tokens, 1).gather(1, order_BN)], 1)
    return Tree(tokens_BN, parents_BN, depth, None, is_chain=branches == 1)


def likely(front: Front, children: int) -> tuple[Tensor, Tensor]:
    """The most probable tokens after each entry: log-probabilities and tokens, [B, P, K]."""
    scores_BPD, ids = front.scores()
    scores_BPD = scores_BPD.float() if scores_BPD.dtype in (torch.bfloat16, torch.float16) else scores_BPD
    score_BPK, place_BPK = scores_BPD.log_softmax(-1).topk(children)
    return score_BPK, place_BPK if ids is None else ids[place_BPK]
