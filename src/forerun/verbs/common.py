"""What several verbs need."""

from __future__ import annotations

from forerun.config import METHODS
from forerun.types import UserError


def known_method(method: str) -> str:
    """The drafter kind of a `--method`."""
    if method not in METHODS:
        raise UserError(f"--method {method}: there are naive, ngram, draft, medusa and eagle")
    return METHODS[method]


def hush_libraries() -> None:
    """Loading bars and advice of transformers are not for the user of a verb; its errors reach them as ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
