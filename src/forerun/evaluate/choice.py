"""Multiple choice by log-likelihood: RACE, and JSONL files of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from forerun.config import ChoiceConfig
from forerun.evaluate.encoding import encode_pair
from forerun.evaluate.quality import Quality, Tell, described, limit_of, scorer_of, tokenizer_of, write_items
from forerun.evaluate.statistics import passes
from forerun.types import Backend, Score, UserError
from forerun.workload import Row, rows

TOGETHER = 64
"""Questions handed to the scorer at a time."""
LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """Texts to compare, as (context, continuation), and the index of the right one.

    `gold` None: there is one pair, and it is passed if greedy decoding writes the continuation. `lengths`: UTF-8 bytes of each
    answer without the space before it; empty where all candidates continue with the same words.
    """

    id: str
    pairs: tuple[tuple[str, str], ...]
    gold: int | None
    lengths: tuple[int, ...] = ()


def choice(config: ChoiceConfig, backend: Backend, folder: Path, tell: Tell) -> list[Quality]:
    """Share of the questions whose right answer is the most probable continuation: acc by log-likelihood, acc_norm by
    log-likelihood per byte of the answer (lm-eval's acc_norm counts characters, which is the same in ASCII).

    RACE: each question alone, zero-shot, in the words of lm-eval's `race` (which itself asks only the last question of a
    passage, behind the earlier ones with their answers, and writes no `Question:` and `Answer:` around that one):

        Article: <article>

        Question: <question>
        Answer: <option>

    JSONL: {"query", "choices", "gold"}; {"context_options", "continuation", "gold"}, where the same continuation is scored
    after each context (WinoGrande); {"context", "continuation"}, passed if greedy decoding writes the continuation (LAMBADA).
    A space joins context and continuation unless either brings its own. The metric that `normalize` asks for comes first.
    """
    name = called(config)
    scorer, tokenizer = scorer_of(backend, name), tokenizer_of(backend, name)
    questions = material(config)
    scores: list[list[Score]] = []
    limit, clipped = limit_of(backend), 0
    for start in range(0, len(questions), TOGETHER):
        part = questions[start : start + TOGETHER]
        pairs = [encode_pair(tokenizer, *pair) for one in part for pair in one.pairs]
        clipped += sum(limit is not None and len(context) + len(told) - 1 > limit for context, told in pairs)
        found = iter(scorer.score(pairs))
        scores += [list(islice(found, len(one.pairs))) for one in part]
        tell(name, len(scores), len(questions))
    details = described(config.kind, config.path) | {"shots": 0, "clipped_texts": clipped}
    answers = [answered(one, found) for one, found in zip(questions, scores, strict=True)]
    write_items(folder, name, ({"id": one.id} | answer for one, answer in zip(questions, answers, strict=True)))
    metrics = [metric for metric in ("acc", "acc_norm") if metric in answers[0]]
    metrics.sort(key=lambda metric: (metric == "acc_norm") != config.normalize)
    return [passes(name, metric, [answer[metric] for answer in answers], details) for metric in metrics]


def called(config: ChoiceConfig) -> str:
    return config.kind if config.kind != "choice" else Path(config.path or "choice").name.split(".")[0]


def material(config: ChoiceConfig) -> list[Question]:
    """The questions; UserError where there are none, or some that cannot be asked."""
    questions = [question(row) for row in islice(rows(config.kind, config.path), config.limit)]
    if not questions:
        raise UserError(f"{called(config)}: no question in {config.path}")
    if len({one.gold is None for one in questions}) > 1:
        raise UserError(f"{called(config)}: {config.path} mixes questions with `gold` and without; put them into two files")
    return questions


def question(row: Row) -> Question:
    """One row of RACE or of a JSONL file as texts to compare; UserError where it has none of the forms."""
    data = row.data
    if "article" in data:
        context = f"Article: {data['article']}\n\nQuestion: {data['question']}\nAnswer:"
        return compared(row, context, data["options"], LETTERS.find(data["answer"]))
    if {"query", "choices", "gold"} <= set(data):
        return compared(row, data["query"], data["choices"], data["gold"])
    if {"context_options", "continuation", "gold"} <= set(data):
        contexts = listed(row, data["context_options"], data["gold"])
        return Question(row.id, tuple(joined(row, context, data["continuation"]) for context in contexts), data["gold"])
    if {"context", "continuation"} <= set(data):
        return Question(row.id, (joined(row, data["context"], data["continuation"]),), None)
    raise UserError(
        f"{row.place}: not a question; give query, choices, gold, or context_options, continuation, gold, "
        f"or context, continuation (there is {', '.join(data)})"
    )


def compared(row: Row, context: str, options: Any, gold: Any) -> Question:
    options = listed(row, options, gold)
    pairs = tuple(joined(row, context, option) for option in options)
    return Question(row.id, pairs, gold, tuple(len(option.encode()) for option in options))


def listed(row: Row, options: Any, gold: Any) -> list[str]:
    """The options, if they are texts and `gold` is the index of one."""
    texts = isinstance(options, list) and all(isinstance(option, str) and option for option in options)
    if not texts or not isinstance(gold, int) or not 0 <= gold < len(options):
        raise UserError(f"{row.place}: question {row.id!r} needs a list of texts and the index of the right one, not {gold!r}")
    return list(options)


def joined(row: Row, context: Any, continuation: Any) -> tuple[str, str]:
    """The two with a space between them unless either brings its own; only the context may be empty."""
    if not isinstance(context, str) or not isinstance(continuation, str) or not continuation:
        raise UserError(f"{row.place}: question {row.id!r} needs texts to continue and texts to continue with, not empty ones")
    space = "" if not context or context[-1].isspace() or continuation[0].isspace() else " "
    return context, space + continuation


def answered(one: Question, scores: Sequence[Score]) -> dict[str, Any]:
    """What the model says to a question, and whether that is right by each metric; the first of equals is chosen."""
    logprobs = [score.logprob for score in scores]
    if one.gold is None:
        return {"logprobs": logprobs, "acc": scores[0].greedy}
    best = logprobs.index(max(logprobs))
    answer = {"logprobs": logprobs, "gold": one.gold, "answer": best, "acc": best == one.gold}
    if one.lengths:
        per_byte = [logprob / length for logprob, length in zip(logprobs, one.lengths, strict=True)]
        answer["acc_norm"] = per_byte.index(max(per_byte)) == one.gold
    return answer
