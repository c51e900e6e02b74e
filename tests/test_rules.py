"""The acceptance rules, proved by exact enumeration in float64: what comes out of a round has the target's own law."""

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from forerun.accept import Law, Match, Rule, Standard, choose, walk, walk_greedy
from forerun.accept.block import Block
from forerun.accept.exact import Process, distance, drawn_chains, ends, first_tokens, random_process, score
from forerun.accept.multi_round import MultiRound
from forerun.accept.rule import at_node, follow
from forerun.sampling import path_counts
from forerun.tree import PADDING, Tree, chain_parents
from forerun.types import UserError

EXACT, WRONG = 1e-12, 1e-3
SIZES = [(2, 4), (3, 3), (4, 2), (5, 1), (5, 4)]  # vocabulary, drafted tokens
RULES = {"standard": Standard(), "match": Match(), "block": Block(), "multi-round": MultiRound()}
LAST_UNIFORM = 1 - 2**-24  # the largest float32 below 1


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def error(rule: Rule, tree: Tree, target: Process, weights_B: Tensor | None = None) -> float:
    """Total variation between the law of the first tokens and the target's; trees without weights are judged each by itself."""
    law = rule.law(tree, score(tree, target))
    assert bool(((law.accept_BN >= 0) & (law.accept_BN <= 1)).all())
    weights = torch.eye(tree.rows, dtype=torch.float64) if weights_B is None else weights_B[None]
    return max(distance(first_tokens(tree, law, target, own_B), target.joint()) for own_B in weights)


def random_tree(seed: int, rows: int = 6, size: int = 8, vocabulary: int = 3, deepest: int = 3) -> Tree:
    """Trees with branches, siblings that carry the same token, and padding nodes anywhere."""
    draw = generator(seed)
    tokens_BN = torch.randint(0, vocabulary, (rows, size), generator=draw)
    parents, depth = [], 0
    for _ in range(rows):
        depths: dict[int, int] = {0: 0}
        own = [0]
        for node in range(1, size):
            open_nodes = [n for n, d in depths.items() if d < deepest]
            parent = open_nodes[int(torch.randint(0, len(open_nodes), (1,), generator=draw))]
            if float(torch.rand(1, generator=draw)) < 0.15:
                parent = PADDING
            else:
                depths[node] = depths[parent] + 1
            own.append(parent)
        parents.append(own)
        depth = max(depth, *depths.values())
    return Tree(tokens_BN, torch.tensor(parents), depth)


def ragged_chain(seed: int, rows: int = 12, depth: int = 4, vocabulary: int = 3) -> Tree:
    draw = generator(seed)
    lengths = torch.randint(0, depth + 1, (rows,), generator=draw).tolist()
    tokens_BN = torch.randint(0, vocabulary, (rows, depth + 1), generator=draw)
    return Tree(tokens_BN, chain_parents(lengths, depth, tokens_BN.device), depth, is_chain=True)


# Enumeration.


@pytest.mark.parametrize(("vocabulary", "depth"), SIZES)
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("confidence", [0.0, 0.35], ids=["full", "stops-when-unsure"])
def test_drawn_chains_are_lossless(name: str, vocabulary: int, depth: int, confidence: float) -> None:
    for seed in range(2):
        target = random_process(vocabulary, depth + 1, generator(seed))
        draft = random_process(vocabulary, depth, generator(100 + seed))
        tree, weights_B = drawn_chains(draft, depth, confidence)
        assert float(weights_B.sum()) == pytest.approx(1, abs=1e-12)
        assert error(RULES[name], tree, target, weights_B) < EXACT


@pytest.mark.parametrize(("sharp_target", "sharp_draft"), [(math.inf, 1.5), (1.5, math.inf), (math.inf, math.inf)])
@pytest.mark.parametrize("name", RULES)
def test_one_hot_laws_are_lossless(name: str, sharp_target: float, sharp_draft: float) -> None:
    """Greedy requests, and drafters whose law is a single token."""
    for seed in range(4):
        target = random_process(3, 4, generator(seed), sharp_target)
        draft = random_process(3, 3, generator(50 + seed), sharp_draft)
        tree, weights_B = drawn_chains(draft, 3)
        assert error(RULES[name], tree, target, weights_B) < EXACT


def test_laws_with_zeros_are_lossless() -> None:
    """Warped laws: tokens that top-k or top-p took out of the target, of the draft, or of both."""
    for seed in range(6):
        draw = generator(seed)
        target, draft = random_process(4, 3, draw), random_process(4, 2, draw)
        cut = [Process(tuple(without_smallest(law, 1 + seed % 3) for law in process.laws)) for process in (target, draft)]
        tree, weights_B = drawn_chains(cut[1], 2)
        assert error(Standard(), tree, cut[0], weights_B) < EXACT
        assert error(Match(), tree, cut[0], weights_B) < EXACT


def without_smallest(law: Tensor, count: int) -> Tensor:
    kept = law.masked_fill(law <= law.sort(-1).values[..., count - 1, None], 0)
    return kept / kept.sum(-1, keepdim=True)


@pytest.mark.parametrize("seed", range(5))
def test_match_is_lossless_on_every_tree(seed: int) -> None:
    tree = random_tree(seed)
    twins = sum(len(set(children)) < len(children) for row in range(tree.rows) for children in siblings(tree, row))
    assert twins > 0, "siblings with the same token must occur"
    assert bool((tree.parents_BN == PADDING).any())
    assert error(Match(), tree, random_process(3, tree.depth + 1, generator(seed))) < EXACT
    assert error(Match(), tree, random_process(3, tree.depth + 1, generator(seed), math.inf)) < EXACT


def siblings(tree: Tree, row: int) -> list[list[int]]:
    """The tokens of each node's children."""
    parents, tokens = tree.parents_BN[row].tolist(), tree.tokens_BN[row].tolist()
    return [[tokens[n] for n in range(1, tree.size) if parents[n] == parent] for parent in range(tree.size)]


def test_match_is_lossless_on_chosen_chains_of_any_length() -> None:
    assert error(Match(), ragged_chain(0), random_process(3, 5, generator(0))) < EXACT


def test_match_where_children_carry_the_whole_vocabulary() -> None:
    """Nothing is left for the residual: the last child must be taken."""
    tree = Tree(torch.tensor([[0, 2, 0, 1]]), torch.tensor([[0, 0, 0, 0]]), 1)
    target = random_process(3, 2, generator(0))
    law = Match().law(tree, score(tree, target))
    assert float(ends(tree, law)[0, 0]) < EXACT
    assert error(Match(), tree, target) < EXACT


# The enumeration can fail.


class UnnormalizedResidual(Standard):
    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        right = super().law(tree, p_BNV)
        assert tree.probs_BNV is not None
        q_BNV = torch.cat([tree.probs_BNV[:, 1:], torch.zeros_like(p_BNV[:, :1])], 1)
        return Law(right.accept_BN, lambda end_B: (at_node(p_BNV, end_B) - at_node(q_BNV, end_B)).clamp_min(0))


class ResidualOfTarget(Standard):
    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        return Law(super().law(tree, p_BNV).accept_BN, lambda end_B: at_node(p_BNV, end_B))


class TwinsTakenTwice(Match):
    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        parents_BN = tree.parents_BN.clamp_min(0)
        own_BN = p_BNV.flatten(1).gather(1, parents_BN * p_BNV.shape[2] + tree.tokens_BN)
        return Law(own_BN, super().law(tree, p_BNV).residual)


@pytest.mark.parametrize("wrong", [UnnormalizedResidual(), ResidualOfTarget()], ids=lambda rule: type(rule).__name__)
def test_a_wrong_residual_is_found(wrong: Rule) -> None:
    tree, weights_B = drawn_chains(random_process(3, 2, generator(1)), 2)
    assert error(wrong, tree, random_process(3, 3, generator(0)), weights_B) > WRONG


def test_the_full_law_of_a_draft_that_was_not_drawn_is_found() -> None:
    draft = random_process(3, 2, generator(1))
    tree, weights_B = drawn_chains(draft, 2)
    argmax_B = torch.nn.functional.one_hot(weights_B.argmax(), len(weights_B)).double()
    assert error(Standard(), tree, random_process(3, 3, generator(0)), argmax_B) > WRONG


def test_discarding_a_drawn_token_is_found() -> None:
    """Stopping before an unsure token, after it was drawn, is no stopping time of the draft."""
    tree, weights_B = drawn_chains(random_process(3, 3, generator(1)), 3, confidence=0.35)
    lengths = (tree.valid_BN.sum(1) - 1).tolist()
    shorter = chain_parents([n - 1 if n < 3 else n for n in lengths], 3, tree.tokens_BN.device)
    tree = dataclasses.replace(tree, parents_BN=shorter)
    assert error(Standard(), tree, random_process(3, 4, generator(0)), weights_B) > WRONG


def test_coins_that_forget_earlier_siblings_are_found() -> None:
    assert error(TwinsTakenTwice(), random_tree(0), random_process(3, 4, generator(0))) > WRONG


# Identical draft and target.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_identical_draft_is_always_accepted(dtype: torch.dtype) -> None:
    same = random_process(5, 4, generator(0), sharpness=6)
    same = Process(tuple(law.to(dtype) for law in same.laws))
    tree, weights_B = drawn_chains(Process(same.laws[:3]), 3)
    for rule in (Standard(), Block(), MultiRound()):
        law = rule.law(tree, score(tree, same))
        assert bool((ends(tree, law)[weights_B > 0, -1] == 1).all())


def test_a_greedy_draft_of_a_greedy_request_is_always_accepted() -> None:
    same = random_process(5, 4, generator(0), math.inf)
    tree, weights_B = drawn_chains(Process(same.laws[:3]), 3)
    for rule in RULES.values():
        law = rule.law(tree, score(tree, same))
        assert bool((ends(tree, law)[weights_B > 0, -1] == 1).all())


def test_match_accepts_an_identical_draft_by_chance_only() -> None:
    """It draws its own token: a draft of the same law p is accepted with the sum of p squared."""
    same = random_process(4, 2, generator(0))
    tree, weights_B = drawn_chains(Process(same.laws[:1]), 1)
    accepted = (weights_B * Match().law(tree, score(tree, same)).accept_BN[:, 1]).sum()
    assert float(accepted) == pytest.approx(float((same.laws[0] ** 2).sum()), abs=1e-12)


def test_standard_accepts_what_the_overlap_of_the_laws_allows() -> None:
    """E[min(1, p/q)] = 1 - TV(p, q)."""
    target, draft = random_process(5, 2, generator(0)), random_process(5, 1, generator(1))
    tree, weights_B = drawn_chains(draft, 1)
    accepted = (weights_B * Standard().law(tree, score(tree, target)).accept_BN[:, 1]).sum()
    assert float(accepted) == pytest.approx(1 - distance(target.laws[0], draft.laws[0]), abs=1e-12)


# The walker.


def test_the_walker_draws_the_law_on_a_grid_of_uniforms() -> None:
    """Acceptances that are multiples of the grid's step come out exactly; the tree branches at two depths."""
    steps, coins = 12, 4
    grid = torch.tensor(list(itertools.product(range(steps), repeat=coins))) / steps
    uniforms_BN = torch.cat([torch.zeros(len(grid), 1), grid], 1)
    parents_BN = torch.tensor([[0, 0, 0, 1, 1]]).expand(len(grid), -1)
    tree = Tree(torch.zeros(len(grid), 5, dtype=torch.long), parents_BN, 2)
    accept_BN = torch.tensor([[12, 5, 9, 0, 7]]).expand(len(grid), -1) / steps
    law = Law(accept_BN, lambda end_B: torch.ones(len(end_B), 2))
    verdict = walk(tree, law, uniforms_BN, torch.ones(len(grid), 2))
    end_B = verdict.path_BD.gather(1, verdict.accepted_B[:, None] - 1)[:, 0]
    drawn = torch.bincount(end_B, minlength=5) / len(grid)
    assert drawn.tolist() == pytest.approx(ends(tree, law)[0].tolist(), abs=1e-6)
    assert bool((verdict.accepted_B == torch.tensor([1, 2, 2, 3, 3])[end_B]).all())


@pytest.mark.parametrize("name", RULES)
def test_every_acceptance_probability_is_met_up_to_the_grid(name: str) -> None:
    steps = 1000
    tree, _ = drawn_chains(random_process(5, 1, generator(1)), 1)
    law = RULES[name].law(tree, score(tree, random_process(5, 2, generator(0))))
    for row in range(tree.rows):
        one = Tree(tree.tokens_BN[row].expand(steps, -1), tree.parents_BN[row].expand(steps, -1), 1, is_chain=True)
        uniforms_BN = (torch.arange(steps) / steps)[:, None].expand(-1, 2)
        own = Law(law.accept_BN[row].expand(steps, -1), lambda end_B: torch.ones(len(end_B), 5))
        share = float((walk(one, own, uniforms_BN, torch.ones(steps, 5)).accepted_B == 2).double().mean())
        assert abs(share - float(law.accept_BN[row, 1])) <= 1 / steps


@pytest.mark.parametrize("uniform", [0.0, LAST_UNIFORM])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("is_chain", [True, False])
def test_certainty_is_certain(uniform: float, dtype: torch.dtype, is_chain: bool) -> None:
    """Probability 1 always accepts and 0 never does, at both ends of the uniforms; a padding node is never accepted."""
    uniforms_BN = torch.full((1, 3), uniform)
    assert float(uniforms_BN[0, 0]) < 1
    for accept, parents, expected in [(1.0, [0, 0, 1], 3), (0.0, [0, 0, 1], 1), (1.0, [0, 0, PADDING], 2)]:
        tree = Tree(torch.zeros(1, 3, dtype=torch.long), torch.tensor([parents]), 2, is_chain=is_chain)
        law = Law(torch.full((1, 3), accept, dtype=dtype), lambda end_B: torch.ones(1, 2))
        assert int(walk(tree, law, uniforms_BN, torch.ones(1, 2)).accepted_B) == expected


def test_the_token_after_the_walk_comes_from_the_residual_where_it_ends() -> None:
    tree, _ = drawn_chains(random_process(4, 2, generator(1)), 2)
    p_BNV = score(tree, random_process(4, 3, generator(0)))
    law = Standard().law(tree, p_BNV)
    draw = generator(2)
    uniforms_BN = torch.rand(tree.rows, 3, generator=draw)
    exponentials_BV = torch.empty(tree.rows, 4).exponential_(generator=draw)
    verdict = walk(tree, law, uniforms_BN, exponentials_BV)
    assert set(verdict.accepted_B.tolist()) == {1, 2, 3}
    residual_BV = law.residual(verdict.accepted_B - 1)
    assert verdict.bonus_B.tolist() == (residual_BV / exponentials_BV).argmax(-1).tolist()
    assert bool((residual_BV.gather(1, verdict.bonus_B[:, None]) > 0).all())


# Fast paths.


def same_verdicts(tree: Tree, one: object, other: object) -> None:
    for row in range(tree.rows):
        count = int(one.accepted_B[row])  # type: ignore[attr-defined]
        assert count == int(other.accepted_B[row])  # type: ignore[attr-defined]
        assert one.path_BD[row, :count].tolist() == other.path_BD[row, :count].tolist()  # type: ignore[attr-defined]
        assert int(one.bonus_B[row]) == int(other.bonus_B[row])  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("shape", ["tree", "chain"])
def test_walk_greedy_is_walk_with_one_hot_laws(seed: int, shape: str) -> None:
    tree = random_tree(seed, rows=40, vocabulary=2) if shape == "tree" else ragged_chain(seed, rows=40, vocabulary=2)
    draw = generator(seed)
    best_BN = torch.randint(0, 2, tree.tokens_BN.shape, generator=draw)
    p_BNV = torch.nn.functional.one_hot(best_BN, 2).double()
    uniforms_BN = torch.rand(tree.tokens_BN.shape, generator=draw)
    exponentials_BV = torch.empty(tree.rows, 2).exponential_(generator=draw)
    greedy = walk_greedy(tree, best_BN)
    same_verdicts(tree, greedy, walk(tree, Match().law(tree, p_BNV), uniforms_BN, exponentials_BV))
    assert len(set(greedy.accepted_B.tolist())) > 2
    if shape == "chain":
        q_BNV = torch.nn.functional.one_hot(tree.tokens_BN, 2).double()
        drawn = dataclasses.replace(tree, probs_BNV=q_BNV)
        same_verdicts(tree, greedy, walk(drawn, Standard().law(drawn, p_BNV), uniforms_BN, exponentials_BV))


@pytest.mark.parametrize("seed", range(3))
def test_the_short_cuts_of_chains_equal_the_general_path(seed: int) -> None:
    tree = ragged_chain(seed, rows=40)
    general = dataclasses.replace(tree, is_chain=False)
    valid_BN = tree.valid_BN
    draw = generator(seed)
    coin_BN = (torch.rand(tree.tokens_BN.shape, generator=draw) < 0.6) & valid_BN
    (path_BD, accepted_B), (general_BD, general_B) = follow(tree, coin_BN), follow(general, coin_BN)
    assert accepted_B.tolist() == general_B.tolist()
    assert path_BD.tolist() == general_BD.tolist()
    assert bool((tree.ancestors_BNN() == general.ancestors_BNN())[valid_BN].all())
    assert bool((tree.depths_BN() == general.depths_BN())[valid_BN].all())
    assert bool((path_counts(tree, 3) == path_counts(general, 3))[valid_BN].all())
    p_BNV = torch.rand(*tree.tokens_BN.shape, 3, generator=draw, dtype=torch.float64).softmax(-1)
    laws = [Match().law(one, p_BNV) for one in (tree, general)]
    torch.testing.assert_close(laws[0].accept_BN, laws[1].accept_BN, rtol=0, atol=1e-15)
    torch.testing.assert_close(laws[0].residual(accepted_B - 1), laws[1].residual(accepted_B - 1), rtol=0, atol=0)


def test_ancestors_by_walking_up() -> None:
    tree = random_tree(3, size=12, deepest=11)
    reach_BNN, depths_BN = tree.ancestors_BNN(), tree.depths_BN()
    for row, node in itertools.product(range(tree.rows), range(tree.size)):
        expected, at = {node}, node
        while at != 0 and int(tree.parents_BN[row, at]) != PADDING:
            at = int(tree.parents_BN[row, at])
            expected.add(at)
        assert set(reach_BNN[row, node].nonzero()[:, 0].tolist()) == expected
        assert int(depths_BN[row, node]) == len(expected) - 1


def test_the_rule_of_a_name() -> None:
    assert isinstance(choose("auto", drawn=True), Block)
    assert isinstance(choose("auto", drawn=True, trees=True), MultiRound)
    assert isinstance(choose("auto", drawn=False), Match)
    assert isinstance(choose("match", drawn=True), Match)
    with pytest.raises(UserError, match="typcal"):
        choose("typcal", drawn=True)


def test_standard_on_chosen_drafts_takes_their_law_as_one_hot() -> None:
    """That is what `match` does; asking for `standard` with n-gram lookup or without drafts must not fail."""
    assert error(choose("standard", drawn=False), ragged_chain(0), random_process(3, 5, generator(0))) < EXACT
