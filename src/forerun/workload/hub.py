"""The one place that uses the `datasets` library: the Hub, folders that it saved, and Parquet files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from forerun.types import UserError

SAVED = ("dataset_dict.json", "state.json")
"""What marks a folder that `save_to_disk` wrote."""


def library(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{what} needs the datasets library: pip install 'forerun[data]'") from error
    return datasets


def fetch(id: str, name: str | None, split: str, *, streaming: bool = True, advice: str = "") -> Iterator[dict[str, Any]]:
    """The records of a data set of the Hub; UserError where it, its configuration or the split is not there or not reached.

    Streaming reads as far as it is asked to and keeps nothing; otherwise the split is kept in the library's cache.
    """
    datasets = library(f"data set {id!r} of the Hub")
    try:
        yield from datasets.load_dataset(id, name, split=split, streaming=streaming)
    except Exception as error:  # not found, no network, a wrong split: no common base class
        raise unreadable(f"data set {id!r}", error, advice) from error


def saved(folder: Path, split: str) -> Iterator[dict[str, Any]]:
    """The records of a folder that `save_to_disk` wrote: of its split, or all of them where it has none."""
    datasets = library(str(folder))
    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # as above
        raise unreadable(str(folder), error, "") from error
    if not isinstance(found, dict):
        return iter(found)
    words = split.split("+")
    if missing := [word for word in words if word not in found]:
        raise UserError(f"{folder}: no split {missing[0]!r}; there are {', '.join(map(repr, found))}")
    return (record for word in words for record in found[word])


def parquet(path: Path) -> Iterator[dict[str, Any]]:
    datasets = library(str(path))
    try:
        yield from datasets.load_dataset("parquet", data_files=str(path), split="train", streaming=True)
    except Exception as error:  # as above
        raise unreadable(str(path), error, "") from error


def unreadable(what: str, error: Exception, advice: str) -> UserError:
    said = str(error).strip() or type(error).__name__
    return UserError(f"{what} cannot be read: {said.splitlines()[0]}{advice}")
