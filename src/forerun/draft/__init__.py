"""Drafters: what proposes the tree."""

from forerun.draft.choices import Choices, default_choices, read_choices
from forerun.draft.eagle import EagleDraft
from forerun.draft.expand import Dynamic
from forerun.draft.medusa import MedusaDraft
from forerun.draft.mlp import MLPDraft
from forerun.draft.model import DraftModel
from forerun.draft.ngram import NGram
from forerun.draft.none import NoDraft
from forerun.draft.policy import Adaptive, Constant, Heuristic, LengthPolicy, build_policy
from forerun.draft.protocol import Batch, Drafter, Outcome, Row
from forerun.draft.shapes import AdaptiveShape, FixedShape, ShapePolicy, grid, prefixes

__all__ = [
    "Adaptive",
    "AdaptiveShape",
    "Batch",
    "Choices",
    "Constant",
    "DraftModel",
    "Drafter",
    "Dynamic",
    "EagleDraft",
    "FixedShape",
    "Heuristic",
    "LengthPolicy",
    "MLPDraft",
    "MedusaDraft",
    "NGram",
    "NoDraft",
    "Outcome",
    "Row",
    "ShapePolicy",
    "build_policy",
    "default_choices",
    "grid",
    "prefixes",
    "read_choices",
]
