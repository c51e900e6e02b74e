"""The prompts of a run: shipped, synthetic, or from a file; every mistake in them names the id and the line."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from forerun.config import WorkloadConfig
from forerun.types import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEMO = Path(__file__).parents[1] / "assets" / "prompts.jsonl"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt in the token ids of one tokenizer; `text` is None where it was made of random ids."""

    id: str
    category: str
    tokens: tuple[int, ...]
    text: str | None


@dataclass(frozen=True, slots=True)
class Line:
    """One prompt as its file has it; `place` is for messages."""

    id: str
    category: str
    text: str
    place: str


def load(config: WorkloadConfig, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int, room: int) -> list[Prompt]:
    """The prompts that a workload asks for, at most `limit` of them.

    `room` is the longest prompt, in tokens, that leaves space for the output. Raises UserError for a missing file, a line
    without the field, an empty prompt, one longer than `room`, and where nothing is left.
    """
    if config.kind == "synthetic":
        return [fitting(prompt, room, "synthetic") for prompt in synthetic(config, vocabulary)]
    if tokenizer is None:
        raise UserError(f"workload.kind={config.kind}: the model has no tokenizer; use workload.kind=synthetic")
    lines = [line for line in read(config) if not config.categories or line.category in config.categories]
    if not lines:
        wanted = f" in the categories {', '.join(config.categories)}" if config.categories else ""
        raise UserError(f"workload: no prompt{wanted} in {source(config)}")
    if (twice := duplicate([line.id for line in lines])) is not None:
        raise UserError(f"workload: the id {twice!r} is there twice in {source(config)}")
    prompts = []
    for line in lines[: config.limit]:
        tokens = tuple(tokenizer(line.text, verbose=False)["input_ids"])[: config.max_prompt_tokens]
        if not line.text.strip() or not tokens:
            raise UserError(f"{line.place}: prompt {line.id!r} is empty")
        prompts.append(fitting(Prompt(line.id, line.category, tokens, line.text), room, line.place))
    return prompts


def fitting(prompt: Prompt, room: int, place: str) -> Prompt:
    if len(prompt.tokens) <= room:
        return prompt
    raise UserError(
        f"{place}: prompt {prompt.id!r} has {len(prompt.tokens)} tokens and {max(room, 0)} fit beside sampling.max_new; "
        "raise engine.capacity or set workload.max_prompt_tokens"
    )


def duplicate(ids: list[str]) -> str | None:
    seen: set[str] = set()
    return next((id for id in ids if id in seen or seen.add(id)), None)  # type: ignore[func-returns-value]


def synthetic(config: WorkloadConfig, vocabulary: int) -> Iterator[Prompt]:
    """Random ids, the same on every machine."""
    length = min(config.prompt_tokens, config.max_prompt_tokens or config.prompt_tokens)
    for i in range(min(config.prompts, config.limit or config.prompts)):
        draw = random.Random(i)
        yield Prompt(f"synthetic-{i}", "synthetic", tuple(draw.randrange(vocabulary) for _ in range(length)), None)


def source(config: WorkloadConfig) -> Path:
    if config.kind == "demo":
        return DEMO
    if config.path is None:
        raise UserError(f"workload.kind={config.kind} needs workload.path, the file with the prompts")
    return Path(config.path)


def read(config: WorkloadConfig) -> Iterator[Line]:
    """The lines of the file as prompts: `text` has one a line, `jsonl` an object a line, `spec-bench` and `demo` questions."""
    path = source(config)
    if not path.is_file():
        raise UserError(f"workload.path={path}: no such file")
    opener: Callable[..., TextIO] = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as lines:
        try:
            for number, raw in enumerate(lines, 1):
                place = f"{path}, line {number}"
                if config.kind == "text":
                    if raw.strip():
                        yield Line(f"line-{number}", "text", raw.strip(), place)
                elif raw.strip():
                    yield from_object(config, raw, number, place)
        except (UnicodeDecodeError, gzip.BadGzipFile) as error:
            raise UserError(f"workload.path={path}: not readable as UTF-8 text: {error}") from error


def from_object(config: WorkloadConfig, raw: str, number: int, place: str) -> Line:
    try:
        item: Any = json.loads(raw)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(item, dict):
        raise UserError(f"{place}: expected an object, found {type(item).__name__}")
    field = config.field if config.kind == "jsonl" else "turns"
    if field not in item:
        raise UserError(f"{place}: no field {field!r}; there are {', '.join(map(repr, item))}")
    value = item[field]
    if isinstance(value, list) and value:  # the turns of a conversation: the first one now
        value = value[0]
    id = str(item.get("question_id", item.get("id", number)))
    if not isinstance(value, str):
        raise UserError(f"{place}: field {field!r} of prompt {id!r} holds no text")
    return Line(id, str(item.get("category", config.kind)), value, place)
