"""Quality beside speed: every measure on every variant, those that only score once for each model, and the comparison."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from forerun.config import ChoiceConfig, ModelConfig, PerplexityConfig, QualityConfig
from forerun.evaluate.quality import Quality
from forerun.evaluate.statistics import compare

SCORING = (PerplexityConfig, ChoiceConfig)
"""Measures that read the model's probabilities and decode nothing: neither drafter nor rule can change them."""
KINDS = ("perplexity", "race-high", "race-middle", "choice")
"""The same, as findings name them."""
LIKELIHOODS = (
    "acc", "acc_norm", "acc_bytes", "perplexity", "word_perplexity", "byte_perplexity", "bits_per_byte", "brier_score",
)  # fmt: skip
"""And lm-eval's metrics of that sort."""


@dataclass(frozen=True)
class Finding:
    """What one measure came to on one variant: its figures, or why there are none."""

    measure: str  # its kind
    found: tuple[Quality, ...] = ()
    error: str | None = None
    texts: str | None = None  # digest of what was decoded greedily; None where nothing was
    scored: str | None = None  # digest of the model, backend and measure that decided a score; None where text was decoded

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Finding:
        found = tuple(quality_of(one) for one in data["found"])
        return cls(data["measure"], found, data["error"], data["texts"], data.get("scored"))


def quality_of(data: dict[str, Any]) -> Quality:
    items = data["items"]
    return Quality(**{**data, "items": None if items is None else tuple(items)})


Scored = tuple[ModelConfig, str, QualityConfig]
"""What decides a score: the model, the backend that runs it, the measure."""


def scored(model: ModelConfig, backend: str, config: QualityConfig) -> Scored | None:
    """Under which the finding is shared; None where it is not."""
    return (model, backend, config) if isinstance(config, SCORING) else None


def digest(key: Scored) -> str:
    """The same in a few letters."""
    model, backend, config = key
    text = f"{model.model_dump_json()} {backend} {config.model_dump_json()}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def of_target(finding: Finding, one: Quality) -> bool:
    """Whether a figure is of the target's probabilities, and not of any text that was decoded."""
    return finding.measure in KINDS or (finding.measure == "lm-eval" and one.metric.partition(",")[0] in LIKELIHOODS)


def named(findings: Iterable[Finding]) -> dict[str, tuple[Finding, Quality | None]]:
    """Each figure under a name of its own, or the error of its measure, which has none.

    The first metric of a measure has the measure's name, further ones `name/metric`; a second measure of the same name is
    `name 2`.
    """
    found: dict[str, tuple[Finding, Quality | None]] = {}
    uses: Counter[str] = Counter()
    for finding in findings:
        names = dict.fromkeys([one.name for one in finding.found] or [finding.measure])
        uses.update(list(names))
        own = {name: name if uses[name] == 1 else f"{name} {uses[name]}" for name in names}
        if finding.error is not None:
            found[own[finding.measure]] = finding, None
        for one in finding.found:
            name = own[one.name]
            found[name if name not in found else f"{name}/{one.metric}"] = finding, one
    return found


def beside(ours: Sequence[Finding], theirs: Sequence[Finding], *, lossy: bool = False) -> dict[str, Any] | None:
    """`quality` of summary.json: each figure with McNemar's p against the baseline's answers to the same questions.

    `greedy_equal`: whether all texts of a measure that decodes greedily are the baseline's; None for any other measure.
    `of_target`: that the figure says nothing of the variant's own text, as scores do not where the rule is `lossy`.
    """
    if not ours:
        return None
    other = named(theirs)
    found: dict[str, Any] = {}
    for name, (finding, one) in named(ours).items():
        if one is None:
            found[name] = {"error": finding.error}
            continue
        base, answers = other.get(name, (None, None))
        known = base is not None and None not in (base.texts, finding.texts)
        alone = lossy and of_target(finding, one)
        shared = base is not None and base.scored is not None and base.scored == finding.scored  # nothing to compare
        found[name] = {key: value for key, value in asdict(one).items() if key not in {"name", "items"}} | {
            "mcnemar_p": compare(one, answers) if answers is not None and not alone and not shared else None,
            "greedy_equal": finding.texts == base.texts if known and base is not None else None,
            "of_target": alone,
        }
    return found


def sharing(qualities: dict[str, Sequence[Finding]]) -> dict[str, dict[str, str]]:
    """By variant and name of a figure, the earlier variant of the same model whose score it is."""
    first: dict[tuple[str, str], str] = {}
    return {
        variant: {
            name: owner
            for name, (finding, one) in named(findings).items()
            if one is not None
            and finding.scored is not None
            and (owner := first.setdefault((finding.scored, name), variant)) != variant
        }
        for variant, findings in qualities.items()
    }  # fmt: skip
