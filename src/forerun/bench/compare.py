"""Finished runs side by side, each with its own run's speed-ups; across runs only where machine and prompts are the same."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forerun.bench import folder, material, sections
from forerun.bench.blocks import Block, Grid, Section, Text
from forerun.bench.folder import Folder, Records
from forerun.bench.headline import listed
from forerun.bench.material import Material, gather
from forerun.bench.report import publish
from forerun.bench.show import ABSENT, Figures, interval, short
from forerun.bench.sweeps import shown
from forerun.config import Variant
from forerun.config.part import Part

PARTS = ("drafter", "rule")
LINES = 3  # of the notes about a machine that stand for each run


@dataclass(frozen=True)
class Side:
    """One of the runs that are compared."""

    name: str
    run: Folder
    records: Records
    found: Material

    @property
    def machine(self) -> tuple[str, ...]:
        """All that is known of the machine; runs that wrote none of it are of unknown machines."""
        env = self.run.environment
        if not env:
            return (f"unknown ({self.name})",)
        gpus = [(gpu.get("name"), gpu.get("memory_bytes")) for gpu in env.get("gpus") or []]
        return tuple(
            str(one) for one in (env.get("cpu"), env.get("cpu_allowed"), env.get("threads"), env.get("memory_bytes"), gpus)
        )

    @property
    def prompts(self) -> tuple[Any, ...]:
        """The workload, and which prompts of which length were served; the length tells tokenizers and clipping apart."""
        served = {(one.id, one.prompt_tokens) for records in self.records.values() for one in records}
        return self.run.experiment.workload.model_dump_json(), frozenset(served)


@dataclass(frozen=True)
class Comparison:
    """What there is to say of several runs: what differs between them, and why no speed-up across them is computed."""

    sides: Sequence[Side]
    differences: dict[str, list[str]]  # property, its value in each run
    refused: list[str] = field(default_factory=list)  # empty: speed-ups across the runs make sense


def sides(paths: Sequence[Path]) -> list[Side]:
    """The runs in some folders. Raises UserError with one line for a folder that holds none."""
    found = []
    for path, name in zip(paths, names(paths), strict=True):
        run = folder.read(path)
        records = folder.records(path, list(run.summary["variants"]))
        experiment = run.experiment
        made = gather(run.summary, experiment.expand(), records, experiment.floor, tuple(experiment.axes))
        found.append(Side(name, run, records, made))
    return found


def names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart; with a number where one folder is named twice."""
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts)) + 1):
        found = ["/".join(one[-length:]) for one in parts]
        if len(set(found)) == len(found):
            return found
    return [f"{path.name}#{i}" for i, path in enumerate(paths, 1)]


def compare(found: Sequence[Side]) -> Comparison:
    """Which properties differ, and whether any of them forbids a speed-up across runs."""
    env = [side.run.environment for side in found]
    every = {
        "machine": [folder.device(one) if one else "unknown" for one in env],
        "CPU cores, threads": [f"{one.get('cpu_allowed')}, {one.get('threads')}" for one in env],
        "memory": [str(one.get("memory_bytes")) for one in env],
        "platform": [str(one.get("platform")) for one in env],
        "forerun": [str(one.get("forerun")) for one in env],
        "commit": [short(one.get("commit") or "no checkout") for one in env],
        "Python": [str(one.get("python")) for one in env],
        "packages": [folder.packages(one) or ABSENT for one in env],
        "model": [settings(side.run.experiment.model) for side in found],
        "workload": [settings(side.run.experiment.workload) for side in found],
        "sampling": [settings(side.run.experiment.sampling) for side in found],
        "engine": [settings(side.run.experiment.engine) for side in found],
        **methods(found),
        "quality": ["; ".join(of_kind(one) for one in side.run.experiment.quality) or "none" for side in found],
        "floor": [side.run.experiment.floor or "none" for side in found],
        "repeats": [str(side.run.experiment.repeats) for side in found],
        "status": [str(side.run.summary.get("status")) for side in found],
        "started": [str(one.get("started")) for one in env],
    }
    refused = []
    if len({side.machine for side in found}) > 1:
        refused.append("the machines differ")
    if len({side.prompts for side in found}) > 1 or not all(side.prompts[1] for side in found):
        refused.append("the prompts differ, or their records are missing")
    return Comparison(found, {name: values for name, values in every.items() if len(set(values)) > 1}, refused)


def methods(found: Sequence[Side]) -> dict[str, list[str]]:
    """Drafter and rule of the variants that all runs have, by name; then of which names there are."""
    variants = [side.run.experiment.expand() for side in found]
    shared = [name for name in variants[0] if all(name in one for one in variants)]
    parts = {f"{name}, {part}": [of_kind(getattr(one[name], part)) for one in variants] for name in shared for part in PARTS}
    return {"variants": [", ".join(one) for one in variants]} | parts


def of_kind(part: Part) -> str:
    """A part's kind and what it sets apart from the defaults."""
    set_to = part.model_dump(mode="json", exclude_defaults=True, exclude={"kind"})
    return ", ".join([str(getattr(part, "kind", "")), *(f"{key} {shown(value)}" for key, value in set_to.items())])


def settings(part: Part) -> str:
    """What a part of a configuration sets, apart from the defaults."""
    set_to = part.model_dump(mode="json", exclude_defaults=True)
    return ", ".join(f"{key} {shown(value)}" for key, value in set_to.items()) or "defaults"


def merged(found: Comparison) -> Material:
    """All variants as RUN/variant, each with the speed-ups of its own run."""
    variants: dict[str, Any] = {}
    configs: dict[str, Variant] = {}
    records: Records = {}
    baselines: dict[str, str] = {}
    plains: dict[str, str] = {}
    for side in found.sides:

        def own(name: str, run: str = side.name) -> str:
            return f"{run}/{name}"

        variants |= {own(name): renamed(figures, own) for name, figures in side.found.variants.items()}
        configs |= {own(name): config for name, config in side.found.configs.items()}
        records |= {own(name): lines for name, lines in side.records.items()}
        baselines |= {own(name): own(baseline) for name, baseline in side.found.baselines.items()}
        plains |= {own(name): own(plain) for name, plain in side.found.own_plains.items()}
    summary = {"status": "complete", "baseline": None, "variants": variants}
    return Material(summary, configs, records, baselines=baselines, own_plains=plains)


def renamed(figures: Figures, own: Callable[[str], str]) -> Figures:
    """With the new name of the variant that it shares a score with."""
    quality = figures.get("quality") or {}
    told = {name: one | {"shared_with": own(one["shared_with"])} for name, one in quality.items() if one.get("shared_with")}
    return figures | {"quality": quality | told} if told else figures


def across(found: Comparison, whole: Material) -> dict[str, dict[str, float | None]]:
    """Each variant's speed-up over the first run's baseline; empty where that is refused."""
    if found.refused:
        return {}
    first = found.sides[0]
    base = f"{first.name}/{first.run.summary['baseline']}"
    others = [name for name in whole.measured if not name.startswith(f"{first.name}/")]
    return {name: material.speedup(whole.records, name, base) for name in others}


def told(found: Comparison, whole: Material) -> list[Section]:
    """The sections that only a comparison has."""
    runs = [side.name for side in found.sides]
    blocks: list[Block] = [Text(f"Compared: {listed(runs, most=99)}. Every speed-up is over the baseline of its own run.")]
    if unfinished := [side.name for side in found.sides if side.run.summary.get("status", "complete") != "complete"]:
        blocks.append(Text(f"Not finished, so of fewer prompts than meant: {listed(unfinished)}."))
    first, crossed = found.sides[0], across(found, whole)
    if found.refused:
        why = " and ".join(found.refused)
        text = f"No speed-up across these runs is computed: {why}, and a ratio of their times would mix that in."
        blocks.append(Text(text))
    else:
        base = f"{first.name}/{first.run.summary['baseline']}"
        blocks.append(
            Text(
                f"The machine (as far as it tells) and the prompts are the same, so the others are set against {base} too. "
                "They did not take turns with it: drift of the machine between them is in these figures."
            )
        )
        blocks.append(Grid([["variant", f"over {base}"], *[[name, interval(one)] for name, one in crossed.items()]]))
    rows = [["", *runs], *[[name, *values] for name, values in found.differences.items()]]
    differs = Section("What differs", [Grid(rows)] if found.differences else [Text("Nothing that the runs wrote down.")])
    return [Section("", [blocks[0]]), Section("Across runs", blocks[1:]), differs]


def write(paths: Sequence[Path], out: Path) -> Comparison:
    """report.md, report.html and summary.csv of a comparison into `out`."""
    found = compare(sides(paths))
    whole = merged(found)
    notes = [f"{side.name}: {line}" for side in found.sides for line in folder.machine(side.run.environment)[:LINES]]
    made = [*told(found, whole), *sections.compared(whole), *sections.appendix(whole, notes)]
    out.mkdir(parents=True, exist_ok=True)
    publish("forerun report", listed([side.name for side in found.sides]), made, whole, out)
    return found
