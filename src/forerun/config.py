"""One experiment as data: tagged unions, YAML, overrides `a.b=c`, variants and axes. No torch."""

from __future__ import annotations

import difflib
import itertools
import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args

from omegaconf import OmegaConf
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from forerun.types import Sampling, UserError

EMBEDDED = "embedded"
"""The path that names the model that ships with the package."""


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Part):
    path: str = EMBEDDED  # hub id, folder, or with weights=random a config.json
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | balanced (device_map over several GPUs)
    attention: str = "auto"  # auto | sdpa | eager | flash_attention_2 (prefill only)
    weights: Literal["pretrained", "random"] = "pretrained"
    pack: bool = True  # fuse and prepack the linear layers where that is faster
    recipes: tuple[dict[str, Any], ...] = ()


T = TypeVar("T", bound=Part)


class NoDraftConfig(Part):
    kind: Literal["none"] = "none"


class Policy(Part):
    """How many tokens to draft next: constant k; confidence stop; heuristic (+2 / -1); adaptive (renewal-reward)."""

    policy: Literal["constant", "heuristic", "adaptive"] = "constant"
    k: int = Field(default=5, ge=0, le=64)


class NGramConfig(Policy):
    kind: Literal["ngram"] = "ngram"
    lookup_min: int = Field(default=1, ge=1)
    lookup_max: int = Field(default=3, ge=1)


class DraftModelConfig(Policy):
    kind: Literal["model"] = "model"
    path: str = EMBEDDED
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    weights: Literal["pretrained", "random"] = "pretrained"
    confidence: float = Field(default=0.0, ge=0.0, le=1.0)  # stop after a kept token less probable than this
    greedy: bool = False  # draft greedily even where the request samples
    recipes: tuple[dict[str, Any], ...] = ()


DrafterConfig = Annotated[NoDraftConfig | NGramConfig | DraftModelConfig, Field(discriminator="kind")]
METHODS = {"naive": "none", "none": "none", "ngram": "ngram", "draft": "model", "model": "model"}
"""Names that `--method` takes, and the drafter kind of each."""


class LosslessRuleConfig(Part):
    """`auto` is the one of them that accepts most: block for drawn chains, multi-round for drawn trees, else match."""

    kind: Literal["auto", "match", "standard", "block", "multi-round"] = "auto"


class TemperatureRelaxedConfig(Part):
    kind: Literal["temperature-relaxed"] = "temperature-relaxed"
    temperature: float = Field(default=2.0, gt=0.0)  # its own: above 1 accepts more than `standard`, below 1 less


class TopPResidualConfig(Part):
    kind: Literal["top-p-residual"] = "top-p-residual"
    top_p: float = Field(default=0.9, gt=0.0, le=1.0)  # cut of the residual, apart from sampling.top_p


class MinPRatioConfig(Part):
    kind: Literal["min-p-ratio"] = "min-p-ratio"
    min_p: float = Field(default=0.05, ge=0.0, le=1.0)
    filter_value: float = Field(default=-math.inf, le=0.0)  # log-probability of what the filter takes out


class TypicalConfig(Part):
    kind: Literal["typical"] = "typical"
    epsilon: float = Field(default=0.09, gt=0.0, lt=1.0)
    delta: float = Field(default=0.3, gt=0.0)


class RelaxedConfig(Part):
    kind: Literal["relaxed"] = "relaxed"
    top_k: int = Field(default=10, ge=1)
    delta: float = Field(default=0.6, ge=0.0, le=1.0)


class EnsembleConfig(Part):
    kind: Literal["ensemble"] = "ensemble"
    weight: float = Field(default=0.5, ge=0.0, le=1.0)  # of the target


class SyntheticConfig(Part):
    kind: Literal["synthetic"] = "synthetic"
    rates: tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...] = Field(default=(0.8,), min_length=1)


class ImportedRuleConfig(Part):
    kind: Literal["import"] = "import"
    path: str  # module:Name, looked up in the current folder too
    options: dict[str, Any] = {}  # keyword arguments of Name


RuleConfig = Annotated[
    LosslessRuleConfig
    | TemperatureRelaxedConfig
    | TopPResidualConfig
    | MinPRatioConfig
    | TypicalConfig
    | RelaxedConfig
    | EnsembleConfig
    | SyntheticConfig
    | ImportedRuleConfig,
    Field(discriminator="kind"),
]


class SamplingConfig(Part):
    temperature: float = Field(default=0.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    repetition_penalty: float = Field(default=1.0, gt=0.0)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = {}
    max_new: int = Field(default=128, ge=1)
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int | None = 0
    n: int = Field(default=1, ge=1)

    def build(self) -> Sampling:
        return Sampling(**self.model_dump())


class EngineConfig(Part):
    rows: int = Field(default=1, ge=1)
    capacity: int = Field(default=1024, ge=2)  # tokens a row, prompt and output and one tree
    compile: Literal["auto"] | bool = "auto"
    chunk: int = Field(default=512, ge=1)  # tokens a prefill pass
    debug: bool = False  # assert the invariants every step


class WorkloadConfig(Part):
    kind: Literal["demo", "synthetic", "text", "jsonl", "spec-bench"] = "demo"
    path: str | None = None
    field: str = "prompt"  # jsonl: where the prompt is
    categories: tuple[str, ...] = ()  # empty: all
    limit: int | None = Field(default=None, ge=1)
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    prompts: int = Field(default=8, ge=1)  # synthetic
    prompt_tokens: int = Field(default=64, ge=1)  # synthetic


class Variant(Part):
    """One thing to measure: everything but the workload, repeats and names."""

    model: ModelConfig = ModelConfig()
    drafter: DrafterConfig = NoDraftConfig()
    rule: RuleConfig = LosslessRuleConfig()
    sampling: SamplingConfig = SamplingConfig()
    engine: EngineConfig = EngineConfig()
    backend: Literal["forerun", "reference"] = "forerun"

    @field_validator("drafter", mode="before")
    @classmethod
    def canonical(cls, drafter: Any) -> Any:
        """`naive` and `draft` are names that people know for `none` and `model`."""
        if isinstance(drafter, dict) and drafter.get("kind") in METHODS:
            return {**drafter, "kind": METHODS[drafter["kind"]]}
        return drafter


class Experiment(Variant):
    """A base variant, what runs on it, and what varies."""

    workload: WorkloadConfig = WorkloadConfig()
    repeats: int = Field(default=3, ge=1)
    warmup: int = Field(default=1, ge=0)  # requests run and thrown away, each variant
    variants: dict[str, dict[str, Any]] = {}
    axes: dict[str, list[Any]] = {}
    excludes: tuple[dict[str, Any], ...] = ()
    baseline: str | None = None

    @field_validator("variants", mode="before")
    @classmethod
    def nested(cls, variants: Any) -> Any:
        """A variant may say `drafter.k: 3` for `drafter: {k: 3}`, and nothing at all for the base itself."""
        if not isinstance(variants, dict):
            return variants
        return {str(name): nest(over or {}) if isinstance(over, dict | None) else over for name, over in variants.items()}

    @field_validator("axes", mode="before")
    @classmethod
    def flat(cls, axes: Any) -> Any:
        """An axis may be written nested (as the override `axes.drafter.k=[3,5]` arrives) or under its dotted name."""
        return flatten_keys(axes) if isinstance(axes, dict) else axes

    @field_validator("excludes", mode="before")
    @classmethod
    def flat_cuts(cls, excludes: Any) -> Any:
        if not isinstance(excludes, list | tuple):
            return excludes
        return tuple(flatten_keys(cut) if isinstance(cut, dict) else cut for cut in excludes)

    def expand(self) -> dict[str, Variant]:
        """The variants by name: the named ones crossed with the axes, without the excluded points."""
        base = self.model_dump(include=set(Variant.model_fields))
        named = self.variants or {"base": {}}
        found: dict[str, Variant] = {}
        for name, overrides in named.items():
            for values in itertools.product(*self.axes.values()):
                point = dict(zip(self.axes, values, strict=True))
                if any(all(point.get(key) == value for key, value in cut.items()) for cut in self.excludes):
                    continue
                if kind_of_drafter(base, overrides) == "none" and "drafter.kind" not in point:
                    # Plain decoding is one variant, whatever the drafters beside it vary.
                    point = {key: value for key, value in point.items() if not key.startswith("drafter.")}
                label = ",".join(f"{key}={value}" for key, value in point.items())
                full = label if not self.variants and label else name + ("," + label if label else "")
                found[full] = parse(Variant, merge(merge(base, overrides), nest(point)), f"variant {full!r}")
        if self.baseline is not None and self.baseline not in found:
            raise UserError(f"baseline: no variant is called {self.baseline!r}; there are {', '.join(found)}")
        return found

    def baseline_name(self) -> str:
        """The named baseline, else `plain`, else the first variant."""
        names = list(self.expand())
        return self.baseline or ("plain" if "plain" in names else names[0])


def kind_of_drafter(base: dict[str, Any], overrides: dict[str, Any]) -> str:
    kind = str(merge(base, overrides)["drafter"]["kind"])
    return METHODS.get(kind, kind)


def merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Deep merge; a change of `kind` replaces the whole part, since the old kind's keys mean nothing to the new one."""
    if "kind" in over and "kind" in base and METHODS.get(over["kind"], over["kind"]) != METHODS.get(base["kind"], base["kind"]):
        return dict(over)
    joined = dict(base)
    for key, value in over.items():
        old = joined.get(key)
        joined[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return joined


def nest(flat: dict[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for key, value in flat.items():
        branch: Any = value
        for part in reversed(str(key).split(".")):
            branch = {part: branch}
        tree = merge(tree, branch)
    return tree


def flatten_keys(tree: dict[str, Any], parents: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten_keys(value, f"{parents}{key}.") if isinstance(value, dict) else {f"{parents}{key}": value}
    return flat


def load(path: str | None, overrides: list[str], flags: dict[str, Any] | None = None) -> Experiment:
    """The experiment of a YAML file (or the defaults), with flags {"a.b": c} and then overrides `a.b=c` on top.

    Errors name the nearest right key.
    """
    data: dict[str, Any] = {}
    if path is not None:
        if not Path(path).is_file():
            raise UserError(f"{path}: no such config file; give the path of a YAML file")
        try:
            loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
        except Exception as error:  # YAML's own errors share no base class with OmegaConf's
            raise UserError(f"{path}: not readable as YAML: {str(error).splitlines()[0]}") from error
        if not isinstance(loaded, dict):
            raise UserError(f"{path}: expected a mapping at the top, found {type(loaded).__name__}")
        data = {str(key): value for key, value in loaded.items()}
    for override in overrides:
        if "=" not in override:
            raise UserError(f"{override!r}: an override has the form a.b=c")
    try:
        changes = OmegaConf.to_container(OmegaConf.from_dotlist(overrides))
    except Exception as error:  # as above
        raise UserError(f"overrides: {str(error).splitlines()[0]}") from error
    assert isinstance(changes, dict)
    defaults = {"drafter": {"kind": "none"}}
    with_flags = merge(merge(defaults, data), nest(flags or {}))
    return parse(Experiment, merge(with_flags, {str(k): v for k, v in changes.items()}), path or "command line")


def parse(kind: type[T], data: dict[str, Any], where: str) -> T:
    """Validate, turning the first mistake into one line that names the nearest right key."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{where}: {explain(kind, error)}") from error


def explain(kind: type[BaseModel], error: ValidationError) -> str:
    """The first mistake; the tag that pydantic puts in the place of a union (`drafter.none.k`) is said apart."""
    first = error.errors()[0]
    loc = [str(part) for part in first["loc"]]
    tags = {tag for union in (DrafterConfig, RuleConfig) for k in flatten(union) for tag in kinds_of(k)}
    place = [part for i, part in enumerate(loc) if not (i and loc[i - 1] in TAGGED and part in tags)]
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(loc[-1], known_keys(kind, loc[:-1]), n=1, cutoff=0.0)
        right = ".".join([*place[:-1], *near])
        of = next((f" where {part}.kind is {loc[i + 1]!r}" for i, part in enumerate(loc[:-2]) if part in TAGGED), "")
        return f"unknown key {'.'.join(place)!r}{of}; did you mean {right!r}?"
    if first["type"] == "union_tag_invalid":
        return f"{'.'.join(place)}.kind: {first['ctx']['tag']!r} is none of {first['ctx']['expected_tags']}"
    return f"{'.'.join(place)}: {first['msg']} (got {first['input']!r})"


TAGGED = ("drafter", "rule")
"""Parts that are tagged unions: pydantic puts the tag into the place of a mistake."""


def kinds_of(part: type[BaseModel]) -> tuple[str, ...]:
    """The tags that a member of a tagged union answers to."""
    return get_args(part.model_fields["kind"].annotation) if "kind" in part.model_fields else ()


def known_keys(kind: type[BaseModel], place: list[str]) -> list[str]:
    """The fields at a place such as ["drafter", "model"]; tags of unions appear in the place as pydantic writes them."""
    kinds: list[Any] = [kind]
    for part in place:
        inner = [f.annotation for k in kinds for name, f in k.model_fields.items() if name == part]
        if inner:
            kinds = [k for annotation in inner for k in flatten(annotation)]
        else:
            kinds = [k for k in kinds if part in kinds_of(k)] or kinds
    return [name for k in kinds for name in k.model_fields]


def flatten(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [k for argument in get_args(annotation) for k in flatten(argument)]


def save(experiment: Experiment, path: Path) -> None:
    """Write the resolved experiment as YAML that `load` reads back."""
    OmegaConf.save(OmegaConf.create(experiment.model_dump(mode="json")), path)
