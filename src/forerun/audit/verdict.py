"""What an audit says: named checks, each passed, failed or undecided, and the verdict that follows from them. No torch."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

LOSSLESS, NOT_LOSSLESS, UNDECIDED = 0, 1, 3  # exit statuses; 2 is bad input, as everywhere


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. `passed` None: it could not be decided, and `evidence` says why.

    A check that does not apply (self-draft of a drafter without a model) is left out, not passed.
    """

    name: str
    passed: bool | None
    evidence: str  # one line with the numbers
    figures: dict[str, Any] = field(default_factory=dict)  # the same numbers, for --json


@dataclass(frozen=True, slots=True)
class Audit:
    """The checks of one subject. One failure: not lossless. None, but something undecided or nothing checked: undecided."""

    subject: str
    checks: tuple[Check, ...]

    @property
    def status(self) -> int:
        outcomes = [check.passed for check in self.checks]
        if False in outcomes:
            return NOT_LOSSLESS
        return UNDECIDED if None in outcomes or not outcomes else LOSSLESS

    @property
    def verdict(self) -> str:
        return {LOSSLESS: "lossless", NOT_LOSSLESS: "not lossless", UNDECIDED: "undecided"}[self.status]

    def to_json(self) -> dict[str, Any]:
        return {"subject": self.subject, "verdict": self.verdict, "checks": [asdict(check) for check in self.checks]}
