"""Drafters: what proposes the tree."""

from forerun.draft.model import DraftModel
from forerun.draft.ngram import NGram
from forerun.draft.none import NoDraft
from forerun.draft.policy import Adaptive, Constant, Heuristic, LengthPolicy, build_policy
from forerun.draft.protocol import Batch, Drafter, Outcome, Row

__all__ = [
    "Adaptive",
    "Batch",
    "Constant",
    "DraftModel",
    "Drafter",
    "Heuristic",
    "LengthPolicy",
    "NGram",
    "NoDraft",
    "Outcome",
    "Row",
    "build_policy",
]
