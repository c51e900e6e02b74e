"""Measures of quality: choices against plain computations, mathematics by generation, statistics."""

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from fakes import Fake
from forerun.config import ChoiceConfig, GSM8KConfig, PerplexityConfig
from forerun.draft import Constant, NGram
from forerun.evaluate.encoding import encode_pair
from forerun.evaluate.generation import answer, fitting, run
from forerun.evaluate.mathematics import number
from forerun.evaluate.measure import measure
from forerun.evaluate.quality import Quality
from forerun.evaluate.statistics import compare, mcnemar, ratio, wilson
from forerun.types import Delta, Request, Sampling, UserError
from worded import TEXT, engine, items, mathematics, model, reading, silent, tokenizer

# Multiple choice.


def race(path: Path, questions: list[tuple[str, list[str], str]]) -> None:
    texts, options, answers = zip(*questions, strict=True)
    passage = {"id": "p", "article": "The mill ran.", "questions": texts, "options": options, "answers": answers}
    path.write_text(json.dumps(passage) + "\n")


def test_race_asks_each_question_alone(tmp_path: Path) -> None:
    path = tmp_path / "race_high_test.jsonl"
    race(path, [("What ran?", ["the mill", "a", "b", "c"], "A"), ("Who counted?", ["d", "the miller", "e", "f"], "B")])
    backend = reading()
    found = measure(ChoiceConfig(kind="race-high", path=str(path)), backend, Sampling(), tmp_path, silent)
    asked = [tokenizer().decode([*context, *continuation]) for context, continuation in backend.judge.seen]
    first = "Article: The mill ran.\n\nQuestion: What ran?\nAnswer:"
    assert asked[:4] == [f"{first} {option}" for option in ("the mill", "a", "b", "c")]
    assert asked[5] == "Article: The mill ran.\n\nQuestion: Who counted?\nAnswer: the miller"
    assert [(one.name, one.metric, one.count) for one in found] == [("race-high", "acc", 2), ("race-high", "acc_norm", 2)]
    assert "non-commercial" in found[0].details["licence"]


def test_accuracy_is_that_of_a_plain_computation(tmp_path: Path) -> None:
    """By the most probable answer, and by the most probable a byte."""
    docs = [
        {
            "query": f"the mill of {i} sacks ran past",
            "choices": ["the old mill", "1 2 3", "a miller who counted – 12"],
            "gold": i % 3,
        }
        for i in range(24)
    ]
    path = tmp_path / "mills.jsonl"
    path.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    network = model(scale=1.5)
    expected: dict[str, list[bool]] = {"acc": [], "acc_norm": []}
    for doc in docs:
        before = tokenizer()(doc["query"])["input_ids"]
        logprobs = []
        for option in doc["choices"]:
            ids = tokenizer()(f"{doc['query']} {option}")["input_ids"]
            laws = network(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
            logprobs.append(sum(float(laws[at - 1, ids[at]]) for at in range(len(before), len(ids))))
        sizes = [len(option.encode()) for option in doc["choices"]]
        expected["acc"].append(int(np.argmax(logprobs)) == doc["gold"])
        expected["acc_norm"].append(int(np.argmax(np.array(logprobs) / sizes)) == doc["gold"])
    assert expected["acc"] != expected["acc_norm"]
    for normalize, first in ((False, "acc"), (True, "acc_norm")):
        config = ChoiceConfig(kind="choice", path=str(path), normalize=normalize)
        found = measure(config, engine(network), Sampling(), tmp_path / "out", silent)
        assert found[0].metric == first
        assert {one.metric: list(one.items) for one in found} == expected
        assert all(one.value == sum(one.items) / 24 and one.low < one.value < one.high for one in found)
    kept = items(tmp_path / "out" / "mills.jsonl")
    assert [one["acc"] for one in kept] == expected["acc"]


def test_the_other_forms_of_a_question(tmp_path: Path) -> None:
    (tmp_path / "blanks.jsonl").write_text(
        '{"context_options": ["the mill", "the miller"], "continuation": "ran.", "gold": 1}\n'
    )
    (tmp_path / "words.jsonl").write_text(
        '{"context": "the old ", "continuation": "mill"}\n{"context": "", "continuation": "12"}\n'
    )
    backend = reading()
    (blanks,) = measure(
        ChoiceConfig(kind="choice", path=str(tmp_path / "blanks.jsonl")), backend, Sampling(), tmp_path / "a", silent
    )
    assert [tokenizer().decode(context) for context, _ in backend.judge.seen] == ["the mill", "the miller"]
    assert {tokenizer().decode(told) for _, told in backend.judge.seen} == {" ran."}
    assert (blanks.name, blanks.metric, blanks.items) == ("blanks", "acc", (False,))  # equals: the first is chosen
    backend.judge.seen.clear()
    (words,) = measure(
        ChoiceConfig(kind="choice", path=str(tmp_path / "words.jsonl")), backend, Sampling(), tmp_path / "a", silent
    )
    asked = [(tokenizer().decode(context), tokenizer().decode(told)) for context, told in backend.judge.seen]
    assert asked == [("the old", " mill"), ("<end>", "12")]
    assert words.items == tuple(sum(told) % 2 == 0 for _, told in backend.judge.seen)  # whether greedy decoding writes it


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"question": "what?"}', "not a question; give query, choices, gold"),
        ('{"query": "a", "choices": ["b", "c"], "gold": 2}', "index of the right one, not 2"),
        ('{"query": "a", "choices": ["b", 3], "gold": 0}', "list of texts"),
        ('{"query": "a", "choices": ["b"], "gold": 0}\n{"context": "a", "continuation": "b"}', "two files"),
        ('{"context": "abc", "continuation": ""}', "'1' needs texts to continue and texts to continue with"),
        ('{"context": 3, "continuation": "b"}', "line 1: question '1' needs texts to continue"),
        ('{"query": ["a"], "choices": ["b", "c"], "gold": 0}', "line 1: question '1' needs texts to continue"),
        ("", "no question in"),
    ],
)
def test_questions_that_cannot_be_asked(tmp_path: Path, line: str, says: str) -> None:
    (tmp_path / "mine.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=says):
        measure(ChoiceConfig(kind="choice", path=str(tmp_path / "mine.jsonl")), reading(), Sampling(), tmp_path / "out", silent)
    assert not (tmp_path / "out").exists()


def test_long_contexts_lose_their_start_and_are_counted(tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_text(json.dumps({"query": TEXT, "choices": ["a", "b"], "gold": 0}) + "\n")
    config = ChoiceConfig(kind="choice", path=str(tmp_path / "long.jsonl"))
    found = measure(config, engine(model(max_position_embeddings=64)), Sampling(), tmp_path, silent)
    assert found[0].details["clipped_texts"] == 2


def test_space_at_the_end_of_a_context_goes_to_the_continuation() -> None:
    before, told = encode_pair(tokenizer(), "the old \n ", "mill")
    assert (tokenizer().decode(before), tokenizer().decode(told)) == ("the old", " \n mill")
    assert encode_pair(tokenizer(), "", "<end>mill")[0] == [0]


@pytest.mark.parametrize("config", [PerplexityConfig(text="demo"), ChoiceConfig(kind="race-high", path="none")])
def test_likelihoods_need_a_scorer(tmp_path: Path, config: PerplexityConfig | ChoiceConfig) -> None:
    with pytest.raises(UserError, match=r"by log-likelihood, which this backend does not tell"):
        measure(config, Fake(), Sampling(), tmp_path, silent)


# Mathematics.


def test_gsm8k_shows_examples_and_reads_the_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mathematics(tmp_path)
    asked: list[tuple[str, Sampling]] = []

    def write(name, backend, prompts, tell):
        asked.extend(prompts)
        return ["so #### 1", "#### $1,000.", "2", " #### 4.\n"], 0

    monkeypatch.setattr("forerun.evaluate.mathematics.answer", write)
    own = Sampling(temperature=0.6, seed=1, max_new=9, stop=("x",), ignore_eos=True)
    (found,) = measure(GSM8KConfig(path=str(tmp_path), shots=2, max_new=50), reading(), own, tmp_path / "out", silent)
    shown = "".join(f"Question: how many sacks are {i} and 1?\nAnswer: count\n#### {i + 1}\n\n" for i in range(2))
    assert [text for text, _ in asked] == [shown + f"Question: how many sacks are {i} and 1?\nAnswer:" for i in range(4)]
    assert all(sampling == Sampling(temperature=0.6, seed=1, max_new=50, stop=("Question:",)) for _, sampling in asked)
    assert found.items == (True, False, False, True)
    assert (found.metric, found.value, found.details["shots"]) == ("exact_match", 0.5, 2)
    assert [one["number"] for one in items(tmp_path / "out" / "gsm8k.jsonl")] == ["1", "1000", None, "4"]


def test_numbers_are_read_as_people_write_them() -> None:
    wanted = {
        "#### 18": "18",
        "####-3.5": "-3.5",
        "#### $1,234.": "1234",
        "so 18": None,
        "#### none": None,
        "#### 1\n#### 2": "1",
    }
    assert {text: number(text) for text in wanted} == wanted


def test_answers_are_the_same_with_a_drafter_and_draw_numbers_of_their_own(tmp_path: Path) -> None:
    network = model(scale=1.5)
    for temperature in (0.0, 1.0):
        own = Sampling(temperature=temperature, seed=7, max_new=12)
        asked = [(f"the mill of {i % 2} ran", own) for i in range(5)]
        plain = answer("sums", engine(network), asked, silent)
        rows = answer("sums", engine(network, rows=4), asked, silent)
        assert plain == rows
        if not temperature:
            assert plain == answer("sums", engine(network, NGram(Constant(3), 2, 1, 2)), asked, silent)
            assert plain[0][0] == plain[0][2]
        else:
            assert plain[0][0] != plain[0][2]


def test_prompts_fit_the_capacity_or_say_so_and_are_clipped_to_the_model() -> None:
    asked = [(TEXT, Sampling(max_new=10))]
    with pytest.raises(UserError, match=r"engine.capacity=64; set engine.capacity=\d+"):
        answer("sums", engine(model(max_position_embeddings=512), capacity=64), asked, silent)
    small = engine(model(max_position_embeddings=64), capacity=64)
    texts, clipped = answer("sums", small, asked, silent)
    assert (len(texts), clipped) == (1, 1)
    assert fitting("sums", small, list(range(200)), 10) == list(range(200))[-(64 - 10 - small.facts["tree_size"]) :]
    with pytest.raises(UserError, match="leave no room"):
        answer("sums", engine(model(max_position_embeddings=64), capacity=64), [("the", Sampling(max_new=64))], silent)


def test_an_interrupt_leaves_nothing_in_flight() -> None:
    backend = engine(model(), rows=2)

    def stop(_what: str, _done: int, _all: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        answer("sums", backend, [(f"the mill {i}", Sampling(max_new=20)) for i in range(5)], stop)
    again, _ = answer("sums", backend, [("the mill 0", Sampling(max_new=20))], silent)
    assert again == answer("sums", engine(model()), [("the mill 0", Sampling(max_new=20))], silent)[0]


def test_answers_that_a_backend_gives_up_are_no_figure() -> None:
    """A server that went away: half an answer is neither right nor wrong."""
    backend = Fake()
    own, lost = backend.step, [False]

    def step() -> list[Delta]:
        return [replace(one, finish="cancelled") if one.finish and lost[0] else one for one in own()]

    backend.step = step  # type: ignore[method-assign]
    requests = [Request("a", (1,), Sampling(max_new=3)), Request("b", (2,), Sampling(max_new=3))]
    assert len(run("sums", backend, requests, silent)) == 2
    lost[0] = True
    with pytest.raises(UserError, match="sums: 2 of 2 answers were lost"):
        run("sums", backend, requests, silent)


# Statistics.


def test_mcnemar_is_exact() -> None:
    """Against the sum of binomial probabilities that are no larger."""
    for won, lost in ((0, 0), (1, 0), (3, 3), (9, 2), (0, 12), (5, 14)):
        ours = [True] * won + [False] * lost + [True, False]
        theirs = [False] * won + [True] * lost + [True, False]
        count = won + lost
        law = [math.comb(count, i) / 2**count for i in range(count + 1)]
        assert mcnemar(ours, theirs) == pytest.approx(sum(p for p in law if p <= law[won] * (1 + 1e-9)))


def test_wilson_is_its_formula() -> None:
    z = 1.959963984540054
    for passed, count in ((0, 5), (3, 8), (620, 1000), (7, 7)):
        share, spread = passed / count, z * z / count
        middle = (share + spread / 2) / (1 + spread)
        half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / 4 / count)
        assert wilson(passed, count) == pytest.approx((middle - half, middle + half), abs=1e-9)
    assert wilson(0, 0) == (None, None)


def test_the_bootstrap_covers_what_it_should() -> None:
    """95 % intervals of a ratio of sums hold the truth about 95 times in 100."""
    draw, held = np.random.default_rng(0), 0
    for i in range(100):
        wholes = draw.integers(1, 9, size=60)
        low, high = ratio(list(2.0 * wholes + draw.normal(size=60)), list(wholes), seed=i)
        held += low < 2.0 < high
    assert 87 <= held <= 100
    assert ratio([1.0], [2.0]) == (None, None)


def figure(passed: Sequence[bool] | None, name: str = "race-high", metric: str = "acc") -> Quality:
    return Quality(
        name, metric, 0.5, None, None, higher_is_better=True, count=4, items=None if passed is None else tuple(passed)
    )


def test_only_answers_to_the_same_questions_are_compared() -> None:
    ours = figure([True] * 4)
    assert compare(ours, figure([False] * 4)) == pytest.approx(2 * 0.5**4)
    assert compare(ours, figure(None)) is None
    assert compare(ours, figure([True] * 4, name="race-middle")) is None
    assert compare(ours, figure([True] * 4, metric="acc_norm")) is None
