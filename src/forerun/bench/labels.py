"""What a report says of a variant's acceptance rule: by exact enumeration, never by the rule's own claim."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from forerun.accept import Rule, describe
from forerun.accept.evidence import EXACT, Evidence, examine, seeded
from forerun.accept.exact import distance, first_tokens, random_process, score
from forerun.config import Variant
from forerun.engine import Engine
from forerun.tree import Tree, chain
from forerun.types import Backend, Sampling, UserError


def of(backend: Backend, variant: Variant, examined: dict[str, Evidence]) -> dict[str, Any]:
    """`rule`, `label`, `lossless`, `meaningless` and `rule_evidence` of a built variant, as summary.json has them.

    `rule` is None where nothing is drafted, since none judges anything there; `lossless` and `rule_evidence` are None where
    the backend is not our engine, whose rules alone can be enumerated. `examined` remembers what was enumerated. A rule is
    lossless for the target that it runs on; of one that recipes made smaller the label says so.
    """
    found, compressed = rule_of(backend, variant, examined), bool(variant.model.recipes)
    note = "; of the compressed target" if compressed else ""
    return found | {"compressed": compressed, "label": found["label"] + note}


def rule_of(backend: Backend, variant: Variant, examined: dict[str, Evidence]) -> dict[str, Any]:
    """The same, of the rule alone."""
    if not isinstance(backend, Engine):
        label = f"not enumerated: {backend.facts['rule']}"
        return {"label": label, "lossless": None, "meaningless": None, "rule_evidence": None}
    try:
        return told(backend.rule, backend.drafter.size > 1, variant.sampling.build(), examined)
    except Exception as error:  # a rule from outside may raise anything
        name = describe(backend.rule)
        raise UserError(f"rule {name}: {type(error).__name__}: {error}; mend its law(tree, p_BNV)") from error


def told(rule: Rule, drafts: bool, sampling: Sampling, examined: dict[str, Evidence]) -> dict[str, Any]:
    """The same of a rule. Without drafts no rule changes anything; at temperature 0 what counts is what it does there.

    rule_evidence: `tv` is the total variation that the label tells, the worst one with this sampling; the other figures are
    Evidence's, of the standard grid.
    """
    if not drafts and chosen_tv(rule, [chosen(())], sharpness=1.5) < EXACT:
        label = "lossless (greedy, nothing drafted)" if sampling.greedy else f"lossless for {law(sampling)} (nothing drafted)"
        return {"rule": None, "label": label, "lossless": True, "meaningless": False, "rule_evidence": None}
    key = f"{type(rule)} {describe(rule)} {getattr(rule, '__dict__', '')}"
    if key not in examined:
        examined[key] = examine(rule)
    found = examined[key]
    tv, lossless = (found.worst_tv if found.worst_tv >= EXACT else found.joint_tv), found.lossless
    label = found.label(law(sampling))
    if sampling.greedy:
        tv = chosen_tv(rule, greedy_drafts(rule.trees), sharpness=math.inf)
        lossless = tv < EXACT
        label = "lossless (greedy: the target's best tokens)" if lossless else f"LOSSY: greedy, TV up to {tv:.2g} a round"
    if found.meaningless:
        lossless, label = False, found.label("")
    elif not lossless:
        label += f"; accepts {found.against_standard:.2f} times what standard does"
    names = ("worst_tv", "mean_tv", "joint_tv", "against_standard")
    return {
        "rule": describe(rule),
        "label": label,
        "lossless": lossless,
        "meaningless": found.meaningless,
        "rule_evidence": {"tv": finite(tv), "lossless": found.lossless}
        | {name: finite(getattr(found, name)) for name in names},
    }


def greedy_drafts(trees: bool) -> Iterator[Tree]:
    """Everything of 3 tokens that may be chosen at temperature 0: chains of 3, and trees of two children with two children."""
    for drafts in itertools.product(range(3), repeat=3):
        yield chosen(drafts)
    for children, grandchildren in itertools.product(itertools.permutations(range(3), 2), repeat=2) if trees else ():
        yield Tree(torch.tensor([[0, *children, *grandchildren]]), torch.tensor([[0, 0, 0, 1, 1]]), depth=2)


def chosen(drafts: Sequence[int]) -> Tree:
    return chain(torch.zeros(1, dtype=torch.long), [list(drafts)])


def chosen_tv(rule: Rule, drafts: Iterable[Tree], sharpness: float) -> float:
    """Worst total variation of whole rounds, drafts of 3 tokens and at most 3 deep; infinite sharpness makes them greedy."""
    worst, target = 0.0, random_process(3, 4, seeded(0), sharpness)
    for tree in drafts:
        out = first_tokens(tree, rule.law(tree, score(tree, target)), target, torch.ones(1, dtype=torch.float64))
        off = distance(out, target.joint())
        worst = max(worst, math.inf if math.isnan(off) else off)
    return worst


def law(sampling: Sampling) -> str:
    """Which law the request's sampling makes of the target's: `p at temperature 0.7, top-p 0.9`."""
    settings = {
        "temperature": (sampling.temperature, 1.0),
        "top-k": (sampling.top_k, 0),
        "top-p": (sampling.top_p, 1.0),
        "min-p": (sampling.min_p, 0.0),
        "repetition penalty": (sampling.repetition_penalty, 1.0),
        "presence penalty": (sampling.presence_penalty, 0.0),
        "frequency penalty": (sampling.frequency_penalty, 0.0),
    }
    parts = [f"{name} {value:g}" for name, (value, off) in settings.items() if value != off]
    parts += ["logit bias"] if sampling.logit_bias else []
    return "p at " + ", ".join(parts) if parts else "p"


def finite(value: float) -> float | None:
    """JSON has no infinity: the error of a law that is no number is null."""
    return value if math.isfinite(value) else None
