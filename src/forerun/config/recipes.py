"""How a model is made smaller, as data: a list of recipes, applied in order. No torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field

from forerun.config.data import WorkloadConfig
from forerun.config.part import Part


class CalibrationConfig(Part):
    """Texts from which a recipe learns what the layers see."""

    workload: WorkloadConfig | None = None  # None: text that the model itself writes
    samples: int = Field(default=128, ge=1)
    length: int = Field(default=512, ge=8)  # tokens a sample; texts are laid end to end and cut
    seed: int = 0


class Recipe(Part):
    """What all recipes can."""

    def located(self, data: str | None) -> Self:
        """The same with the path of the calibration texts, where they are a named data set that the folder `data` holds."""
        calibration = getattr(self, "calibration", None)
        workload = calibration.workload if isinstance(calibration, CalibrationConfig) else None
        if calibration is None or workload is None:
            return self
        return self.model_copy(update={"calibration": calibration.model_copy(update={"workload": workload.located(data)})})


class BnbConfig(Recipe):
    """bitsandbytes: LLM.int8 (8 bit), NF4 or FP4 (4 bit)."""

    kind: Literal["bnb"] = "bnb"
    bits: Literal[4, 8] = 4
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: the model's own
    threshold: float = Field(default=6.0, ge=0.0)  # LLM.int8: larger activations stay in 16 bit


class RoundConfig(Recipe):
    """Round to nearest, without calibration; what GPTQ is measured against."""

    kind: Literal["rtn"] = "rtn"
    bits: Literal[4, 8] = 4
    group_size: Literal[-1, 32, 64, 128] = 128  # inputs that share a scale; -1: all inputs of an output channel
    symmetric: bool = True


class GPTQConfig(Recipe):
    """GPTQ (Frantar et al. 2022): rounds column by column and lets later columns make up for the error."""

    kind: Literal["gptq"] = "gptq"
    bits: Literal[4, 8] = 4
    group_size: Literal[-1, 32, 64, 128] = 128
    symmetric: bool = True
    act_order: bool = False  # columns by falling activation; groups stay those of the original order (static groups)
    damping: float = Field(default=0.01, gt=0.0)  # of the mean diagonal of the Hessian
    calibration: CalibrationConfig = CalibrationConfig()


class PruneConfig(Recipe):
    """Structured pruning by L1 norm, without retraining.

    `input`: inputs of each linear layer; `output`: outputs of each linear layer, zeros in their place; `mlp`: channels of
    gate, up and down together; `heads`: KV heads with their query heads. The last two leave a plain checkpoint.
    """

    kind: Literal["prune"] = "prune"
    what: Literal["input", "output", "mlp", "heads"] = "mlp"
    fraction: float = Field(default=0.25, ge=0.0, lt=1.0)
    scope: Literal["layer", "global"] = "layer"  # global (input, output): the fraction is over all layers together
    score: Literal["l1", "activation"] = "l1"  # activation: L1 weighted by the mean magnitude of each input in calibration
    calibration: CalibrationConfig = CalibrationConfig()


RecipeConfig = Annotated[BnbConfig | RoundConfig | GPTQConfig | PruneConfig, Field(discriminator="kind")]
