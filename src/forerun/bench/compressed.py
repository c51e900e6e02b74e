"""What compressing the target costs its drafters: the same drafter's acceptance on the uncompressed target beside it."""

from __future__ import annotations

import json

from forerun.bench.blocks import Grid, Section, Text
from forerun.bench.intervals import paired, ratio_interval
from forerun.bench.material import Material
from forerun.bench.metrics import Record
from forerun.bench.show import interval, number, share
from forerun.config import NoDraftConfig, Variant

HEADER = ["variant", "beside", "acceptance", "uncompressed", "tokens/round", "uncompressed", "of the uncompressed's"]
MEANING = (
    "The same drafter on the compressed and on the uncompressed target, same prompts: accepted over drafted tokens, tokens a "
    "round, and the ratio of these. The two targets may write other texts, so that luck is in it; an interval that includes 1 "
    "shows no loss."
)


def acceptance_lost(found: Material) -> Section:
    """Each drafting variant on a compressed target beside the same one without the target's recipes, where the run has both."""
    lines = [HEADER]
    for name, whole in uncompressed(found.configs).items():
        ours, theirs = (found.measured.get(one, {}) for one in (name, whole))
        if ours.get("block_efficiency") is None or theirs.get("block_efficiency") is None:
            continue
        pairs = paired(found.records.get(name, []), found.records.get(whole, []))
        shares = [share(one["acceptance_rate"]) for one in (ours, theirs)]
        emitted = [number(one["block_efficiency"], 2) for one in (ours, theirs)]
        lines.append([name, whole, *shares, *emitted, interval(ratio_interval(pairs, rounds_a_token, seed=0))])
    return Section("Acceptance lost to compression", [Grid(lines), Text(MEANING)] if len(lines) > 1 else [])


def uncompressed(configs: dict[str, Variant]) -> dict[str, str]:
    """Of each drafting variant with recipes for the target, the one that is otherwise set as it is and has none."""
    drafting = {name: config for name, config in configs.items() if not isinstance(config.drafter, NoDraftConfig)}
    plain = {others(config): name for name, config in reversed(drafting.items()) if not config.model.recipes}
    return {
        name: plain[others(config)]
        for name, config in drafting.items()
        if config.model.recipes and others(config) in plain
    }  # fmt: skip


def others(config: Variant) -> str:
    """All settings but the target's recipes, in one string."""
    return json.dumps(config.model_dump(mode="json", exclude={"model": {"recipes"}}), sort_keys=True)


def rounds_a_token(record: Record) -> tuple[float, int]:
    rounds = record.rounds or ()
    return len(rounds), sum(one.emitted for one in rounds)
