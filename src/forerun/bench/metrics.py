"""From raw records to the figures of summary.json: pure functions, one definition each, None for what was not measured.

A round drafts d tokens, accepts a, computes N positions of the target and emits e tokens (a + 1 unless a stop cut it).
The decode of a request is what follows its first delta: its seconds and its tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from forerun.bench.intervals import Pair, paired, percentile, ratio, ratio_interval
from forerun.bench.quality import Finding, beside, sharing
from forerun.types import Phases

MEANINGLESS_WITH_RANDOM_WEIGHTS = (
    "accepted", "acceptance_rate", "conditional_acceptance", "block_efficiency", "rollbacks", "rejected_tokens",
    "draft_wastage", "verification_wastage", "identity_residual",
)  # fmt: skip

REASONS = 3
"""Most reasons for lost requests that a summary names."""
NEEDED = {50: 1, 95: 20, 99: 100}
"""Requests below which a percentile is the greatest value or so, and null."""


class RoundRecord(NamedTuple):
    """One verification of one row."""

    drafted: int
    accepted: int
    nodes: int  # positions that the target computed
    emitted: int


@dataclass(frozen=True, slots=True)
class Record:
    """One completion of one request in one repeat, as records.jsonl has it.

    Seconds count from the request's submission, in an open loop from its arrival.
    """

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
    turn: int = 1  # of its conversation; the id of a later one ends with `/2`, `/3`, ...

    @property
    def decode_s(self) -> float:
        return self.total_s - self.first_s

    @property
    def decode_tokens(self) -> int:
        return len(self.tokens) - self.arrivals[0][1]

    @property
    def ms_per_token(self) -> float | None:
        return ratio(1e3 * self.decode_s, self.decode_tokens)

    @property
    def acceptance_rate(self) -> float | None:
        return ratio(self.accepted, self.drafted)

    @property
    def block_efficiency(self) -> float | None:
        return ratio(sum(round.emitted for round in self.rounds), len(self.rounds)) if self.rounds else None

    @property
    def key(self) -> tuple[str, int, int]:
        """What it shares with the record of the same request of another variant."""
        return self.id, self.index, self.repeat

    @property
    def conversation(self) -> str:
        return self.id.removesuffix(f"/{self.turn}") if self.turn > 1 else self.id

    def to_json(self) -> dict[str, Any]:
        derived = ("decode_s", "ms_per_token", "acceptance_rate", "block_efficiency")
        return asdict(self) | {name: getattr(self, name) for name in derived}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Record:
        rounds = data["rounds"]
        own = {one.name: data[one.name] for one in fields(cls) if one.name in data}
        return cls(
            **{
                **own,
                "tokens": tuple(data["tokens"]),
                "arrivals": tuple((at, count) for at, count in data["arrivals"]),
                "rounds": None if rounds is None else tuple(RoundRecord(*round) for round in rounds),
            }
        )


@dataclass(frozen=True, slots=True)
class Lost:
    """One completion that the backend gave up, as lost.jsonl has it, and nothing else: no figure counts it."""

    id: str
    category: str
    repeat: int
    index: int
    turn: int
    tokens: int  # that had come
    reason: str


@dataclass(frozen=True)
class Run:
    """What one variant left behind. `error` says why there is nothing, or nothing more."""

    records: Sequence[Record] = ()
    wall_seconds: float | None = 0.0  # in which this variant had the machine, warm-up apart
    phases: Phases | None = None  # spent within wall_seconds
    facts: dict[str, Any] = field(default_factory=dict)
    greedy: bool = True
    drafts: bool = False
    random_weights: bool = False
    peak_memory_bytes: int | None = None  # of a process
    peak_device_bytes: int | None = None  # of a GPU
    cpu_percent: float | None = None  # of all allowed cores
    utilization_percent: float | None = None  # of the GPU
    energy_joules: float | None = None
    quality: tuple[Finding, ...] = ()
    lost: Sequence[Lost] = ()
    hash: str | None = None  # of all that decides what is measured
    session: str | None = None  # runs of one session took turns on the machine
    error: str | None = None


def summarize(runs: dict[str, Run], baseline: str, seed: int = 0) -> dict[str, Any]:
    """summary.json without its `status`: every variant against the baseline."""
    found = {name: variant(run, runs[baseline], seed) for name, run in runs.items()}
    for name, shared in sharing({name: () if run.error is not None else run.quality for name, run in runs.items()}).items():
        for measure, owner in shared.items():
            found[name]["quality"][measure]["shared_with"] = owner
    return {"baseline": baseline, "variants": found}


def variant(run: Run, baseline: Run, seed: int = 0) -> dict[str, Any]:
    """All figures of one variant; of a failed one, all None beside its error."""
    if run.error is not None:
        run = Run(error=run.error, lost=run.lost)
    run, baseline = timed(run), timed(baseline)
    pairs = paired(run.records, baseline.records)
    figures = (
        clock(run)
        | {
            "speedup": ratio_interval(pairs, decode_cost, seed),
            "speedup_e2e": ratio_interval(pairs, lambda r: (r.total_s, len(r.tokens)), seed),
        }
        | acceptance(rounds_of(run.records))
        | {"seconds": seconds(run.phases), "counts": counts(run.records), "lost": losses(run.lost)}
    )
    figures["overhead"] = overhead(run, baseline)
    speedup = figures["speedup"]["value"]
    figures["efficiency_gain"] = None if speedup is None else speedup - 1
    figures["identity_residual"] = residual(figures["block_efficiency"], figures["overhead"], speedup)
    facts = ("rule", "label", "lossless", "meaningless", "compressed", "rule_evidence", "weight_bytes", "kv_bytes", "commit")
    own = (
        "peak_memory_bytes", "peak_device_bytes", "cpu_percent", "utilization_percent", "energy_joules", "hash", "error"
    )  # fmt: skip
    figures |= {
        **{key: run.facts.get(key) for key in facts},
        **{key: getattr(run, key) for key in own},
        "energy_per_token": ratio(run.energy_joules, figures["tokens"]),
        "exact_share": exact_share(run, baseline),
        "interleaved": run.session == baseline.session if run.records and baseline.records else None,
        "quality": beside(run.quality, baseline.quality, lossy=lossy(run)),
        "categories": categories(run, pairs, seed),
    }
    if run.random_weights:
        figures |= dict.fromkeys(MEANINGLESS_WITH_RANDOM_WEIGHTS)
        figures["counts"] |= dict.fromkeys(("accepted", "emitted", "rollbacks"))
    return figures


def lossy(run: Run) -> bool:
    """Whether what is accepted is not known to be the target's law; without drafts only a broken rule changes anything."""
    lossless = run.facts.get("lossless")
    return lossless is False or (run.drafts and lossless is None)


def decode_cost(record: Record) -> tuple[float, int]:
    return record.decode_s, record.decode_tokens


def timed(run: Run) -> Run:
    """Without the totals that hold the time of lost requests too, and of an outage: they tell nothing of the others."""
    if not run.lost:
        return run
    return replace(run, wall_seconds=None, phases=None, energy_joules=None, cpu_percent=None, utilization_percent=None)


def losses(lost: Sequence[Lost]) -> dict[str, Any]:
    """How many completions were lost, their tokens that had come, and why: the most frequent reasons."""
    found = Counter(one.reason for one in lost).most_common()
    told = [reason if len(found) == 1 else f"{reason} ({count})" for reason, count in found[:REASONS]]
    more = [f"and {len(found) - REASONS} other reasons"] if len(found) > REASONS else []
    return {"requests": len(lost), "tokens": sum(one.tokens for one in lost), "why": "; ".join([*told, *more]) or None}


def clock(run: Run) -> dict[str, Any]:
    """What the clock says of one variant; per-request figures are of each request's own stream."""
    records = run.records
    tokens = sum(len(record.tokens) for record in records)
    decoding = decoded(records)
    first_ms = [1e3 * record.first_s for record in records]
    total_ms = [1e3 * record.total_s for record in records]
    token_ms = [1e3 * record.decode_s / record.decode_tokens for record in decoding]
    speeds = [record.decode_tokens / record.decode_s for record in decoding]
    return {
        "requests": len(records),
        "tokens": tokens if records else None,
        "wall_seconds": run.wall_seconds if records else None,
        "in_flight": ratio(sum(record.total_s for record in records), run.wall_seconds),  # Little's law
        "tokens_per_second": {
            "total": ratio(tokens, run.wall_seconds),
            "decode": decode_speed(records),
            "p50": percentile(speeds, 50),
        },
        "ttft_ms": percentiles(first_ms, len(records)),
        "ms_per_token": percentiles(token_ms, len(decoding), (50, 95)),
        "inter_token_ms": percentiles(gaps_ms(records), len(decoding)),
        "latency_ms": {"mean": fmean(total_ms) if total_ms else None} | percentiles(total_ms, len(records)),
    }


def percentiles(values: Sequence[float], requests: int, which: Sequence[int] = (50, 95, 99)) -> dict[str, float | None]:
    """Those for which there are requests enough; null the others."""
    return {f"p{one}": percentile(values, one) if requests >= NEEDED[one] else None for one in which}


def decoded(records: Iterable[Record]) -> list[Record]:
    """Those with anything after their first delta."""
    return [record for record in records if record.decode_tokens > 0 and record.decode_s > 0]


def decode_speed(records: Iterable[Record]) -> float | None:
    """Tokens a second in the requests' own streams, pooled."""
    decoding = decoded(records)
    return ratio(sum(record.decode_tokens for record in decoding), sum(record.decode_s for record in decoding))


def gaps_ms(records: Iterable[Record]) -> list[float]:
    """One gap for each token but those of the first delta: tokens that came together share their delta's gap evenly."""
    found: list[float] = []
    for record in records:
        at = np.array([at for at, _ in record.arrivals])
        counts = np.array([count for _, count in record.arrivals])
        found += np.repeat(1e3 * np.diff(at) / counts[1:], counts[1:]).tolist()
    return found


def rounds_of(records: Iterable[Record]) -> list[RoundRecord] | None:
    """All rounds, pooled; None where any record does not tell."""
    pooled: list[RoundRecord] = []
    for record in records:
        if record.rounds is None:
            return None
        pooled += record.rounds
    return pooled


def counts(records: Sequence[Record]) -> dict[str, Any]:
    """Numerators and denominators of the shares and speeds, pooled; decode figures of the requests that decoded."""
    rounds, decoding = rounds_of(records), decoded(records)
    told = {
        "rounds": len(rounds or ()),
        **{name: sum(getattr(round, name) for round in rounds or ()) for name in RoundRecord._fields},
        "rollbacks": sum(round.accepted < round.drafted for round in rounds or ()),
    }
    return {
        "requests": len(records),
        "tokens": sum(len(record.tokens) for record in records) if records else None,
        "decode_tokens": sum(record.decode_tokens for record in decoding) if records else None,
        "decode_seconds": sum(record.decode_s for record in decoding) if records else None,
    } | (told if rounds else dict.fromkeys(told))


def categories(run: Run, pairs: dict[str, list[Pair]], seed: int) -> dict[str, dict[str, Any]]:
    """By category: tokens a second of decoding, acceptance, block efficiency and speed-up."""
    found: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(record.category for record in run.records):
        records = [record for record in run.records if record.category == name]
        own = {id: of for id, of in pairs.items() if of[0][0].category == name}
        told = acceptance(None if run.random_weights else rounds_of(records))
        found[name] = {
            "requests": len(records),
            "tokens": sum(len(record.tokens) for record in records),
            "tokens_per_second": decode_speed(records),
            "acceptance_rate": told["acceptance_rate"],
            "block_efficiency": told["block_efficiency"],
            "speedup": ratio_interval(own, decode_cost, seed),
        }
    return found


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


def exact_share(run: Run, baseline: Run) -> float | None:
    """Share of greedy requests that are token for token the baseline's plain decoding."""
    pairs = [pair for of_prompt in paired(run.records, baseline.records).values() for pair in of_prompt]
    if not pairs or not run.greedy or not baseline.greedy or baseline.drafts:
        return None
    return sum(ours.tokens == theirs.tokens for ours, theirs in pairs) / len(pairs)
