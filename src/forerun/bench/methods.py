"""What `forerun bench` compares when no config says so, and how its variants become backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from forerun.config import METHODS, Variant

if TYPE_CHECKING:
    from forerun.bench.lanes import Maker
    from forerun.model import Loaded

SHIPPED = ("ngram", "model", "medusa", "eagle")
"""The drafters that `forerun bench` runs beside plain decoding, each named after its method."""
TRAINED = ("model", "medusa", "eagle")
"""Those that fit the embedded target only."""


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

    def loaded(variant: Variant) -> Loaded:
        return models.target(variant.model, variant.backend)

    return Maker(
        build=lambda variant: build(variant, models),
        vocabulary=lambda variant: int(loaded(variant).model.get_output_embeddings().out_features),
        tokenizer=lambda variant: loaded(variant).tokenizer,
    )
