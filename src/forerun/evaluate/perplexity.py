"""Perplexity and bits per byte of a running text, in windows that slide over it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forerun.config import PerplexityConfig, WorkloadConfig
from forerun.evaluate.quality import Quality, Tell, described, limit_of, scorer_of, tokenizer_of, write_items
from forerun.evaluate.statistics import bits, ratio
from forerun.types import Backend, UserError
from forerun.workload import texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

JOINT = "\n\n"


@dataclass(frozen=True)
class Window:
    """Tokens [begin, end) are read; of these, [new, end) are counted."""

    begin: int
    new: int
    end: int


def perplexity(config: PerplexityConfig, backend: Backend, folder: Path, tell: Tell) -> list[Quality]:
    """exp of the mean negative log-likelihood of the counted tokens, each token of all windows weighing the same.

    The texts are joined by an empty line and tokenized once. A window begins every `stride` tokens and reads `max_length`, or
    what the model takes if that is less; the last one is the first that reaches the end. A token is counted in the first window
    that reads it, so the first window counts all its tokens and later ones only what is new. A window's first token
    has nothing before it and is never counted: with stride < max_length the text's first token is the only one left out.
    Bits per byte: the same sum in bits over the UTF-8 bytes of the counted tokens' text, where the tokenizer gives offsets.
    Intervals: bootstrap over windows.

    Raises UserError where there is no tokenizer, fewer than two tokens, or a stride that leaves tokens out.
    """
    name = "perplexity" if config.text == "wikitext2" else f"perplexity-{config.text}"
    scorer, tokenizer = scorer_of(backend, name), tokenizer_of(backend, name)
    text = running_text(config, tokenizer)
    ids, ends = encoded(text, tokenizer, config.limit)
    length = min(config.max_length, limit_of(backend) or config.max_length)
    if config.stride > length:
        raise UserError(f"{name}: stride={config.stride} leaves gaps between windows of {length}; give stride={length // 2}")
    chosen = list(windows(len(ids), config.stride, length))
    if not chosen:
        raise UserError(f"{name}: {len(ids)} tokens of text are too few, two are the least; raise limit or give more text")
    nats: list[float] = []
    for start in range(0, len(chosen), config.batch):
        pairs = [(ids[one.begin : one.new], ids[one.new : one.end]) for one in chosen[start : start + config.batch]]
        nats += [-score.logprob for score in scorer.score(pairs)]
        tell(name, len(nats), len(chosen))
    tokens = [one.end - one.new for one in chosen]
    write_items(folder, name, ({**asdict(one), "nats": value} for one, value in zip(chosen, nats, strict=True)))
    details = described(config.text, config.path) | {
        "text_tokens": len(ids), "windows": len(chosen), "stride": config.stride, "max_length": length,
        "asked_max_length": config.max_length, "nats": math.fsum(nats),
    }  # fmt: skip
    found = [figure(name, "perplexity", nats, tokens, math.exp, details, tokens)]
    if ends is not None:
        sizes = [len(text[ends[one.new - 1] : ends[one.end - 1]].encode()) for one in chosen]
        found.append(figure(name, "bits_per_byte", nats, sizes, bits, details | {"bytes": sum(sizes)}, tokens))
    return found


def figure(
    name: str, metric: str, nats: Sequence[float], parts: Sequence[int], show: Callable[[float], float],
    details: dict[str, Any], tokens: Sequence[int],
) -> Quality:  # fmt: skip
    """`show` of all nats over all parts, with its interval over the windows."""
    low, high = ratio(nats, parts)
    return Quality(
        name, metric, show(math.fsum(nats) / sum(parts)), low=None if low is None else show(low),
        high=None if high is None else show(high), higher_is_better=False, count=sum(tokens), details=details,
    )  # fmt: skip


def windows(count: int, stride: int, length: int) -> Iterator[Window]:
    """The windows over `count` tokens, by the rule that `perplexity` tells."""
    end = 0
    for begin in range(0, count - 1, stride):
        new, end = max(end, begin + 1), min(begin + length, count)
        if new < end:
            yield Window(begin, new, end)
        if end == count:
            return


def material(config: PerplexityConfig) -> Iterator[str]:
    """The texts, read as far as the first that is not blank; UserError where there is none, or no end of them."""
    if config.text == "c4" and config.path is None and config.limit is None:
        raise UserError("perplexity: C4 has no end; give limit, the tokens to measure on")
    found, begun = texts(WorkloadConfig(kind=config.text, path=config.path, field=config.field)), []
    for text in found:
        begun.append(text)
        if text.strip():
            return chain(begun, found)
    raise UserError(f"perplexity: no text in {config.path or config.text}")


def running_text(config: PerplexityConfig, tokenizer: PreTrainedTokenizerBase) -> str:
    """The texts joined; where `limit` says how many tokens are wanted, no more of them than that takes."""
    parts: list[str] = []
    size, enough = 0, 8 * (config.limit or 0)  # characters
    for text in material(config):
        parts.append(text)
        size += len(text)
        if config.limit is not None and size >= enough:
            if len(encoded(JOINT.join(parts), tokenizer, None)[0]) > config.limit:
                break
            enough = 2 * size
    return JOINT.join(parts)


def encoded(text: str, tokenizer: PreTrainedTokenizerBase, limit: int | None) -> tuple[list[int], list[int] | None]:
    """Token ids, and where in the text each token ends (in characters) if the tokenizer can tell."""
    told = tokenizer(text, return_offsets_mapping=tokenizer.is_fast, verbose=False)
    # A special token at the end of the text has no place in it: (0, 0).
    ends = list(accumulate((end for _, end in told["offset_mapping"]), max))[:limit] if tokenizer.is_fast else None
    return list(told["input_ids"])[:limit], ends
