"""What a report claims: its headline, where nothing is called faster without proof, and the cost model's algebra."""

from typing import Any

import pytest

import report_world as world
from forerun.bench import headline, why
from forerun.types import UserError

# What the headline may claim.


def figures(
    value: float | None, low: float | None, high: float | None, lossless: bool | None = True, **more: Any
) -> dict[str, Any]:
    return {
        "error": None, "speedup": {"value": value, "low": low, "high": high}, "lossless": lossless,
        "meaningless": False, "tokens_per_second": {"decode": 100.0 * (value or 0)},
    } | more  # fmt: skip


def claims(floor: str | None = None, configs: Any = None, **variants: dict[str, Any]) -> list[str]:
    summary = {"status": "complete", "baseline": "plain", "variants": {"plain": figures(1.0, 1.0, 1.0)} | variants}
    return [one.text for one in headline.findings(summary, configs or {}, floor)]


def test_the_fastest_lossless_variant() -> None:
    [said] = claims(a=figures(1.5, 1.4, 1.6), b=figures(1.9, 1.7, 2.1), c=figures(1.8, 1.6, 2.0))
    assert said.startswith(
        "b is the fastest lossless variant: 1.90x plain (95 % interval 1.70 to 2.10), 190 against 100 tokens"
    )
    assert said.endswith("Not told apart from it, since the intervals overlap: c."), "a's interval ends below b's"


@pytest.mark.parametrize(
    ("best", "ending"),
    [
        ((1.1, 0.98, 1.2), "The best of them, a, is 1.10x (95 % interval 0.98 to 1.20); the interval includes 1."),
        ((0.8, 0.7, 0.9), "The best of them, a, is 0.80x (95 % interval 0.70 to 0.90): slower."),
        ((1.7, None, None), "The best of them, a, is 1.70x (too few prompts: no interval), which shows nothing either way."),
        ((1.05, 1.0, 1.2), "The best of them, a, is 1.05x (95 % interval 1.00 to 1.20); the interval includes 1."),
    ],
)
def test_nothing_is_faster_whose_interval_includes_1(best: tuple[float, float | None, float | None], ending: str) -> None:
    [said] = claims(a=figures(*best))
    assert said == f"No lossless variant is shown to be faster than plain. {ending}"


def test_one_proven_is_preferred_to_a_greater_figure_that_is_not() -> None:
    [said] = claims(sure=figures(1.2, 1.1, 1.3), noisy=figures(1.6, 0.9, 2.4))
    assert said.startswith("sure is the fastest")


def test_nothing_to_claim() -> None:
    assert claims() == ["Nothing was measured beside the baseline plain."]
    assert claims(a=figures(None, None, None)) == ["Nothing was measured beside the baseline plain."]
    failed = figures(1.5, 1.4, 1.6, error="broke")
    assert claims(a=failed) == ["Nothing was measured beside the baseline plain."]
    [first, second] = claims(a=figures(1.5, 1.4, 1.6, lossless=None))
    assert first == "No lossless variant of the same target was measured beside the baseline plain."
    assert "its rule was not enumerated; its quality was not measured." in second


def test_few_prompts_are_named_and_prove_nothing() -> None:
    few = figures(1.7, None, None)
    few["speedup"]["prompts"] = 2
    [said] = claims(a=few)
    assert said.startswith(
        "No lossless variant is shown to be faster than plain. The best of them, a, is 1.70x (2 prompts: no "
    )


def test_a_variant_measured_apart_says_so_in_the_headline() -> None:
    [said] = claims(a=figures(1.5, 1.4, 1.6, interleaved=False), b=figures(1.2, 1.1, 1.3, interleaved=True))
    assert said.startswith(
        "a is the fastest lossless variant: 1.50x plain (95 % interval 1.40 to 1.60, measured apart from the "
    )
    assert "apart" not in claims(b=figures(1.2, 1.1, 1.3, interleaved=True))[0]


def test_a_lossy_variant_does_not_pass_a_floor_on_its_targets_score() -> None:
    """A score by likelihood is of the target, whatever the rule accepts."""
    scored = {"perplexity": {"value": 9.0, "low": 8.0, "high": 10.0}}
    fine = figures(1.5, 1.4, 1.6, quality=scored)
    lossy = figures(2.5, 2.4, 2.6, lossless=False, rule_evidence={"tv": 0.4}, quality={"perplexity": scored["perplexity"] | {
        "of_target": True}})  # fmt: skip
    _, faster, floor = claims("perplexity<=12", fine=fine, lossy=lossy)
    assert floor.startswith("fine is the fastest that keeps perplexity <= 12")
    assert "Left out: lossy, for perplexity and choices score the target" in floor
    assert "its quality was not measured, for perplexity and choices score the target" in faster
    assert claims("perplexity<=12", lossy=lossy)[-1].startswith(
        "Floor perplexity <= 12: perplexity was not measured (measured: n"
    )
    written = lossy | {"quality": lossy["quality"] | {"gsm8k": {"value": 0.3, "low": 0.2, "high": 0.4}}}
    _, faster, floor = claims("gsm8k>=0.1", fine=fine, lossy=written)
    assert faster.endswith("quality gsm8k 0.300.")
    assert floor.startswith("lossy is the fastest that keeps gsm8k >= 0.1")
    assert "Left out" not in floor


def test_a_lossy_variant_is_faster_but_promises_nothing() -> None:
    lossy = figures(2.5, 2.4, 2.6, lossless=False, rule_evidence={"tv": 0.41}, quality={"acc": {"value": 0.5}})
    [_, said] = claims(a=figures(1.5, 1.4, 1.6), typical=lossy, load=figures(9.0, 8.0, 9.9, lossless=False, meaningless=True))
    assert said.startswith(
        "Faster, but without a promise of plain's text: typical, 2.50x (95 % interval 2.40 to 2.60); its rule is LOSSY .41"
    )
    assert said.endswith("quality acc 0.500.")
    slower = figures(1.4, 1.3, 1.5, lossless=False, rule_evidence={"tv": 0.41})
    assert len(claims(a=figures(1.5, 1.4, 1.6), typical=slower)) == 1, "not worth a sentence"


def test_a_lossless_rule_on_other_weights_is_not_lossless_beside_the_baseline() -> None:
    configs = world.experiment({name: world.RICH[name] for name in ("plain", "model, k=4", "4-bit, model k=4")}).expand()
    summary = {
        "status": "complete", "baseline": "plain",
        "variants": {
            "plain": figures(1.0, 1.0, 1.0), "model, k=4": figures(1.5, 1.4, 1.6), "4-bit, model k=4": figures(2.5, 2.4, 2.6)
        },
    }  # fmt: skip
    first, second = (one.text for one in headline.findings(summary, configs, None))
    assert first.startswith("model, k=4 is the fastest lossless variant")
    assert "4-bit, model k=4, 2.50x" in second
    assert "its rule is lossless, but for another law" in second


def race(value: float, low: float | None, high: float | None) -> dict[str, Any]:
    return {"race-high": {"metric": "acc", "value": value, "low": low, "high": high}}


def test_the_worse_end_of_the_interval_keeps_the_floor() -> None:
    sure = figures(1.5, 1.4, 1.6, quality=race(0.6, 0.55, 0.65))
    wide = figures(2.0, 1.9, 2.1, quality=race(0.6, 0.45, 0.75))
    said = claims("race-high>=0.5", sure=sure, wide=wide)[-1]
    assert said.startswith("sure is the fastest that keeps race-high >= 0.5: 1.50x plain (95 % interval 1.40 to 1.60)")
    assert said.endswith("race-high 0.600 (0.550-0.650); the worse end of the interval counts.")
    assert (
        claims("race-high>=0.7", sure=sure)[-1] == "No variant keeps race-high >= 0.7 (the worse end of the interval counts)."
    )
    assert claims("race-high>=0.5", wide=wide)[-1].endswith("by the value alone, without its interval, wide would.")
    bare = figures(1.5, 1.4, 1.6, quality=race(0.6, None, None))
    assert claims("acc > .5", bare=bare)[-1].endswith("it has no interval, so its value counts."), "named by its metric"
    slow = figures(1.1, 0.9, 1.2, quality=race(0.6, 0.55, 0.65))
    assert claims("race-high>=0.5", slow=slow)[-1].startswith("Of slow, which keep race-high >= 0.5")
    assert (
        claims("perplexity<=12", sure=sure)[-1] == "Floor perplexity <= 12: perplexity was not measured (measured: race-high)."
    )


def test_a_ceiling_counts_the_upper_end() -> None:
    below = figures(1.5, 1.4, 1.6, quality={"perplexity": {"value": 11.0, "low": 10.0, "high": 12.5}})
    assert claims("perplexity<=12", a=below)[-1].startswith("No variant keeps perplexity <= 12")
    assert claims("perplexity<=12.5", a=below)[-1].startswith("a is the fastest that keeps perplexity <= 12.5")


@pytest.mark.parametrize("text", ["race-high", ">=0.5", "race-high=>0.5", "race-high>=half", "race-high>=0.5 or so", ""])
def test_a_floor_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UserError, match=r"such as race-high>=0\.5"):
        headline.parse_floor(text)
    assert "such as race-high>=0.5" in claims(text, a=figures(1.5, 1.4, 1.6))[-1], "a measured run is not lost over it"


# The cost model.


def costs(
    drafted: int, accepted: int, rollbacks: int, emitted: float, draft: float, verify: float, rest: float, rounds: int = 10
) -> Any:
    """Figures of a variant, seconds for each round."""
    return {
        "error": None, "rounds": rounds, "drafted": drafted, "accepted": accepted, "rollbacks": rollbacks,
        "block_efficiency": emitted, "speedup": {"value": None},
        "seconds": {"draft": draft * rounds, "verify": verify * rounds, "accept": rest * rounds, "other": 0.0, "prefill": 9.0},
    }  # fmt: skip


PLAIN = costs(0, 0, 0, 1.0, 0.0, 0.9, 0.1)


def test_the_algebra_of_the_cost_model() -> None:
    """A round: 4 tokens drafted for 0.1 s each, verified for 1.2 s, 0.2 s of the rest, 3 tokens out; a plain step takes 1 s."""
    found = why.model(costs(40, 20, 5, 3.0, 0.4, 1.2, 0.2), PLAIN)
    assert found is not None
    assert found.alpha == 20 / 25
    assert found.draft_cost == pytest.approx(0.1)
    assert found.growth == pytest.approx(1.2 / 0.9)
    assert found.speedup() == pytest.approx(3.0 * 1.0 / 1.8)
    assert found.free_drafting == pytest.approx(3.0 / 1.4)
    assert found.perfect_acceptance == pytest.approx(5.0 / 1.8)
    assert found.cheap_verification == pytest.approx(3.0 / (0.4 + 0.9 + 0.2))


def test_break_even_is_leviathans_where_his_model_holds() -> None:
    """Tokens a round as alpha .8 gives for k = 2: 1 + .8 + .64. A round costs 1.75 steps; 1 + a + a^2 = 1.75 at a = .5."""
    emitted = 1 + 0.8 + 0.64
    found = why.model(costs(20, 16, 4, emitted, 0.5, 1.15, 0.1), PLAIN)
    assert found is not None
    assert found.alpha == 0.8
    assert found.break_even_alpha == pytest.approx(0.5)
    assert why.expected(0.8, 2) == pytest.approx(emitted)
    assert why.expected(1.0, 2) == 3


def test_break_even_is_where_the_prediction_crosses_1() -> None:
    for emitted in (1.5, 1.8, 2.4):
        found = why.model(costs(20, 12, 6, emitted, 0.5, 1.2, 0.1), PLAIN)
        assert found is not None
        assert found.alpha is not None
        assert found.break_even_alpha is not None
        assert (found.break_even_alpha <= found.alpha) is (found.speedup() >= 1)


def test_no_acceptance_pays_for_a_round_that_costs_more_than_it_can_bring() -> None:
    told = costs(20, 10, 5, 2.0, 2.5, 1.2, 0.1)
    found = why.model(told, PLAIN)
    assert found is not None
    assert found.perfect_acceptance == pytest.approx(3.0 / 3.8)
    assert found.break_even_alpha is None
    text = why.paragraph("slow", told, ("plain", PLAIN), own=True)
    assert "It does not pay; free drafting alone would change that." in text
    assert text.endswith("At these times no α breaks even.")


def test_a_paragraph_says_the_runs_own_numbers() -> None:
    told = costs(40, 20, 5, 3.0, 0.4, 1.2, 0.2) | {"speedup": {"value": 1.6}}
    text = why.paragraph("fast", told, ("plain", PLAIN), own=True)
    assert "α = 0.80" in text
    assert "c = 0.10 plain steps" in text
    assert "1.33 times what one costs" in text
    assert "= 1.67x over plain, 1.60x on the clock (residual +4.2 %)" in text
    assert "2.14x with free drafting, 2.78x with perfect acceptance and 2.00x with" in text
    assert "the largest gain left is in perfect acceptance" in text
    assert "another target" in why.paragraph("fast", told, ("plain", PLAIN), own=False)


@pytest.mark.parametrize("missing", ["rounds", "block_efficiency", "seconds"])
def test_without_times_or_counts_there_is_no_account(missing: str) -> None:
    told = costs(40, 20, 5, 3.0, 0.4, 1.2, 0.2) | {missing: None}
    assert "has nothing to work with" in why.paragraph("a", told, ("plain", PLAIN), own=True)
    assert "no plain decoding beside it" in why.paragraph("a", told, None, own=True)
    assert why.paragraph("a", {"error": "broke"}, None, own=True) == "Failed: broke"


def test_the_pooled_alpha_is_the_mean_of_the_conditional_acceptances_weighted_by_what_was_reached() -> None:
    summary = world.summary_of({name: world.RICH[name] for name in ("plain", "model, k=4")})
    told = summary["variants"]["model, k=4"]
    reached, left = 0.0, float(told["rounds"])
    for share in told["conditional_acceptance"]:
        reached += left
        left *= share
    assert why.pooled_alpha(told) == pytest.approx(told["accepted"] / reached)
