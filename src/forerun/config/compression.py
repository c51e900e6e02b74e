"""A compressed model as data: which model, which recipes, from which texts they learn, how quality is measured. No torch."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from forerun.config.data import QualityConfig, WorkloadConfig, named
from forerun.config.files import read
from forerun.config.parsing import merge, parse
from forerun.config.part import Part
from forerun.config.parts import EngineConfig, ModelConfig, SamplingConfig
from forerun.config.recipes import GPTQConfig, PruneConfig, RecipeConfig
from forerun.types import UserError


class Compression(Part):
    model: ModelConfig = ModelConfig()
    recipes: tuple[RecipeConfig, ...] = Field(min_length=1)  # applied in this order, after those of `model`
    workload: WorkloadConfig | None = None  # calibration texts of every recipe that names none; None: what the model writes
    data: str | None = None  # folder of data sets: a named one without a path is looked for here before the Hub is asked
    quality: tuple[QualityConfig, ...] = ()  # --floor: measures, with their settings; those it names are added
    sampling: SamplingConfig = SamplingConfig()  # --floor: of measures that generate
    engine: EngineConfig = EngineConfig()  # --floor: that runs them

    @field_validator("quality", mode="before")
    @classmethod
    def by_name(cls, quality: Any) -> Any:
        return named(quality)

    def located(self) -> Compression:
        """The same with calibration texts in every recipe, and with the paths of the data sets that the folder `data` holds."""
        return self.model_copy(
            update={
                "recipes": calibrated(self.recipes, self.workload, self.data),
                "quality": tuple(one.located(self.data) for one in self.quality),
            }
        )


def calibrated(
    recipes: tuple[RecipeConfig, ...], workload: WorkloadConfig | None, data: str | None
) -> tuple[RecipeConfig, ...]:
    """The recipes with texts to learn from: those of `workload` where a recipe names none, data sets by the folder `data`."""
    found: list[RecipeConfig] = []
    for recipe in recipes:
        if isinstance(recipe, GPTQConfig | PruneConfig) and recipe.calibration.workload is None:
            recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"workload": workload})})
        found.append(recipe.located(data))
    return tuple(found)


def load_compression(path: str | None, overrides: list[str], small: bool = False) -> Compression:
    """The compression of a YAML file (or the defaults) with overrides `a.b=c` on top; mistakes are one line.

    `small` asks for the file's own small size.
    """
    data = merge({"recipes": [], "quality": []}, read(path, overrides, small=small))
    if not data["recipes"]:
        raise UserError("recipes: say what to do, such as recipes.0.kind=gptq recipes.0.bits=4 (or bnb, rtn, prune)")
    return parse(Compression, data, path or "command line")
