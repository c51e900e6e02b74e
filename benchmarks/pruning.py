"""docs/pruning.svg and its tables: perplexity against the pruned fraction, from a run of configs/pruning.yaml.

    forerun bench configs/pruning.yaml --data DATASETS --no-memory --out runs/pruning
    python benchmarks/pruning.py runs/pruning

The same charts as in the run's report.html, as a file of its own that follows the reader's light or dark setting, without the
intervals: they tell how much a text's windows differ, which is the same for all points.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from forerun.bench import charts, folder
from forerun.bench.charts import Paint, Point, Series
from forerun.bench.page import STYLE
from forerun.bench.show import Figures, bounds, number, worth
from forerun.bench.svg import WIDTH, words
from forerun.bench.sweeps import Sweep, sweeps

AXIS = "model.recipes.0.fraction"
TEXTS = {"perplexity-demo": "perplexity of the shipped prompts", "perplexity": "perplexity of WikiText-2"}
CLASSES = ("svg text", ".grid", ".c0", ".c5", ".line", ".mark")  # of the report's style, what this chart has
PANEL, LINE = 280, 20
Variants = dict[str, Figures]


def values(sweep: Sweep, variants: Variants, measure: str) -> dict[str, dict[float, float]]:
    """Of each line the perplexity at each fraction."""
    found = {
        line.label: {at: bounds(variants[name]["quality"][measure])[0] for at, name in line.points} for line in sweep.lines
    }
    return {label: {at: value for at, value in of.items() if value is not None} for label, of in found.items()}


def panel(found: dict[str, dict[float, float]], y_label: str) -> str:
    series = [
        Series(label, Paint(f"c{i}", i), [Point(at, value, note=f"{label}, {at:g}: {value:.1f}") for at, value in of.items()])
        for i, (label, of) in enumerate(found.items())
    ]
    marks = [(at, f"{at:g}") for at in next(iter(found.values()))]
    svg = charts.plot(series, "share of the MLP channels pruned", y_label, x_marks=marks, height=PANEL)
    return svg[svg.index(">") + 1 :].removesuffix("</svg>")


def drawing(panels: Sequence[str], labels: Sequence[str]) -> str:
    """The charts one above the other, one legend below, and the report's colours for light and dark."""
    parts = [f'<g transform="translate(0 {PANEL * i})">{one}</g>' for i, one in enumerate(panels)]
    for i, label in enumerate(labels):
        top = PANEL * len(panels) + LINE * i
        parts.append(charts.key(Paint(f"c{i}", i)).replace("<svg ", f'<svg x="48" y="{top}" width="26" height="14" ', 1))
        parts.append(words(82, top + 12, label))
    blocks = re.findall(r"^(?::root|@media screen).*?^}$", STYLE, re.DOTALL | re.MULTILINE)
    style = "\n".join([*blocks, *(line for line in STYLE.splitlines() if line.startswith(CLASSES))])
    size = f"0 0 {WIDTH} {PANEL * len(panels) + LINE * len(labels) + 6}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{size}" role="img" aria-label="perplexity against pruned share">'
    return f"{head}\n<style>\n{style}\n</style>\n{''.join(parts)}</svg>\n"


def table(found: dict[str, dict[float, float]]) -> Iterator[str]:
    yield f"| pruned | {' | '.join(found)} |"
    yield "|---" * (len(found) + 1) + "|"
    for at in next(iter(found.values())):
        yield f"| {at:g} | {' | '.join(number(of.get(at), 1) for of in found.values())} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--out", type=Path, default=Path("docs/pruning.svg"))
    options = parser.parse_args()
    run = folder.read(options.run)
    variants: Variants = {name: one for name, one in run.summary["variants"].items() if one.get("quality")}
    [sweep] = [one for one in sweeps(run.experiment.expand(), (AXIS,)) if one.key == AXIS]
    found = {measure: values(sweep, variants, measure) for measure in TEXTS}
    labels = [line.label for line in sweep.lines]
    options.out.write_text(drawing([panel(found[measure], text) for measure, text in TEXTS.items()], labels), encoding="utf-8")
    for measure, text in TEXTS.items():
        print(text, *table(found[measure]), sep="\n")
    for name, figures in variants.items():
        told = ", ".join(f"{measure} {worth(figures['quality'][measure])}" for measure in TEXTS)
        print(f"{name}: {told}, {figures['weight_bytes'] / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
