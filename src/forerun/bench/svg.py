"""Parts of charts as inline SVG: scales, ticks, the frame. Colours and strokes are classes that the page's style gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from forerun.bench.show import compact, middle

WIDTH = 400  # units of a chart: some more pixels on a desktop, some fewer on a phone
LETTER = 7.6  # units that a letter of a label takes, at most on average
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 30, 44  # margins of a plot


@dataclass(frozen=True)
class Scale:
    """From a quantity to a place; `ticks` are its labelled places."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False
    marks: tuple[tuple[float, str], ...] = ()

    def __call__(self, value: float) -> float:
        inside = min(max(value, min(self.low, self.high)), max(self.low, self.high))
        low, high, inside = (math.log10(one) if self.log else one for one in (self.low, self.high, inside))
        return self.start + (self.end - self.start) * ((inside - low) / (high - low) if high != low else 0.5)

    @property
    def ticks(self) -> tuple[tuple[float, str], ...]:
        if self.marks:
            return self.marks
        return tuple((value, compact(value)) for value in (decades if self.log else steps)(self.low, self.high))


def steps(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) from low to high, whichever is larger."""
    low, high = min(low, high), max(low, high)
    if high <= low:
        return [low]
    rough = (high - low) / wanted
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def decades(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten between low and high; over more than three decades the powers alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    spread = math.log10(high / low)
    factors = (1, 1.5, 2, 3, 5, 7) if spread < 0.9 else (1, 2, 5) if spread < 2.2 else (1,)
    found = [factor * 10.0**power for power in powers for factor in factors]
    return [value for value in found if low * 0.999 <= value <= high * 1.001]


def spanning(values: Sequence[float], including: Sequence[float] = (), room: float = 0.06) -> tuple[float, float]:
    """The least and the greatest, with some room around them, none below 0 where nothing is."""
    every = [*values, *including]
    low, high = min(every), max(every)
    margin = room * (high - low) or abs(high) * 0.1 or 1.0
    return (max(low - margin, 0.0) if low >= 0 else low - margin), high + margin


def words(x: float, y: float, text: str, anchor: str = "start", kind: str = "", title: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    place = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{place}{kind}>{escape(text)}{tip(title)}</text>'


def tip(text: str) -> str:
    return f"<title>{escape(text)}</title>" if text else ""


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def fitted(text: str, room: float) -> str:
    """A label cut in its middle to the room there is."""
    return middle(text, max(3, int(room / LETTER)))


def frame(x: Scale, y: Scale, x_label: str, y_label: str) -> str:
    """Grid lines with their numbers, and what the axes are: y's name stands above, so that nothing is turned."""
    drawn = [words(2, 15, y_label, kind="axis"), words(x.end, y.start + 38, x_label, "end", "axis")]
    for value, text in y.ticks:
        drawn += [line(x.start, y(value), x.end, y(value), "grid"), words(x.start - 6, y(value) + 4, text, "end", "tick")]
    room = (x.end - x.start) / max(len(x.ticks), 1)
    for value, text in x.ticks:
        cut = fitted(text, room)
        drawn += [line(x(value), y.start, x(value), y.start + 4, "grid")]
        drawn += [words(x(value), y.start + 18, cut, "middle", "tick", text if cut != text else "")]
    return "".join(drawn)


def drawing(height: float, label: str, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def marker(x: float, y: float, shape: int, kind: str, title: str) -> str:
    """Circle, square, triangle or diamond, so that colour is never the only sign."""
    r = 5.0
    square, up = [(-r, -r), (r, -r), (r, r), (-r, r)], [(0, -r - 1), (r + 1, r), (-r - 1, r)]
    diamond = [(0, -r - 1), (r + 1, 0), (0, r + 1), (-r - 1, 0)]
    corners = (None, square, up, diamond)[shape % 4]
    if corners is None:
        return f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="{r:g}">{tip(title)}</circle>'
    path = " ".join(f"{x + right:.1f},{y + down:.1f}" for right, down in corners)
    return f'<polygon class="{kind}" points="{path}">{tip(title)}</polygon>'
