"""docs/rules.md: every acceptance rule by exact enumeration, and measured on the embedded pair.

    OMP_NUM_THREADS=2 python benchmarks/rules.py --out docs/rules.md

Runs configs/rules.yaml once for each temperature (a twin's own temperature is a multiple of it), enumerates every rule over
the standard grid, and fills benchmarks/rules.template.md with the tables.
"""

from __future__ import annotations

import argparse
import shlex
import string
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from forerun import workload
from forerun.accept import Rule, Standard, choose, describe
from forerun.accept import evidence as grid
from forerun.accept.block import Block
from forerun.accept.choose import RULES
from forerun.bench import measure, methods, report
from forerun.config import Experiment, load

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "rules.yaml"
PROMPTS = 24
PAIRS = 24  # of laws, from unlike to alike, for the gain of `block`


def at_temperature(experiment: Experiment, temperature: float) -> Experiment:
    """The same experiment, its base and its twins' own temperatures multiplied."""
    variants = {name: dict(over) for name, over in experiment.variants.items()}
    for over in variants.values():
        if "temperature" in over.get("sampling", {}):
            over["sampling"] = over["sampling"] | {"temperature": over["sampling"]["temperature"] * temperature}
    base = experiment.sampling.temperature * temperature
    return experiment.model_copy(
        update={"sampling": experiment.sampling.model_copy(update={"temperature": base}), "variants": variants}
    )


def only(experiment: Experiment, prompts: int, path: Path) -> Experiment:
    """The same experiment on so many of the shipped prompts, evenly over their categories; their file goes to `path`."""
    lines = workload.DEMO.read_text(encoding="utf-8").splitlines()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines[i * len(lines) // prompts] for i in range(prompts)) + "\n", encoding="utf-8")
    chosen = experiment.workload.model_copy(update={"kind": "spec-bench", "path": str(path)})
    return experiment.model_copy(update={"workload": chosen})


def measured(summary: dict[str, Any], out: Path) -> str:
    """One temperature's table: a row for each rule and k, plain decoding first."""
    plain = summary["variants"][summary["baseline"]]
    speed = f"{plain['tokens_per_second']['decode']:.0f} tokens/s over {plain['requests']} prompts, {plain['tokens']} tokens"
    lines = [
        f"{'; '.join(report.machine(out))}. Plain decoding: {speed}.",
        "",
        "| rule | k | acceptance | tokens a round | speed-up over plain (95 %) | quality | label |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, figures in summary["variants"].items():
        if name == summary["baseline"]:
            continue
        rule, _, k = name.partition(",drafter.k=")
        shown = [rule, k] + (
            [f"failed: {figures['error']}", "", "", "", ""]
            if figures["error"]
            else [
                report.share(figures["acceptance_rate"]),
                report.number(figures["block_efficiency"], 2),
                report.interval(figures["speedup"]),
                report.quality(figures),
                figures["label"],
            ]
        )
        lines.append("| " + " | ".join(shown) + " |")
    return "\n".join(lines)


def rules(experiment: Experiment) -> list[Rule]:
    """Those of the experiment and, with their defaults, those that a chain of drafts has no use for."""
    found = [choose(variant.rule, drawn=True) for variant in experiment.expand().values() if variant.drafter.kind != "none"]
    unlike = {describe(rule): rule for rule in found}
    rest = [choose(name) for name in RULES if name not in {rule.name for rule in unlike.values()}]
    return [*unlike.values(), *rest]


def enumerated(every: list[Rule]) -> str:
    """The table of the grid's verdicts."""
    columns = ["rule", "verdict", "TV of a token, worst", "mean", "TV of a round, worst", "drafts accepted of 4"]
    columns += ["against `standard`", "least of any pair"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for rule in every:
        found = grid.examine(rule)
        verdict = "meaningless" if found.meaningless else "lossless" if found.lossless else "LOSSY"
        tvs = (found.worst_tv, found.mean_tv, found.joint_tv)
        errors = [f"{value:.0e}" if value < grid.EXACT else f"{value:.3f}" for value in tvs]
        gains = [f"{found.accepted:.3f}", f"{found.against_standard:.3f}", f"{found.least_against_standard:.3f}"]
        lines.append("| " + " | ".join([f"`{describe(rule)}`", verdict, *errors, *gains]) + " |")
    return "\n".join(lines)


def gain(drafts: int) -> str:
    ours, standard = grid.drafts_accepted(Block(), drafts), grid.drafts_accepted(Standard(), drafts)
    mean, least = float(ours.sum() / standard.sum()) - 1, float((ours / standard).min()) - 1
    return f"{100 * mean:+.1f} % in the mean, {100 * least:+.1f} % at least on any pair"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="docs/rules.md")
    parser.add_argument("--runs", default="runs/rules", help="folder for the run folders")
    parser.add_argument("--prompts", type=int, default=PROMPTS, help="fewer for a trial")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.7, 1.0])
    options = parser.parse_args()
    experiment = only(load(str(CONFIG), []), options.prompts, Path(options.runs) / "prompts.jsonl")
    maker, sections = methods.maker(), []
    for temperature in options.temperatures:
        out = Path(options.runs) / f"temperature-{temperature:g}"
        summary = measure.run(at_temperature(experiment, temperature), maker, out, Console(stderr=True), measure_memory=False)
        sections.append(f"### Temperature {temperature:g}\n\n{measured(summary, out)}\n")
        if summary["status"] != "complete":
            sys.exit(f"{out}: {summary['status']}; {options.out} is left as it was")
    trial = "" if options.prompts >= PROMPTS else f"**A trial run with {options.prompts} prompts: its figures mean little.**\n"
    page = string.Template((HERE / "rules.template.md").read_text(encoding="utf-8")).substitute(
        command=shlex.join(["python", *sys.argv]), trial=trial, measured="\n".join(sections),
        enumerated=enumerated(rules(experiment)), gain2=gain(2), gain4=gain(4),
        pairs=f"{grid.PAIRS:,}", vocabulary=grid.PAIR_VOCABULARY, sharpness=grid.SHARPNESS, likeness=grid.LIKENESS,
        chains=", ".join(f"{drafts} of {v}" for v, drafts in grid.CHAINS),
        trees=", ".join(f"{list(parents)} of {v}" for v, parents in grid.SHAPES), exact=f"{grid.EXACT:.0e}",
        some=PAIRS, max_new=experiment.sampling.max_new, cut=experiment.workload.max_prompt_tokens,
    )  # fmt: skip
    Path(options.out).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
