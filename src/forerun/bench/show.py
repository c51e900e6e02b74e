"""How a figure of summary.json is written for people; what was not measured, or an older run does not have, is `-`."""

from __future__ import annotations

from typing import Any

Figures = dict[str, Any]
ABSENT = "-"
GENERATED = (
    "perplexity and choices score the target, whatever drafts for it and accepts: ask for a measure that writes text (quality: "
    "gsm8k, humaneval or mbpp)"
)


def at(figures: Figures, path: str) -> Any:
    """The figure under a dotted name; None where any part of the way is missing or null."""
    found: Any = figures
    for key in path.split("."):
        if not isinstance(found, dict):
            return None
        found = found.get(key)
    return found


def number(value: float | None, digits: int, unit: str = "") -> str:
    return ABSENT if value is None else f"{value:,.{digits}f}{unit}"


def share(value: float | None) -> str:
    return ABSENT if value is None else "100%" if value == 1 else f"{100 * value:.1f}%"


def times(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.2f}x"


def interval(figures: dict[str, float | None] | None) -> str:
    """A ratio with its interval: 1.84x (1.71-1.97)."""
    value, low, high = bounds(figures)
    if value is None or low is None or high is None or low == high:  # too few prompts, or the baseline itself
        prompts = (figures or {}).get("prompts")
        return times(value) + (f" (n={prompts})" if value is not None and low is None and prompts else "")
    return f"{value:.2f}x ({low:.2f}-{high:.2f})"


def bounds(figures: dict[str, Any] | None) -> tuple[float | None, float | None, float | None]:
    """Value, low and high of anything with an interval."""
    found = figures or {}
    return found.get("value"), found.get("low"), found.get("high")


def mark(figures: Figures) -> str:
    """A rule's label in one word; of a lossy one with the total variation that its label begins with.

    Of a compressed target a lossless rule keeps that target's text, not the baseline's.
    """
    lossless, meaningless = figures.get("lossless"), figures.get("meaningless")
    if lossless is None:
        return "unchecked"
    if lossless or meaningless:
        kept = "compressed" if figures.get("compressed") else "lossless"
        return kept if lossless else "meaningless"
    tv = at(figures, "rule_evidence.tv")
    return "LOSSY" if tv is None else "LOSSY <.01" if tv < 0.005 else f"LOSSY {tv:.2f}".replace(" 0.", " .")


def own(figures: Figures) -> dict[str, Any]:
    """The measures of quality that speak of the variant's own text: under a lossy rule, not those of the target alone."""
    return {name: one for name, one in (figures.get("quality") or {}).items() if not one.get("of_target")}


def unjudged(variants: dict[str, Figures]) -> list[str]:
    """Variants under a lossy rule whose text nothing has judged."""
    return [
        name for name, v in variants.items()
        if v.get("error") is None and v.get("lossless") is False and not v.get("meaningless") and not own(v)
    ]  # fmt: skip


def warning(figures: Figures) -> str:
    """What a speed-up in a chart must not be seen without."""
    if figures.get("meaningless"):
        return "meaningless text"
    if figures.get("lossless") is not False:
        return ""
    return f"LOSSY, {'quality -' if not own(figures) else quality(figures).partition(';')[0]}"


def measures(variants: dict[str, Figures]) -> list[str]:
    """The measures of quality that any variant was put to, in their order."""
    return list(dict.fromkeys(name for figures in variants.values() for name in figures.get("quality") or {}))


def worth(measure: dict[str, Any] | None) -> str:
    """One measure of quality with its interval: 0.620 (0.581-0.659), or why there is none."""
    if measure is None:
        return ABSENT
    if measure.get("error"):
        return "failed"
    value, low, high = bounds(measure)
    if value is None:
        return ABSENT
    digits = 3 if abs(value) <= 1 else 2
    spread = f" ({low:.{digits}f}-{high:.{digits}f})" if low is not None and high is not None else ""
    return f"{value:.{digits}f}{spread}"


def probability(value: float | None) -> str:
    return ABSENT if value is None else "<.001" if value < 0.001 else f"{value:.3f}".replace("0.", ".", 1)


def quality(figures: Figures) -> str:
    """What the text is worth, in a few words: each measure without its interval."""
    return "; ".join(f"{name} {worth(one).partition(' ')[0]}" for name, one in own(figures).items()) or ABSENT


def titled(name: str, metric: str | None) -> str:
    """A measure with its metric where that says more: `perplexity`, `perplexity bits per byte`, `race-high acc`."""
    measure = name.removesuffix(f"/{metric}")
    return measure if metric is None or f"{measure}-".startswith(f"{metric}-") else f"{measure} {str(metric).replace('_', ' ')}"


def short(commit: str) -> str:
    """The first letters of a commit, and the mark of a checkout that was changed since."""
    return f"commit {commit[:12]}{'+' if commit.endswith('+') else ''}" if len(commit) > 12 else commit


def mebibytes(value: float | None) -> str:
    return ABSENT if value is None else f"{value / 2**20:,.0f} MiB"


def compact(value: float) -> str:
    """A tick's number: 1200000 is 1.2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):g}{letter}"
    return f"{value:.6g}"


def middle(text: str, length: int) -> str:
    """A name cut in its middle, since names of a sweep differ at both ends."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return text[: length - 1 - tail] + "…" + text[len(text) - tail :]
