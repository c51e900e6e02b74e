"""Acceptance rules. A rule states a law; one walker draws from it."""

from forerun.accept.match import Match
from forerun.accept.rule import Law, Rule, Verdict, walk, walk_greedy
from forerun.accept.standard import Standard
from forerun.types import UserError

__all__ = ["Law", "Match", "Rule", "Standard", "Verdict", "choose", "walk", "walk_greedy"]


def choose(kind: str, drawn: bool) -> Rule:
    """The rule of a config; `auto` takes the best lossless one: `standard` for drawn drafts, `match` for chosen ones.

    `standard` of chosen drafts, whose law is one-hot, is `match`.
    """
    if kind == "match" or (kind in ("standard", "auto") and not drawn):
        return Match()
    if kind in ("standard", "auto"):
        return Standard()
    raise UserError(f"rule.kind={kind}: no such rule; there are auto, match, standard")
