"""From configuration to a rule, its own ones and those from outside."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forerun.accept.block import Block
from forerun.accept.match import Match
from forerun.accept.multi_round import MultiRound
from forerun.accept.relaxations import Ensemble, MinPRatio, TemperatureRelaxed, TopPResidual
from forerun.accept.rule import Rule
from forerun.accept.standard import Standard
from forerun.accept.synthetic import Synthetic
from forerun.accept.thresholds import Relaxed, Typical
from forerun.config import ImportedRuleConfig, RuleConfig, Variant, parse
from forerun.types import UserError

RULES: dict[str, Callable[..., Rule]] = {
    "match": Match, "standard": Standard, "block": Block, "multi-round": MultiRound,
    "temperature-relaxed": TemperatureRelaxed, "top-p-residual": TopPResidual, "min-p-ratio": MinPRatio, "ensemble": Ensemble,
    "typical": Typical, "relaxed": Relaxed, "synthetic": Synthetic,
}  # fmt: skip


def choose(config: RuleConfig | str = "auto", drawn: bool = False, trees: bool = False) -> Rule:
    """The rule of a configuration (or of a name, with defaults) for a drafter: are its drafts drawn, and are they trees?

    `auto` takes the lossless rule that accepts most: `block` for drawn chains, `multi-round` for drawn trees, and for chosen
    drafts `match`, which no rule beats there. UserError where a rule does not admit the drafter's trees.
    """
    if isinstance(config, str):
        config = parse(Variant, {"rule": {"kind": config}}, "rule").rule
    if config.kind == "auto":
        return (MultiRound() if trees else Block()) if drawn else Match()
    if isinstance(config, ImportedRuleConfig):
        rule = imported(config.path, config.options)
    else:
        rule = RULES[config.kind](**config.model_dump(exclude={"kind"}))
    if trees and not rule.trees:
        raise UserError(
            f"rule.kind={config.kind} admits chains only and this drafter proposes trees; take auto, match or multi-round"
        )
    return rule


def imported(path: str, options: dict[str, Any]) -> Rule:
    """A rule from outside: `module:Name`, called with the options; its module may lie in the current folder."""
    module, _, name = path.partition(":")
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        rule = getattr(importlib.import_module(module), name)(**options)
    except Exception as error:  # whatever somebody's module raises
        raise UserError(f"rule.path={path}: {type(error).__name__}: {error}; give module:Name and its rule.options") from error
    finally:
        sys.path.remove(here)
    lacking = [part for part in ("name", "lossless", "trees", "meaningless", "law") if not hasattr(rule, part)]
    if lacking:
        raise UserError(
            f"rule.path={path}: a rule has name, lossless, trees, meaningless and law; it lacks {', '.join(lacking)}"
        )
    return rule  # type: ignore[no-any-return]
