"""report.html: one file, no scripts, no fonts or images from elsewhere; light and dark, phone, desktop and paper."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from forerun.bench.blocks import Block, Chart, Charts, Conclusions, Grid, Items, Section, Terms, Text

# Colours of Okabe and Ito, which the colour-blind tell apart, darkened on paper and lightened at night.
STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1c1e21; --paper: #fbfaf7; --card: #ffffff; --faint: #63686e; --line: #dedbd3; --grid: #eceae4;
  --k0: #0072b2; --k1: #d55e00; --k2: #00875f; --k3: #b5558b; --k4: #3a9ed8; --k5: #b87a00; --k6: #6b4fa0; --base: #3d4248;
  --rest: #b3b1ab; --lossy: #b4602c; --range: #0b3553; --fast: 0, 114, 178; --slow: 213, 94, 0;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --ink: #e6e4df; --paper: #15171a; --card: #1c1f23; --faint: #9ea3aa; --line: #363b41; --grid: #272b30;
    --k0: #4fa8dc; --k1: #f08a4b; --k2: #2fbf94; --k3: #dd8fbb; --k4: #8fd0f2; --k5: #e5b04a; --k6: #a993dc; --base: #c9c6bf;
    --rest: #555a60; --lossy: #e39a68; --range: #d5ecfb; --fast: 79, 168, 220; --slow: 240, 138, 75;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { max-width: 76rem; margin: 0 auto; padding: 1.75rem 1.25rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.15rem; margin: 0; color: var(--faint); font-weight: 600; }
h2 { font-size: 1.3rem; margin: 0 0 .75rem; }
h2 a { color: inherit; text-decoration: none; }
h2 a:hover::after { content: " #"; color: var(--faint); }
section { margin-top: 3rem; scroll-margin-top: 1rem; }
p { margin: .4rem 0 .9rem; max-width: 50rem; }
.scroll + p { margin-top: .9rem; }
nav { margin: 1.25rem 0 0; font-size: .9rem; line-height: 1.9; }
nav a { color: var(--faint); margin-right: 1rem; white-space: nowrap; }
.found { list-style: none; margin: 1rem 0 0; padding: 0; display: grid; gap: .9rem; }
.found li { display: grid; grid-template-columns: 7.5rem 1fr; gap: 1.1rem; align-items: center; }
.found li { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .9rem 1.1rem; }
.found b { font-size: 2rem; line-height: 1.1; text-align: right; font-variant-numeric: tabular-nums; color: var(--k0); }
.found li:not(:first-child) b { font-size: 1.5rem; color: var(--faint); }
.found li:first-child span { font-size: 1.1rem; }
.scroll { overflow-x: auto; border: 1px solid var(--line); border-radius: 10px; background: var(--card); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; width: 100%; }
th, td { padding: .45rem .75rem; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap; }
th, td { vertical-align: top; }
tr:last-child td { border-bottom: 0; }
th { color: var(--faint); font-weight: 600; vertical-align: bottom; }
td.words, th.words { text-align: left; }
td.long { white-space: normal; min-width: 13rem; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--card); }
td:first-child { font-weight: 600; white-space: normal; min-width: 11rem; max-width: 18rem; }
td.failed { color: var(--lossy); white-space: normal; min-width: 16rem; }
td.none { color: var(--faint); }
ul.notes { padding-left: 1.1rem; }
dt { font-weight: 600; }
dd { margin: 0 0 .55rem; color: var(--faint); max-width: 50rem; }
details { margin: .75rem 0; }
summary { cursor: pointer; color: var(--faint); margin-bottom: .5rem; }
.charts { display: grid; gap: 1rem; align-items: start; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); }
figure { margin: 0; padding: .9rem 1rem; border: 1px solid var(--line); border-radius: 10px; background: var(--card); }
figure { min-width: 0; }
figure > svg { display: block; width: 100%; max-width: 32rem; height: auto; margin: 0 auto; }
.single > figure { display: grid; gap: .5rem 2rem; align-items: start; }
.single > figure { grid-template-columns: minmax(0, 32rem) minmax(0, 1fr); }
.single .legend { flex-direction: column; }
figcaption { color: var(--faint); font-size: .9rem; margin-top: .5rem; max-width: 40rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .15rem 1.1rem; }
.legend { padding: 0; margin: .5rem 0 0; font-size: .88rem; }
.legend li { display: flex; align-items: center; gap: .4rem; min-width: 0; }
svg.key { width: 26px; height: 14px; flex: none; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
svg text.tick, svg text.axis { fill: var(--faint); font-size: 12.5px; }
svg text.label { font-size: 12px; paint-order: stroke; stroke: var(--card); stroke-width: 3px; }
.bar { fill: var(--k0); }
.bar.lossy { fill: none; stroke: var(--lossy); stroke-width: 2; stroke-dasharray: 6 3; }
.range { stroke: var(--range); stroke-width: 2; }
.one { stroke: var(--faint); stroke-dasharray: 3 3; }
.grid { stroke: var(--grid); }
.front { fill: none; stroke: var(--faint); stroke-width: 1.5; stroke-dasharray: 2 4; }
.c0 { --c: var(--k0); } .c1 { --c: var(--k1); } .c2 { --c: var(--k2); } .c3 { --c: var(--k3); } .c4 { --c: var(--k4); }
.c5 { --c: var(--k5); } .c6 { --c: var(--k6); } .base { --c: var(--base); } .rest { --c: var(--rest); }
.line { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.line.rest { stroke-width: 1; }
.dashed { stroke-dasharray: 6 4; }
.mark { fill: var(--c); }
.mark.hollow { fill: var(--card); stroke: var(--c); stroke-width: 2; }
.spot { fill-opacity: .75; stroke: var(--c); }
.spot.hollow { fill-opacity: .3; stroke-dasharray: 4 2; }
.whisker { stroke: var(--c); stroke-width: 1.5; }
.part0 { fill: var(--k5); } .part1 { fill: var(--k0); } .part2 { fill: var(--k2); } .part3 { fill: var(--rest); }
footer { margin-top: 3rem; color: var(--faint); font-size: .9rem; }
@media (max-width: 40rem) {
  body { padding: 1.1rem .9rem 3rem; }
  section { margin-top: 2.25rem; }
  figure { padding: .7rem .6rem; }
  .single > figure { display: block; }
  .single .legend { flex-direction: row; }
  th, td { padding: .4rem .5rem; }
  .found li { grid-template-columns: 1fr; gap: .3rem; }
  .found b { text-align: left; }
  td:first-child { max-width: 9.5rem; min-width: 8.5rem; }
}
@media print {
  body { max-width: none; font-size: 11px; }
  nav { display: none; }
  .scroll { overflow: visible; }
  table { font-size: 8px; }
  th, td { padding: .2rem .3rem; white-space: normal; }
  figure, tr, .found li { break-inside: avoid; }
}
"""


def render(title: str, subtitle: str, sections: Sequence[Section], footer: str) -> str:
    """The page. Sections without a title stand before the list of contents."""
    shown = [section for section in sections if section.blocks]
    links = "".join(f'<a href="#{one.anchor}">{escape(one.title)}</a>' for one in shown if one.title)
    head = "".join(rendered(block) for one in shown if not one.title for block in one.blocks)
    top = f"<h1>{escape(title)}{': ' + escape(subtitle) if subtitle else ''}</h1>"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>",
            f'<header>{top}{head}<nav aria-label="Contents">{links}</nav></header>',
            *[section_html(one) for one in shown if one.title],
            f"<footer>{escape(footer)}</footer></body></html>",
            "",
        ]
    )


def section_html(section: Section) -> str:
    inside = "\n".join(rendered(block) for block in section.blocks)
    title = f'<h2><a href="#{section.anchor}">{escape(section.title)}</a></h2>'
    return f'<section id="{section.anchor}">{title}\n{inside}</section>'


def rendered(block: Block) -> str:
    if isinstance(block, Text):
        return f"<p>{f'<b>{escape(block.lead)}</b> ' if block.lead else ''}{escape(block.text)}</p>"
    if isinstance(block, Conclusions):
        concluded = (f"<li><b>{escape(one.figure)}</b><span>{escape(one.text)}</span></li>" for one in block.found)
        return f'<ul class="found">{"".join(concluded)}</ul>'
    if isinstance(block, Items):
        return f'<ul class="notes">{"".join(f"<li>{escape(one)}</li>" for one in block.lines)}</ul>'
    if isinstance(block, Terms):
        return f"<dl>{''.join(f'<dt>{escape(name)}</dt><dd>{escape(text)}</dd>' for name, text in block.meanings.items())}</dl>"
    if isinstance(block, Charts):
        found = [figure(one) for one in block.charts if one.svg]
        return f'<div class="{"single" if len(found) == 1 else "charts"}">{"".join(found)}</div>'
    grid = table(block)
    return f"<details><summary>{escape(block.folded)}</summary>{grid}</details>" if block.folded else grid


def figure(chart: Chart) -> str:
    return f"<figure>{chart.svg}<div>{chart.legend}<figcaption>{escape(chart.caption)}</figcaption></div></figure>"


def table(grid: Grid) -> str:
    """A table in a box of its own, which scrolls where the page is narrower than it."""
    header, *body = grid.rows
    wordy = [any(line[i][:1].isalpha() for line in body if len(line) > i) for i in range(len(header))]
    head = "".join(
        f"<th{' class=words' if words else ''}>{escape(name)}</th>" for name, words in zip(header, wordy, strict=True)
    )
    lines = []
    for i, line in enumerate(body):
        tints = grid.tints[i] if i < len(grid.tints) else ()
        lines.append("<tr>" + cells(line, wordy, tints) + "</tr>")
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def cells(line: Sequence[str], words: Sequence[bool], tints: Sequence[float | None]) -> str:
    if len(line) > 1 and line[1].startswith("failed: "):
        return f'<td>{breakable(line[0])}</td><td class="failed words" colspan="{len(line) - 1}">{escape(line[1])}</td>'
    found = []
    for i, cell in enumerate(line):
        kinds = (
            (["words"] if words[i] else [])
            + (["long"] if len(cell) > 24 and words[i] else [])
            + (["none"] if cell == "-" else [])
        )
        attributes = f' class="{" ".join(kinds)}"' if kinds else ""
        if 0 < i <= len(tints) and (tint := tints[i - 1]) is not None:
            attributes += f' style="background: rgba(var(--{"fast" if tint > 1 else "slow"}), {strength(tint):.2f})"'
        found.append(f"<td{attributes}>{escape(cell) if i else breakable(cell)}</td>")
    return "".join(found)


def breakable(name: str) -> str:
    """A name that a narrow column breaks between settings."""
    return escape(name).replace(",", ",<wbr/>").replace("=", "=<wbr/>")


def strength(speedup: float) -> float:
    """How strongly a speed-up is tinted: fully at three times, or at a third."""
    return min(0.55, 0.12 + 0.25 * abs(max(speedup, 1e-3) - 1) / (1 if speedup > 1 else speedup + 1e-9) / 1.5)
