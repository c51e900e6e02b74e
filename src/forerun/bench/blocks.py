"""What a report is made of, apart from how it is written: report.md and report.html render the same blocks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from forerun.bench.headline import Conclusion


@dataclass(frozen=True)
class Text:
    """A paragraph; `lead` is set in bold before it."""

    text: str
    lead: str = ""


@dataclass(frozen=True)
class Conclusions:
    found: Sequence[Conclusion]


@dataclass(frozen=True)
class Items:
    lines: Sequence[str]


@dataclass(frozen=True)
class Terms:
    meanings: Mapping[str, str]


@dataclass(frozen=True)
class Grid:
    """A table, header first. `tints` colour the cells after the first column by a speed-up; `folded` hides it behind a word."""

    rows: Sequence[Sequence[str]]
    tints: Sequence[Sequence[float | None]] = ()
    folded: str = ""


@dataclass(frozen=True)
class Chart:
    """Inline SVG with what it says in words; `legend` is HTML. Pages alone show it."""

    svg: str
    caption: str
    legend: str = ""


@dataclass(frozen=True)
class Charts:
    """Charts side by side where there is room."""

    charts: Sequence[Chart]


Block = Text | Conclusions | Items | Terms | Grid | Charts


@dataclass(frozen=True)
class Section:
    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower()).strip("-")


def markdown(title: str, sections: Sequence[Section]) -> str:
    lines = [f"# {safe(title)}", ""]
    for section in sections:
        written = [text for block in section.blocks if (text := block_markdown(block))]
        if written:
            lines += ([f"## {safe(section.title)}", ""] if section.title else []) + ["\n\n".join(written), ""]
    return "\n".join(lines)


def block_markdown(block: Block) -> str:
    if isinstance(block, Text):
        return f"**{safe(block.lead)}** {safe(block.text)}" if block.lead else safe(block.text)
    if isinstance(block, Conclusions):
        return "\n".join(f"- {safe(one.text)}" for one in block.found)
    if isinstance(block, Items):
        return "\n".join(f"- {safe(line)}" for line in block.lines)
    if isinstance(block, Terms):
        return "\n".join(f"- **{safe(name)}**: {safe(meaning)}" for name, meaning in block.meanings.items())
    return grid_markdown(block.rows) if isinstance(block, Grid) else ""


def grid_markdown(rows: Sequence[Sequence[str]]) -> str:
    header, *body = [[safe(cell).replace("|", r"\|") for cell in line] for line in rows]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(line) + " |" for line in body])


def safe(text: str) -> str:
    """One line, in which nothing is taken for a tag."""
    return " ".join(text.split()).replace("<", "&lt;") if text else ""
