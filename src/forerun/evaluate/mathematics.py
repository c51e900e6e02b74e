"""GSM8K: grade-school mathematics by generation."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import islice
from pathlib import Path

from forerun.config import GSM8KConfig
from forerun.evaluate.generation import answer
from forerun.evaluate.quality import Quality, Tell, described, write_items
from forerun.evaluate.statistics import passes
from forerun.types import Backend, Sampling, UserError
from forerun.workload import Row, rows

NAME = "gsm8k"
STOP = "Question:"
MARKED = re.compile(r"####\s*(-?[$\d.,]+)")


def gsm8k(config: GSM8KConfig, backend: Backend, sampling: Sampling, folder: Path, tell: Tell) -> list[Quality]:
    """Share of the questions whose answer after `####` is the right number, as lm-evaluation-harness' strict match reads it.

    The prompt is the first `shots` examples of the training split with their worked answers, then the question. The variant's
    own sampling writes up to `max_new` tokens or to the next `Question:`. Numbers are compared without commas, dollar
    signs and a final point. Questions: Cobbe et al. 2021 (arXiv:2110.14168).
    """
    examples, questions = material(config)
    shown = "".join(f"{ask(one)} {one.data['answer']}\n\n" for one in examples)
    own = replace(sampling, max_new=config.max_new, stop=(STOP,), stop_ids=(), ignore_eos=False)
    written, clipped = answer(NAME, backend, [(shown + ask(one), own) for one in questions], tell)
    items, passed = [], []
    for one, text in zip(questions, written, strict=True):
        gold, found = number(one.data["answer"]), number(text)
        passed.append(found is not None and found == gold)
        items.append({"id": one.id, "passed": passed[-1], "number": found, "gold": gold, "answer": text})
    write_items(folder, NAME, items)
    details = described(NAME, config.path) | {"shots": config.shots, "max_new": config.max_new, "clipped_prompts": clipped}
    return [passes(NAME, "exact_match", passed, details)]


def material(config: GSM8KConfig) -> tuple[list[Row], list[Row]]:
    """The worked examples and the questions; UserError where there are too few."""
    examples = list(islice(rows(NAME, config.path, "train"), config.shots)) if config.shots else []
    if len(examples) < config.shots:
        raise UserError(f"{NAME}: shots={config.shots}, and the training split has {len(examples)} examples; lower shots")
    questions = list(islice(rows(NAME, config.path), config.limit))
    if not questions:
        raise UserError(f"{NAME}: no question in {config.path}")
    return examples, questions


def ask(one: Row) -> str:
    return f"Question: {one.data['question']}\nAnswer:"


def number(text: str) -> str | None:
    """The number after the first `####`, without commas, dollar signs and a final point; None where there is none."""
    found = MARKED.search(text)
    return found[1].replace(",", "").replace("$", "").removesuffix(".") if found else None
