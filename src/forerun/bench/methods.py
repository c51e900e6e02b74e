"""What `forerun bench` compares when no config says so, and how its variants become backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from forerun.config import METHODS, Variant

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from forerun.bench.lanes import Maker

SHIPPED = ("ngram", "model", "medusa", "eagle")
"""The drafters that `forerun bench` runs beside plain decoding, each named after its method."""
SHORT = {"workload": {"kind": "demo"}, "samples": 16, "length": 256}
COMPRESSED = {"4-bit": {"model": {"recipes": [{"kind": "gptq", "bits": 4, "calibration": SHORT}]}}}
"""And the target in 4 bit, calibrated on the shipped prompts."""
TRAINED = ("model", "medusa", "eagle")
"""Those that fit the embedded target only."""
ELSEWHERE = ("vllm", "endpoint")
"""Backends that load the weights themselves, or have them already."""


def compare(wanted: Sequence[str], drafter: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Variants `plain` and one for each method; `drafter` holds what flags say of it, such as k."""
    found: dict[str, dict[str, Any]] = {"plain": {"drafter": {"kind": "none"}}}
    for name in wanted:
        kind = METHODS[name]
        if kind != "none":
            fitting = {key: value for key, value in drafter.items() if key != "path" or kind == "model"}
            found[name] = {"drafter": {"kind": kind, **fitting}}
    return found


def maker() -> Maker:
    """Backends from models that are loaded once and shared by all variants."""
    from forerun.bench.lanes import Maker
    from forerun.build import Models, build

    models = Models()

    def vocabulary(variant: Variant) -> int:
        if variant.backend in ELSEWHERE:
            return models.words(variant.model).vocabulary
        return int(models.target(variant.model, variant.backend).model.get_output_embeddings().out_features)

    def tokenizer(variant: Variant) -> PreTrainedTokenizerBase | None:
        if variant.backend in ELSEWHERE:
            return models.words(variant.model).tokenizer
        return models.target(variant.model, variant.backend).tokenizer

    return Maker(lambda variant: build(variant, models), vocabulary, tokenizer)
