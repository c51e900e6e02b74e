"""Acceptance rules. A rule states a law; one walker draws from it."""

from forerun.accept.choose import choose
from forerun.accept.match import Match
from forerun.accept.rule import Law, Rule, Verdict, describe, walk, walk_greedy
from forerun.accept.standard import Standard

__all__ = ["Law", "Match", "Rule", "Standard", "Verdict", "choose", "describe", "walk", "walk_greedy"]
