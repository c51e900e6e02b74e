"""Is a rule lossless? Exact enumeration in float64: nothing is drawn, so nothing is left to chance."""

from __future__ import annotations

from dataclasses import asdict

from forerun.accept import Rule, describe
from forerun.accept.evidence import EXACT, examine
from forerun.audit.verdict import Audit, Check
from forerun.types import UserError


def rule(subject: Rule) -> Audit:
    """Enumerate a rule over chains and small trees, drawn and chosen; UserError where its law cannot be computed."""
    try:
        found = examine(subject)
    except Exception as error:  # a rule from outside may raise anything
        raise UserError(f"rule {subject.name}: {type(error).__name__}: {error}; mend its law(tree, p_BNV)") from error
    joint = Check(
        "law of whole rounds",
        found.joint_tv < EXACT,
        f"worst TV {found.joint_tv:.3g}; {found.worst_case}",
        asdict(found),
    )
    token = Check("law of one token", found.worst_tv < EXACT, f"worst TV {found.worst_tv:.3g}, mean {found.mean_tv:.3g}")
    claim = Check(
        "its own claim",
        found.claims_lossless <= found.lossless,
        f"it says {'lossless' if found.claims_lossless else 'lossy'}; it accepts {found.against_standard:.3f} times what "
        f"standard does (at least {found.least_against_standard:.3f}), an identical draft with at least {found.identical:.3f}",
    )
    return Audit(f"rule {describe(subject)}", (joint, token, claim))
