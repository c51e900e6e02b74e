"""What a run comes to, in sentences. Nothing is called faster whose interval includes 1."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from forerun.bench.show import GENERATED, Figures, at, bounds, mark, number, own, quality, times, unjudged, worth
from forerun.config import Variant
from forerun.types import UserError

Configs = dict[str, Variant]
FLOOR = re.compile(r"\s*([\w.@:/-]+?)\s*(>=|<=|>|<)\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*")
COMPARED: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge, "<=": operator.le, ">": operator.gt, "<": operator.lt,
}  # fmt: skip


@dataclass(frozen=True)
class Conclusion:
    """A sentence, and the figure to set in large type beside it."""

    figure: str
    text: str


@dataclass(frozen=True)
class Floor:
    """What a measure of quality must keep, such as race-high>=0.5; the worse end of its interval counts."""

    measure: str
    sign: str
    value: float

    def __str__(self) -> str:
        return f"{self.measure} {self.sign} {self.value:g}"

    def of(self, figures: Figures) -> dict[str, Any] | None:
        """The measure by its own name or, where one alone has it, its metric's; None where it was not measured."""
        found = {name: one for name, one in own(figures).items() if bounds(one)[0] is not None}
        named = [one for one in found.values() if one.get("metric") == self.measure]
        return found.get(self.measure) or (named[0] if len(named) == 1 else None)

    def kept(self, measure: dict[str, Any]) -> bool:
        """By the end of the interval that is worse for it; by the value where there is no interval."""
        value, low, high = bounds(measure)
        worse = low if self.sign.startswith(">") else high
        return self.reached(value if worse is None else worse)

    def reached(self, value: float | None) -> bool:
        return value is not None and COMPARED[self.sign](value, self.value)


def parse_floor(text: str) -> Floor:
    """Raises UserError for anything but MEASURE, one of >= <= > <, and a number."""
    if (found := FLOOR.fullmatch(text)) is None:
        raise UserError(f"floor {text!r}: write a measure, >= or <=, and a number, such as race-high>=0.5 or perplexity<=12")
    return Floor(found[1], found[2], float(found[3]))


def findings(summary: dict[str, Any], configs: Configs, floor: str | None) -> list[Conclusion]:
    """The fastest lossless variant, what is faster but not the same text, and the fastest above the quality floor."""
    variants, baseline = summary["variants"], summary["baseline"]
    measured = {n: v for n, v in variants.items() if n != baseline and not v.get("error") and bounds(v.get("speedup"))[0]}
    if not measured:
        return [Conclusion("-", f"Nothing was measured beside the baseline {baseline}.")]
    same = {name: v for name, v in measured.items() if v.get("lossless") and same_law(configs, name, baseline)}
    found = [fastest_lossless(same, variants.get(baseline, {}), baseline)]
    rest = {name: v for name, v in measured.items() if name not in same and not v.get("meaningless")}
    found += faster_still(rest, max((value(v) for v in same.values() if faster(v)), default=1.0), baseline, configs)
    if floor is not None:
        found.append(above_floor(variants, baseline, floor))
    return found


def same_law(configs: Configs, name: str, baseline: str) -> bool:
    """Whether a lossless variant promises the baseline's own law: the same weights, the same sampling."""
    ours, theirs = configs.get(name), configs.get(baseline)
    if ours is None or theirs is None:
        return True
    weights, draws = {"path", "dtype", "weights", "recipes"}, {"seed", "n", "max_new"}
    return ours.model.model_dump(include=weights) == theirs.model.model_dump(include=weights) and (
        ours.sampling.model_dump(exclude=draws) == theirs.sampling.model_dump(exclude=draws)
    )


def value(figures: Figures) -> float:
    return bounds(figures["speedup"])[0] or 0.0


def faster(figures: Figures) -> bool:
    low = bounds(figures.get("speedup"))[1]
    return low is not None and low > 1


def spread(figures: Figures) -> str:
    """The interval in words, and what it leaves out."""
    _, low, high = bounds(figures["speedup"])
    apart = ", measured apart from the baseline" if figures.get("interleaved") is False else ""
    if low is None or high is None:
        prompts = at(figures, "speedup.prompts")
        few = "too few prompts" if not prompts else f"{prompts} prompts" if prompts > 1 else "1 prompt"
        return f"{few}: no interval{apart}"
    return f"95 % interval {low:.2f} to {high:.2f}{apart}"


def fastest_lossless(same: dict[str, Figures], base: Figures, baseline: str) -> Conclusion:
    if not same:
        return Conclusion("-", f"No lossless variant of the same target was measured beside the baseline {baseline}.")
    ahead = {name: figures for name, figures in same.items() if faster(figures)}
    best = max(ahead or same, key=lambda name: value(same[name]))
    figures = same[best]
    if not ahead:
        return Conclusion(
            times(value(figures)), f"No lossless variant is shown to be faster than {baseline}. {short_of(best, figures)}"
        )
    ours, theirs = (number(at(one, "tokens_per_second.decode"), 0) for one in (figures, base))
    text = f"{best} is the fastest lossless variant: {times(value(figures))} {baseline} ({spread(figures)}), "
    text += f"{ours} against {theirs} tokens a second of decoding."
    low = bounds(figures["speedup"])[1] or 0.0
    close = [name for name, other in ahead.items() if name != best and (bounds(other["speedup"])[2] or 0.0) >= low]
    if close:
        text += f" Not told apart from it, since the intervals overlap: {listed(close)}."
    return Conclusion(times(value(figures)), text)


def short_of(name: str, figures: Figures) -> str:
    """Why the best of them is not called faster."""
    _, low, high = bounds(figures["speedup"])
    said = f"The best of them, {name}, is {times(value(figures))} ({spread(figures)})"
    if low is None or high is None:
        return f"{said}, which shows nothing either way."
    return f"{said}: slower." if high < 1 else f"{said}; the interval includes 1."


def faster_still(rest: dict[str, Figures], best: float, baseline: str, configs: Configs) -> list[Conclusion]:
    """Variants that outrun every lossless one and do not promise the baseline's text."""
    ahead = {name: figures for name, figures in rest.items() if faster(figures) and value(figures) > best}
    if not ahead:
        return []
    name = max(ahead, key=lambda name: value(ahead[name]))
    figures = ahead[name]
    if figures.get("lossless"):
        same = same_law(configs, name, baseline)
        why = (
            "its rule is lossless" if same else "its rule is lossless, but for another law: its weights or its sampling differ"
        )
    else:
        why = {"unchecked": "its rule was not enumerated"}.get(mark(figures), f"its rule is {mark(figures)}")
    worth_it = f"quality {quality(figures)}" if own(figures) else "its quality was not measured"
    worth_it += f", for {GENERATED}" if name in unjudged(ahead) else ""
    text = f"Faster, but without a promise of {baseline}'s text: {name}, {times(value(figures))} ({spread(figures)}); "
    text += f"{why}; {worth_it}."
    return [Conclusion(times(value(figures)), text)]


def above_floor(variants: dict[str, Figures], baseline: str, text: str) -> Conclusion:
    """The fastest variant that keeps the quality floor; one whose text the measure did not judge keeps nothing."""
    try:
        floor = parse_floor(text)
    except UserError as error:  # the run has been measured: say it, lose nothing
        return Conclusion("-", f"{str(error)[:1].upper()}{str(error)[1:]}.")
    found = fastest_above(variants, baseline, floor)
    asked = {name: v for name, v in variants.items() if v.get("quality") and floor.of(v) is None}
    left = [name for name, v in asked.items() if any(one.get("of_target") for one in v["quality"].values())]
    return replace(found, text=f"{found.text} Left out: {listed(left)}, for {GENERATED}.") if left else found


def fastest_above(variants: dict[str, Figures], baseline: str, floor: Floor) -> Conclusion:
    """By the worse end of each interval."""
    judged = {name: one for name, v in variants.items() if not v.get("error") and (one := floor.of(v)) is not None}
    if not judged:
        known = listed(list(dict.fromkeys(name for v in variants.values() for name in own(v)))) or "nothing"
        return Conclusion("-", f"Floor {floor}: {floor.measure} was not measured (measured: {known}).")
    kept = [name for name, one in judged.items() if floor.kept(one) and not variants[name].get("meaningless")]
    counts = "the worse end of the interval counts"
    if not kept:
        near = [name for name, one in judged.items() if floor.reached(bounds(one)[0])]
        nearly = f"; by the value alone, without its interval, {listed(near)} would" if near else ""
        return Conclusion("-", f"No variant keeps {floor} ({counts}){nearly}.")
    ahead = [name for name in kept if name != baseline and faster(variants[name])]
    if not ahead:
        return Conclusion("-", f"Of {listed(kept)}, which keep {floor} ({counts}), none is shown to be faster than {baseline}.")
    best = max(ahead, key=lambda name: value(variants[name]))
    figures = variants[best]
    told = f"{best} is the fastest that keeps {floor}: {times(value(figures))} {baseline} ({spread(figures)}), "
    kept_by = judged[best]
    how = counts if bounds(kept_by)[1] is not None else "it has no interval, so its value counts"
    return Conclusion(times(value(figures)), f"{told}{floor.measure} {worth(kept_by)}; {how}.")


def listed(names: list[str], most: int = 6) -> str:
    """a, b and c; beyond some, how many more."""
    if len(names) > most:
        return f"{', '.join(names[:most])} and {len(names) - most} more"
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
