"""The figures of summary.json: cases worked out by hand, and what must hold for any records."""

import random
from dataclasses import replace

import pytest

from forerun.bench import metrics
from forerun.bench.metrics import Record, RoundRecord, Run
from forerun.types import Phases

# Drafted, accepted, nodes, emitted: a full round, a rollback, a miss, a round without a draft, one cut short by a stop.
ROUNDS = (
    RoundRecord(3, 3, 4, 4),
    RoundRecord(3, 1, 4, 2),
    RoundRecord(2, 0, 3, 1),
    RoundRecord(0, 0, 1, 1),
    RoundRecord(4, 2, 5, 2),
)
KEYS = {
    "tokens", "wall_seconds", "tokens_per_second", "ttft_ms", "ms_per_token", "latency_ms", "speedup", "speedup_e2e", "rounds",
    "drafted", "accepted", "acceptance_rate", "conditional_acceptance", "block_efficiency", "rollbacks", "rejected_tokens",
    "draft_wastage", "verification_wastage", "overhead", "efficiency_gain", "identity_residual", "seconds", "lossless",
    "rule", "label", "meaningless", "compressed", "rule_evidence",
    "exact_share", "peak_memory_bytes", "weight_bytes", "utilization_percent", "quality", "counts", "inter_token_ms",
    "categories", "kv_bytes", "peak_device_bytes", "cpu_percent", "energy_joules", "energy_per_token", "hash", "interleaved",
    "lost", "in_flight", "commit",
}  # fmt: skip


def record(
    id: str = "a",
    repeat: int = 0,
    first: float = 1.0,
    total: float = 3.0,
    tokens: tuple[int, ...] = (1, 2, 3, 4, 5),
    rounds: tuple[RoundRecord, ...] | None = None,
) -> Record:
    """One token at `first`, all others at `total`."""
    return Record(
        id=id, category="c", repeat=repeat, index=0, prompt_tokens=7, tokens=tokens, text="", finish="length", first_s=first,
        total_s=total, arrivals=((first, 1), (total, len(tokens) - 1)),
        drafted=None if rounds is None else sum(r.drafted for r in rounds),
        accepted=None if rounds is None else sum(r.accepted for r in rounds), rounds=rounds,
    )  # fmt: skip


def plain_rounds(count: int) -> tuple[RoundRecord, ...]:
    return (RoundRecord(0, 0, 1, 1),) * count


def test_acceptance_by_hand() -> None:
    found = metrics.acceptance(ROUNDS)
    assert found["rounds"] == 5
    assert (found["drafted"], found["accepted"], found["rejected_tokens"]) == (12, 6, 6)
    assert found["acceptance_rate"] == 6 / 12
    assert found["block_efficiency"] == 10 / 5
    assert found["rollbacks"] == 3
    assert found["draft_wastage"] == 6 / 12
    assert found["verification_wastage"] == (17 - 10) / 17
    # Position 0: drafted in four rounds, accepted in three. Position 1: reached and drafted in three, accepted in two.
    # Position 2: two, one (the round that drafted two never got there). Position 3: drafted once, but not reached.
    assert found["conditional_acceptance"] == [3 / 4, 2 / 3, 1 / 2]


def test_what_was_not_drafted_has_no_acceptance() -> None:
    found = metrics.acceptance(plain_rounds(4))
    assert (found["rounds"], found["drafted"], found["accepted"], found["block_efficiency"]) == (4, 0, 0, 1.0)
    assert found["acceptance_rate"] is None
    assert found["conditional_acceptance"] is None
    assert found["draft_wastage"] is None
    assert found["verification_wastage"] == 0


def test_what_a_backend_does_not_tell_is_null() -> None:
    assert set(metrics.acceptance(None).values()) == {None}
    told, silent = record("a", rounds=ROUNDS), record("b")
    assert metrics.rounds_of([told]) == list(ROUNDS)
    assert metrics.rounds_of([told, silent]) is None, "half of the rounds would be a wrong share"


def test_conditional_acceptance_survives_a_longer_draft() -> None:
    """Kaplan-Meier: for drafts that accept each token with the same probability, the estimate does not depend on k."""
    draw = random.Random(1)
    for k in (2, 6):
        rounds = []
        for _ in range(20000):
            accepted = next((i for i in range(k) if draw.random() >= 0.7), k)
            rounds.append(RoundRecord(k, accepted, k + 1, accepted + 1))
        found = metrics.conditional_acceptance(rounds)
        assert found is not None
        assert found == pytest.approx([0.7] * k, abs=0.03)


@pytest.mark.parametrize("seed", range(20))
def test_shares_of_any_rounds_agree(seed: int) -> None:
    draw = random.Random(seed)
    rounds = []
    for _ in range(draw.randint(1, 40)):
        drafted = draw.randint(0, 6)
        accepted = draw.randint(0, drafted)
        rounds.append(RoundRecord(drafted, accepted, drafted + 1, accepted + 1))
    found = metrics.acceptance(rounds)
    assert found["accepted"] + found["rejected_tokens"] == found["drafted"]
    assert found["block_efficiency"] == pytest.approx(1 + found["accepted"] / len(rounds))
    assert 0 <= found["verification_wastage"] < 1
    if found["drafted"]:
        assert found["acceptance_rate"] + found["draft_wastage"] == pytest.approx(1)
        # Expected tokens from the conditional acceptances, where every round drafts as deep as it was accepted or deeper.
        conditional = found["conditional_acceptance"] or []
        assert all(0 <= share <= 1 for share in conditional)
    shuffled = rounds[:]
    draw.shuffle(shuffled)
    assert metrics.acceptance(shuffled) == found


def test_clock_by_hand() -> None:
    run = Run([record("a", first=1.0, total=3.0), record("b", first=2.0, total=5.0, tokens=(1, 2, 3, 4))], wall_seconds=8.0)
    found = metrics.clock(run)
    assert found["tokens"] == 9
    assert found["wall_seconds"] == 8.0
    assert found["tokens_per_second"] == {"total": 9 / 8, "decode": 7 / 5, "p50": 1.5}  # 4 / 2 and 3 / 3 tokens a second
    assert found["ttft_ms"]["p50"] == 1500
    assert found["ms_per_token"]["p50"] == 750  # 500 and 1000
    assert found["latency_ms"] == {"mean": 4000, "p50": 4000, "p95": None, "p99": None}, "of two requests"
    assert found["in_flight"] == 8 / 8, "3 and 5 seconds of requests in 8 seconds"


@pytest.mark.parametrize(("requests", "p95", "p99"), [(19, None, None), (20, 20, None), (99, 95, None), (100, 96, 100)])
def test_a_far_percentile_needs_requests(requests: int, p95: int | None, p99: int | None) -> None:
    records = [record(str(i), first=0.001 * i, total=2.0 + i) for i in range(1, requests + 1)]
    found = metrics.clock(Run(records, 1.0))
    for name, figures in found.items():
        if name.endswith("_ms"):
            told = [figures.get(key) is not None for key in ("p50", "p95", "p99")]
            assert told == [True, p95 is not None, p99 is not None and "p99" in figures], name
    assert [None if one is None else round(one) for one in (found["ttft_ms"]["p95"], found["ttft_ms"]["p99"])] == [
        None if p95 is None else round(1 + 0.95 * (requests - 1)), None if p99 is None else round(1 + 0.99 * (requests - 1)),
    ]  # fmt: skip


def test_percentiles_interpolate() -> None:
    assert metrics.percentile([], 50) is None
    assert metrics.percentile([3.0], 95) == 3
    assert metrics.percentile([4.0, 1.0, 2.0, 3.0], 50) == 2.5
    assert metrics.percentile([float(i) for i in range(101)], 95) == 95


def test_speedup_is_the_ratio_of_paired_totals() -> None:
    plain = [record(f"{id}{i}", total=total) for id, total in (("a", 5.0), ("b", 9.0)) for i in range(4)]  # 4 and 8 s decoding
    fast = [record(f"{id}{i}", total=total) for id, total in (("a", 2.0), ("b", 6.0)) for i in range(4)]  # 1 and 5
    fast.append(record("unpaired", total=100.0))
    found = metrics.variant(Run(fast, 8.0), Run(plain, 14.0))
    assert found["speedup"]["value"] == pytest.approx(12 / 6)
    assert found["speedup_e2e"]["value"] == pytest.approx(14 / 8)
    assert found["efficiency_gain"] == pytest.approx(1.0)
    assert 8 / 5 < found["speedup"]["low"] < 12 / 6 < found["speedup"]["high"] < 4, "between only b and only a"


def test_pairs_need_the_same_repeat() -> None:
    ours = [record("a", repeat=0), record("a", repeat=1)]
    assert [len(pairs) for pairs in metrics.paired(ours, [record("a", repeat=1)]).values()] == [1]


def test_saying_less_is_no_speedup() -> None:
    """A variant that stops early spends less time, but not on each token."""
    plain = [record("a", total=5.0)]
    short = [record("a", total=3.0, tokens=(1, 2, 3))]
    assert metrics.variant(Run(short, 3.0), Run(plain, 5.0))["speedup"]["value"] == pytest.approx(1.0)


def test_tokens_that_came_with_the_first_delta_are_not_decoded() -> None:
    one = Record(
        "a", "c", 0, 0, 7, (1, 2, 3, 4, 5), "", "length", 1.0, 3.0, ((1.0, 3), (3.0, 2)), None, None, None
    )  # fmt: skip
    assert one.decode_tokens == 2
    assert metrics.clock(Run([one], 3.0))["tokens_per_second"]["decode"] == 1.0


def test_a_variant_equal_to_the_baseline_has_speedup_one() -> None:
    records = [record(str(i), total=2.0 + i) for i in range(8)]
    found = metrics.variant(Run(records, 9.0), Run(records, 9.0))
    assert found["speedup"] == {"value": 1.0, "low": 1.0, "high": 1.0, "prompts": 8}
    assert found["exact_share"] == 1.0


def test_the_interval_holds_the_value_and_narrows_with_prompts() -> None:
    draw = random.Random(3)

    def width(prompts: int) -> float:
        plain = [record(str(i), total=3.0 + draw.random()) for i in range(prompts)]
        fast = [record(str(i), total=2.0 + draw.random() / 2) for i in range(prompts)]
        found = metrics.variant(Run(fast, 1.0), Run(plain, 1.0))["speedup"]
        assert found["low"] <= found["value"] <= found["high"]
        return float(found["high"] - found["low"])

    assert width(200) < width(8) / 2


@pytest.mark.parametrize("prompts", [1, 2, 7])
def test_few_prompts_have_no_interval(prompts: int) -> None:
    many = [record(str(i), repeat, total=2.0 + i) for i in range(prompts) for repeat in range(9)]
    found = metrics.variant(Run(many, 1.0), Run(many, 1.0))["speedup"]
    assert found == {"value": 1.0, "low": None, "high": None, "prompts": prompts}, "repeats are no prompts"


def test_identity_by_hand() -> None:
    """Plain: 4 rounds in 2 s. Ours: two rounds of 2 tokens, 1.5 s together: overhead 1.5, speed-up 4/3 both ways."""
    plain = Run([record(total=3.0, rounds=plain_rounds(4))], 3.0, Phases(verify=1.5, other=0.5, prefill=1.0))
    ours = [record(total=2.5, rounds=(RoundRecord(1, 1, 2, 2), RoundRecord(1, 1, 2, 2)))]
    found = metrics.variant(Run(ours, 2.5, Phases(0.5, 0.75, 0.15, 0.1, 1.0), drafts=True), plain)
    assert found["overhead"] == pytest.approx(1.5)
    assert found["speedup"]["value"] == pytest.approx(4 / 3)
    assert found["identity_residual"] == pytest.approx(0.0)
    assert found["seconds"] == {"draft": 0.5, "verify": 0.75, "accept": 0.15, "other": 0.1, "prefill": 1.0}
    assert metrics.variant(plain, plain)["overhead"] == pytest.approx(1.0)


def test_overhead_needs_a_plain_baseline() -> None:
    run = Run([record(rounds=plain_rounds(4))], 3.0, Phases(verify=1.0))
    assert metrics.overhead(run, run) == 1.0
    assert metrics.overhead(run, Run(run.records, 3.0, run.phases, drafts=True)) is None
    assert metrics.overhead(run, Run([record()], 3.0)) is None, "a baseline that does not tell its rounds"


def test_exact_share() -> None:
    plain = Run([record("a"), record("b")], 1.0)
    half = [record("a"), record("b", tokens=(1, 2, 3, 4, 6))]
    assert metrics.exact_share(Run(half, 1.0), plain) == 0.5
    assert metrics.exact_share(Run(half, 1.0, greedy=False), plain) is None
    assert metrics.exact_share(Run(half, 1.0), Run(plain.records, 1.0, drafts=True)) is None
    assert metrics.exact_share(Run([], 1.0), plain) is None


def leaves(value: object) -> list[object]:
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in leaves(inner)]
    return [value]


def test_a_failed_variant_is_null_beside_its_error() -> None:
    facts = {"lossless": True, "rule": "block", "label": "lossless for p", "meaningless": False, "rule_evidence": {"tv": 0.0}}
    plain = Run([record()], 1.0, facts=facts)
    found = metrics.summarize({"plain": plain, "bad": Run([record()], 1.0, facts=facts, error="broke")}, "plain")
    assert {name: found["variants"]["plain"][name] for name in facts} == facts
    bad = found["variants"]["bad"]
    assert bad.pop("error") == "broke"
    assert bad.pop("requests") == bad["counts"].pop("requests") == bad["lost"].pop("requests") == bad["lost"].pop("tokens") == 0
    assert {leaf for leaf in leaves(bad) if leaf is not None} == set()
    assert set(bad) == KEYS


def test_every_promised_key_is_there() -> None:
    found = metrics.summarize({"plain": Run([record()], 1.0)}, "plain")
    assert set(found) == {"baseline", "variants"}
    assert set(found["variants"]["plain"]) >= KEYS
    assert found["variants"]["plain"]["peak_memory_bytes"] is None


def test_random_weights_have_no_acceptance_but_a_clock() -> None:
    rounds = ROUNDS
    plain = Run([record(rounds=plain_rounds(4))], 3.0, Phases(verify=1.0), random_weights=True)
    found = metrics.variant(Run([record(rounds=rounds)], 3.0, Phases(verify=2.0), random_weights=True, drafts=True), plain)
    for name in metrics.MEANINGLESS_WITH_RANDOM_WEIGHTS:
        assert found[name] is None, name
    assert found["drafted"] == 12
    assert found["overhead"] == pytest.approx(2.0 / 5 * 4)
    assert found["speedup"]["value"] == pytest.approx(1.0)


def test_records_survive_json() -> None:
    import json

    for one in (record(rounds=ROUNDS), record()):
        assert Record.from_json(json.loads(json.dumps(one.to_json()))) == one


def test_the_gaps_between_tokens_by_hand() -> None:
    """Tokens that came together share the gap of their delta: 3 tokens after 1.5 s are three gaps of half a second."""
    one = replace(record(tokens=(1, 2, 3, 4, 5, 6)), arrivals=((1.0, 1), (2.5, 3), (3.5, 1), (5.5, 1)), total_s=5.5)
    assert metrics.gaps_ms([one]) == [500, 500, 500, 1000, 2000]
    assert sum(metrics.gaps_ms([one])) == pytest.approx(1e3 * one.decode_s)
    found = metrics.clock(Run([one], 5.5))["inter_token_ms"]
    assert found == {"p50": 500, "p95": None, "p99": None}
    assert metrics.gaps_ms([replace(one, tokens=(1,), arrivals=((1.0, 1),))]) == []


def test_counts_are_the_parts_of_every_share() -> None:
    plain = Run([record("b", rounds=plain_rounds(4))], 3.0)
    found = metrics.variant(Run([record("a", rounds=ROUNDS), record("b", rounds=ROUNDS[:2])], 6.0), plain)
    counts = found["counts"]
    assert counts == {
        "requests": 2, "tokens": 10, "decode_tokens": 8, "decode_seconds": 4.0, "rounds": 7, "drafted": 18, "accepted": 10,
        "nodes": 25, "emitted": 16, "rollbacks": 4,
    }  # fmt: skip
    assert found["acceptance_rate"] == counts["accepted"] / counts["drafted"]
    assert found["block_efficiency"] == counts["emitted"] / counts["rounds"]
    assert found["verification_wastage"] == (counts["nodes"] - counts["emitted"]) / counts["nodes"]
    assert found["tokens_per_second"]["decode"] == counts["decode_tokens"] / counts["decode_seconds"]
    silent = metrics.variant(Run([record("a"), record("b", rounds=ROUNDS)], 6.0), plain)["counts"]
    assert silent["decode_tokens"] == 8
    assert silent["rounds"] is silent["drafted"] is silent["rollbacks"] is None


def test_categories_by_hand() -> None:
    plain = [record("a", total=5.0), replace(record("b", total=9.0), category="d")]
    ours = [record("a", total=2.0, rounds=ROUNDS), replace(record("b", total=5.0), category="d")]
    found = metrics.variant(Run(ours, 7.0), Run(plain, 14.0))["categories"]
    assert list(found) == ["c", "d"]
    assert found["c"] == {
        "requests": 1, "tokens": 5, "tokens_per_second": 4.0, "acceptance_rate": 0.5, "block_efficiency": 2.0,
        "speedup": {"value": 4.0, "low": None, "high": None, "prompts": 1},
    }  # fmt: skip
    assert (found["d"]["speedup"]["value"], found["d"]["acceptance_rate"]) == (2.0, None)
    random_weights = metrics.variant(Run(ours, 7.0, random_weights=True), Run(plain, 14.0))
    assert random_weights["categories"]["c"]["acceptance_rate"] is None
    assert random_weights["counts"]["accepted"] is None


def test_turns_of_a_conversation_are_drawn_together() -> None:
    def talk(total: float) -> list[Record]:
        return [record("q", total=total), replace(record("q/2", total=2 * total), turn=2)]

    assert [one.conversation for one in talk(3.0)] == ["q", "q"]
    assert record("q/2").conversation == "q/2", "an id may have a slash of its own"
    found = metrics.variant(Run(talk(2.0), 6.0), Run(talk(3.0), 9.0))["speedup"]
    assert found == {"value": pytest.approx(7 / 4), "low": None, "high": None, "prompts": 1}, "2 + 5 s over 1 + 3; one of both"


def test_the_interval_is_that_of_resampled_prompts() -> None:
    """Against resampling written out, prompt by prompt."""
    draw = random.Random(5)
    plain = [record(str(i), total=3.0 + draw.random()) for i in range(12)]
    fast = [record(str(i), total=2.0 + draw.random()) for i in range(12)]
    ratios = []
    for _ in range(4000):
        chosen = [draw.randrange(12) for _ in range(12)]
        ratios.append(sum(plain[i].decode_s for i in chosen) / sum(fast[i].decode_s for i in chosen))
    found = metrics.variant(Run(fast, 1.0), Run(plain, 1.0))["speedup"]
    assert found["value"] == pytest.approx(sum(r.decode_s for r in plain) / sum(r.decode_s for r in fast))
    assert found["low"] == pytest.approx(metrics.percentile(ratios, 2.5), rel=0.02)
    assert found["high"] == pytest.approx(metrics.percentile(ratios, 97.5), rel=0.02)


def test_energy_is_told_for_each_token() -> None:
    found = metrics.variant(Run([record()], 3.0, energy_joules=20.0), Run([record()], 3.0))
    assert (found["energy_joules"], found["energy_per_token"]) == (20.0, 4.0)
    assert metrics.variant(Run([record()], 3.0), Run())["energy_per_token"] is None


def test_a_line_of_records_says_what_is_known_of_the_request() -> None:
    line = record(rounds=ROUNDS).to_json()
    assert (line["decode_s"], line["ms_per_token"], line["acceptance_rate"], line["block_efficiency"]) == (2.0, 500.0, 0.5, 2.0)
    assert record().to_json()["block_efficiency"] is None
    old = {key: value for key, value in line.items() if key not in {"turn", "decode_s"}}
    assert Record.from_json(old) == record(rounds=ROUNDS), "a line of an older run"
