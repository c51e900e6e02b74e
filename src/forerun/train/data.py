"""Sequences of tokens to learn from: text files, JSONL, hub data sets and arrays of tokens.

Shape suffixes: N sequences, T tokens of the longest.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from forerun.train.settings import DataConfig
from forerun.types import UserError
from forerun.workload import hub

Tokens = NDArray[np.int32]
Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Sequences:
    """N sequences of up to T tokens; what lies past a sequence's length is padding."""

    tokens_NT: Tokens
    lengths_N: Numbers
    prompt: int  # tokens at the start that nobody drafts

    def __len__(self) -> int:
        return len(self.tokens_NT)

    def take(self, picked: Numbers) -> Sequences:
        return Sequences(self.tokens_NT[picked], self.lengths_N[picked], self.prompt)


def read(config: DataConfig, tokenizer: PreTrainedTokenizerBase | None, vocabulary: int) -> Sequences:
    """The sequences that a config asks for; UserError for what is missing, empty, too short or of another vocabulary."""
    if config.kind == "tokens":
        found = from_array(config)
    elif tokenizer is None:
        raise UserError(f"data.kind={config.kind}: the model has no tokenizer; give data.kind=tokens")
    else:
        texts = {"text": from_files, "jsonl": from_jsonl, "hub": from_hub}[config.kind](config)
        found = cut(config, tokenized(texts, tokenizer), [tokenizer.eos_token_id])
    long = found.lengths_N >= config.prompt + 2  # one token to read and one to guess after the prompt
    found = found.take(np.flatnonzero(long)[: config.limit])
    if not len(found):
        raise UserError(
            f"data {config.path!r}: no sequence of {config.prompt + 2} tokens or more; give more text or less data.length"
        )
    if (largest := int(found.tokens_NT.max())) >= vocabulary or int(found.tokens_NT.min()) < 0:
        raise UserError(f"data {config.path!r}: token {largest} is not in the target's vocabulary of {vocabulary}")
    return found


def paths(config: DataConfig) -> list[Path]:
    """The files of a comma-separated list of paths and patterns, each pattern's in order of name."""
    found = []
    for word in filter(None, (word.strip() for word in config.path.split(","))):
        matches = sorted(glob.glob(word, recursive=True))  # noqa: PTH207 Path.glob takes no absolute pattern
        if not matches:
            raise UserError(f"data.path: no file is called or matches {word!r}")
        found += [Path(match) for match in matches if Path(match).is_file()]
    if not found:
        raise UserError(f"data.path={config.path!r} names no file; give paths or patterns, comma-separated")
    return found


def from_files(config: DataConfig) -> Iterator[str]:
    for path in paths(config):
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def from_jsonl(config: DataConfig) -> Iterator[str]:
    for path in paths(config):
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except ValueError as error:
                    raise UserError(f"{path}:{number}: not JSON: {error}") from error
                yield text_of(record, config.field, f"{path}:{number}")


def from_hub(config: DataConfig) -> Iterator[str]:
    for number, record in enumerate(hub.fetch(config.path, config.subset, config.split)):
        yield text_of(record, config.field, f"{config.path} record {number}")


def text_of(record: Any, field: str, place: str) -> str:
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        keys = ", ".join(map(str, record)) if isinstance(record, dict) else type(record).__name__
        raise UserError(f"{place}: no text under {field!r} (there is {keys}); set data.field")
    return str(record[field])


def tokenized(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    for text in texts:
        yield list(tokenizer(text, verbose=False)["input_ids"])


def cut(config: DataConfig, documents: Iterable[list[int]], end: list[int | None]) -> Sequences:
    """Documents laid end to end and cut every `length` tokens, or one sequence a document (its start)."""
    length, ending = config.length, [token for token in end if token is not None]
    rows: list[list[int]] = []
    held: list[int] = []
    for document in documents:
        if config.packed:
            held += document + ending
            while len(held) >= length:
                rows.append(held[:length])
                held = held[length:]
        elif document:
            rows.append(document[:length])
        if config.limit is not None and len(rows) >= config.limit:
            break
    if held and not rows:  # less text than one sequence
        rows.append(held)
    return padded(rows, config.prompt)


def padded(rows: list[list[int]], prompt: int) -> Sequences:
    tokens_NT = np.zeros((len(rows), max(map(len, rows), default=0)), np.int32)
    for i, row in enumerate(rows):
        tokens_NT[i, : len(row)] = row
    return Sequences(tokens_NT, np.array([len(row) for row in rows], np.int64), prompt)


def from_array(config: DataConfig) -> Sequences:
    path = Path(config.path)
    try:
        found = np.load(path)
        array = found[config.field] if path.suffix == ".npz" else found
    except (OSError, EOFError, ValueError, KeyError, IndexError) as error:
        raise UserError(f"data.path={config.path}: {error}; give an .npy or .npz array [sequences, tokens]") from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"data.path={config.path}: {array.dtype} {array.shape}; wanted whole numbers [sequences, tokens]")
    tokens = array[:, : config.length].astype(np.int32)
    return Sequences(tokens, np.full(len(tokens), tokens.shape[1], np.int64), config.prompt)


def split(sequences: Sequences, held_out: float, seed: int) -> tuple[Sequences, Sequences]:
    """What is learned and what validates, drawn at random; at least one sequence each."""
    count = len(sequences)
    if count < 2:
        raise UserError("data: one sequence only, and validation needs one of its own; give more text or less data.length")
    order = np.random.default_rng((seed, 1)).permutation(count)
    kept = min(max(1, round(held_out * count)), count - 1)
    return sequences.take(np.sort(order[kept:])), sequences.take(np.sort(order[:kept]))
