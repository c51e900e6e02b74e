"""The rows of any data set, from its file, folder or the Hub, checked; as prompts, as whole texts, and where they came from."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from forerun.config import WorkloadConfig
from forerun.types import UserError
from forerun.workload import hub
from forerun.workload.files import Found, check, files, local, on_hub, opened
from forerun.workload.sets import SETS, Data, DataSet

DEMO = Path(__file__).parents[1] / "assets" / "prompts.jsonl"


@dataclass(frozen=True, slots=True)
class Row:
    """One record as its file or the Hub has it (RACE: one question); `place` is for messages."""

    id: str
    data: Data
    place: str


@dataclass(frozen=True, slots=True)
class Line:
    """One prompt as its file has it; `place` is for messages."""

    id: str
    category: str
    turns: tuple[str, ...]  # of the user
    place: str
    system: str | None = None
    chat: bool = False  # said to an assistant

    @property
    def text(self) -> str:
        return self.turns[0]


@dataclass(frozen=True, slots=True)
class Source:
    """Where rows came from, for reports."""

    name: str
    origin: str  # file, folder, or id on the Hub
    split: str | None
    rows: int | None  # None: not counted, since it is read as far as it is needed
    licence: str | None  # None: nothing is known
    remarks: tuple[str, ...] = ()


def rows(kind: str, path: str | None, split: str | None = None, name: str | None = None) -> Iterator[Row]:
    """The records of a data set in their order, each checked; ids are unique in RACE and data sets of the Hub at large.

    Raises UserError for a missing file, split or field, a field of another type, and a Hub that is not reached.
    """
    known = described(kind)
    if known.parts and split is not None and split not in known.parts:
        near = difflib.get_close_matches(split, known.parts, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{known.title}: no split {split!r}{hint} (there are {', '.join(map(repr, known.parts))})")
    ids = known.parts[split].ids if known.parts and split is not None else None
    seen: Counter[str] = Counter()
    for number, record, place in found(kind, known, path, split, name):
        for data in known.questions(record, place) if known.questions else (record,):
            check(data, known.fields, place)
            if ids is not None and data["task_id"] not in ids:
                continue
            id = identity(kind, data, number)
            seen[id] += 1
            again = known.questions is not None or (kind == "hub" and seen[id] > 1)
            yield Row(f"{id}#{seen[id]}" if again else id, data, place)


def described(kind: str) -> DataSet:
    if kind not in SETS:
        raise UserError(f"no data set is called {kind!r}; there are {', '.join(SETS)}")
    return SETS[kind]


def identity(kind: str, data: Data, number: int) -> str:
    """What a record calls itself, or its number."""
    for field in ("question_id", "task_id", "example_id", "id"):
        if isinstance(data.get(field), str | int):
            return str(data[field])
    if kind in ("demo", "jsonl", "choice", "hub"):
        return str(number)
    return f"{'line' if kind == 'text' else kind}-{number}"


def found(kind: str, known: DataSet, path: str | None, split: str | None, name: str | None) -> Iterator[Found]:
    """The records as they lie there."""
    if kind == "demo":
        return local(known, DEMO, None, None)
    if path is not None and (kind != "hub" or Path(path).exists()):
        return local(known, Path(path), split, name or known.name)
    id = path if kind == "hub" else known.hub
    if id is None:
        where = "path" if kind == "choice" else "workload.path"  # questions are no workload
        raise UserError(f"{kind} needs {where}, {known.advice}")
    away = "" if kind == "hub" else "; give its path=FILE or data=FOLDER"
    records = hub.fetch(id, name or known.name, on_hub(known, split), streaming=known.streamed, advice=away)
    return ((number, data, f"{id}, row {number}") for number, data in enumerate(records, 1))


def read(config: WorkloadConfig) -> Iterator[Line]:
    """The prompts of a file or data set; blank lines of plain text are none."""
    plain = SETS[config.kind].lines
    for row in rows(config.kind, config.path, config.split, config.name):
        if not plain or row.data["text"].strip():
            yield line_of(row, config)


def line_of(row: Row, config: WorkloadConfig) -> Line:
    """A record as a prompt; a field may hold text, a list of turns, or a list of {role, content}."""
    known, field = SETS[config.kind], ""
    if callable(known.prompt):
        value: Any = known.prompt(row.data)
    else:
        field = known.prompt or named_field(row, config.field)
        value = row.data[field].strip() if config.kind == "text" else row.data[field]
    system = None
    if isinstance(value, list) and all(isinstance(one, dict) and isinstance(one.get("content"), str) for one in value):
        system = next((one["content"] for one in value if one.get("role") == "system"), None)
        turns = [one["content"] for one in value if one.get("role") == "user"]
    else:
        turns = value if isinstance(value, list) else [value]
    if not turns or not all(isinstance(turn, str) for turn in turns):
        raise UserError(f"{row.place}: field {field!r} of prompt {row.id!r} holds no text")
    category = str(row.data.get("category", config.kind))
    chat = known.chat or (config.kind in ("jsonl", "hub") and isinstance(value, list))
    return Line(row.id, category, tuple(turns), row.place, system, chat)


def named_field(row: Row, field: str) -> str:
    """The field that the config names; where it names none, conversations are known by their usual names."""
    usual = ("prompt", "messages", "turns") if field == "prompt" else (field,)
    if (there := next((name for name in usual if name in row.data), None)) is not None:
        return there
    check(row.data, {field: object}, row.place, "; set workload.field")
    raise AssertionError("unreachable: the field is missing")


def texts(config: WorkloadConfig) -> Iterator[str]:
    """Whole documents, at most `limit`: a file or a row each; "\\n\\n".join of wikitext2 is the usual text.

    Tasks come with their solutions, passages without questions, conversations as what their user says.
    """
    return islice(documents(config), config.limit)


def documents(config: WorkloadConfig) -> Iterator[str]:
    if config.kind == "synthetic":
        raise UserError("workload.kind=synthetic is made of random tokens and has no text; give another kind")
    known = SETS[config.kind]
    if config.kind == "text" and config.path is not None and not config.path.endswith(".parquet"):
        for path in files(known, Path(config.path), None, None):
            with opened(path) as file:
                yield file.read()
        return
    last = None
    for row in rows(config.kind, config.path, config.split, config.name):
        if known.document is not None:
            text = known.document(row.data)
            if text != last:  # the next question is often of the same passage
                yield text
            last = text
        elif config.kind == "wikitext2":
            yield row.data["text"]
        else:
            unnamed = config.field == "prompt" and "prompt" not in row.data and "text" in row.data  # as documents call it
            yield "\n".join(line_of(row, config.model_copy(update={"field": "text"}) if unnamed else config).turns)


def source(config: WorkloadConfig) -> Source:
    """What is known of a workload's origin; reads it through (but not a data set too large for that) to count and check it."""
    if config.kind == "synthetic":
        return Source("synthetic", "random tokens, seeded by the number of the prompt", None, config.prompts, None)
    known, kind = SETS[config.kind], config.kind
    fetched = kind != "demo" and (config.path is None or (kind == "hub" and not Path(config.path).exists()))
    id = config.path if kind == "hub" else known.hub
    name = config.name or known.name
    origin = f"Hub: {id}" + (f" ({name})" if name else "") if fetched else "shipped" if kind == "demo" else str(config.path)
    split = config.split or next(iter(known.parts), None)
    licence = f"see https://huggingface.co/datasets/{id}" if fetched and kind == "hub" else known.licence
    there = () if fetched and known.streamed else rows(kind, config.path, config.split, config.name)
    counted = sum(1 for row in there if kind != "text" or row.data["text"]) if there else None
    published = known.parts[split].rows if split and split in known.parts and name == known.name else None
    other = counted and published not in (None, counted)
    remarks = (f"{counted} rows found, and {known.title} has {published} as published: is it that?",) if other else ()
    return Source(known.title, origin, split, counted, licence, remarks)
