"""A tiny model that reads text, a backend that writes down what it is asked to score, and files of questions."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers import models as kinds
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from fakes import Fake
from forerun.accept import choose
from forerun.draft import Drafter, NoDraft
from forerun.engine import Engine
from forerun.model import Target
from forerun.types import Score
from models import tiny

WORDS = "the river ran past the old mill and the miller counted 1 2 3 4 5 sacks; Question: how many? Answer: #### 12\n\n"
SIZE = 300


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """All bytes, some merges, and one special token that begins and ends texts."""
    made = Tokenizer(kinds.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=SIZE, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([WORDS] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<end>", eos_token="<end>", pad_token="<end>")


def model(**overrides: object) -> PreTrainedModel:
    return tiny("llama", **{"vocab_size": SIZE, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0} | overrides)


def engine(target: PreTrainedModel, drafter: Drafter | None = None, rows: int = 2, capacity: int = 256) -> Engine:
    drafter = drafter or NoDraft()
    return Engine(
        Target(target, compile=False), drafter, choose("auto"), rows=rows, capacity=capacity, tokenizer=tokenizer(),
        eos=frozenset([0]),
    )  # fmt: skip


def silent(_what: str, _done: int, _all: int) -> None:
    pass


TEXT = "Question: how many sacks ran past the old mill – 1 2 3? Answer: the miller counted 12.\n\n" * 6


@dataclass
class Scribe:
    """A scorer that writes down what it is asked; a continuation costs the sum of its tokens."""

    limit: int | None = None
    seen: list[tuple[list[int], list[int]]] = field(default_factory=list)

    def score(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[Score]:
        self.seen += [(list(context), list(continuation)) for context, continuation in pairs]
        return [Score(-float(sum(continuation)), greedy=sum(continuation) % 2 == 0) for _, continuation in pairs]


@dataclass
class Scored(Fake):
    """A backend that scores and reads text."""

    judge: Scribe = field(default_factory=Scribe)

    @property
    def scorer(self) -> Scribe:
        return self.judge


def reading(**settings) -> Scored:
    return Scored(tokenizer=tokenizer(), judge=Scribe(**settings))


def items(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def mathematics(folder: Path, count: int = 4) -> None:
    lines = [{"question": f"how many sacks are {i} and 1?", "answer": f"count\n#### {i + 1}"} for i in range(count)]
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
