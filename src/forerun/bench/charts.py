"""The charts of a report, each a pure function from figures to inline SVG; hollow or dashed is LOSSY."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from forerun.bench.show import times
from forerun.bench.svg import (
    BOTTOM,
    LEFT,
    LETTER,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    drawing,
    fitted,
    frame,
    line,
    marker,
    spanning,
    tip,
    words,
)  # fmt: skip

ROW = 42  # height of a bar with its name above it
CROWD = 10  # spots beyond which the grey ones go without a label


@dataclass(frozen=True)
class Paint:
    """How a variant looks in every chart: a colour class, a marker's shape, dashed or hollow where it is LOSSY."""

    colour: str
    shape: int = 0
    lossy: bool = False

    @property
    def line(self) -> str:
        return f"line {self.colour}" + (" dashed" if self.lossy else "")

    @property
    def mark(self) -> str:
        return f"mark {self.colour}" + (" hollow" if self.lossy else "")


@dataclass(frozen=True)
class Bar:
    """A speed-up with its interval; one with a warning is drawn hollow and says it."""

    value: float | None
    low: float | None
    high: float | None
    warning: str = ""


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Series:
    name: str
    paint: Paint
    points: Sequence[Point]


@dataclass(frozen=True)
class Spot:
    """A variant in the plot of trade-offs; a spot's area is its `size`."""

    name: str
    paint: Paint
    x: float
    y: float
    x_low: float | None = None
    x_high: float | None = None
    y_low: float | None = None
    y_high: float | None = None
    size: float | None = None
    note: str = ""


def bars(found: dict[str, Bar]) -> str:
    """Bars with their intervals, names above them, and a dashed line at 1. Empty where nothing is known."""
    known = {name: bar for name, bar in found.items() if bar.value is not None}
    if not known:
        return ""
    most = max(1.0, *(bar.high or bar.value or 0.0 for bar in known.values()))
    x = Scale(0.0, most, 1, WIDTH - 8)
    height = ROW * len(known) + 22
    drawn = [line(x(1), 6, x(1), height - 16, "one"), words(x(1), height - 3, "1x", "middle", "tick")]
    for i, (name, bar) in enumerate(known.items()):
        top, value = ROW * i + 2, bar.value or 0.0
        said = times(value) + (f", {bar.warning}" if bar.warning else "")
        if 14 + len(said) > WIDTH / LETTER:
            said = fitted(said, WIDTH - 14 * LETTER)
        label = fitted(name, WIDTH - (len(said) + 2) * LETTER)
        kind, ends = "bar lossy" if bar.warning else "bar", f"{bar.low:.2f} to {bar.high:.2f}" if bar.low and bar.high else ""
        note = tip(f"{name}: {said}" + (f" ({ends})" if ends else ""))
        place = f'x="1" y="{top + 20}" width="{x(value) - 1:.1f}" height="13" rx="2"'
        drawn += [words(1, top + 14, label, title=name), words(WIDTH - 4, top + 14, said, "end")]
        drawn.append(f'<rect class="{kind}" {place}>{note}</rect>')
        if bar.low is not None and bar.high is not None and bar.high > bar.low:
            y = top + 26.5
            drawn += [line(x(bar.low), y, x(bar.high), y, "range")]
            drawn += [line(x(end), y - 4, x(end), y + 4, "range") for end in (bar.low, bar.high)]
    return drawing(height, "speed-up of each variant", drawn)


def stacks(found: dict[str, dict[str, float]], parts: Sequence[str], unit: str, label: str) -> str:
    """For each name its parts side by side, and their sum. The classes part0, part1, ... colour them."""
    if not found:
        return ""
    most = max(sum(values.values()) for values in found.values()) or 1.0
    x = Scale(0.0, most, 0, WIDTH - 4)
    drawn = []
    for i, (name, values) in enumerate(found.items()):
        top, left = ROW * i + 2, 1.0
        total = f"{sum(values.values()):.2f} {unit}"
        drawn.append(words(1, top + 14, fitted(name, WIDTH - (len(total) + 2) * LETTER), title=name))
        drawn.append(words(WIDTH - 4, top + 14, total, "end"))
        for k, part in enumerate(parts):
            width = x(values.get(part, 0.0))
            note = f"{name}, {part}: {values.get(part, 0.0):.3f} {unit}"
            drawn.append(
                f'<rect class="part{k}" x="{left:.1f}" y="{top + 20}" width="{width:.1f}" height="13">{tip(note)}</rect>'
            )
            left += width
    return drawing(ROW * len(found) + 4, label, drawn)


def plot(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    *,
    y_range: tuple[float, float] | None = None,
    reference: float | None = None,
    x_marks: Sequence[tuple[float, str]] = (),
    log: bool = False,
    joined: bool = True,
    marked: bool = True,
    height: int = 280,
) -> str:
    """Lines over a common x, with intervals where points have them, and a dashed line at `reference`."""
    points = [point for one in series for point in one.points]
    if not points:
        return ""
    ends = [end for point in points for end in (point.y, point.low, point.high) if end is not None]
    low, high = y_range or spanning(ends, [] if reference is None else [reference])
    x_low, x_high = (min(p.x for p in points), max(p.x for p in points)) if log else spanning([p.x for p in points], room=0.04)
    if log and x_low == x_high:
        x_low, x_high = x_low / 2, x_high * 2
    x = Scale(x_low, x_high, LEFT, WIDTH - RIGHT, log, tuple(apart(x_marks, x_low, x_high)))
    y = Scale(low, high, height - BOTTOM, TOP)
    drawn = [frame(x, y, x_label, y_label)]
    if reference is not None:
        drawn.append(line(x.start, y(reference), x.end, y(reference), "one"))
    for one in series:
        if joined and len(one.points) > 1:
            path = " ".join(f"{x(point.x):.1f},{y(point.y):.1f}" for point in one.points)
            drawn.append(f'<polyline class="{one.paint.line}" points="{path}">{tip(one.name)}</polyline>')
        quiet = joined and one.paint.colour == "rest" and len(one.points) > 1  # many grey marks would hide the coloured ones
        for point in one.points if marked and not quiet else ():
            if point.low is not None and point.high is not None:
                drawn.append(line(x(point.x), y(point.low), x(point.x), y(point.high), f"whisker {one.paint.colour}"))
            drawn.append(marker(x(point.x), y(point.y), one.paint.shape, one.paint.mark, point.note or one.name))
    return drawing(height, f"{y_label} against {x_label}", drawn)


def apart(marks: Sequence[tuple[float, str]], low: float, high: float) -> list[tuple[float, str]]:
    """The ticks that fit beside each other; all of them where they are few."""
    room = (WIDTH - LEFT - RIGHT) / ((high - low) or 1.0)
    kept: list[tuple[float, str]] = []
    for at, text in sorted(marks):
        if not kept or room * (at - kept[-1][0]) > 22:
            kept.append((at, text))
    return kept


def front(spots: Sequence[Spot], less_is_better: bool) -> list[Spot]:
    """The spots that no other one beats in both directions, fastest first."""
    sign = -1 if less_is_better else 1
    found: list[Spot] = []
    for spot in sorted(spots, key=lambda spot: (-spot.x, -sign * spot.y)):
        if not found or sign * spot.y > sign * found[-1].y:
            found.append(spot)
    return found


def tradeoff(spots: Sequence[Spot], x_label: str, y_label: str, *, less_is_better: bool, height: int = 340) -> str:
    """Speed against what it costs; up and to the right is better, the front that nothing beats is drawn through."""
    if not spots:
        return ""
    x_low, x_high = spanning([v for s in spots for v in (s.x, s.x_low, s.x_high) if v is not None], [1.0])
    low, high = spanning([v for s in spots for v in (s.y, s.y_low, s.y_high) if v is not None], room=0.12)
    x = Scale(x_low, x_high, LEFT + 8, WIDTH - RIGHT)
    y = Scale(*((high, low) if less_is_better else (low, high)), height - BOTTOM, TOP)
    best = front(spots, less_is_better)
    corners = [f"{x(s.x):.1f},{y(s.y):.1f}" for s in best]
    turns = [f"{x(s.x):.1f},{y(t.y):.1f}" for s, t in itertools.pairwise(best)]
    path = " ".join(point for pair in zip(corners, [*turns, ""], strict=True) for point in pair if point)
    drawn = [frame(x, y, x_label, y_label), line(x(1), y.start, x(1), y.end, "one")]
    drawn += [f'<polyline class="front" points="{path}">{tip("nothing here beats these")}</polyline>'] if len(best) > 1 else []
    largest = max((spot.size or 0.0 for spot in spots), default=0.0)
    circles = [(x(s.x), y(s.y), max(3.5, 11 * math.sqrt((s.size or 0.0) / largest)) if largest else 6.0) for s in spots]
    for spot, (cx, cy, r) in sorted(zip(spots, circles, strict=True), key=lambda one: -one[1][2]):
        if spot.x_low is not None and spot.x_high is not None:
            drawn.append(line(x(spot.x_low), cy, x(spot.x_high), cy, f"whisker {spot.paint.colour}"))
        if spot.y_low is not None and spot.y_high is not None:
            drawn.append(line(cx, y(spot.y_low), cx, y(spot.y_high), f"whisker {spot.paint.colour}"))
        place = f'cx="{cx:.1f}" cy="{cy:.1f}" r="{r:.1f}"'
        drawn.append(f'<circle class="spot {spot.paint.mark}" {place}>{tip(spot.note or spot.name)}</circle>')
    named = ["" if spot.paint.colour == "rest" and len(spots) > CROWD else spot.name for spot in spots]
    drawn += names(named, circles, (x.start, y.end, WIDTH, y.start))
    return drawing(height, f"{y_label} against {x_label}", drawn)


Box = tuple[float, float, float, float]


def names(texts: Sequence[str], circles: Sequence[tuple[float, float, float]], area: Box) -> list[str]:
    """A label beside each circle where there is room, else none: titles and the legend name every circle."""
    taken: list[Box] = [(cx - r, cy - r, cx + r, cy + r) for cx, cy, r in circles]
    drawn = []
    for text, (cx, cy, r) in zip(texts, circles, strict=True):
        if not text:
            continue
        cut = fitted(text, 18 * LETTER)
        wide = len(cut) * LETTER
        for left, base in [
            (cx + r + 4, cy + 4), (cx - r - 4 - wide, cy + 4), (cx - wide / 2, cy - r - 5), (cx - wide / 2, cy + r + 13),
            (cx + r, cy - r - 1), (cx + r, cy + r + 10), (cx - r - wide, cy - r - 1), (cx - r - wide, cy + r + 10),
        ]:  # fmt: skip
            box = (left, base - 11, left + wide, base + 3)
            inside = area[0] <= box[0] and box[2] <= area[2] and area[1] - 6 <= box[1] and box[3] <= area[3]
            if inside and not any(overlap(box, other) for other in taken):
                taken.append(box)
                drawn.append(words(left, base, cut, kind="label", title=text if cut != text else ""))
                break
    return drawn


def overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def key(paint: Paint, *, marked: bool = True, joined: bool = True) -> str:
    """A legend's sample of a variant's line and mark."""
    inside = line(1, 7, 25, 7, paint.line) if joined else ""
    inside += marker(13, 7, paint.shape, paint.mark, "") if marked else ""
    return f'<svg class="key" viewBox="0 0 26 14" aria-hidden="true">{inside}</svg>'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """Samples with their names, as text of the page, which breaks as it must."""
    return '<ul class="legend">' + "".join(f"<li>{sample}{escape(name)}</li>" for sample, name in entries) + "</ul>"
