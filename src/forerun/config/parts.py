"""The parts of a variant: models, drafters, rules, sampling, engine. Tagged unions; strict keys. No torch."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field

from forerun.config.part import EMBEDDED, Part
from forerun.config.recipes import RecipeConfig
from forerun.types import Sampling


class ModelConfig(Part):
    path: str = EMBEDDED  # hub id, folder, or with weights=random a config.json
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto"
    device: str = "auto"  # auto | cpu | cuda | cuda:1 | balanced (device_map over several GPUs)
    attention: str = "auto"  # auto | sdpa | eager | flash_attention_2 (prefill only)
    weights: Literal["pretrained", "random"] = "pretrained"
    pack: bool = True  # fuse and prepack the linear layers where that is faster
    recipes: tuple[RecipeConfig, ...] = ()  # applied in this order when the model is loaded


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
    recipes: tuple[RecipeConfig, ...] = ()


Choices = tuple[tuple[int, ...], ...]
"""A tree in Medusa's notation: each path of child ranks, ((0,), (1,), (0, 0))."""


class MedusaConfig(Policy):
    kind: Literal["medusa"] = "medusa"
    path: str = EMBEDDED
    k: int = Field(default=4, ge=0, le=64)  # heads used, at most those there are
    nodes: int = Field(default=10, ge=1, le=256)  # of the tree, the pending token not counted
    choices: Choices = ()  # empty: the most probable paths by the accuracies measured in training


class MLPConfig(Policy):
    kind: Literal["mlp"] = "mlp"
    path: str
    k: int = Field(default=3, ge=0, le=64)


class EagleConfig(Policy):
    kind: Literal["eagle"] = "eagle"
    path: str = EMBEDDED
    tree: Literal["dynamic", "static", "chain"] = "dynamic"
    branches: int = Field(default=4, ge=1, le=64)  # dynamic: nodes expanded a pass, children of each
    nodes: int = Field(default=10, ge=1, le=256)  # dynamic: kept in the end, the pending token not counted
    choices: Choices = ()  # static
    drawn: bool = False  # static: draw the children where the request samples, instead of taking the most probable


DrafterConfig = Annotated[
    NoDraftConfig | NGramConfig | DraftModelConfig | MedusaConfig | MLPConfig | EagleConfig, Field(discriminator="kind")
]
METHODS = {
    "naive": "none", "none": "none", "ngram": "ngram", "draft": "model", "model": "model",
    "medusa": "medusa", "mlp": "mlp", "eagle": "eagle",
}  # fmt: skip
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
    options: dict[str, Any] = Field(default={})  # keyword arguments of Name


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
    logit_bias: dict[int, float] = Field(default={})
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
