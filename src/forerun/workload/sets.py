"""The data sets that are known by name: where they are, what their files are called, how many rows, and under which licence.

Sources: WikiText-2 arXiv:1609.07843, C4 arXiv:1910.10683, HumanEval arXiv:2107.03374, MBPP arXiv:2108.07732, GSM8K
arXiv:2110.14168, RACE arXiv:1704.04683, MT-bench arXiv:2306.05685, Spec-Bench arXiv:2401.07851.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from string import ascii_uppercase
from types import MappingProxyType
from typing import Any

from forerun.types import UserError

Data = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """One split of a data set."""

    rows: int | None = None  # as published: lines, tasks or questions
    hub: str | None = None  # its name on the Hub, several joined by `+`; None: the name that it has here
    ids: range | None = None  # its task ids, where one file holds all splits


@dataclass(frozen=True)
class DataSet:
    """One data set, or one kind of one's own files; the first of `parts` is the split that is taken where none is named."""

    title: str
    licence: str | None
    prompt: str | Callable[[Data], str] | None  # field that holds the prompt, or how to write it; None: the config says
    hub: str | None = None  # id on the Hub
    name: str | None = None  # its configuration there
    parts: Mapping[str, Part] = field(default_factory=dict)  # empty: any
    files: tuple[str, ...] = ()  # patterns below a folder, the best first, with {split} and {name}
    fields: Mapping[str, type] = field(default_factory=dict)  # that each row must have
    document: Callable[[Data], str] | None = None  # the whole text; None: the prompt
    questions: Callable[[Data, str], Iterator[Data]] | None = None  # of one record, where it holds several
    lines: bool = False  # files hold a row of plain text in each line, instead of JSON
    streamed: bool = False  # too large to be fetched whole
    chat: bool = False  # its prompts are said to an assistant
    advice: str = ""  # what its path must be, where it must have one


def mbpp_prompt(data: Data) -> str:
    """The task and its asserts as a docstring, the form that models without instruction tuning are asked in."""
    return '"""\n' + "\n".join([data["text"], *data["test_list"]]) + '\n"""\n'


def gsm8k_prompt(data: Data) -> str:
    return f"Question: {data['question']}\nAnswer:"


def race_prompt(data: Data) -> str:
    options = "".join(f"{letter}. {option}\n" for letter, option in zip(ascii_uppercase, data["options"], strict=False))
    return f"{data['article']}\n\nQuestion: {data['question']}\n{options}Answer:"


def race_questions(data: Data, place: str) -> Iterator[Data]:
    """One row for each question in the fields that the Hub has; RACE's own files hold a passage with all its questions."""
    if "questions" not in data:
        yield data
        return
    lists = [data.get(name) for name in ("questions", "options", "answers")]
    if not all(isinstance(one, list) for one in lists) or len({len(one) for one in lists if one is not None}) > 1:
        raise UserError(f"{place}: `questions`, `options` and `answers` must be lists of the same length")
    for question, options, answer in zip(*lists, strict=True):
        yield {
            "example_id": data.get("id"), "article": data.get("article"),
            "question": question, "options": options, "answer": answer,
        }  # fmt: skip


TASK = {"task_id": int, "text": str, "code": str, "test_list": list}
RACE = {"article": str, "question": str, "options": list, "answer": str}
TEST, VALIDATION, TRAIN = "test", "validation", "train"
RESEARCH = "non-commercial research only (Lai et al. 2017)"


def race(level: str, test: int, validation: int, train: int) -> DataSet:
    return DataSet(
        f"RACE, {level} school", RESEARCH, race_prompt, hub="ehovy/race", name=level,
        parts={TEST: Part(test), VALIDATION: Part(validation), TRAIN: Part(train)},
        files=(f"race_{level}_{{split}}.jsonl", f"{{split}}/{level}/*.txt", f"RACE/{{split}}/{level}/*.txt"),
        fields=RACE, document=lambda data: str(data["article"]), questions=race_questions,
    )  # fmt: skip


SETS: Mapping[str, DataSet] = MappingProxyType({
    "demo": DataSet("prompts shipped with forerun", "Apache-2.0", "turns", fields={"turns": list}),
    "text": DataSet(
        "text", None, "text", files=("*.txt", "*.raw", "*.parquet"), fields={"text": str}, lines=True,
        advice="a file with a prompt in each line",
    ),
    "jsonl": DataSet("JSONL", None, None, files=("*.jsonl", "*.parquet"), advice="a file with a JSON object in each line"),
    "choice": DataSet("questions with choices", None, None, files=("*.jsonl", "*.parquet"), advice="a JSONL file of questions"),
    "hub": DataSet("data set", None, None, streamed=True, advice="the id of a data set such as openai/gsm8k"),
    "spec-bench": DataSet(
        "Spec-Bench", "Apache-2.0; each part under its own source's", "turns", parts={TEST: Part(480)},
        files=("question.jsonl", "spec_bench.jsonl", "spec_bench/question.jsonl", "data/spec_bench/question.jsonl"),
        fields={"category": str, "turns": list}, chat=True,
        advice="for it is not on the Hub: fetch data/spec_bench/question.jsonl of github.com/hemingkx/Spec-Bench",
    ),
    "mt-bench": DataSet(
        "MT-bench", "Apache-2.0", "turns", hub="philschmid/mt-bench", parts={TEST: Part(80, hub=TRAIN)},
        files=("question.jsonl", "mt_bench.jsonl", "mt_bench/question.jsonl"),
        fields={"category": str, "turns": list}, chat=True,
    ),
    "wikitext2": DataSet(
        "WikiText-2 (raw)", "CC BY-SA 3.0 and GFDL", "text", hub="Salesforce/wikitext", name="wikitext-2-raw-v1",
        parts={TEST: Part(4358), VALIDATION: Part(3760), TRAIN: Part(36718)},
        files=("wiki.{split}.raw", "wikitext-2-raw/wiki.{split}.raw"), fields={"text": str}, lines=True,
    ),
    "c4": DataSet(
        "C4 (English)", "ODC-BY 1.0, and Common Crawl's terms", "text", hub="allenai/c4", name="en",
        parts={TRAIN: Part(), VALIDATION: Part()},
        files=("c4-{split}.*.json", "{name}/c4-{split}.*.json", "c4_{name}_{split}*.jsonl"), fields={"text": str},
        streamed=True,
    ),
    "humaneval": DataSet(
        "HumanEval", "MIT", "prompt", hub="openai/openai_humaneval", name="openai_humaneval", parts={TEST: Part(164)},
        files=("HumanEval.jsonl", "data/HumanEval.jsonl", "humaneval.jsonl"),
        fields={"task_id": str, "prompt": str, "canonical_solution": str, "test": str, "entry_point": str},
        document=lambda data: str(data["prompt"] + data["canonical_solution"]),
    ),
    "mbpp": DataSet(
        "MBPP", "CC BY 4.0", mbpp_prompt, hub="google-research-datasets/mbpp", name="full",
        parts={
            "all": Part(974, hub="prompt+test+validation+train"), "prompt": Part(10, ids=range(1, 11)),
            TEST: Part(500, ids=range(11, 511)), VALIDATION: Part(90, ids=range(511, 601)),
            TRAIN: Part(374, ids=range(601, 975)),
        },
        files=("mbpp.jsonl",), fields=TASK, document=lambda data: mbpp_prompt(data) + str(data["code"]),
    ),
    "gsm8k": DataSet(
        "GSM8K", "MIT", gsm8k_prompt, hub="openai/gsm8k", name="main", parts={TEST: Part(1319), TRAIN: Part(7473)},
        files=("{split}.jsonl", "gsm8k_{split}.jsonl", "grade_school_math/data/{split}.jsonl"),
        fields={"question": str, "answer": str}, document=lambda data: f"{gsm8k_prompt(data)} {data['answer']}",
    ),
    "race-high": race("high", 3498, 3451, 62445),
    "race-middle": race("middle", 1436, 1436, 25421),
})  # fmt: skip
