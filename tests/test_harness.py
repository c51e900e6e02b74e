"""lm-evaluation-harness through a backend: the same scores as its own model of the same weights, and what cannot be served."""

import copy
import json
from pathlib import Path

import pytest
import torch

from forerun.config import HarnessConfig
from forerun.draft import Constant, NGram
from forerun.evaluate.measure import check, measure
from forerun.types import Sampling, UserError
from worded import engine, model, silent, tokenizer

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("error")  # lm_eval, datasets and what they import have warnings of their own

CHOICE = """
task: rivers
output_type: multiple_choice
doc_to_text: "{{query}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
fewshot_split: train
num_fewshot: 1
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATE = """
task: sums
output_type: generate_until
doc_to_text: "Question: {{query}}\\nAnswer:"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["s", "\\n\\n"], max_gen_toks: 12, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
filter_list:
  - name: letters
    filter: [{function: regex, regex_pattern: "([a-z]+)"}, {function: take_first}]
"""
ROLLING = """
task: stories
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""
WORDS = (
    "the", "old", "mill", "ran", "past", "and", "counted", "sacks", "of", "12", "rivers", "while", "a", "miller", "asked",
)  # fmt: skip


def words(seed: int, count: int) -> str:
    drawn = torch.randint(0, len(WORDS), (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(WORDS[i] for i in drawn.tolist())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three tasks with local data."""
    folder = tmp_path_factory.mktemp("tasks")
    docs = {
        "rivers": [
            {"query": words(i, 9), "choices": [words(50 + 3 * i + j, 2 + j) for j in range(3)], "gold": i % 3}
            for i in range(12)
        ],
        "sums": [{"query": words(i, 5 + i), "answer": "mill"} for i in range(8)],
        "stories": [{"text": words(200 + i, 20 + 60 * (i % 3))} for i in range(5)],  # longer than a window, and shorter
    }
    for text in (CHOICE, GENERATE, ROLLING):
        name = text.split()[1]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs[name]))
        data = {"train": str(folder / f"{name}.jsonl"), "test": str(folder / f"{name}.jsonl")}
        where = f"dataset_path: json\ndataset_kwargs: {{data_files: {json.dumps(data)}}}\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(text + where)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


def network():
    """A model of float32 that reads 128 tokens at once, so that the long stories take several windows."""
    return copy.deepcopy(model(dtype=torch.float32, max_position_embeddings=128, scale=1.5))


def test_scores_equal_those_of_lm_evals_own_model(tasks: Path, tmp_path: Path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    names = ("rivers", "sums", "stories")
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    theirs = simple_evaluate(
        HFLM(pretrained=network(), tokenizer=tokenizer(), batch_size=3),
        tasks=list(names),
        task_manager=manager,
        bootstrap_iters=0,
    )
    drafting = engine(network(), NGram(Constant(3), 3, 1, 2), rows=3, capacity=128)
    config = HarnessConfig(path=str(tasks), tasks=names)
    ours = measure(config, drafting, Sampling(), tmp_path, silent)
    values = {(one.name, one.metric): one.value for one in ours}
    wanted = {
        ("rivers", "acc"): theirs["results"]["rivers"]["acc,none"],
        ("rivers", "acc_norm"): theirs["results"]["rivers"]["acc_norm,none"],
        ("sums", "exact_match,letters"): theirs["results"]["sums"]["exact_match,letters"],
    }
    for metric in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        wanted["stories", metric] = theirs["results"]["stories"][f"{metric},none"]
    assert values == pytest.approx(wanted, rel=1e-5)
    assert 0 < wanted["rivers", "acc"] < 1

    def kept(name: str) -> list:
        return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]

    for name in names:
        for one, other in zip(kept(name), theirs["samples"][name], strict=True):
            assert_same(one["answer"], other["resps"])
            assert_same(one["filtered"], other["filtered_resps"])
    assert len({str(one["answer"]) for one in kept("sums")}) > 2
    figures = {(one.name, one.metric): one for one in ours}
    acc, perplexity = figures["rivers", "acc"], figures["stories", "byte_perplexity"]
    assert (acc.count, len(acc.items), acc.higher_is_better) == (12, 12, True)
    assert sum(acc.items) / 12 == acc.value
    assert acc.low < acc.value < acc.high
    assert not perplexity.higher_is_better
    assert perplexity.low < perplexity.value < perplexity.high
    assert drafting.facts["tree_size"] == 4


def assert_same(ours: object, theirs: object) -> None:
    """Nested answers: numbers up to rounding, all else exactly."""
    if isinstance(ours, list):
        assert len(ours) == len(theirs)
        for one, other in zip(ours, theirs, strict=True):
            assert_same(one, other)
    else:
        assert ours == (pytest.approx(theirs, rel=1e-5) if isinstance(theirs, float) else theirs)


def test_generation_arguments_become_a_sampling() -> None:
    from forerun.evaluate.harness import mapped

    own = Sampling(max_new=7, stop=("x",), seed=3, ignore_eos=True)
    greedy = mapped({"until": "\n", "do_sample": False, "temperature": 0.9, "max_gen_toks": 5}, own)
    assert (greedy.temperature, greedy.stop, greedy.max_new, greedy.seed, greedy.ignore_eos) == (0.0, ("\n",), 5, 3, False)
    assert mapped({}, own).max_new == 256
    assert mapped({}, own).greedy
    drawn = mapped(
        {"until": ["a", ""], "do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": None, "max_tokens": 9}, own
    )
    assert (drawn.temperature, drawn.top_p, drawn.stop, drawn.max_new) == (0.7, 0.9, ("a",), 9)
    assert mapped({"do_sample": True}, own).temperature == 1.0
    assert mapped({"temperature": 0.5}, own).temperature == 0.5
    assert mapped({}, Sampling(temperature=0.8)).temperature == 0.8  # where the task says nothing, the variant does
    assert mapped({"do_sample": False}, Sampling(temperature=0.8)).greedy
    with pytest.raises(UserError, match="num_beams"):
        mapped({"num_beams": 4}, own)


def test_a_limit_and_shots_are_passed_on(tasks: Path, tmp_path: Path) -> None:
    config = HarnessConfig(path=str(tasks), tasks=("rivers",), limit=4, shots=2)
    found = measure(config, engine(network()), Sampling(), tmp_path, silent)
    assert [(one.count, one.details["shots"]) for one in found] == [(4, 2), (4, 2)]


@pytest.mark.parametrize("named", ["path", "file"])
def test_a_task_may_be_a_yaml_file(tasks: Path, tmp_path: Path, named: str) -> None:
    path = str(tasks / "rivers.yaml") if named == "path" else None
    names = ("rivers",) if named == "path" else (str(tasks / "rivers.yaml"),)
    found = measure(HarnessConfig(path=path, tasks=names, limit=2), engine(network()), Sampling(), tmp_path, silent)
    assert {one.name for one in found} == {"rivers"}


def test_what_is_not_there_is_named(tasks: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file or folder"):
        measure(HarnessConfig(path=str(tasks / "none"), tasks=("rivers",)), engine(network()), Sampling(), tmp_path, silent)
    from forerun.evaluate import harness

    known = harness.TaskManager(include_path=str(tasks), include_defaults=False)
    assert known.all_tasks == ["rivers", "stories", "sums"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "TaskManager", lambda **_: known)  # reading all of lm_eval's own takes ten seconds
        with pytest.raises(UserError, match=r"'river'; did you mean 'rivers'\?"):
            measure(HarnessConfig(path=str(tasks), tasks=("river",)), engine(network()), Sampling(), tmp_path, silent)


def test_data_that_are_missing_show_before_anything_is_built(tasks: Path, tmp_path: Path) -> None:
    check(HarnessConfig(path=str(tasks), tasks=("rivers",)))
    text = (tasks / "rivers.yaml").read_text().replace(str(tasks), str(tmp_path / "none"))
    (tmp_path / "lost.yaml").write_text(text.replace("task: rivers", "task: lost"))
    with pytest.raises(UserError, match=r"lm-eval: lost cannot be loaded: .*none") as caught:
        check(HarnessConfig(path=str(tmp_path), tasks=("lost",)))
    assert "\n" not in str(caught.value)


def test_intervals_are_told_where_the_aggregation_is_known() -> None:
    from forerun.evaluate.harness import interval

    low, high = interval("acc", [1, 0, 1, 1], 0.75)
    assert low < 0.75 < high
    assert interval("acc", [1, 0, 1, 1], 0.5) == (None, None)  # not the mean of what was seen
    assert interval("f1", [(1, 2, 3), (1, 2, 3)], 0.5) == (None, None)
    assert interval("acc", [], 0.5) == (None, None)
    low, high = interval("bits_per_byte", [(-8.0, 4), (-4.0, 4), (-9.0, 6)], 21 / 14 / 0.6931471805599453)
    assert low < 21 / 14 / 0.6931471805599453 < high
