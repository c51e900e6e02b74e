"""A report's sections, from the headline to what it was measured on. Pure functions from the material to blocks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from forerun.bench import charts, why
from forerun.bench.blocks import Block, Chart, Charts, Conclusions, Grid, Items, Section, Terms, Text
from forerun.bench.charts import Bar, Paint, Point, Series, Spot
from forerun.bench.compressed import acceptance_lost
from forerun.bench.headline import findings
from forerun.bench.material import COLOURS, Material, paints
from forerun.bench.metrics import gaps_ms
from forerun.bench.show import (
    Figures,
    at,
    bounds,
    interval,
    measures,
    mebibytes,
    number,
    own,
    probability,
    share,
    times,
    titled,
    warning,
    worth,
)
from forerun.bench.sweeps import Sweep, shown, sweeps
from forerun.bench.table import MEANINGS, by_category, count, losses, more, remarks, rows

PARTS = ("draft", "verify", "accept", "other")
INTERVALS = (
    "A figure with an interval, 1.84x (1.71-1.97), is pooled over all prompts; the interval is what 95 % of 2,000 resamplings "
    "of the prompts give (bootstrap). One that includes 1 shows no difference. Below 8 prompts there is none: 1.84x (n=2) is "
    "of 2 prompts: no interval, and no conclusion."
)
MARKS = (
    "Hollow bars and marks and dashed lines are LOSSY: their text is not the target's, and their speed counts only with its "
    "quality."
)
LOST = (
    "No figure counts them, and totals that hold their time (tokens/s, overhead, energy) are left out; each of them is in the "
    "variant's lost.jsonl."
)
GAPS = (
    "Share of tokens with at most this time each from one delta to the next; tokens that came together share it evenly, though "
    "a reader sees them at once, after the whole of it."
)


def headline(found: Material) -> Section:
    """What the run comes to."""
    return Section("", [Conclusions(findings(found.summary, found.configs, found.floor))])


def speedups(found: Material) -> Section:
    bars = {name: Bar(*bounds(figures.get("speedup")), warning=warning(figures)) for name, figures in found.variants.items()}
    drawn = charts.bars(bars)
    caption = "How much faster than its run's baseline each variant decodes; the fine line is the 95 % interval."
    return Section("Speed-up of decoding", [Charts([Chart(drawn, caption)])] if drawn else [Text("Nothing was measured.")])


def everything(found: Material) -> Section:
    blocks: list[Block] = [Grid(rows(found.summary))]
    if any(bounds(figures.get("over_own_plain"))[0] is not None for figures in found.variants.values()):
        blocks.append(
            Text(
                "Two baselines: the speed-up over the run's baseline holds all that a variant changes; the one over its own "
                "plain decoding (same target, sampling and engine) holds speculation alone."
            )
        )
    blocks += [Text(f"{line}. {LOST}") for line in losses(found.variants)]
    blocks += [Text(f"{line}.") for line in remarks(found.variants)]
    return Section("All variants", blocks)


def tradeoffs(found: Material) -> Section:
    """Speed against quality, one chart a measure, memory as size; without quality speed against memory."""
    painted = paints(found.variants, set(found.baselines.values()))
    names = measures(found.variants)
    drawn = [chart for name in names if (chart := against_quality(found, name, painted)) is not None]
    if not drawn and (chart := against_memory(found, painted)) is not None:
        drawn = [chart]
    title = "Speed, quality and memory" if names else "Speed and memory"
    return Section(title, [Charts(drawn)] if drawn else [])


def against_quality(found: Material, name: str, painted: dict[str, Paint]) -> Chart | None:
    spots, better_low, metric = [], False, name
    for variant, figures in found.measured.items():
        measure = own(figures).get(name)
        (x, x_low, x_high), (y, low, high) = bounds(figures.get("speedup")), bounds(measure)
        if x is None or y is None or measure is None:
            continue
        better_low, metric = not measure.get("higher_is_better", True), measure.get("metric") or name
        memory = weight(figures)
        note = f"{variant}: {interval(figures['speedup'])}, {name} {worth(measure)}, memory {mebibytes(memory)}"
        spots.append(Spot(variant, painted[variant], x, y, x_low, x_high, low, high, memory, note))
    if len(spots) < 2:
        return None
    label = f"{titled(name, metric)} ({'lower' if better_low else 'higher'} is better)"
    caption = "Up and to the right is better; the dotted line joins what nothing beats; a spot's area is its memory."
    return Chart(charts.tradeoff(spots, "speed-up", label, less_is_better=better_low), caption, spot_legend(spots))


def against_memory(found: Material, painted: dict[str, Paint]) -> Chart | None:
    spots = []
    for variant, figures in found.measured.items():
        (x, low, high), memory = bounds(figures.get("speedup")), weight(figures)
        if x is not None and memory is not None:
            note = f"{variant}: {interval(figures['speedup'])}, {mebibytes(memory)}"
            spots.append(Spot(variant, painted[variant], x, memory / 2**20, low, high, note=note))
    if len({round(spot.y) for spot in spots}) < 2:  # all the same: nothing to trade
        return None
    caption = "Up and to the right is better; the dotted line joins what nothing beats. Quality was not measured."
    return Chart(
        charts.tradeoff(spots, "speed-up", "memory, MiB (less is better)", less_is_better=True), caption, spot_legend(spots)
    )


def weight(figures: Figures) -> float | None:
    """Memory of a variant: what a process of its own took, else its weights."""
    found: float | None = figures.get("peak_memory_bytes") or figures.get("weight_bytes")
    return found


def spot_legend(spots: Sequence[Spot]) -> str:
    return legend([(spot.paint, spot.name) for spot in spots], spots=True)


def line_legend(series: Sequence[Series], *, marked: bool = True) -> str:
    return legend([(one.paint, one.name) for one in series], marked=marked)


def legend(shown: Sequence[tuple[Paint, str]], *, marked: bool = True, spots: bool = False) -> str:
    """Samples of the coloured lines or spots, each with its name; many grey ones together."""
    grey = [one for one in shown if one[0].colour == "rest"]
    apart = shown if len(grey) < 2 else [one for one in shown if one not in grey]
    entries = [
        (charts.key(replace(paint, shape=0) if spots else paint, marked=marked, joined=not spots), name)
        for paint, name in apart
    ]
    if len(grey) > 1:
        entries.append(
            (charts.key(Paint("rest"), marked=spots, joined=not spots), f"{len(grey)} slower ones; pointing at one names it")
        )
    return charts.legend(entries)


def behind_first(series: list[Series]) -> list[Series]:
    """Grey lines below coloured ones."""
    return sorted(series, key=lambda one: one.paint.colour != "rest")


def positions(found: Material) -> Section:
    """Conditional acceptance at each drafted position."""
    painted = paints(found.variants, set(found.baselines.values()))
    known = {name: v["conditional_acceptance"] for name, v in found.measured.items() if v.get("conditional_acceptance")}
    if not known:
        return Section("Acceptance by position", [])
    series = [
        Series(
            name, painted[name], [Point(i + 1.0, y, note=f"{name}, position {i + 1}: {share(y)}") for i, y in enumerate(shares)]
        )
        for name, shares in known.items()
    ]
    longest = max(len(shares) for shares in known.values())
    marks = [(float(i), str(i)) for i in range(1, longest + 1)]
    drawn = charts.plot(behind_first(series), "position in the draft", "accepted", y_range=(0.0, 1.0), x_marks=marks)
    caption = "Of the rounds that drafted this position and accepted all before it, the share that accepted it."
    grid = [["variant", *[text for _, text in marks]]]
    grid += [[name, *[share(y) for y in shares], *["-"] * (longest - len(shares))] for name, shares in known.items()]
    return Section(
        "Acceptance by position", [Charts([Chart(drawn, caption, line_legend(series))]), Grid(grid, folded="The figures")]
    )


def round_parts(found: Material) -> Section:
    """Milliseconds of a round in each of its parts."""
    split: dict[str, dict[str, float]] = {}
    for name, figures in found.measured.items():
        rounds, spent = count(figures, "rounds"), {part: at(figures, f"seconds.{part}") for part in PARTS}
        if rounds and all(value is not None for value in spent.values()):
            split[name] = {part: 1e3 * value / rounds for part, value in spent.items()}
    if not split:
        return Section("Where a round's time goes", [])
    samples = [
        f'<svg class="key" viewBox="0 0 26 14" aria-hidden="true"><rect class="part{k}" width="26" height="14"/></svg>'
        for k in range(4)
    ]
    legend = charts.legend(list(zip(samples, PARTS, strict=True)))
    caption = (
        "Milliseconds of a round: drafting, the target's pass, acceptance, and the rest of a step. Prefill is no part of it."
    )
    drawn = charts.stacks(split, PARTS, "ms", "milliseconds of a round")
    grid = [["variant", *(f"{part} ms" for part in PARTS), "round ms", "tokens/round"]]
    for name, parts in split.items():
        cells = [
            number(value, 2) for value in (*parts.values(), sum(parts.values()), found.variants[name].get("block_efficiency"))
        ]
        grid.append([name, *cells])
    return Section("Where a round's time goes", [Charts([Chart(drawn, caption, legend)]), Grid(grid, folded="The figures")])


def categories(found: Material) -> Section:
    lines, tints = by_category(found.summary)
    if len(lines) < 2:
        return Section("Speed-up by category", [])
    note = (
        "An interval above 1 is faster than the baseline on these prompts (in report.html blue), one below 1 slower (orange); "
        "one that includes 1, and a figure without an interval, shows no difference."
    )
    return Section("Speed-up by category", [Grid(lines, tints), Text(note)])


def latency(found: Material) -> Section:
    """How long requests take, and the time between tokens, as cumulative shares."""
    painted = paints(found.variants, set(found.baselines.values()))
    whole = {name: sorted(1e3 * record.total_s for record in records) for name, records in found.records.items() if records}
    gaps = {name: sorted(gap for gap in gaps_ms(records) if gap > 0) for name, records in found.records.items()}
    drawn = []
    for milliseconds, x_label, caption in (
        (whole, "milliseconds of a request", "Share of requests that were done within this time of their submission."),
        (gaps, "milliseconds to the next token", GAPS),
    ):
        series = [
            Series(name, painted[name], cumulative(name, values))
            for name, values in milliseconds.items()
            if values and name in painted
        ]
        if series:
            chart = charts.plot(
                behind_first(series), x_label, "share", y_range=(0.0, 1.0), log=True, marked=False, height=250,
            )  # fmt: skip
            drawn.append(Chart(chart, caption, line_legend(series, marked=False)))
    return Section("Latency", [Charts(drawn)] if drawn else [])


def cumulative(name: str, values: Sequence[float]) -> list[Point]:
    """At most a hundred points of a distribution, its ends among them; milliseconds."""
    picked = sorted({round(i * (len(values) - 1) / 99) for i in range(100)})
    return [Point(values[i], (i + 1) / len(values), note=name) for i in picked]


def swept(found: Material) -> list[Section]:
    return [one for sweep in sweeps(found.configs, found.axes) if (one := curve(found, sweep)).blocks]


def curve(found: Material, sweep: Sweep) -> Section:
    """Speed-up, acceptance and each measure of quality against one setting."""
    places = {shown(value): float(value) if sweep.numeric else float(i) for i, value in enumerate(sweep.values)}
    marks = [(at, text) for text, at in places.items()]
    looks, metrics = line_paints(found, sweep), ["speed-up", "acceptance", *measures(found.variants)]
    drawn = []
    for metric in metrics:
        series = []
        for line, look in zip(sweep.lines, looks, strict=True):
            known = [(value, name, metric_of(found.variants.get(name, {}), metric)) for value, name in line.points]
            points = [
                Point(places[shown(value)], y, low, high, f"{name}: {metric} {y:.3g}")
                for value, name, (y, low, high) in known
                if y is not None
            ]
            series.append(Series(line.label, look, points))
        told = {point.y for one in series for point in one.points}
        if len(told) > 1 and any(len(one.points) > 1 for one in series):
            reference = 1.0 if metric == "speed-up" else None
            chart = charts.plot(
                behind_first(series), sweep.key, metric, reference=reference, x_marks=marks, joined=sweep.numeric, height=250,
            )  # fmt: skip
            drawn.append(Chart(chart, f"{metric} against {sweep.key}", line_legend(series)))
    grid = [[sweep.key, "settings", "variant", *metrics]]
    for line in sweep.lines:
        for value, name in line.points:
            grid.append([shown(value), line.label, name, *[cell(found.variants.get(name, {}), metric) for metric in metrics]])
    return Section(f"Swept: {sweep.key}", [Charts(drawn), Grid(grid, folded="The figures")] if drawn else [])


def line_paints(found: Material, sweep: Sweep) -> list[Paint]:
    """A look for each line of a sweep: those that reach the greatest speed-ups in colours, LOSSY ones dashed."""
    best, lossy = [], []
    for line in sweep.lines:
        figures = [found.variants.get(name, {}) for _, name in line.points]
        best.append(max(bounds(one.get("speedup"))[0] or 0.0 for one in figures))
        lossy.append(all(one.get("lossless") is False for one in figures))
    ranked = sorted(sorted(range(len(best)), key=lambda i: -best[i])[:COLOURS])
    return [Paint(f"c{ranked.index(i)}" if i in ranked else "rest", i % 4, lossy[i]) for i in range(len(best))]


def metric_of(figures: Figures, metric: str) -> tuple[float | None, float | None, float | None]:
    if metric == "speed-up":
        return bounds(figures.get("speedup"))
    if metric == "acceptance":
        return figures.get("acceptance_rate"), None, None
    return bounds(own(figures).get(metric))


def cell(figures: Figures, metric: str) -> str:
    if metric == "speed-up":
        return interval(figures.get("speedup"))
    return share(figures.get("acceptance_rate")) if metric == "acceptance" else worth(own(figures).get(metric))


def reasons(found: Material) -> Section:
    """The cost model's account of each variant."""
    blocks: list[Block] = []
    for name, figures in found.variants.items():
        text = why.paragraph(name, figures, found.plain_beside(name), own=name in found.own_plains)
        blocks.append(Text(text, lead=f"{name}, {times(bounds(figures.get('speedup'))[0])}."))
    told = "Speed-up = tokens a round x plain step / (drafting + verification + the rest), each as this run measured it."
    return Section("Why", [Text(told), *blocks] if blocks else [])


def quality_details(found: Material) -> Section:
    """Everything that each measure of quality says; a score that several variants of one model share once."""
    lines = [["variant", "measure", "metric", "value", "count", "better", "McNemar p", "greedy outputs equal", "details"]]
    for name, figures in found.measured.items():
        for measure, one in (figures.get("quality") or {}).items():
            if one.get("error"):
                lines.append([name, measure, "failed", str(one["error"]), *["-"] * 5])
                continue
            if one.get("shared_with") in found.measured:
                continue
            p, equal, higher = one.get("mcnemar_p"), one.get("greedy_equal"), one.get("higher_is_better")
            said_of = ["of the target, not of this variant's text"] if one.get("of_target") else []
            details = "; ".join([*said_of, *detailed(one.get("details") or {})])
            said = "-" if equal is None else share(equal) if isinstance(equal, float) else str(equal).lower()
            better = "-" if higher is None else "higher" if higher else "lower"
            counted = number(one.get("count"), 0)
            lines.append(
                [name, measure, one.get("metric") or "-", worth(one), counted, better, probability(p), said, details or "-"]
            )
    note = Text(
        "A score by likelihood is the model's, whatever drafts for it: it stands here once, with the first of its variants."
    )
    shared = any(one.get("shared_with") for v in found.measured.values() for one in (v.get("quality") or {}).values())
    return Section("Quality", [Grid(lines), *([note] if shared else [])] if len(lines) > 1 else [])


def detailed(details: dict[str, Any], path: str = "") -> Iterator[str]:
    """Everything that a measure was told of, under its name: `sandbox mode namespaces`."""
    for key, value in details.items():
        name = f"{path} {key}".strip()
        if isinstance(value, dict):
            yield from detailed(value, name)
        elif isinstance(value, list | tuple):
            yield f"{name} {', '.join(map(str, value[:5]))}{f' and {len(value) - 5} more' if len(value) > 5 else ''}"
        elif value is not None:
            yield f"{name} {f'{value:.6g}' if isinstance(value, float) else str(value)}"


def appendix(found: Material, notes: Sequence[str]) -> list[Section]:
    """The figures that few ask for, the machine, and what everything means."""
    others = more(found.summary)
    used = {*rows(found.summary)[0], *others[0]}
    meanings = {name: meaning for name, meaning in MEANINGS.items() if name in used}
    return [
        Section("More figures", [Grid(others)] if len(others[0]) > 1 and len(others) > 1 else []),
        Section("What it was measured on", [Items(notes)] if notes else []),
        Section("How to read it", [Items([INTERVALS, MARKS, "A dash stands for what was not measured."])]),
        Section("What the columns mean", [Terms(meanings)]),
    ]


def body(found: Material) -> list[Section]:
    """What a run's report says after its headline."""
    return [
        speedups(found), everything(found), tradeoffs(found), acceptance_lost(found), positions(found), round_parts(found),
        categories(found), latency(found), *swept(found), reasons(found), quality_details(found),
    ]  # fmt: skip


def compared(found: Material) -> list[Section]:
    """The same of several runs, without what would set one run's speed-up against another's baseline."""
    return [
        speedups(found), everything(found), positions(found), round_parts(found), categories(found), latency(found),
        reasons(found), quality_details(found),
    ]  # fmt: skip
