"""Perplexity: its windows, and against computations that share nothing with it but the weights."""

import gzip
import itertools
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from forerun.build import Models, build
from forerun.config import ModelConfig, PerplexityConfig, Variant
from forerun.evaluate.measure import measure
from forerun.evaluate.perplexity import Window, windows
from forerun.types import Sampling, UserError
from worded import TEXT, engine, items, model, reading, silent, tokenizer

needs_data = pytest.mark.skipif("FORERUN_DATA" not in os.environ, reason="FORERUN_DATA names no folder of data sets")


@pytest.mark.parametrize(
    ("count", "stride", "length"), [(50, 4, 10), (50, 10, 10), (7, 3, 10), (50, 7, 20), (2, 1, 2), (20, 5, 10)]
)
def test_windows_count_every_token_once(count: int, stride: int, length: int) -> None:
    chosen = list(windows(count, stride, length))
    assert [one.begin for one in chosen] == [i * stride for i in range(len(chosen))]
    counted = list(itertools.chain.from_iterable(range(one.new, one.end) for one in chosen))
    missed = set(range(count)) - set(counted)
    assert len(set(counted)) == len(counted)
    assert missed == ({0} if stride < length else set(range(0, count, stride)))
    assert all(one.end - one.begin <= length and one.begin < one.new < one.end for one in chosen)
    assert chosen[-1].end == count
    assert all(one.end < count for one in chosen[:-1])


def test_windows_are_those_of_the_known_example() -> None:
    assert list(windows(10, 2, 6)) == [Window(0, 1, 6), Window(2, 6, 8), Window(4, 8, 10)]
    assert not list(windows(1, 2, 6))


def plain_perplexity(network, ids: Sequence[int], stride: int, length: int) -> tuple[float, int]:
    """A window at a time with labels, -100 where a token was counted before; each token weighs the same."""
    nats, count, before = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        window = torch.tensor(ids[begin:end])
        labels = window.clone()
        labels[: max(0, before - begin)] = -100
        logits = network(input_ids=window[None]).logits[0, :-1].float()
        nats += float(torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum"))
        count += int((labels[1:] != -100).sum())
        before = end
        if end == len(ids):
            break
    return nats, count


@pytest.mark.parametrize(("stride", "length", "batch"), [(20, 50, 3), (50, 50, 1), (17, 400, 8)])
def test_perplexity_is_that_of_a_plain_computation(tmp_path: Path, stride: int, length: int, batch: int) -> None:
    network = model(max_position_embeddings=128)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    ids = tokenizer()(TEXT)["input_ids"]
    config = PerplexityConfig(text="text", path=str(tmp_path / "text.txt"), stride=stride, max_length=length, batch=batch)
    told = []
    found, bits = measure(config, engine(network), Sampling(), tmp_path, lambda *args: told.append(args))
    nats, count = plain_perplexity(network, ids, stride, min(length, 128))
    assert (found.name, found.metric, found.count, found.higher_is_better) == ("perplexity-text", "perplexity", count, False)
    assert found.value == pytest.approx(math.exp(nats / count), rel=1e-6)
    assert found.low < found.value < found.high
    assert found.details["max_length"] == min(length, 128)
    assert found.details["asked_max_length"] == length
    kept = items(tmp_path / "perplexity-text.jsonl")
    assert sum(one["nats"] for one in kept) == pytest.approx(nats, rel=1e-6)
    assert told[-1] == ("perplexity-text", len(kept), len(kept))
    # The first token of the text (of each window where they do not overlap) is not counted, and its bytes neither.
    left_out = [0] if stride < length else range(0, len(ids), stride)
    size = len(TEXT.encode()) - sum(len(tokenizer().decode([ids[i]]).encode()) for i in left_out)
    assert bits.details["bytes"] == size
    assert bits.value == pytest.approx(nats / math.log(2) / size, rel=1e-6)


def test_texts_are_joined_by_an_empty_line_and_tokenized_once(tmp_path: Path) -> None:
    (tmp_path / "wiki.test.raw").write_text(" \n = Mill = \n \n The miller . \n")
    backend = reading()
    measure(PerplexityConfig(path=str(tmp_path / "wiki.test.raw")), backend, Sampling(), tmp_path, silent)
    context, continuation = backend.judge.seen[0]
    assert tokenizer().decode(context + continuation) == "\n\n = Mill = \n\n\n\n\n The miller . \n"


def test_a_limit_counts_tokens_and_reads_no_more_text_than_it_takes(tmp_path: Path) -> None:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {i} of the mill"}) + "\n" for i in range(500)) + "not JSON\n")
    backend = reading()
    config = PerplexityConfig(text="jsonl", path=str(path), limit=30)
    found, _ = measure(config, backend, Sampling(), tmp_path, silent)
    assert found.count == 29
    whole = tokenizer()("\n\n".join(f"text {i} of the mill" for i in range(500)))["input_ids"]
    assert backend.judge.seen == [(whole[:1], whole[1:30])]


@pytest.mark.parametrize(
    ("settings", "limit", "says"),
    [
        ({"stride": 100}, 80, "stride=40"),
        ({"limit": 1}, None, "too few"),
    ],
)
def test_perplexity_that_cannot_be_measured(tmp_path: Path, settings: dict, limit: int | None, says: str) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    config = PerplexityConfig(text="text", path=str(tmp_path / "text.txt"), **settings)
    with pytest.raises(UserError, match=says):
        measure(config, reading(limit=limit), Sampling(), tmp_path, silent)
    assert not list(tmp_path.glob("*.jsonl*"))


@needs_data
def test_perplexity_of_the_embedded_target_on_wikitext2(tmp_path: Path) -> None:
    """Against a computation that shares nothing with ours but the weights; the whole test set takes minutes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from forerun.model import ASSETS

    folder, tokens = Path(os.environ["FORERUN_DATA"], "wikitext2"), 2000
    variant = Variant(model=ModelConfig(dtype="float32"))
    config = PerplexityConfig(path=str(folder), limit=tokens)
    found, _ = measure(config, build(variant, Models()), Sampling(), tmp_path, silent)
    with gzip.open(folder / "wiki.test.raw.gz", "rt", encoding="utf-8") as file:
        rows = [line if line.strip() else "" for line in file]
    network = AutoModelForCausalLM.from_pretrained(ASSETS / "target", dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(ASSETS / "target")("\n\n".join(rows), verbose=False)["input_ids"][:tokens]
    with torch.inference_mode():
        nats, count = plain_perplexity(network, ids, 512, 1024)  # what the target reads
    assert found.count == count == tokens - 1
    assert found.value == pytest.approx(math.exp(nats / count), rel=1e-4)
