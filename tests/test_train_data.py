"""Where training text comes from: files, records, arrays, and the target's own writing."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from forerun.model import ASSETS
from forerun.train import loggers
from forerun.train.data import padded, read, split
from forerun.train.settings import DataConfig, WriteConfig
from forerun.train.written import continued
from forerun.types import UserError
from models import plain_greedy, tiny

SIZE = 4096  # of the embedded vocabulary


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(ASSETS / "target")


def test_files_are_laid_end_to_end_and_cut(tokenizer: Any, tmp_path: Path) -> None:
    texts = ["One day a dog ran to the sea. " * 3, "It was a very long way to go for a small dog. " * 4]
    for name, text in zip("ab", texts, strict=True):
        (tmp_path / f"{name}.txt").write_text(text)
    found = read(DataConfig(path=f"{tmp_path}/*.txt", length=8), tokenizer, SIZE)
    joined = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    assert found.tokens_NT.tolist() == [joined[i : i + 8] for i in range(0, len(joined) - 7, 8)]
    assert found.lengths_N.tolist() == [8] * len(found)
    two = read(DataConfig(path=f"{tmp_path}/a.txt, {tmp_path}/b.txt", length=8, limit=2), tokenizer, SIZE)
    assert two.tokens_NT.tolist() == found.tokens_NT[:2].tolist()


def test_a_document_a_sequence(tokenizer: Any, tmp_path: Path) -> None:
    texts = ["Once upon a time there was a king.", "No.", "And the queen was there too, in the garden."]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in texts) + "\n\n")
    config = DataConfig(kind="jsonl", path=str(path), field="prompt", length=9, packed=False, prompt=2)
    found = read(config, tokenizer, SIZE)
    ids = [tokenizer(text)["input_ids"][:9] for text in texts]
    assert len(ids[1]) < 4, "too short to learn from"
    assert [row[:n].tolist() for row, n in zip(found.tokens_NT, found.lengths_N, strict=True)] == [ids[0], ids[2]]
    assert found.prompt == 2


def test_less_text_than_a_sequence_is_one_sequence(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("One day a dog ran to the sea.")
    assert len(read(DataConfig(path=str(tmp_path / "a.txt"), length=400), tokenizer, SIZE)) == 1


def test_arrays_of_tokens(tmp_path: Path) -> None:
    tokens = np.arange(60, dtype=np.uint16).reshape(5, 12)
    np.savez(tmp_path / "a.npz", mine=tokens)
    np.save(tmp_path / "a.npy", tokens)
    for config in (
        DataConfig(kind="tokens", path=str(tmp_path / "a.npz"), field="mine"),
        DataConfig(kind="tokens", path=str(tmp_path / "a.npy")),
    ):
        assert read(config, None, 60).tokens_NT.tolist() == tokens.tolist()
    short = DataConfig(kind="tokens", path=str(tmp_path / "a.npy"), length=7, limit=2)
    assert read(short, None, 60).tokens_NT.tolist() == tokens[:2, :7].tolist()
    with pytest.raises(UserError, match="token 59 is not in the target's vocabulary of 59"):
        read(short.model_copy(update={"length": 12, "limit": 5}), None, 59)


def test_what_cannot_be_read_is_one_line(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": \n')
    (tmp_path / "other.jsonl").write_text('{"words": "a"}\n')
    np.save(tmp_path / "flat.npy", np.arange(5))
    wrong = [
        ("text", "empty.txt", "no sequence of 3 tokens or more"),
        ("text", "absent*.txt", "no file is called or matches"),
        ("text", "", "names no file"),
        ("text", "latin.txt", "latin.txt: not UTF-8"),
        ("jsonl", "bad.jsonl", "bad.jsonl:2: not JSON"),
        ("jsonl", "other.jsonl", r"other.jsonl:1: no text under 'text' \(there is words\); set data.field"),
        ("tokens", "flat.npy", r"wanted whole numbers \[sequences, tokens\]"),
        ("tokens", "absent.npy", "No such file"),
        ("tokens", "empty.txt", "give an .npy or .npz"),
    ]  # fmt: skip
    for kind, name, words in wrong:
        with pytest.raises(UserError, match=words):
            read(DataConfig(kind=kind, path=str(tmp_path / name) if name else ""), tokenizer, SIZE)


def test_a_hub_data_set_needs_the_library(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(kind="hub", path="some/set", field="body", split="test", length=8)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install .forerun\[data\]"):
        read(config, tokenizer, SIZE)
    stand_in: Any = ModuleType("datasets")
    asked = []

    def load_dataset(*args: object, **kwargs: object) -> list[dict[str, str]]:
        asked.append((args, kwargs))
        return [{"body": "One day a dog ran to the sea and swam."}]

    stand_in.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    assert len(read(config, tokenizer, SIZE)) == 1
    assert asked == [(("some/set", None), {"split": "test", "streaming": True})]
    stand_in.load_dataset = lambda *args, **kwargs: 1 / 0
    with pytest.raises(UserError, match="'some/set' cannot be read: division by zero"):
        read(config, tokenizer, SIZE)


def test_the_split_is_the_same_every_time_and_leaves_something_for_both() -> None:
    rows = padded([[i] * 4 for i in range(10)], 1)
    learned, held_out = split(rows, 0.2, seed=1)
    assert (len(learned), len(held_out)) == (8, 2)
    assert sorted([*learned.tokens_NT[:, 0], *held_out.tokens_NT[:, 0]]) == list(range(10))
    again = split(rows, 0.2, seed=1)[1]
    assert again.tokens_NT.tolist() == held_out.tokens_NT.tolist()
    assert [len(part) for part in split(rows.take(np.arange(2)), 0.9, 0)] == [1, 1]
    with pytest.raises(UserError, match="one sequence only"):
        split(rows.take(np.arange(1)), 0.5, 0)


def test_the_target_continues_prompts(tmp_path: Path) -> None:
    target = tiny("llama")
    source = padded([[i, i + 1, i + 2, i + 3, 9] for i in range(70)], 1)
    config = WriteConfig(prompt=4, new=6, greedy=0.5, temperature=1.0, rows=8)
    told: list[tuple[int, int]] = []

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    found = continued(target, source, config, tmp_path, frozenset(), tell)
    assert found.prompt == 4
    assert found.lengths_N.tolist() == [10] * 70
    assert found.tokens_NT[:, :4].tolist() == source.tokens_NT[:, :4].tolist()
    greedy = [found.tokens_NT[i, 4:].tolist() == plain_greedy(target, tuple(source.tokens_NT[i, :4]), 6) for i in range(12)]
    assert greedy == [False, True] * 6
    assert told == [(64, 70), (70, 70)]
    assert len(list(tmp_path.iterdir())) == 2
    again = continued(target, source, config, tmp_path, frozenset(), tell)
    assert again.tokens_NT.tolist() == found.tokens_NT.tolist()
    assert len(list(tmp_path.iterdir())) == 2, "read back, not written again"
    continued(target, source, config.model_copy(update={"temperature": 0.5}), tmp_path, frozenset(), tell)
    assert len(list(tmp_path.iterdir())) == 4, "other settings, other texts"


def test_a_text_that_ends_early_is_shorter(tmp_path: Path) -> None:
    target = tiny("llama")
    source = padded([[i, i + 1, i + 2] for i in range(6)], 1)
    config = WriteConfig(prompt=3, new=6, greedy=1.0, rows=2)
    full = continued(target, source, config, tmp_path, frozenset(), lambda done, total: None)
    end = int(full.tokens_NT[0, 5])
    found = continued(
        target, source, config.model_copy(update={"new": 5}), tmp_path, frozenset([end]), lambda done, total: None
    )
    cut = full.tokens_NT[0, 3:].tolist().index(end) + 4
    assert found.lengths_N[0] == cut
    with pytest.raises(UserError, match=r"write\.prompt=4"):
        continued(target, source, config.model_copy(update={"prompt": 4}), tmp_path, frozenset(), lambda done, total: None)


def test_a_log_forgets_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    log = loggers.open_log(tmp_path, 0, (), {})
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.5})
    loggers.open_log(tmp_path, 2, (), {}).write(3, {"loss": 2.5})
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.5}, {"step": 2, "loss": 1.5}, {"step": 3, "loss": 2.5}]


@pytest.mark.parametrize(
    ("name", "module", "words"),
    [
        ("wandb", "wandb", r"wandb.*forerun\[loggers\]"),
        ("tensorboard", "torch.utils.tensorboard.writer", r"tensorboard.*forerun\[loggers\]"),
    ],
)
def test_a_logger_that_is_not_installed_is_named(
    name: str, module: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=words):
        loggers.open_log(tmp_path, 0, (name,), {})


def test_loggers_hear_every_figure_under_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[object] = []
    wandb: Any = ModuleType("wandb")

    class WandbRun:
        def log(self, figures: dict[str, float], step: int) -> None:
            heard.append((step, figures))

        def finish(self) -> None:
            heard.append("finished")

    wandb.init = lambda **kwargs: heard.append(kwargs["config"]) or WandbRun()
    board: Any = ModuleType("torch.utils.tensorboard.writer")

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            heard.append(folder)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            heard.append((name, value, step))

        def close(self) -> None:
            heard.append("closed")

    board.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard.writer", board)
    log = loggers.open_log(tmp_path, 0, ("wandb", "tensorboard"), {"rate": 1})
    log.write(7, {"loss": 0.5, "validation": {"top1": [0.25]}})
    log.close()
    assert heard == [
        {"rate": 1}, str(tmp_path / "tensorboard"), (7, {"loss": 0.5, "validation/top1/0": 0.25}),
        ("loss", 0.5, 7), ("validation/top1/0", 0.25, 7), "finished", "closed",
    ]  # fmt: skip
