"""One experiment: a base variant, what it runs on, and what varies; from YAML and overrides `a.b=c`, and back."""

from __future__ import annotations

import difflib
import itertools
from pathlib import Path
from typing import Any, Literal

from omegaconf import OmegaConf
from pydantic import Field, field_validator

from forerun.config.data import PerplexityConfig, QualityConfig, WorkloadConfig, named
from forerun.config.files import read
from forerun.config.parsing import flatten_keys, merge, nest, parse
from forerun.config.part import Part
from forerun.config.parts import (
    METHODS,
    DrafterConfig,
    EngineConfig,
    LosslessRuleConfig,
    ModelConfig,
    NoDraftConfig,
    RuleConfig,
    SamplingConfig,
)
from forerun.config.serving import EndpointConfig, VllmConfig
from forerun.types import UserError


class Variant(Part):
    """One thing to measure: everything but the workload, repeats and names."""

    model: ModelConfig = ModelConfig()
    drafter: DrafterConfig = NoDraftConfig()
    rule: RuleConfig = LosslessRuleConfig()
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
    backend: Literal["forerun", "reference", "vllm", "endpoint"] = "forerun"
    vllm: VllmConfig = VllmConfig()
    endpoint: EndpointConfig = EndpointConfig()

    @field_validator("drafter", mode="before")
    @classmethod
    def canonical(cls, drafter: Any) -> Any:
        """`naive` and `draft` are names that people know for `none` and `model`."""
        if isinstance(drafter, dict) and drafter.get("kind") in METHODS:
            return {**drafter, "kind": METHODS[drafter["kind"]]}
        return drafter


class LogConfig(Part):
    """Weights & Biases: where a run is logged to; without a network set WANDB_MODE=offline."""

    project: str = "forerun"
    entity: str | None = None
    name: str | None = None  # None: the name of the run's folder


class Experiment(Variant):
    """A base variant, what runs on it, and what varies."""

    workload: WorkloadConfig = WorkloadConfig()
    quality: tuple[QualityConfig, ...] = ()  # measured on every variant
    floor: str | None = None  # such as `race-high>=0.5`: the headline's fastest variant must keep it
    data: str | None = None  # folder of data sets: a named one without a path is looked for here before the Hub is asked
    fresh: bool = False  # each variant alone in a process of its own, one after another, instead of interleaved
    wandb: LogConfig | None = None
    repeats: int = Field(default=3, ge=1)
    warmup: int = Field(default=1, ge=0)  # requests run and thrown away, each variant
    variants: dict[str, dict[str, Any]] = Field(default={})
    axes: dict[str, list[Any]] = Field(default={})
    excludes: tuple[dict[str, Any], ...] = ()
    baseline: str | None = None

    @field_validator("variants", mode="before")
    @classmethod
    def nested(cls, variants: Any) -> Any:
        """A variant may say `drafter.k: 3` for `drafter: {k: 3}`, and nothing at all for the base itself."""
        if not isinstance(variants, dict):
            return variants
        return {str(name): nest(over or {}) if isinstance(over, dict | None) else over for name, over in variants.items()}

    @field_validator("quality", mode="before")
    @classmethod
    def by_name(cls, quality: Any) -> Any:
        return named(quality)

    @field_validator("axes", mode="before")
    @classmethod
    def flat(cls, axes: Any) -> Any:
        """An axis may be written nested (as the override `axes.drafter.k=[3,5]` arrives) or under its dotted name."""
        flat = flatten_keys(axes) if isinstance(axes, dict) else axes
        if isinstance(flat, dict) and (empty := [key for key, values in flat.items() if values == []]):
            raise ValueError(f"the axis {empty[0]} has no values; give at least one, or leave it out")
        return flat

    @field_validator("excludes", mode="before")
    @classmethod
    def flat_cuts(cls, excludes: Any) -> Any:
        if not isinstance(excludes, list | tuple):
            return excludes
        return tuple(flatten_keys(cut) if isinstance(cut, dict) else cut for cut in excludes)

    def expand(self) -> dict[str, Variant]:
        """The variants by name: the named ones crossed with the axes, without the excluded points.

        An exclude names axes, settings of the variant (`engine.rows`) or its name (`variant`), and cuts where all agree.
        """
        base = self.model_dump(include=set(Variant.model_fields))
        found: dict[str, Variant] = {}
        known: set[str] = set()
        for name, overrides in (self.variants or {"base": {}}).items():
            for values in itertools.product(*self.axes.values()):
                point = dict(zip(self.axes, values, strict=True))
                told = {"variant": name} | point
                known |= told.keys()
                if self.cuts(told):  # before it is parsed: what cannot be is a reason to exclude it
                    continue
                if kind_of_drafter(base, overrides) == "none" and "drafter.kind" not in point:
                    # Plain decoding is one variant, whatever the drafters beside it vary.
                    point = {key: value for key, value in point.items() if not key.startswith("drafter.")}
                label = ",".join(f"{key}={value}" for key, value in point.items())
                full = label if not self.variants and label else name + ("," + label if label else "")
                variant = parse(Variant, merge(merge(base, overrides), nest(point)), f"variant {full!r}")
                settings = flatten_keys(variant.model_dump(mode="json"))
                known |= settings.keys()
                if not self.cuts(settings | told):
                    found[full] = with_calibration(variant, self.data)
        if not found:
            raise UserError("excludes: they leave no variant to measure")
        if strange := [key for cut in self.excludes for key in cut if key not in known]:
            [near] = difflib.get_close_matches(strange[0], known, n=1, cutoff=0.0)
            raise UserError(f"excludes: no variant has a setting {strange[0]!r}; did you mean {near!r}?")
        if self.baseline is not None and self.baseline not in found:
            raise UserError(f"baseline: no variant is called {self.baseline!r}; there are {', '.join(found)}")
        return found

    def cuts(self, told: dict[str, Any]) -> bool:
        return any(all(key in told and told[key] == value for key, value in cut.items()) for cut in self.excludes)

    def located(self) -> Experiment:
        """The same with the paths of the named data sets that the folder `data` holds."""
        quality = tuple(one.located(self.data) for one in self.quality)
        return self.model_copy(update={"workload": self.workload.located(self.data), "quality": quality})

    def without_data(self) -> tuple[Experiment, list[str]]:
        """The same where no data set may be fetched, and what that changed: shipped prompts stand in for what has no path."""
        found, remarks, quality = self.located(), [], []
        workload = found.workload
        if workload.path is None and workload.kind not in ("demo", "synthetic"):
            remarks.append(f"workload: the shipped prompts instead of {workload.kind}")
            kept = {"limit", "max_prompt_tokens", "concurrency", "rate"}
            workload = WorkloadConfig(**workload.model_dump(include=kept))
        for one in found.quality:
            if one.path is not None:
                quality.append(one)
            elif isinstance(one, PerplexityConfig):
                remarks.append(f"perplexity: of the shipped prompts instead of {one.text}")
                quality.append(one.model_copy(update={"text": "demo"}))
            else:
                remarks.append(f"{one.kind}: left out, its data set is not here")
        return found.model_copy(update={"workload": workload, "quality": tuple(quality)}), remarks

    def baseline_name(self) -> str:
        """The named baseline, else `plain`, else the first variant."""
        names = list(self.expand())
        return self.baseline or ("plain" if "plain" in names else names[0])


def with_calibration(variant: Variant, data: str | None) -> Variant:
    """The same with the paths of the calibration texts that the folder `data` holds."""
    found = {}
    for name in ("model", "drafter"):
        part = getattr(variant, name)
        recipes = tuple(one.located(data) for one in getattr(part, "recipes", ()))
        if recipes:
            found[name] = part.model_copy(update={"recipes": recipes})
    return variant.model_copy(update=found)


def kind_of_drafter(base: dict[str, Any], overrides: dict[str, Any]) -> str:
    kind = str(merge(base, overrides)["drafter"]["kind"])
    return METHODS.get(kind, kind)


def load(path: str | None, overrides: list[str], flags: dict[str, Any] | None = None, small: bool = False) -> Experiment:
    """The experiment of a YAML file (or the defaults), with flags {"a.b": c} and then overrides `a.b=c` on top.

    `small` asks for the file's own small size. Errors name the nearest right key.
    """
    return parse(Experiment, merge({"drafter": {"kind": "none"}}, read(path, overrides, flags, small)), path or "command line")


def save(experiment: Experiment, path: Path) -> None:
    """Write the resolved experiment as YAML that `load` reads back."""
    OmegaConf.save(OmegaConf.create(experiment.model_dump(mode="json")), path)
