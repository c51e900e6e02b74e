"""`forerun compress --floor`: the largest fraction that keeps a measured quality, and the model of that fraction."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from forerun.build import Models, build
from forerun.compress import floor as floors
from forerun.compress.coupled import NothingPrunedError
from forerun.compress.partial import clear, exchange, held
from forerun.compress.recipes import apart
from forerun.compress.run import MADE, Report, compress, refuse_taken
from forerun.config import Compression, PruneConfig, QualityConfig, Variant, merge, parse
from forerun.evaluate.measure import check as check_quality
from forerun.evaluate.measure import measure as measure_quality
from forerun.evaluate.quality import Quality, Tell
from forerun.types import Backend, Sampling, UserError
from forerun.verbs.compress import Bar, headline, size

Measure = Callable[[QualityConfig, Backend, Sampling, Path, Tell], list[Quality]]
FOUND = "floor.json"
"""What was looked at, in the folder of the model that was found."""
TOKENS = 16384
"""Tokens of a first look at a perplexity, for which questions are too small a unit."""


def search(
    config: Compression,
    out: Path,
    wanted: str,
    axis: str | None,
    console: Console,
    *,
    overwrite: bool = False,
    as_json: bool = False,
    measure: Measure = measure_quality,
    check: Callable[[QualityConfig], None] = check_quality,
) -> int:
    """Returns 0, or 1 where the floor does not hold even with nothing pruned.

    `measure` and `check`, which opens the data of a measure, stand in for real ones in tests.
    """
    floor, axis = floors.parse(wanted), axis or only_fraction(config)
    quality, own = chosen(config.located(), floor), at(config, axis, 0.0)
    check(quality)
    refuse_taken(out, overwrite)
    work = out.with_name(out.name + ".search")
    with Bar.on(console) as bar:
        trials = Trials(own, axis, floor, quality, work, measure, bar.tell)

        def tell(probe: floors.Probe) -> None:
            trials.keep_only(probe)
            bar.progress.console.print(said(floor, probe, trials.bytes[probe.fraction]), markup=False, highlight=False)

        with held(work, out) as mark:
            refuse_taken(out, overwrite)  # again: another run may have made it meanwhile
            clear(mark)
            first = TOKENS if floor.name == "perplexity" else floors.FIRST
            _, probes = floors.search(trials.measured, floor, first=first, most=quality.limit, tell=tell)
            trials.backend, fraction = None, trials.best
            if fraction is not None:
                found = {"floor": str(floor), "axis": axis, "fraction": fraction, "probes": [asdict(one) for one in probes]}
                (work / str(fraction) / FOUND).write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
                refuse_taken(out, overwrite)
                exchange(work / str(fraction), work, out)
    if as_json:
        looks = [asdict(one) | {"bytes": trials.bytes[one.fraction]} for one in probes]
        print(json.dumps({"folder": str(out), "floor": str(floor), "axis": axis, "fraction": fraction, "probes": looks}))
    else:
        shown = Console(quiet=console.quiet)
        shown.print(table(floor, axis, probes, trials.bytes))
        shown.print(verdict(floor, axis, fraction, probes), markup=False, highlight=False)
        if fraction is not None:
            shown.print(headline(trials.reports[fraction], str(out)), markup=False, highlight=False)
    return int(fraction is None)


def only_fraction(config: Compression) -> str:
    pruning = [index for index, recipe in enumerate(config.recipes) if isinstance(recipe, PruneConfig)]
    if len(pruning) != 1:
        raise UserError(f"--floor: {len(pruning)} recipes prune; say which fraction is searched: --axis recipes.0.fraction")
    return f"recipes.{pruning[0]}.fraction"


def at(config: Compression, axis: str, fraction: float) -> Compression:
    """The compression with another value of the axis."""
    place: Any = config.model_dump()
    for part in axis.split("."):
        index: Any = int(part) if isinstance(place, list | tuple) and part.isdigit() else part
        try:
            place = place[index]
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"--axis {axis}: there is no such number; name a fraction, such as recipes.0.fraction") from error
    if not isinstance(place, float) or not axis.startswith("recipes."):
        raise UserError(f"--axis {axis} is {place!r}; name a fraction, such as recipes.0.fraction")
    change: Any = fraction
    for part in reversed(axis.split(".")):
        change = {part: change}
    return parse(Compression, merge(config.model_dump(), change), f"--axis {axis}={fraction}")


def chosen(config: Compression, floor: floors.Floor) -> QualityConfig:
    """The measure that the floor names, with the settings that the config gives it."""
    for quality in config.quality:
        if floor.name in (quality.kind, *getattr(quality, "tasks", ())):
            return quality
    asked = {**config.model_dump(), "quality": [{"kind": floor.name}]}
    return parse(Compression, asked, f"--floor {floor}").located().quality[0]


@dataclass
class Trials:
    """Models of the fractions that are looked at: each compressed once, one of them loaded, the best one so far kept."""

    config: Compression
    axis: str
    floor: floors.Floor
    quality: QualityConfig
    work: Path
    measure: Measure
    tell: Tell
    reports: dict[float, Report] = field(default_factory=dict)
    backend: tuple[float, Backend] | None = None
    best: float | None = None
    whole: dict[int | None, Quality] = field(default_factory=dict)  # with nothing pruned, by questions
    too_small: set[float] = field(default_factory=set)  # fractions that prune nothing: their model is that of 0

    @property
    def bytes(self) -> dict[float, int]:
        return {fraction: report.bytes_after for fraction, report in self.reports.items()}

    def measured(self, fraction: float, questions: int | None) -> Quality:
        """The quality at a fraction, on the first so many questions."""
        if fraction not in self.too_small and (self.backend is None or self.backend[0] != fraction):
            self.backend = None  # before the next model is loaded
            try:
                self.backend = fraction, self.open(fraction)
            except NothingPrunedError:
                if fraction == 0:  # another recipe's doing
                    raise
                self.too_small.add(fraction)
                self.reports[fraction] = self.reports[0]
        if fraction in self.too_small:
            return self.whole[questions]
        assert self.backend is not None
        quality = self.quality if questions is None else self.quality.model_copy(update={"limit": questions})
        items = self.work / "items"
        figures = self.measure(quality, self.backend[1], self.config.sampling.build(), items, self.tell)
        named = [one for one in figures if one.name == self.floor.name]
        if fraction == 0:
            self.whole[questions] = (named or figures)[0]
        return (named or figures)[0]

    def open(self, fraction: float) -> Backend:
        folder, config = self.work / str(fraction), at(self.config, self.axis, fraction)
        shutil.rmtree(folder, ignore_errors=True)
        first = 0 if config.model.recipes else apart(config.recipes)
        if first and first <= int(self.axis.split(".")[1]):  # the same at every fraction
            before = self.work / "quantized"
            if not before.exists():
                compress(config.model_copy(update={"recipes": config.recipes[:first]}), before, self.tell)
            own = config.model.model_copy(update={"path": str(before), "weights": "pretrained", "recipes": ()})
            config = config.model_copy(update={"model": own, "recipes": config.recipes[first:]})
        self.reports[fraction] = compress(config, folder, lambda what, *n: self.tell(f"{fraction:.1%}, {what}", *n))
        model = config.model.model_copy(update={"path": str(folder), "weights": "pretrained", "recipes": ()})
        return build(Variant(model=model, sampling=config.sampling, engine=config.engine), Models())

    def keep_only(self, probe: floors.Probe) -> None:
        """Remove the models that cannot be the answer any more."""
        if probe.kept and probe.fraction not in self.too_small:
            self.best = probe.fraction
        for place in self.work.glob(f"*/{MADE}"):
            if place.parent.name not in (str(self.best), "quantized"):
                shutil.rmtree(place.parent)


def said(floor: floors.Floor, probe: floors.Probe, bytes_held: int) -> str:
    interval = "" if probe.low is None or probe.high is None else f" ({probe.low:.4g} to {probe.high:.4g})"
    decision = ("keeps" if probe.kept else "misses") + f" {floor}" + ("" if probe.decided else ", by the value alone")
    return f"{probe.fraction:.2%}: {floor.name} {probe.value:.4g}{interval}, {size(bytes_held)}: {decision}"


def table(floor: floors.Floor, axis: str, probes: list[floors.Probe], bytes_held: dict[float, int]) -> Table:
    shown = Table(title=f"{axis}, where {floor}")
    for name in ("fraction", floor.name, "95 % interval", "tokens" if floor.name == "perplexity" else "questions", "bytes"):
        shown.add_column(name, justify="right")
    shown.add_column("holds")
    for probe in sorted(probes, key=lambda one: one.fraction):
        interval = "" if probe.low is None or probe.high is None else f"{probe.low:.4g} to {probe.high:.4g}"
        holds = ("yes" if probe.kept else "no") + ("" if probe.decided else ", by the value")
        shown.add_row(
            f"{probe.fraction:.2%}", f"{probe.value:.4g}", interval, str(probe.count), size(bytes_held[probe.fraction]), holds
        )
    return shown


def verdict(floor: floors.Floor, axis: str, fraction: float | None, probes: list[floors.Probe]) -> str:
    if fraction is None:
        return f"{floor} does not hold even at {axis}={probes[0].fraction:g}; nothing was written"
    missed = [probe.fraction for probe in probes if not probe.kept]
    above = f", {min(missed):.2%} misses it" if missed else ""
    return f"{axis}={fraction:g} is the largest found that keeps {floor}{above} (taking quality to fall as the fraction rises)"
