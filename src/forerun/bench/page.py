"""report.html: one file, no scripts, no fonts or images from elsewhere, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1c1e21; --paper: #fbfaf7; --faint: #6b7076; --line: #dcdad3;
  --bar: #2f6f9f; --range: #9cc3de; --lossy: #b4602c;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e4df; --paper: #17191c; --faint: #9a9fa6; --line: #34383d; }
  :root { --bar: #6fb1e0; --range: #2b5270; --lossy: #e39a68; }
}
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { max-width: 76rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.5rem; }
h2 { font-size: 1.1rem; margin-top: 2.25rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { padding: .35rem .75rem; border-bottom: 1px solid var(--line); text-align: right; }
th { color: var(--faint); font-weight: 600; }
td:nth-child(-n+3), th:nth-child(-n+3) { text-align: left; }
ul { color: var(--faint); padding-left: 1.1rem; }
dt { font-weight: 600; }
dd { margin: 0 0 .4rem; color: var(--faint); }
svg { width: 100%; max-width: 44rem; height: auto; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
.bar { fill: var(--bar); }
.bar.lossy { fill: none; stroke: var(--lossy); stroke-width: 2; stroke-dasharray: 6 3; }
.range { stroke: var(--range); stroke-width: 6; }
.one { stroke: var(--faint); stroke-dasharray: 3 3; }
"""
LEFT, WIDTH, STEP = 170, 640, 30  # of the chart: label column, whole width, height of a bar's line; in SVG units


@dataclass(frozen=True)
class Bar:
    """A speed-up with its interval; one with a warning is drawn hollow and says it."""

    value: float | None
    low: float | None
    high: float | None
    warning: str


def render(
    title: str,
    notes: Sequence[str],
    rows: Sequence[Sequence[str]],
    meanings: dict[str, str],
    bars: dict[str, Bar],
) -> str:
    """The page; `notes` are HTML already, everything else is escaped here."""
    header, *body = rows
    lines = ["<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in body]
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1><ul>" + "".join(f"<li>{note}</li>" for note in notes) + "</ul>",
            "<h2>Speed-up of decoding</h2>" + chart(bars),
            '<h2>All variants</h2><div class="scroll"><table><thead><tr>' + "".join(f"<th>{escape(c)}</th>" for c in header),
            "</tr></thead><tbody>" + "".join(lines) + "</tbody></table></div>",
            "<h2>What the columns mean</h2><dl>",
            *[f"<dt>{escape(name)}</dt><dd>{escape(meaning)}</dd>" for name, meaning in meanings.items()],
            "</dl></body></html>",
            "",
        ]
    )


def chart(bars: dict[str, Bar]) -> str:
    """Bars with their intervals, and a dashed line at 1."""
    known = {name: bar for name, bar in bars.items() if bar.value is not None}
    if not known:
        return "<p>Nothing was measured.</p>"
    most = max(1.0, *(bar.high or bar.value or 0.0 for bar in known.values()))
    scale = (WIDTH - LEFT - 60 - 7 * max(len(bar.warning) for bar in known.values())) / most
    height = STEP * len(known) + 10
    drawn = [f'<line class="one" x1="{LEFT + scale:.1f}" x2="{LEFT + scale:.1f}" y1="0" y2="{height}"/>']
    for i, (name, bar) in enumerate(known.items()):
        middle, value = STEP * i + STEP / 2, bar.value or 0.0
        low, high = bar.low or value, bar.high or value
        label = name if len(name) <= 22 else name[:21] + "…"
        kind, said = ("bar lossy", f", {bar.warning}") if bar.warning else ("bar", "")
        drawn += [
            f'<text x="{LEFT - 8}" y="{middle + 5}" text-anchor="end">{escape(label)}<title>{escape(name)}</title></text>',
            f'<rect class="{kind}" x="{LEFT}" y="{middle - 9}" width="{scale * value:.1f}" height="18" rx="2"/>',
            f'<line class="range" x1="{LEFT + scale * low:.1f}" x2="{LEFT + scale * high:.1f}" y1="{middle}" y2="{middle}"/>',
            f'<text x="{LEFT + scale * high + 8:.1f}" y="{middle + 5}">{value:.2f}x{escape(said)}</text>',
        ]
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="speed-up of each variant">{"".join(drawn)}</svg>'
