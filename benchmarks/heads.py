"""docs/heads.md: Medusa and EAGLE heads beside the draft model on the embedded target, at several batch sizes.

    OMP_NUM_THREADS=2 python benchmarks/heads.py --out docs/heads.md

Runs configs/heads.yaml once for each batch size and fills benchmarks/heads.template.md with the tables.
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import string
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console

from forerun.bench import folder, measure, methods, report
from forerun.bench.metrics import Record
from forerun.config import load

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "heads.yaml"
PROMPTS = 48
COLUMNS = ["drafter", "tokens a round", "accepted", "speed-up over plain (95 %)", "draft / verify / accept / other, ms a round"]
COLUMNS += ["overhead", "exact", "nodes verified, median (most frequent)"]


def chosen(folder: Path) -> str:
    """Which tree sizes the rounds had, the pending token counted."""
    import json

    lines = (folder / "records.jsonl").read_text(encoding="utf-8").splitlines()
    nodes = [round.nodes for line in lines for round in Record.from_json(json.loads(line)).rounds or ()]
    frequent = ", ".join(f"{size}: {100 * count / len(nodes):.0f} %" for size, count in Counter(nodes).most_common(3))
    return f"{statistics.median(nodes):g} ({frequent})"


def table(summary: dict[str, Any], out: Path) -> str:
    """One batch size: a row for each drafter, plain decoding first."""
    folders = folder.folders(list(summary["variants"]))
    plain = summary["variants"][summary["baseline"]]
    speed = f"{plain['tokens_per_second']['total']:.0f} tokens/s over {plain['requests']} prompts"
    lines = [f"{'; '.join(report.machine(out))}. Plain decoding: {speed}.", ""]
    lines += ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    for name, figures in summary["variants"].items():
        if figures["error"]:
            lines.append(f"| {name} | failed: {figures['error']} |" + " |" * (len(COLUMNS) - 2))
            continue
        parts = ("draft", "verify", "accept", "other")
        split = " / ".join(f"{1e3 * figures['seconds'][part] / figures['rounds']:.2f}" for part in parts)
        shown = [
            name, report.number(figures["block_efficiency"], 2), report.share(figures["acceptance_rate"]),
            report.interval(figures["speedup"]), split, report.number(figures["overhead"], 2),
            report.share(figures["exact_share"]), chosen(out / folders[name]),
        ]  # fmt: skip
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="docs/heads.md")
    parser.add_argument("--runs", default="runs/heads", help="folder for the run folders")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="fewer for a trial")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16])
    options = parser.parse_args()
    maker, sections = methods.maker(), []
    for rows in options.rows:
        experiment = load(str(CONFIG), [f"engine.rows={rows}", f"workload.limit={options.prompts}"])
        out = Path(options.runs) / f"rows-{rows}"
        summary = measure.run(experiment, maker, out, Console(stderr=True), measure_memory=False)
        if summary["status"] != "complete":
            sys.exit(f"{out}: {summary['status']}; {options.out} is left as it was")
        sections.append(f"### {rows} row{'s' if rows > 1 else ''}\n\n{table(summary, out)}\n")
    trial = "" if options.prompts >= PROMPTS else f"**A run with {options.prompts} of {PROMPTS} prompts.**\n"
    page = string.Template((HERE / "heads.template.md").read_text(encoding="utf-8")).substitute(
        command=shlex.join(["python", *sys.argv]), trial=trial, measured="\n".join(sections)
    )
    Path(options.out).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
