"""What is said of every rule comes from enumeration: lossless ones are exact, lossy ones are off by what they are known for."""

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from forerun.accept import Law, Match, Rule, Standard, choose, describe, walk, walk_greedy
from forerun.accept.block import Block
from forerun.accept.choose import RULES
from forerun.accept.evidence import EXACT, cases, drafts_accepted, examine, one_token
from forerun.accept.exact import Process, drawn_chains, drawn_trees, ends, random_process, score
from forerun.accept.multi_round import MultiRound
from forerun.accept.relaxations import Ensemble, MinPRatio, TemperatureRelaxed, TopPResidual
from forerun.accept.rule import at_node
from forerun.accept.synthetic import Synthetic
from forerun.accept.thresholds import Relaxed, Typical
from forerun.config import Variant, parse
from forerun.tree import PADDING, Tree, chain_parents
from forerun.types import UserError

LOSSLESS = ("match", "standard", "block", "multi-round")
LOSSY = tuple(name for name in RULES if name not in LOSSLESS)
ONE_HOT = [[0.0, 1.0, 0.0, 0.0]]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def drawn(p: list[list[float]], q: list[list[float]], tokens: list[int]) -> tuple[Tree, Tensor]:
    """One chain: q[i] is the law of draft i + 1, p[i] the target's after node i."""
    tokens_BN = torch.tensor([[0, *tokens]])
    probs_BNV = torch.tensor([[[0.0] * len(q[0]), *q]], dtype=torch.float64)
    tree = Tree(tokens_BN, chain_parents([len(tokens)], len(tokens), tokens_BN.device), len(tokens), probs_BNV, is_chain=True)
    return tree, torch.tensor([p], dtype=torch.float64)


# The verdict on every rule.


@pytest.mark.parametrize("name", LOSSLESS)
def test_a_lossless_rule_is_exact_on_the_whole_grid(name: str) -> None:
    found = examine(choose(name))
    assert found.lossless
    assert found.claims_lossless
    assert max(found.worst_tv, found.joint_tv) < EXACT
    assert found.label("p at temperature 0.7") == "lossless for p at temperature 0.7"
    assert found.identical == (0 if name == "match" else 1) or name == "match"


@pytest.mark.parametrize("name", LOSSY)
def test_a_lossy_rule_is_measured_and_labelled(name: str) -> None:
    found = examine(choose(name))
    assert not found.lossless
    assert not found.claims_lossless
    assert found.joint_tv > 1e-3
    label = found.label("p")
    assert label.startswith("meaningless" if name == "synthetic" else "LOSSY: TV up to ")


def test_the_lossy_rules_have_the_known_order() -> None:
    """By worst case; the two threshold rules, whose worst cases are close, by the mean."""
    thresholds = [one_token(rule)[0] for rule in (Relaxed(10, 0.6), Typical(0.09, 0.3))]
    others = [
        one_token(rule)[0] for rule in (TemperatureRelaxed(0.5), TemperatureRelaxed(2), MinPRatio(0.05), TopPResidual(0.5))
    ]
    assert float(thresholds[0].mean()) > float(thresholds[1].mean()) > float(others[0].mean())
    worst = [float(error_P.max()) for error_P in others]
    assert worst == sorted(worst, reverse=True)
    assert min(float(error_P.max()) for error_P in thresholds) > 2 * worst[0]
    assert worst[-1] > 0.1


def test_the_ensemble_is_off_by_its_share_of_the_total_variation() -> None:
    """(1 - w) TV(p, q), for every pair: its error is proportional to 1 - w."""
    half, quarter = one_token(Ensemble(0.5))[0], one_token(Ensemble(0.75))[0]
    torch.testing.assert_close(half, 2 * quarter, rtol=1e-9, atol=1e-15)
    assert float(one_token(Ensemble(1.0))[0].max()) < EXACT


def test_block_accepts_at_least_as_much_as_standard() -> None:
    ours, standard = drafts_accepted(Block()), drafts_accepted(Standard())
    assert bool((ours >= standard - 1e-12).all())
    assert float(ours.mean() / standard.mean()) >= 1.02
    found = examine(Block())
    assert found.least_against_standard >= 1 - 1e-12
    assert found.against_standard == pytest.approx(float(ours.sum() / standard.sum()))


@pytest.mark.parametrize("seed", range(20))
def test_block_accepts_at_least_as_much_as_standard_on_any_pair(seed: int) -> None:
    draw = generator(seed)
    sharp = float(torch.rand(1, generator=draw)) * 4
    target, draft = random_process(4, 5, draw, 2.0), random_process(4, 4, draw, sharp)
    tree, weights_B = drawn_chains(draft, 4)
    means = [
        float(weights_B @ (ends(tree, rule.law(tree, score(tree, target))) @ torch.arange(5.0, dtype=torch.float64)))
        for rule in (Block(), Standard())
    ]
    assert means[0] >= means[1] - 1e-12


# The grid can fail a rule.


class FalseClaim(TemperatureRelaxed):
    lossless = True


class NotANumber(Standard):
    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        return Law(super().law(tree, p_BNV).accept_BN, lambda end_B: at_node(p_BNV, end_B) / 0.0 * 0.0)


class NotANumberSometimes(Standard):
    """Only for chosen drafts, which come between others in the grid."""

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        right = super().law(tree, p_BNV)
        bad = tree.probs_BNV is None and tree.size == 4
        return Law(right.accept_BN, lambda end_B: right.residual(end_B) * (float("nan") if bad else 1.0))


class ForgetsTheRefused(MultiRound):
    """Every child is tested against p itself, as if its elder siblings had not been refused."""

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        right = super().law(tree, p_BNV)
        assert tree.probs_BNV is None or tree.size > 1
        own_BN = p_BNV.flatten(1).gather(1, tree.parents_BN.clamp_min(0) * p_BNV.shape[2] + tree.tokens_BN)
        q_BN = (
            torch.ones_like(own_BN) if tree.probs_BNV is None else tree.probs_BNV.gather(2, tree.tokens_BN[..., None])[..., 0]
        )
        accept_BN = (own_BN / q_BN.clamp_min(1e-300)).clamp_max(1).masked_fill(~tree.valid_BN, 0)
        accept_BN[:, 0] = 1
        return Law(accept_BN, right.residual)


class FirstCoin(Block):
    """Block verification that stops at the first coin that fails, as `standard` does."""

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        return dataclasses.replace(super().law(tree, p_BNV), last=False)


@pytest.mark.parametrize(
    "wrong",
    [FalseClaim(2.0), NotANumber(), NotANumberSometimes(), ForgetsTheRefused(), FirstCoin()],
    ids=lambda r: type(r).__name__,
)
def test_a_wrong_rule_is_found(wrong: Rule) -> None:
    found = examine(wrong)
    assert found.claims_lossless
    assert not found.lossless


def test_the_grid_holds_drawn_chosen_stopped_and_branching_drafts() -> None:
    labels = [case.label for case in cases(trees=True)]
    for part in ("drawn drafts", "chosen drafts", "stopped below", "drawn with replacement", "drawn without replacement"):
        assert any(part in label for label in labels)
    assert len(list(cases(trees=False))) < len(labels)
    for case in cases(trees=True):
        assert float(case.weights_B.sum()) == pytest.approx(1, abs=1e-12)


def test_children_without_replacement_never_repeat_a_sibling_and_run_out_into_padding() -> None:
    tree, weights_B = drawn_trees(random_process(2, 1, generator(0)), (0, 0, 0, 0), replacement=False)
    possible = weights_B > 0
    assert bool((tree.tokens_BN[possible, 1] != tree.tokens_BN[possible, 2]).all())
    assert bool((tree.parents_BN[possible, 3] == PADDING).all())


# Outcomes of 0/0 and x/0, and single rules.


def test_what_a_filter_took_out_of_both_laws_is_refused() -> None:
    tree, p_BNV = drawn([[0.96, 0.04, 0.0], [1.0, 0, 0]], [[0.97, 0.01, 0.02]], [1])  # 0.04 < 0.05 * 0.96
    law = MinPRatio(0.05).law(tree, p_BNV)
    assert float(law.accept_BN[0, 1]) == 0
    left = law.residual(torch.tensor([0]))
    assert left[0].tolist() == pytest.approx([0, 1, 0])  # of the unfiltered laws


def test_what_a_filter_took_out_of_the_draft_only_is_accepted() -> None:
    tree, p_BNV = drawn([[0.5, 0.5, 0.0], [1.0, 0, 0]], [[0.98, 0.02, 0.0]], [1])
    assert float(MinPRatio(0.05).law(tree, p_BNV).accept_BN[0, 1]) == 1


def test_a_filter_value_leaves_what_is_filtered_a_chance() -> None:
    tree, p_BNV = drawn([[0.96, 0.04, 0.0], [1.0, 0, 0]], [[0.97, 0.01, 0.02]], [1])
    assert float(MinPRatio(0.05, filter_value=-5.0).law(tree, p_BNV).accept_BN[0, 1]) > 0.9


@pytest.mark.parametrize(
    "rule", [TemperatureRelaxed(0.5), TemperatureRelaxed(2), TopPResidual(0.1), Ensemble(0.3), Standard(), Block()]
)
def test_equal_laws_are_accepted_and_what_is_in_neither_is_not(rule: Rule) -> None:
    """p = q leaves no residual: the token after an end that cannot happen comes from p. A token of no mass anywhere is 0/0."""
    tree, p_BNV = drawn([[0.25, 0.75, 0.0], [0.5, 0.5, 0]], [[0.25, 0.75, 0.0]], [1])
    law = rule.law(tree, p_BNV)
    assert float(ends(tree, law)[0, 1]) == 1
    assert law.residual(torch.tensor([0]))[0].tolist() == pytest.approx([0.25, 0.75, 0])
    impossible, p_BNV = drawn([[0.25, 0.75, 0.0], [0.5, 0.5, 0]], [[0.25, 0.75, 0.0]], [2])
    accept = rule.law(impossible, p_BNV).accept_BN
    assert bool(torch.isfinite(accept).all())
    if rule.lossless or not isinstance(rule, Ensemble):
        assert float(accept[0, 1]) == 0


def test_relaxing_the_temperature_raises_or_lowers_acceptance() -> None:
    tree, p_BNV = drawn([[0.25, 0.75], [0.5, 0.5]], [[0.5, 0.5]], [0])
    accepted = [float(TemperatureRelaxed(t).law(tree, p_BNV).accept_BN[0, 1]) for t in (0.5, 1.0, 2.0)]
    assert accepted == pytest.approx([0.25, 0.5, math.sqrt(0.5)])


def test_the_residual_is_cut_before_it_is_normalized() -> None:
    tree, p_BNV = drawn([[0.5, 0.3, 0.2, 0.0], [1.0, 0, 0, 0]], [[0.0, 0.1, 0.1, 0.8]], [3])  # (p - q)+ = .5 .2 .1 0
    masses = {0.4: [1, 0, 0, 0], 0.6: [5 / 7, 2 / 7, 0, 0], 0.8: [5 / 8, 2 / 8, 1 / 8, 0]}
    for top_p, expected in masses.items():
        law = TopPResidual(top_p).law(tree, p_BNV)
        assert law.residual(torch.tensor([0]))[0].tolist() == pytest.approx(expected)
        assert law.residual(torch.tensor([1]))[0].tolist() == [1, 0, 0, 0]  # the bonus is never cut


def test_typical_takes_its_threshold_from_the_entropy() -> None:
    p = [0.6, 0.3, 0.06, 0.04]
    entropy = -sum(x * math.log(x) for x in p)
    tree, p_BNV = drawn([p, [1.0, 0, 0, 0]], [[0.25] * 4], [2])
    for epsilon, delta in [(0.09, 0.3), (0.09, 0.1), (0.05, 5.0)]:
        floor = min(epsilon, delta * math.exp(-entropy))
        assert float(Typical(epsilon, delta).law(tree, p_BNV).accept_BN[0, 1]) == (floor < 0.06)


def test_relaxed_wants_rank_and_closeness() -> None:
    tree, p_BNV = drawn([[0.6, 0.3, 0.06, 0.04], [1.0, 0, 0, 0]], [[0.25] * 4], [1])
    outcomes = {(2, 0.3): 1.0, (1, 0.3): 0.0, (2, 0.2): 0.0, (9, 1.0): 1.0}
    for (top_k, delta), expected in outcomes.items():
        assert float(Relaxed(top_k, delta).law(tree, p_BNV).accept_BN[0, 1]) == expected


@pytest.mark.parametrize("rule", [Typical(0.09, 0.3), Relaxed(10, 0.6)], ids=describe)
def test_the_longest_accepted_path_is_taken(rule: Rule) -> None:
    """Both children of the root are fine; only the second one's child is too."""
    tree = Tree(torch.tensor([[0, 1, 2, 3, 3]]), torch.tensor([[0, 0, 0, 1, 2]]), 2)
    p_BNV = torch.tensor([[[0, 0.5, 0.5, 0], [1, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0], [1, 0, 0, 0]]]).double()
    verdict = walk(tree, rule.law(tree, p_BNV), torch.full((1, 5), 0.5), torch.ones(1, 4))
    assert verdict.path_BD.tolist() == [[0, 2, 4]]
    assert verdict.bonus_B.tolist() == [0]


@pytest.mark.parametrize("name", [name for name in RULES if name not in ("ensemble", "synthetic")])
def test_at_temperature_0_rules_follow_the_best_tokens(name: str) -> None:
    draw = generator(3)
    tokens_BN, best_BN = torch.randint(0, 2, (60, 4), generator=draw), torch.randint(0, 2, (60, 4), generator=draw)
    tree = Tree(tokens_BN, chain_parents([3] * 60, 3, tokens_BN.device), 3, is_chain=True)
    p_BNV = torch.nn.functional.one_hot(best_BN, 2).double()
    ours = walk(tree, choose(name).law(tree, p_BNV), torch.rand(60, 4, generator=draw), torch.ones(60, 2))
    greedy = walk_greedy(tree, best_BN)
    assert ours.accepted_B.tolist() == greedy.accepted_B.tolist()
    assert ours.bonus_B.tolist() == greedy.bonus_B.tolist()
    assert len(set(greedy.accepted_B.tolist())) > 2


def test_synthetic_accepts_at_its_rates_by_depth() -> None:
    tree = Tree(torch.tensor([[0, 1, 2, 3, 1, 2]]), torch.tensor([[0, 0, 0, 1, 1, 3]]), 3)
    law = Synthetic((0.9, 0.5)).law(tree, torch.full((1, 6, 4), 0.25).double())
    assert law.accept_BN[0].tolist() == pytest.approx([1, 0.9, 0, 0.5, 0, 0.5])


# Multi-round on trees, walked and enumerated.


def test_multi_round_of_chosen_children_is_match() -> None:
    tree = Tree(torch.tensor([[0, 1, 2, 1, 0]]), torch.tensor([[0, 0, 0, 1, 1]]), 2)
    p_BNV = score(tree, random_process(3, 3, generator(0)))
    ours, match = MultiRound().law(tree, p_BNV), Match().law(tree, p_BNV)
    torch.testing.assert_close(ours.accept_BN, match.accept_BN, rtol=0, atol=1e-12)
    for node in range(5):
        torch.testing.assert_close(
            ours.residual(torch.tensor([node])), match.residual(torch.tensor([node])), rtol=0, atol=1e-12
        )


def test_more_children_are_accepted_more() -> None:
    target, draft = random_process(4, 2, generator(0)), random_process(4, 1, generator(1))
    refused = []
    for count, replacement in [(1, True), (2, True), (2, False), (3, False)]:
        tree, weights_B = drawn_trees(draft, (0,) * (count + 1), replacement)
        law = MultiRound().law(tree, score(tree, target))
        refused.append(float(weights_B @ ends(tree, law)[:, 0]))
    assert refused == sorted(refused, reverse=True)
    assert refused[-1] < refused[0] / 2


# From configuration to rule.


def test_every_kind_of_the_configuration_is_built_with_its_parameters() -> None:
    typical = parse(Variant, {"rule": {"kind": "typical", "epsilon": 0.2}}, "test").rule
    assert choose(typical) == Typical(0.2, 0.3)
    for name in RULES:
        assert choose(name).name == name
    assert describe(choose("typical")) == "typical(epsilon=0.09, delta=0.3)"
    assert describe(choose("block")) == "block"


@pytest.mark.parametrize("name", [name for name in RULES if not choose(name).trees])
def test_a_rule_for_chains_is_refused_for_trees_in_one_sentence(name: str) -> None:
    with pytest.raises(UserError, match=rf"rule\.kind={name} admits chains only"):
        choose(name, trees=True)


@pytest.mark.parametrize("path", ["nowhere:Rule", "test_evidence", "math:pi", "math:nothing", "pathlib:Path"])
def test_what_is_no_rule_is_refused(path: str) -> None:
    with pytest.raises(UserError, match=r"rule\.path="):
        choose(parse(Variant, {"rule": {"kind": "import", "path": path}}, "test").rule)


def test_a_process_that_is_its_own_draft_is_its_own_evidence() -> None:
    """The enumerator's probabilities of ends add up for walks to the last coin, too."""
    target, draft = random_process(3, 4, generator(0)), random_process(3, 3, generator(1))
    tree, _ = drawn_chains(Process(draft.laws), 3, confidence=0.35)
    law = Block().law(tree, score(tree, target))
    assert law.last
    torch.testing.assert_close(ends(tree, law).sum(1), torch.ones(tree.rows, dtype=torch.float64), rtol=0, atol=1e-12)


def test_the_walk_to_the_last_coin() -> None:
    tokens_BN = torch.zeros(8, 4, dtype=torch.long)
    tree = Tree(tokens_BN, chain_parents([3] * 8, 3, tokens_BN.device), 3, is_chain=True)
    coins = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    law = Law(torch.cat([torch.ones(8, 1), coins], 1), lambda end_B: torch.ones(8, 2), last=True)
    verdict = walk(tree, law, torch.full((8, 4), 0.5), torch.ones(8, 2))
    assert verdict.accepted_B.tolist() == [1, 4, 3, 4, 2, 4, 3, 4]
    assert verdict.path_BD[4].tolist() == [0, 1, 1, 1]
