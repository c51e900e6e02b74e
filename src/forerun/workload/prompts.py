"""The prompts of a run: shipped, made, of a file or a data set; and the next turn of a conversation."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from forerun.config import WorkloadConfig
from forerun.types import UserError
from forerun.workload.records import Line, read
from forerun.workload.sets import SETS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STRETCH = 16
"""Longest stretch of a synthetic prompt that is repeated or new at a time, in tokens."""
S1_TOKENS = 128
"""Length of wikitext2's prompts where nothing else is said."""

Message = tuple[str, str]
"""Role and what it says."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt in the token ids of one tokenizer; `text` is None where it was made of random ids."""

    id: str
    category: str
    tokens: tuple[int, ...]
    text: str | None  # as it was tokenized, before it was clipped
    turns: tuple[str, ...] = ()  # what the user says next, turn by turn
    messages: tuple[Message, ...] = ()  # what was said so far, where there are such turns


def load(config: WorkloadConfig, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int, room: int) -> list[Prompt]:
    """The prompts that a workload asks for, at most `limit` of them.

    `room` is the longest prompt, in tokens, that leaves space for the output. Raises UserError for what cannot be read (see
    `rows`), an empty prompt, one longer than `room`, and where nothing is left.
    """
    if config.kind == "synthetic":
        return [fitting(prompt, room, "synthetic") for prompt in synthetic(config, vocabulary)]
    if tokenizer is None:
        raise UserError(f"workload.kind={config.kind}: the model has no tokenizer; use workload.kind=synthetic")
    if config.limit is None and config.path is None and SETS[config.kind].streamed and config.kind != "hub":
        raise UserError(f"workload.kind={config.kind} has no end worth waiting for; give workload.limit")
    prompts: dict[str, Prompt] = {}
    for line in read(config):
        if config.categories and line.category not in config.categories:
            continue
        if (prompt := entry(line, config, tokenizer) if config.kind == "wikitext2" else begun(line, config, tokenizer)) is None:
            continue
        if prompt.id in prompts:
            raise UserError(f"{line.place}: the id {prompt.id!r} is there twice")
        prompts[prompt.id] = fitting(prompt, room, line.place)
        if len(prompts) == config.limit:
            break
    if not prompts:
        wanted = f" in the categories {', '.join(config.categories)}" if config.categories else ""
        long = f" of {config.max_prompt_tokens or S1_TOKENS} tokens or more" if config.kind == "wikitext2" else ""
        raise UserError(f"workload: no prompt{long}{wanted} in {config.path or config.kind}")
    return list(prompts.values())


def entry(line: Line, config: WorkloadConfig, tokenizer: PreTrainedTokenizerBase) -> Prompt | None:
    """WikiText-2: an entry's newlines as spaces, clipped to n tokens; None where it has fewer. No chat template."""
    length = config.max_prompt_tokens or S1_TOKENS
    text = line.text.replace("\n", " ")
    tokens = tuple(tokenizer(text, verbose=False)["input_ids"])
    return Prompt(line.id, line.category, tokens[:length], text) if len(tokens) >= length else None


def begun(line: Line, config: WorkloadConfig, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """A line's first turn."""
    if not line.text.strip():
        raise UserError(f"{line.place}: prompt {line.id!r} is empty")
    messages = (*([("system", line.system)] if line.system else []), ("user", line.text))
    text, tokens = written(messages, config, tokenizer, line.chat)
    if not tokens:
        raise UserError(f"{line.place}: prompt {line.id!r} is empty")
    more = line.turns[1:] if config.turns == "all" else ()
    return Prompt(line.id, line.category, tokens, text, more, messages if more else ())


def follow(prompt: Prompt, answer: str, config: WorkloadConfig, tokenizer: PreTrainedTokenizerBase | None) -> Prompt | None:
    """The next turn's prompt: all that was said, the answer and what the user says next; None where no turn is left.

    It is clipped to `max_prompt_tokens`, not to the engine's capacity: compare `len(tokens)` before it is submitted.
    """
    if not prompt.turns or tokenizer is None:
        return None
    messages = (*prompt.messages, ("assistant", answer), ("user", prompt.turns[0]))
    turn = sum(role == "user" for role, _ in messages)
    id = f"{prompt.id.removesuffix(f'/{turn - 1}') if turn > 2 else prompt.id}/{turn}"
    text, tokens = written(messages, config, tokenizer, chat=True)
    return Prompt(id, prompt.category, tokens, text, prompt.turns[1:], messages)


def written(
    messages: tuple[Message, ...], config: WorkloadConfig, tokenizer: PreTrainedTokenizerBase, chat: bool
) -> tuple[str, tuple[int, ...]]:
    """A conversation as text and tokens, at most `max_prompt_tokens` of them.

    Of one that is too long, the oldest turns go first, then the end of the last message: a template stays whole.
    """
    limit, template = config.max_prompt_tokens, templated(config, tokenizer, chat)
    while True:
        text = said(messages, tokenizer) if template else "\n".join(words for _, words in messages)
        special = {"add_special_tokens": False} if template else {}  # a template writes its own
        tokens = tuple(tokenizer(text, verbose=False, **special)["input_ids"])
        if limit is None or len(tokens) <= limit:
            return text, tokens
        spoken = [at for at, (role, _) in enumerate(messages) if role == "user"]
        if len(spoken) > 1:
            messages = messages[: spoken[0]] + messages[spoken[1] :]
        elif not template:
            return text, tokens[:limit]
        else:
            words = messages[-1][1]
            kept = min(len(words) - 1, int(len(words) * limit / len(tokens)))
            if kept < 1:
                raise UserError(f"workload.max_prompt_tokens={limit}: the chat template alone is longer; raise it")
            messages = (*messages[:-1], ("user", words[:kept]))


def templated(config: WorkloadConfig, tokenizer: PreTrainedTokenizerBase, chat: bool) -> bool:
    has = getattr(tokenizer, "chat_template", None) is not None
    if config.chat is True and not has:
        raise UserError("workload.chat=true: the tokenizer has no chat template; set workload.chat=auto")
    return config.chat is True or (config.chat == "auto" and chat and has)


def said(messages: tuple[Message, ...], tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation through the tokenizer's chat template, up to where the assistant speaks."""
    given = [{"role": role, "content": words} for role, words in messages]
    try:
        return str(tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True))
    except Exception as error:  # templates raise what they like, such as that they know no system's message
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"the tokenizer's chat template refuses a conversation: {reason}; set workload.chat=false") from error


def fitting(prompt: Prompt, room: int, place: str) -> Prompt:
    if len(prompt.tokens) <= room:
        return prompt
    raise UserError(
        f"{place}: prompt {prompt.id!r} has {len(prompt.tokens)} tokens and {max(room, 0)} fit beside sampling.max_new; "
        "raise engine.capacity or set workload.max_prompt_tokens"
    )


def synthetic(config: WorkloadConfig, vocabulary: int) -> Iterator[Prompt]:
    """Random ids, the same on every machine."""
    length = min(config.prompt_tokens, config.max_prompt_tokens or config.prompt_tokens)
    for i in range(min(config.prompts, config.limit or config.prompts)):
        draw = random.Random(i)
        new = [draw.randrange(vocabulary) for _ in range(max(1, length - round(config.repetition * length)))]
        yield Prompt(f"synthetic-{i}", "synthetic", tuple(repeated(new, length, draw)), None)


def repeated(new: list[int], length: int, draw: random.Random) -> list[int]:
    """`length` tokens: the new ones in their order, and between them stretches that stand earlier in the same prompt."""
    tokens, rest = new[:STRETCH], new[STRETCH:]
    sizes = [(True, size) for size in stretches(length - len(new))] + [(False, size) for size in stretches(len(rest))]
    draw.shuffle(sizes)
    for again, size in sizes:
        while again and size:
            copied = min(size, len(tokens))
            start = draw.randrange(len(tokens) - copied + 1)
            tokens += tokens[start : start + copied]
            size -= copied
        tokens, rest = tokens + rest[:size], rest[size:]
    return tokens


def stretches(count: int) -> list[int]:
    return [min(STRETCH, count - at) for at in range(0, count, STRETCH)]
