"""Rows of local files and folders; every mistake in them names the file and the line."""

from __future__ import annotations

import difflib
import gzip
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from forerun.types import UserError
from forerun.workload import hub
from forerun.workload.sets import Data, DataSet, Part

PACKED: Mapping[str, Callable[..., TextIO]] = {".gz": gzip.open, ".xz": lzma.open}
CALLED = {"validation": ("validation", "valid", "dev")}
"""What files call a split."""
USUAL = ("{name}/{split}-*.parquet", "{split}-*.parquet", "data/{split}-*.parquet", "{name}/{split}/*.parquet", "{split}.jsonl")
"""Where a copy of a repository of the Hub has a split."""

ABOUT = ("readme", "license", "licence", "copying", "notice", "source", "sources", "citation", "authors", "changelog")
WORDS = {str: "text", list: "a list", int: "a whole number"}
Found = tuple[int, Data, str]
"""Number of the row from 1, the row, its place for messages."""


def local(known: DataSet, path: Path, split: str | None, name: str | None) -> Iterator[Found]:
    """The records below a file or folder; `split` None is the data set's first one, or the whole of a file of one's own."""
    if path.is_dir() and any((path / mark).is_file() for mark in hub.SAVED):
        records = hub.saved(path, on_hub(known, split))
        return ((number, data, f"{path}, row {number}") for number, data in enumerate(records, 1))
    return numbered(known, files(known, path, split, name))


def files(known: DataSet, path: Path, split: str | None, name: str | None) -> list[Path]:
    """The files that hold a split. A file stands for the first split; another one is looked for beside it."""
    if path.is_dir():
        return find(known, path, split, name)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder; give its path=FILE")
    if split is None or not known.parts or split == next(iter(known.parts)) or known.parts[split].ids is not None:
        return [path]
    return find(known, path.parent, split, name)


def find(known: DataSet, folder: Path, split: str | None, name: str | None) -> list[Path]:
    """The files below a folder that the first matching pattern names, for each of the parts that a split is made of."""
    patterns = known.files + (USUAL if known.parts or not known.files else ())
    found: dict[Path, None] = {}
    for word in on_hub(known, split).split("+"):
        filled = [
            pattern.format(split=called, name=name)
            for pattern in patterns
            for called in (CALLED.get(word, (word,)) if "{split}" in pattern else (word,))
            if name or "{name}" not in pattern
        ]
        matches = next((hits for pattern in filled if (hits := matching(folder, pattern))), [])
        if not matches:
            wanted = " or ".join(pattern.format(split=word, name=name) for pattern in known.files or USUAL[1:3])
            there = ", ".join(sorted(one.name for one in folder.iterdir())[:8]) or "nothing"
            raise UserError(
                f"{folder}: no file of {known.title}, split {word!r}, such as {wanted}; there is {there}; give its path=FILE"
            )
        found |= dict.fromkeys(matches)
    return list(found)


def matching(folder: Path, pattern: str) -> list[Path]:
    """Plain files before packed ones, so that a file and its packed twin are not both read; none that is about the data."""
    found = ([one for one in sorted(folder.glob(pattern + end)) if not about(one)] for end in ("", *PACKED))
    return next((hits for hits in found if hits), [])


def about(path: Path) -> bool:
    """Whether a file's name says that it tells of the data beside it: README.md, LICENSE-CODE.txt, SOURCE.txt."""
    return re.split(r"[._-]", path.name.lower())[0] in ABOUT


def on_hub(known: DataSet, split: str | None) -> str:
    """The Hub's name of a split; a data set of which nothing is known is taken to have a `test`."""
    split = split or next(iter(known.parts), "test")
    return known.parts.get(split, Part()).hub or split


def numbered(known: DataSet, paths: Iterable[Path]) -> Iterator[Found]:
    """Records of files, counted on from one file to the next; blank lines of JSONL count too."""
    before = 0
    for path in paths:
        number = 0
        for number, data, place in parquet(path) if path.suffix == ".parquet" else lines(path, plain=known.lines):
            if data is not None:
                yield before + number, data, place
        before += number


def parquet(path: Path) -> Iterator[tuple[int, Data, str]]:
    return ((number, data, f"{path}, row {number}") for number, data in enumerate(hub.parquet(path), 1))


def lines(path: Path, *, plain: bool) -> Iterator[tuple[int, Data | None, str]]:
    """Each line with its newline as {"text": line}, a blank one as "" (so the Hub has WikiText), or the JSON object in it."""
    with opened(path) as file:
        for number, line in enumerate(file, 1):
            place = f"{path}, line {number}"
            if plain:
                yield number, {"text": line if line.strip() else ""}, place
            else:
                yield number, decoded(line, place) if line.strip() else None, place


def decoded(line: str, place: str) -> Data:
    try:
        item: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{place}: not JSON: {error.msg} at column {error.colno}") from error
    if not isinstance(item, dict):
        raise UserError(f"{place}: expected an object, found {type(item).__name__}")
    return item


@contextmanager
def opened(path: Path) -> Iterator[TextIO]:
    """A text file, packed or not."""
    try:
        with PACKED.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; give its path=FILE") from error
    except (UnicodeDecodeError, OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"{path}: not readable as UTF-8 text: {error}") from error


def check(data: Data, fields: Mapping[str, type], place: str, advice: str = "") -> None:
    """UserError for a field that is not there, has another type, or is an empty list."""
    for name, kind in fields.items():
        if name not in data:
            near = difflib.get_close_matches(name, data, 1)
            hint = f" (near: {near[0]!r})" if near else ""
            raise UserError(f"{place}: no field {name!r}{hint}; there are {', '.join(map(repr, data))}{advice}")
        if not isinstance(data[name], kind) or data[name] == []:
            found = "an empty list" if data[name] == [] else type(data[name]).__name__
            raise UserError(f"{place}: field {name!r} holds {found}, not {WORDS[kind]}{advice}")
