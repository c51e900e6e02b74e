"""From raw records to the figures of summary.json: pure functions, one definition each, None for what was not measured.

A round drafts d tokens, accepts a, computes N positions of the target and emits e tokens (a + 1 unless a stop cut it).
The decode of a request is what follows its first delta: its seconds and its tokens.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any, NamedTuple

from forerun.types import Phases

RESAMPLES = 2000
MEANINGLESS_WITH_RANDOM_WEIGHTS = (
    "accepted", "acceptance_rate", "conditional_acceptance", "block_efficiency", "rollbacks", "rejected_tokens",
    "draft_wastage", "verification_wastage", "identity_residual",
)  # fmt: skip


class RoundRecord(NamedTuple):
    """One verification of one row."""

    drafted: int
    accepted: int
    nodes: int  # positions that the target computed
    emitted: int


@dataclass(frozen=True, slots=True)
class Record:
    """One completion of one request in one repeat, as records.jsonl has it; seconds count from the submission."""

    id: str
    category: str
    repeat: int
    index: int
    prompt_tokens: int
    tokens: tuple[int, ...]
    text: str
    finish: str
    first_s: float
    total_s: float
    arrivals: tuple[tuple[float, int], ...]  # seconds and tokens of each delta
    drafted: int | None  # sums over the rounds; None where the backend does not tell
    accepted: int | None
    rounds: tuple[RoundRecord, ...] | None

    @property
    def decode_s(self) -> float:
        return self.total_s - self.first_s

    @property
    def decode_tokens(self) -> int:
        return len(self.tokens) - self.arrivals[0][1]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        rounds = data["rounds"]
        return cls(
            **{
                **data,
                "tokens": tuple(data["tokens"]),
                "arrivals": tuple((at, count) for at, count in data["arrivals"]),
                "rounds": None if rounds is None else tuple(RoundRecord(*round) for round in rounds),
            }
        )


@dataclass(frozen=True)
class Run:
    """What one variant left behind. `error` says why there is nothing, or nothing more."""

    records: Sequence[Record] = ()
    wall_seconds: float = 0.0  # in which this variant had the machine, warm-up apart
    phases: Phases | None = None  # spent within wall_seconds
    facts: dict[str, Any] = field(default_factory=dict)
    greedy: bool = True
    drafts: bool = False
    random_weights: bool = False
    peak_memory_bytes: int | None = None
    utilization_percent: float | None = None
    error: str | None = None


def summarize(runs: dict[str, Run], baseline: str, seed: int = 0) -> dict[str, Any]:
    """summary.json without its `status`: every variant against the baseline."""
    return {"baseline": baseline, "variants": {name: variant(run, runs[baseline], seed) for name, run in runs.items()}}


def variant(run: Run, baseline: Run, seed: int = 0) -> dict[str, Any]:
    """All figures of one variant; of a failed one, all None beside its error."""
    if run.error is not None:
        run = Run(error=run.error)
    pairs = paired(run.records, baseline.records)
    figures = (
        clock(run)
        | {
            "speedup": ratio_interval(pairs, lambda r: (r.decode_s, r.decode_tokens), seed),
            "speedup_e2e": ratio_interval(pairs, lambda r: (r.total_s, len(r.tokens)), seed),
        }
        | acceptance(rounds_of(run.records))
        | {"seconds": seconds(run.phases)}
    )
    figures["overhead"] = overhead(run, baseline)
    speedup = figures["speedup"]["value"]
    figures["efficiency_gain"] = None if speedup is None else speedup - 1
    figures["identity_residual"] = residual(figures["block_efficiency"], figures["overhead"], speedup)
    figures |= {
        **{key: run.facts.get(key) for key in ("rule", "label", "lossless", "meaningless", "rule_evidence")},
        "exact_share": exact_share(run, baseline),
        "peak_memory_bytes": run.peak_memory_bytes,
        "weight_bytes": run.facts.get("weight_bytes"),
        "utilization_percent": run.utilization_percent,
        "quality": None,
        "error": run.error,
    }
    if run.random_weights:
        figures |= dict.fromkeys(MEANINGLESS_WITH_RANDOM_WEIGHTS)
    return figures


def clock(run: Run) -> dict[str, Any]:
    """What the clock says of one variant; per-request figures are of each request's own stream."""
    records = run.records
    tokens = sum(len(record.tokens) for record in records)
    decoding = [record for record in records if record.decode_tokens > 0 and record.decode_s > 0]
    decode_s, decode_tokens = sum(r.decode_s for r in decoding), sum(r.decode_tokens for r in decoding)
    first_ms = [1e3 * record.first_s for record in records]
    total_ms = [1e3 * record.total_s for record in records]
    token_ms = [1e3 * record.decode_s / record.decode_tokens for record in decoding]
    speeds = [record.decode_tokens / record.decode_s for record in decoding]
    return {
        "requests": len(records),
        "tokens": tokens if records else None,
        "wall_seconds": run.wall_seconds if records else None,
        "tokens_per_second": {
            "total": ratio(tokens, run.wall_seconds),
            "decode": ratio(decode_tokens, decode_s),
            "p50": percentile(speeds, 50),
        },
        "ttft_ms": {"p50": percentile(first_ms, 50), "p95": percentile(first_ms, 95)},
        "ms_per_token": {"p50": percentile(token_ms, 50), "p95": percentile(token_ms, 95)},
        "latency_ms": {
            "mean": fmean(total_ms) if total_ms else None,
            "p50": percentile(total_ms, 50),
            "p95": percentile(total_ms, 95),
        },
    }


def rounds_of(records: Iterable[Record]) -> list[RoundRecord] | None:
    """All rounds, pooled; None where any record does not tell."""
    pooled: list[RoundRecord] = []
    for record in records:
        if record.rounds is None:
            return None
        pooled += record.rounds
    return pooled


def acceptance(rounds: Sequence[RoundRecord] | None) -> dict[str, Any]:
    """Counts and shares over pooled rounds: shares are ratios of sums, never means of ratios."""
    if not rounds:
        names = ("rounds", "drafted", "accepted", "acceptance_rate", "conditional_acceptance", "block_efficiency", "rollbacks")
        return dict.fromkeys((*names, "rejected_tokens", "draft_wastage", "verification_wastage"))
    drafted = sum(round.drafted for round in rounds)
    accepted = sum(round.accepted for round in rounds)
    emitted = sum(round.emitted for round in rounds)
    nodes = sum(round.nodes for round in rounds)
    return {
        "rounds": len(rounds),
        "drafted": drafted,
        "accepted": accepted,
        "acceptance_rate": ratio(accepted, drafted),
        "conditional_acceptance": conditional_acceptance(rounds),
        "block_efficiency": emitted / len(rounds),
        "rollbacks": sum(round.accepted < round.drafted for round in rounds),
        "rejected_tokens": drafted - accepted,
        "draft_wastage": ratio(drafted - accepted, drafted),
        "verification_wastage": ratio(nodes - emitted, nodes),
    }


def conditional_acceptance(rounds: Sequence[RoundRecord]) -> list[float] | None:
    """Kaplan-Meier: of the rounds in which position i was drafted and reached, the share that accepted it."""
    shares: list[float] = []
    for i in range(max((round.drafted for round in rounds), default=0)):
        tried = [round for round in rounds if round.drafted > i and round.accepted >= i]
        if not tried:
            break
        shares.append(sum(round.accepted > i for round in tried) / len(tried))
    return shares or None


def seconds(phases: Phases | None) -> dict[str, float | None]:
    return asdict(phases) if phases else dict.fromkeys(asdict(Phases()))


def round_seconds(run: Run) -> float | None:
    """Seconds that a round of one row costs: prefill is no part of it. Rows that share a step share its cost."""
    rounds = rounds_of(run.records)
    if run.phases is None or not rounds:
        return None
    return (run.phases.draft + run.phases.verify + run.phases.accept + run.phases.other) / len(rounds)


def overhead(run: Run, baseline: Run) -> float | None:
    """A round in plain steps; the plain step is the baseline's, so there is none where the baseline drafts."""
    if baseline.drafts:
        return None
    return ratio(round_seconds(run), round_seconds(baseline))


def residual(efficiency: float | None, cost: float | None, speedup: float | None) -> float | None:
    """How far the identity speed-up = block efficiency / overhead is off the clock, as a share of the clock's speed-up."""
    predicted = ratio(efficiency, cost)
    measured = ratio(predicted, speedup)
    return None if measured is None else measured - 1


Pair = tuple[Record, Record]


def paired(ours: Iterable[Record], theirs: Iterable[Record]) -> dict[str, list[Pair]]:
    """By prompt: our record beside the baseline's of the same request, completion and repeat."""
    partner = {(record.id, record.index, record.repeat): record for record in theirs}
    pairs: dict[str, list[Pair]] = {}
    for record in ours:
        if (other := partner.get((record.id, record.index, record.repeat))) is not None:
            pairs.setdefault(record.id, []).append((record, other))
    return pairs


def ratio_interval(
    pairs: dict[str, list[Pair]], cost: Callable[[Record], tuple[float, int]], seed: int
) -> dict[str, float | None]:
    """The baseline's seconds per token over ours, with a bootstrap 95 % interval over prompts (percentile method).

    `cost` gives a record's seconds and tokens. Where both sides emit the same tokens, as greedy ones do, this is the ratio
    of the paired totals of seconds; where they do not, neither gains by saying less. One prompt gives no interval.
    """
    totals = []
    for of_prompt in pairs.values():
        ours, theirs = [cost(pair[0]) for pair in of_prompt], [cost(pair[1]) for pair in of_prompt]
        totals.append([float(sum(column)) for side in (ours, theirs) for column in zip(*side, strict=True)])

    def value(drawn: Sequence[Sequence[float]]) -> float | None:
        our_s, our_tokens, their_s, their_tokens = (sum(column) for column in zip(*drawn, strict=True))
        return ratio(ratio(their_s, their_tokens), ratio(our_s, our_tokens))

    if not totals:
        return {"value": None, "low": None, "high": None}
    draw = random.Random(seed)
    resampled = [value(draw.choices(totals, k=len(totals))) for _ in range(RESAMPLES)] if len(totals) > 1 else []
    ratios = [one for one in resampled if one is not None]
    return {"value": value(totals), "low": percentile(ratios, 2.5), "high": percentile(ratios, 97.5)}


def exact_share(run: Run, baseline: Run) -> float | None:
    """Share of greedy requests that are token for token the baseline's plain decoding."""
    pairs = [pair for of_prompt in paired(run.records, baseline.records).values() for pair in of_prompt]
    if not pairs or not run.greedy or not baseline.greedy or baseline.drafts:
        return None
    return sum(ours.tokens == theirs.tokens for ours, theirs in pairs) / len(pairs)


def ratio(over: float | None, under: float | None) -> float | None:
    return None if over is None or not under else over / under


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Linear interpolation between order statistics, as numpy's default."""
    if not values:
        return None
    ordered = sorted(values)
    at = (len(ordered) - 1) * percent / 100
    low = int(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
