"""Every kind of workload from a file, a folder and the Hub; whole texts; and what goes wrong, in one line."""

import gzip
import json
import lzma
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from fakes import Letters
from forerun import workload
from forerun.config import WorkloadConfig
from forerun.config.data import WorkloadKind
from forerun.types import UserError
from forerun.workload.sets import SETS

DATA = os.environ.get("FORERUN_DATA")
real = pytest.mark.skipif(DATA is None, reason="FORERUN_DATA names no folder with the data sets")
SOURCES = Path(workload.__file__).parents[1]


def prompts(tokenizer: Any = None, room: int = 10**6, **config: Any) -> list[workload.Prompt]:
    return workload.load(WorkloadConfig(**config), tokenizer or Letters(), 97, room)


def texts(**config: Any) -> list[str]:
    return list(workload.texts(WorkloadConfig(**config)))


def write(path: Path, *records: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    opener: Any = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("".join(one if isinstance(one, str) else json.dumps(one) + "\n" for one in records))
    return str(path)


QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Now shorter.", "And now?"]},
    {"question_id": 95, "category": "math", "turns": ["What is 2 + 2?"]},
]
TASK = {
    "task_id": "HumanEval/7", "entry_point": "f", "prompt": "def f():\n", "canonical_solution": "    return 1\n", "test": "x",
}  # fmt: skip
ASSERTS = {"task_id": 12, "text": "Write a function f.", "code": "def f(): pass", "test_list": ["assert f(1)", "assert f(2)"]}
SUM = {"question": "How many?", "answer": "Two.\n#### 2"}
ASKED = {"article": "A dog ran.", "question": "Who ran?", "options": ["cat", "dog", "cow", "hen"], "answer": "B"}
PASSAGE = {
    "id": "high3.txt", "article": "A dog ran.", "questions": ["Who ran?", "Where?"],
    "options": [["cat", "dog", "cow", "hen"], ["home", "away", "up", "down"]], "answers": ["B", "A"],
}  # fmt: skip
RACE_PROMPT = "A dog ran.\n\nQuestion: Who ran?\nA. cat\nB. dog\nC. cow\nD. hen\nAnswer:"
KNOWN: dict[str, tuple[Any, tuple[Any, ...], str, str, str, str]] = {
    # record; what the Hub is asked; id, category, prompt, document
    "mt-bench": (QUESTIONS[0], ("philschmid/mt-bench", None, "train", False), "81", "writing", "Write.",
                 "Write.\nNow shorter.\nAnd now?"),
    "c4": ({"text": "Dear all,\nhello"}, ("allenai/c4", "en", "train", True), "c4-1", "c4", "Dear all,\nhello",
           "Dear all,\nhello"),
    "humaneval": (TASK, ("openai/openai_humaneval", "openai_humaneval", "test", False), "HumanEval/7", "humaneval",
                  "def f():\n", "def f():\n    return 1\n"),
    "mbpp": (ASSERTS, ("google-research-datasets/mbpp", "full", "prompt+test+validation+train", False), "12", "mbpp",
             '"""\nWrite a function f.\nassert f(1)\nassert f(2)\n"""\n',
             '"""\nWrite a function f.\nassert f(1)\nassert f(2)\n"""\ndef f(): pass'),
    "gsm8k": (SUM, ("openai/gsm8k", "main", "test", False), "gsm8k-1", "gsm8k", "Question: How many?\nAnswer:",
              "Question: How many?\nAnswer: Two.\n#### 2"),
    "race-high": ({"example_id": "high3.txt", **ASKED}, ("ehovy/race", "high", "test", False), "high3.txt#1", "race-high",
                  RACE_PROMPT, "A dog ran."),
    "race-middle": ({"example_id": "middle3.txt", **ASKED}, ("ehovy/race", "middle", "test", False), "middle3.txt#1",
                    "race-middle", RACE_PROMPT, "A dog ran."),
}  # fmt: skip


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[Any, ...], list[Any]]]:
    """Records by what is asked for: id, configuration, split, streaming."""
    datasets = pytest.importorskip("datasets")
    held: dict[tuple[Any, ...], list[Any]] = {}

    def load_dataset(id: str, name: str | None, *, split: str, streaming: bool) -> list[Any]:
        if (id, name, split, streaming) not in held:
            raise ConnectionError(f"Couldn't reach {id!r} {name} {split} {streaming}\nand more")
        return held[id, name, split, streaming]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return held


def test_every_kind_is_known() -> None:
    assert set(SETS) == {*get_args(WorkloadKind), "choice"} - {"synthetic"}
    for name, known in SETS.items():
        assert known.licence or name in ("text", "jsonl", "choice", "hub")


def test_one_file_uses_the_library() -> None:
    users = [path for path in SOURCES.rglob("*.py") if re.search(r"^\s*(import|from) datasets\b", path.read_text(), re.M)]
    assert users == [SOURCES / "workload" / "hub.py"]


@pytest.mark.parametrize("kind", KNOWN)
def test_a_named_set_is_the_same_from_a_file_and_from_the_hub(kind: str, tmp_path: Path, hub: Any) -> None:
    record, asked, id, category, prompt, document = KNOWN[kind]
    path = write(tmp_path / "any.jsonl.gz", record)
    hub[asked] = [record]
    for where in ({"path": path}, {"path": None, "limit": 1}):
        (found,) = prompts(kind=kind, **where)
        assert (found.id, found.category, found.text, len(found.tokens)) == (id, category, prompt, len(prompt))
        assert texts(kind=kind, **where) == [document]
        (row,) = workload.rows(kind, where["path"])
        assert (row.id, row.data) == (id, record)
    (short,) = prompts(kind=kind, path=path, max_prompt_tokens=4)
    assert short.tokens == found.tokens[:4]


def test_race_has_a_row_for_each_question(tmp_path: Path, hub: Any) -> None:
    second = {**ASKED, "question": "Where?", "options": PASSAGE["options"][1], "answer": "A"}
    hub["ehovy/race", "high", "test", False] = [{"example_id": "high3.txt", **one} for one in (ASKED, second)]
    local = list(workload.rows("race-high", write(tmp_path / "race_high_test.jsonl", PASSAGE)))
    assert [row.id for row in local] == ["high3.txt#1", "high3.txt#2"]
    assert [(row.id, row.data) for row in workload.rows("race-high", None)] == [(row.id, row.data) for row in local]
    assert texts(kind="race-high", path=str(tmp_path)) == ["A dog ran."], "each passage once"
    with pytest.raises(UserError, match=r"line 1: .*lists of the same length"):
        list(workload.rows("race-high", write(tmp_path / "bad.jsonl", {**PASSAGE, "answers": ["A"]})))


def test_folders_are_searched_for_the_names_that_files_have(tmp_path: Path) -> None:
    for name in ("test", "train"):
        write(tmp_path / "gsm8k" / f"{name}.jsonl.gz", {"question": name, "answer": "1"})
    for split, word in ((None, "test"), ("train", "train")):
        for path in ("gsm8k", "gsm8k/test.jsonl.gz"):  # another split is looked for beside a file
            (row,) = workload.rows("gsm8k", str(tmp_path / path), split)
            assert row.data["question"] == word
    write(tmp_path / "race" / "race_high_dev.jsonl.xz", PASSAGE)
    assert len(list(workload.rows("race-high", str(tmp_path / "race"), "validation"))) == 2
    write(tmp_path / "RACE" / "test" / "middle" / "1.txt", PASSAGE)
    write(tmp_path / "RACE" / "test" / "middle" / "2.txt", PASSAGE | {"id": "middle2.txt"})
    assert len(prompts(kind="race-middle", path=str(tmp_path / "RACE"))) == 4
    for shard in range(2):
        write(tmp_path / "c4" / "en" / f"c4-train.0000{shard}-of-01024.json.gz", {"text": f"shard {shard}"})
    assert [one.id for one in prompts(kind="c4", path=str(tmp_path / "c4"))] == ["c4-1", "c4-2"]
    write(tmp_path / "mt" / "question.jsonl", QUESTIONS[0])
    write(tmp_path / "mt" / "vicuna_question.jsonl", QUESTIONS[1])
    assert [one.id for one in prompts(kind="mt-bench", path=str(tmp_path / "mt"))] == ["81"]
    with pytest.raises(UserError, match=r"no file of GSM8K, split 'train', such as train.jsonl or .*; there is dev, question"):
        list(workload.rows("gsm8k", str((tmp_path / "mt" / "dev").mkdir() or tmp_path / "mt"), "train"))


def test_parquet_and_saved_folders(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([SUM, SUM | {"question": "When?"}])
    (tmp_path / "main").mkdir()
    table.to_parquet(tmp_path / "main" / "test-00000-of-00001.parquet")
    datasets.DatasetDict({"test": table, "train": table.select([1])}).save_to_disk(tmp_path / "saved")
    table.save_to_disk(tmp_path / "one")
    file = tmp_path / "main" / "test-00000-of-00001.parquet"
    for path in (tmp_path, file, tmp_path / "saved", tmp_path / "one"):
        assert [row.data["question"] for row in workload.rows("gsm8k", str(path))] == ["How many?", "When?"]
    assert len(list(workload.rows("gsm8k", str(tmp_path / "saved"), "train"))) == 1
    assert [one.text for one in prompts(kind="jsonl", path=str(file), field="question")] == ["How many?", "When?"]
    assert [one.text for one in prompts(kind="hub", path=str(tmp_path / "saved"), field="question", split="train")] == ["When?"]
    with pytest.raises(UserError, match="saved: no split 'extra'; there are 'test', 'train'"):
        prompts(kind="hub", path=str(tmp_path / "saved"), split="extra")


def test_the_splits_of_mbpp_are_ranges_of_its_task_ids(tmp_path: Path) -> None:
    path = write(tmp_path / "mbpp.jsonl", *(ASSERTS | {"task_id": id} for id in range(1, 975)))
    counts = {"prompt": 10, "test": 500, "validation": 90, "train": 374, None: 974}
    for where in (path, str(tmp_path)):
        assert {split: len(list(workload.rows("mbpp", where, split))) for split in counts} == counts
    assert [one.id for one in prompts(kind="mbpp", path=path, split="test")][:2] == ["11", "12"]


def test_any_data_set_of_the_hub(hub: Any) -> None:
    hub["me/set", "small", "dev", True] = [{"id": 5, "body": "one"}, {"id": 5, "body": ["two", "three"], "category": "talk"}]
    config = {"kind": "hub", "path": "me/set", "name": "small", "split": "dev", "field": "body"}
    found = prompts(**config)
    assert [(one.id, one.category, one.text) for one in found] == [("5", "hub", "one"), ("5#2", "talk", "two")]
    assert [one.text for one in prompts(limit=1, **config)] == ["one"]
    told = workload.source(WorkloadConfig(**config))
    assert (told.origin, told.rows) == ("Hub: me/set (small)", None)
    assert told.licence == "see https://huggingface.co/datasets/me/set"
    hub["me/set", None, "test", True] = [{"id": 5, "body": "one"}]
    with pytest.raises(
        UserError, match=r"me/set, row 1: no field 'bodi' \(near: 'body'\); there are 'id', 'body'; set workload.f"
    ):
        prompts(kind="hub", path="me/set", field="bodi")


# Whole texts and made prompts.


def test_wikitext2_takes_entries_that_are_long_enough(tmp_path: Path, hub: Any) -> None:
    raw = [" \n", " = Dog = \n", " \n", " A dog ran to\u2028sea . \n", " It swam . \n", " \n"]
    rows = ["", " = Dog = \n", "", " A dog ran to\u2028sea . \n", " It swam . \n", ""]
    path = write(tmp_path / "wiki.test.raw", *raw)
    hub["Salesforce/wikitext", "wikitext-2-raw-v1", "test", False] = [{"text": row} for row in rows]
    for where in (path, str(tmp_path), None):
        assert texts(kind="wikitext2", path=where) == rows
        found = prompts(kind="wikitext2", path=where, max_prompt_tokens=12)
        assert [(one.id, one.text, len(one.tokens)) for one in found] == [
            ("wikitext2-4", " A dog ran to\u2028sea .  ", 12), ("wikitext2-5", " It swam .  ", 12),
        ]  # fmt: skip
        assert len(prompts(kind="wikitext2", path=where, max_prompt_tokens=13, limit=5)) == 1
        with pytest.raises(UserError, match="no prompt of 128 tokens or more"):
            prompts(kind="wikitext2", path=where)


def test_texts_of_ones_own(tmp_path: Path) -> None:
    write(tmp_path / "b.txt", "second\n")
    path = write(tmp_path / "a.txt.gz", "one\n\ntwo\n")
    assert texts(kind="text", path=path) == ["one\n\ntwo\n"]
    write(tmp_path / "c" / "a.txt", "first")
    write(tmp_path / "c" / "b.txt", "second\n")
    assert texts(kind="text", path=str(tmp_path / "c")) == ["first", "second\n"]
    assert texts(kind="text", path=str(tmp_path / "c"), limit=1) == ["first"]
    assert [(one.id, one.text) for one in prompts(kind="text", path=str(tmp_path / "c"))] == [
        ("line-1", "first"), ("line-2", "second"),
    ]  # fmt: skip
    for name in ("SOURCE.txt", "README.txt", "LICENSE-CODE.txt", "licence.txt"):
        write(tmp_path / "c" / name, "about the others\n")
    assert texts(kind="text", path=str(tmp_path / "c")) == ["first", "second\n"], "not what tells of them"
    write(tmp_path / "packed" / "SOURCE.txt", "about the other\n")
    write(tmp_path / "packed" / "a.txt.gz", "third\n")
    assert [one.text for one in prompts(kind="text", path=str(tmp_path / "packed"))] == ["third"]
    assert texts(kind="text", path=str(tmp_path / "c" / "SOURCE.txt")) == ["about the others\n"], "named outright"
    assert texts(kind="jsonl", path=write(tmp_path / "a.jsonl", {"body": "x"}), field="body") == ["x"]
    assert texts(kind="jsonl", path=write(tmp_path / "t.jsonl", {"text": "x"})) == ["x"]
    assert len(texts(kind="demo")) == 48
    with pytest.raises(UserError, match="has no text"):
        texts(kind="synthetic")


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("length", [1, 7, 64, 500])
def test_synthetic_prompts_repeat_as_much_of_themselves_as_was_asked(share: float, length: int) -> None:
    vocabulary = 10**9  # so large that nothing comes twice by chance
    config = WorkloadConfig(kind="synthetic", prompts=4, prompt_tokens=length, repetition=share)
    found = workload.load(config, None, vocabulary, length)
    assert workload.load(config, None, vocabulary, length) == found
    assert len({one.tokens for one in found}) == 4
    plain = workload.load(config.model_copy(update={"repetition": 0.0}), None, vocabulary, length)
    for one, other in zip(found, plain, strict=True):
        assert len(one.tokens) == length
        new = list(dict.fromkeys(one.tokens))
        assert len(new) == max(1, length - round(share * length))
        assert new == list(other.tokens[: len(new)]), "the same new tokens at every share"
    if (share, length) == (0.5, 500):  # stretches, not single tokens
        pairs = [tuple(one.tokens[i : i + 8]) for i in range(492)]
        assert len(pairs) - len(set(pairs)) > 80


# What a report says, and mistakes.


def test_sources_tell_licence_count_and_what_differs(tmp_path: Path, hub: Any) -> None:
    path = write(tmp_path / "race_high_test.jsonl", PASSAGE)
    told = workload.source(WorkloadConfig(kind="race-high", path=path))
    assert (told.name, told.origin, told.split, told.rows) == ("RACE, high school", path, "test", 2)
    assert "non-commercial research only" in str(told.licence)
    assert told.remarks == ("2 rows found, and RACE, high school has 3498 as published: is it that?",)
    hub["HuggingFaceFW/x", None, "test", True] = []
    hub["openai/gsm8k", "main", "test", False] = [SUM] * 1319
    told = workload.source(WorkloadConfig(kind="gsm8k"))
    assert (told.origin, told.rows, told.licence, told.remarks) == ("Hub: openai/gsm8k (main)", 1319, "MIT", ())
    assert workload.source(WorkloadConfig(kind="c4")).rows is None, "not counted: too large"
    assert workload.source(WorkloadConfig()).rows == 48
    assert workload.source(WorkloadConfig(kind="synthetic", prompts=5)).rows == 5


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        (
            "humaneval",
            [{"task_id": "a", "promt": "x"}],
            r"line 1: no field 'prompt' \(near: 'promt'\); there are 'task_id', 'pro",
        ),
        ("gsm8k", [SUM, SUM | {"answer": 5}], "line 2: field 'answer' holds int, not text"),
        ("mt-bench", [{"category": "c", "turns": []}], "line 1: field 'turns' holds an empty list, not a list"),
        ("mt-bench", [{"category": "c", "turns": [3]}], "prompt 'mt-bench-1' holds no text"),
        ("mt-bench", [QUESTIONS[0], {**QUESTIONS[1], "turns": [" "]}], "line 2: prompt '95' is empty"),
        ("humaneval", [TASK, TASK], "line 2: the id 'HumanEval/7' is there twice"),
        ("jsonl", [{"messages": [{"role": "system", "content": "x"}]}], "holds no text"),
        ("jsonl", [{"text": "x"}], "no field 'prompt'.*set workload.field"),
    ],
)
def test_mistakes_in_a_record_name_the_place(kind: str, content: list[Any], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", *content)
    with pytest.raises(UserError, match=message) as caught:
        prompts(kind=kind, path=path)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_had_says_what_to_do(tmp_path: Path, hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for config, message in (
        ({"kind": "gsm8k", "split": "tst"}, r"GSM8K: no split 'tst'; did you mean 'test'\? \(there are 'test', 'train'\)"),
        ({"kind": "gsm8k"}, "'openai/gsm8k' cannot be read: Couldn't reach.*; give its path=FILE or data=FOLDER"),
        ({"kind": "gsm8k", "path": str(tmp_path / "no")}, "no: no such file or folder; give its path=FILE"),
        ({"kind": "spec-bench"}, "needs workload.path, for it is not on the Hub: fetch .*hemingkx/Spec-Bench"),
        ({"kind": "hub"}, "hub needs workload.path, the id of a data set"),
        ({"kind": "hub", "path": "me/set"}, "'me/set' cannot be read: Couldn't reach"),
        ({"kind": "c4"}, "give workload.limit"),
        ({"kind": "text", "path": write(tmp_path / "a.txt.gz.xz", "x").removesuffix(".gz.xz")}, "no such file"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            prompts(**config)
        assert "\n" not in str(caught.value)
    (tmp_path / "bad.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"bad\.gz: not readable as UTF-8 text"):
        prompts(kind="text", path=str(tmp_path / "bad.gz"))
    with pytest.raises(UserError, match="choice needs path, a JSONL file of questions"):
        list(workload.rows("choice", None))
    with pytest.raises(UserError, match="no data set is called 'rice'; there are demo"):
        list(workload.rows("rice", None))
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"needs the datasets library: pip install 'forerun\[data\]'"):
        prompts(kind="gsm8k")


# The real data.


def gpt2(folder: Path) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    with gzip.open(folder / "gpt2_vocab.json.gz", "rt") as vocab, gzip.open(folder / "gpt2_merges.txt.gz", "rt") as merges:
        pairs = [tuple(line.split()) for line in merges if not line.startswith("#version")]
        tokenizer = Tokenizer(models.BPE(json.load(vocab), [pair for pair in pairs if len(pair) == 2]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@real
def test_the_real_wikitext2_has_the_rows_of_the_hub() -> None:
    rows = texts(kind="wikitext2", path=f"{DATA}/wikitext2")
    assert len(rows) == 4358
    assert sum(map(bool, rows)) == 2891
    assert all(row == "" or (row.startswith(" ") and row.endswith(" \n")) for row in rows)
    with gzip.open(f"{DATA}/wikitext2/wiki.test.raw.gz", "rt") as file:
        assert [line.strip() for line in file] == [row.strip() for row in rows]
    if (
        DATA and Path(DATA, "tokenizers", "gpt2_vocab.json.gz").exists()
    ):  # 287644 is what transformers' guide to perplexity prints
        assert len(gpt2(Path(DATA, "tokenizers")).encode("\n\n".join(rows)).ids) == 287644
    assert all(len(one.tokens) == 128 for one in prompts(kind="wikitext2", path=f"{DATA}/wikitext2", limit=50))


@real
@pytest.mark.parametrize(
    ("kind", "folder", "split"),
    [
        ("wikitext2", "wikitext2", "test"), ("wikitext2", "wikitext2", "validation"), ("humaneval", "humaneval", None),
        ("mbpp", "mbpp", None), ("mbpp", "mbpp", "test"), ("gsm8k", "gsm8k", "test"), ("gsm8k", "gsm8k", "train"),
        ("race-high", "race", "test"), ("race-high", "race", "validation"), ("race-middle", "race", "test"),
        ("mt-bench", "mt_bench", None), ("c4", "c4_sample", None),
    ],
)  # fmt: skip
def test_the_real_sets_have_as_many_rows_as_published(kind: str, folder: str, split: str | None) -> None:
    told = workload.source(WorkloadConfig(kind=kind, path=f"{DATA}/{folder}", split=split))  # type: ignore[arg-type]
    assert told.rows
    assert told.remarks == ()
    found = prompts(kind=kind, path=f"{DATA}/{folder}", split=split, max_prompt_tokens=64)
    assert len(found) == told.rows or kind == "wikitext2"
