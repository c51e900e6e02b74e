"""All that a report is made of, in one value, and what follows from it: plain decoding beside each variant, and its look."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from forerun.bench import sweeps
from forerun.bench.charts import Paint
from forerun.bench.folder import Records
from forerun.bench.intervals import paired, ratio, ratio_interval
from forerun.bench.metrics import decode_cost
from forerun.bench.show import Figures, bounds
from forerun.config import NoDraftConfig, Variant

COLOURS = 7


@dataclass(frozen=True)
class Material:
    """One run, or several laid side by side (then without a baseline of their own)."""

    summary: dict[str, Any]
    configs: dict[str, Variant]
    records: Records = field(default_factory=dict)
    floor: str | None = None
    axes: tuple[str, ...] = ()
    baselines: dict[str, str] = field(default_factory=dict)  # each variant's, of its own run
    own_plains: dict[str, str] = field(default_factory=dict)  # plain decoding of the variant's own target and setting

    @property
    def variants(self) -> dict[str, Figures]:
        found: dict[str, Figures] = self.summary["variants"]
        return found

    @property
    def measured(self) -> dict[str, Figures]:
        return {name: figures for name, figures in self.variants.items() if figures.get("error") is None}

    def plain_beside(self, name: str) -> tuple[str, Figures] | None:
        """The plain decoding that a variant's rounds are measured in: its own, else its run's baseline if that is plain."""
        beside = self.own_plains.get(name) or self.baselines.get(name)
        config = self.configs.get(beside) if beside else None
        if beside not in self.measured or (config is not None and not isinstance(config.drafter, NoDraftConfig)):
            return None
        return beside, self.variants[beside]


def gather(
    summary: dict[str, Any], configs: dict[str, Variant], records: Records, floor: str | None, axes: tuple[str, ...]
) -> Material:
    """The material of one run, the speed-ups over own plain decoding added to its figures."""
    plains, baseline, added = sweeps.own_plains(configs), summary["baseline"], dict(summary["variants"])
    if any(plain != baseline for plain in plains.values()):
        for name in plains.keys() & added.keys():
            own = added[name].get("speedup") if plains[name] == baseline else over(plains[name], name, summary, records)
            added[name] = added[name] | {"over_own_plain": own}
    baselines = dict.fromkeys(added, baseline)
    return Material(summary | {"variants": added}, configs, records, floor, axes, baselines, plains)


def over(plain: str, name: str, summary: dict[str, Any], records: Records) -> dict[str, float | None]:
    """A variant's speed-up over another one of its run: from the records with an interval, else from the two speed-ups."""
    variants = summary["variants"]
    if any(variants.get(one, {"error": ""}).get("error") is not None for one in (plain, name)):
        return {"value": None, "low": None, "high": None}
    found = speedup(records, name, plain)
    if found["value"] is None:
        ours, theirs = (bounds(variants.get(one, {}).get("speedup"))[0] for one in (name, plain))
        return {"value": ratio(ours, theirs), "low": None, "high": None}
    return found


def speedup(records: Records, name: str, plain: str) -> dict[str, float | None]:
    """Decode seconds per token of `plain` over those of `name`, on the prompts that both have."""
    pairs = paired(records.get(name, []), records.get(plain, []))
    return ratio_interval(pairs, decode_cost, seed=0)


def paints(variants: dict[str, Figures], baselines: set[str]) -> dict[str, Paint]:
    """A look for each variant: the fastest few in colours of their own, baselines in ink, the rest in grey."""
    others = [name for name in variants if name not in baselines]
    ranked = sorted(others, key=lambda name: -(bounds(variants[name].get("speedup"))[0] or 0.0))[:COLOURS]
    colours = {name: f"c{i}" for i, name in enumerate(name for name in others if name in ranked)}
    return {
        name: Paint("base" if name in baselines else colours.get(name, "rest"), i % 4, figures.get("lossless") is False)
        for i, (name, figures) in enumerate(variants.items())
    }
