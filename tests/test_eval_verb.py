"""`forerun eval`: every variant, every measure, what fails and what is interrupted."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from fakes import Fakes
from forerun import cli
from forerun.bench import methods
from forerun.config import Variant
from forerun.types import UserError
from forerun.verbs import evaluate
from worded import Scored, mathematics, tokenizer


def questions(folder: Path) -> Path:
    path = folder / "mills.jsonl"
    path.write_text("".join(json.dumps({"query": f"q{i}", "choices": ["a", "bb"], "gold": i % 2}) + "\n" for i in range(6)))
    return path


@dataclass
class Readers(Fakes):
    """Builds backends that score."""

    def build(self, variant: Variant) -> Scored:
        made = super().build(variant)
        return Scored(rows=made.rows, width=made.width, tokenizer=tokenizer())


CONFIG = "variants:\n  plain: {drafter: {kind: none}}\n  ngram: {drafter: {kind: ngram, k: 2}}\n"


def test_eval_measures_every_variant_and_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "two.yaml").write_text(CONFIG)
    mathematics(tmp_path)
    out = tmp_path / "out"
    words = [
        str(tmp_path / "two.yaml"),
        f"tasks={questions(tmp_path)},gsm8k",
        "limit=3",
        "shots=1",
        f"quality.0.path={tmp_path}",
    ]
    assert evaluate.run(words, str(out), as_json=True, maker=Readers().maker()) == 0
    summary = json.loads(capsys.readouterr().out)
    assert json.loads((out / "quality.json").read_text()) == summary
    assert (summary["status"], summary["baseline"], list(summary["variants"])) == ("complete", "plain", ["plain", "ngram"])
    for name, figures in summary["variants"].items():
        assert list(figures["quality"]) == ["gsm8k", "mills", "mills/acc_norm"]
        assert figures["quality"]["mills"]["count"] == 3
        assert figures["quality"]["gsm8k"]["mcnemar_p"] == 1.0
        assert figures["quality"]["gsm8k"]["greedy_equal"] is True
        assert len(list((out / name).rglob("gsm8k.jsonl"))) == 1
    assert (out / "config.yaml").is_file()
    assert json.loads((out / "environment.json").read_text())["variants"]["ngram"]["rule"] == "fake"
    with pytest.raises(UserError, match="already holds an evaluation"):
        evaluate.run(words, str(out), maker=Readers().maker())
    assert evaluate.run(words, str(out), overwrite=True, quiet=True, maker=Readers().maker()) == 0
    table = capsys.readouterr().out
    assert "mills/acc" in table
    assert "the same" in table


def test_a_failing_measure_is_an_error_in_its_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "two.yaml").write_text(CONFIG + f"quality: [{{kind: choice, path: {questions(tmp_path)}}}]\n")
    words = [str(tmp_path / "two.yaml"), "quality.1.kind=perplexity", "quality.1.text=demo", "quality.1.limit=1"]
    assert evaluate.run(words, str(tmp_path / "out"), maker=Readers().maker()) == 1
    assert "plain, perplexity failed:" in capsys.readouterr().out
    assert evaluate.run(words[:1], str(tmp_path / "other"), maker=Readers(broken="ngram").maker()) == 1
    summary = json.loads((tmp_path / "other" / "quality.json").read_text())
    assert summary["variants"]["ngram"]["error"] == "cannot be built"
    assert summary["variants"]["plain"]["quality"]["mills"]["count"] == 6


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "no question in"),
        ('{"question": "what?"}\n', "line 1: not a question"),
        ('{"context": "abc", "continuation": ""}\n', "line 1: question '1' needs texts"),
        (None, "no such file"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(tmp_path: Path, capfd, monkeypatch, text: str | None, says: str) -> None:
    monkeypatch.setattr(methods, "maker", Readers().maker)
    path, out = tmp_path / "mine.jsonl", tmp_path / "out"
    if text is not None:
        path.write_text(text)
    assert cli.run(["eval", f"tasks={path}", "--out", str(out)]) == 2
    said = capfd.readouterr().err
    assert said.startswith("forerun: ") and said.count("\n") == 1 and says in said
    assert not out.exists()


@pytest.mark.filterwarnings("ignore")  # of lm_eval and what it imports
def test_a_task_that_nobody_knows_leaves_nothing(tmp_path: Path, capfd, monkeypatch) -> None:
    pytest.importorskip("lm_eval")
    from forerun.evaluate import harness

    known = harness.TaskManager(include_path=str(tmp_path), include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", lambda **_: known)  # reading all of lm_eval's own takes ten seconds
    monkeypatch.setattr(methods, "maker", Readers().maker)
    assert cli.run(["eval", "tasks=arc_eazy_x", "--out", str(tmp_path / "out")]) == 2
    assert capfd.readouterr().err.startswith("forerun: lm-eval: no task is called 'arc_eazy_x'")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_cannot_be_built_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "two.yaml").write_text(CONFIG)
    with pytest.raises(UserError, match="baseline 'plain': cannot be built"):
        evaluate.run(
            [str(tmp_path / "two.yaml"), f"tasks={questions(tmp_path)}"], str(tmp_path / "out"), quiet=True,
            maker=Readers(broken="none").maker(),
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_a_mistake_spares_the_evaluation_that_is_there(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert evaluate.run([f"tasks={questions(tmp_path)}"], str(out), quiet=True, maker=Readers().maker()) == 0
    with pytest.raises(UserError):
        evaluate.run([f"tasks={tmp_path / 'none.jsonl'}"], str(out), overwrite=True, quiet=True, maker=Readers().maker())
    assert (out / "quality.json").is_file()


def test_data_sets_are_looked_for_in_the_folder_that_a_flag_names(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(methods, "maker", Readers().maker)
    (tmp_path / "gsm8k").mkdir()
    mathematics(tmp_path / "gsm8k")
    words = ["eval", "tasks=gsm8k", "shots=1", "limit=2", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "-q"]
    assert cli.run(words) == 0
    assert cli.run([*words[:4], "--data", str(tmp_path / "none"), "--out", str(tmp_path / "other")]) == 2


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two.yaml").write_text(CONFIG)
    measured = evaluate.assess

    def once(lane, *rest):
        if lane.name == "ngram":
            raise KeyboardInterrupt
        measured(lane, *rest)

    monkeypatch.setattr(evaluate, "assess", once)
    words = [str(tmp_path / "two.yaml"), f"tasks={questions(tmp_path)}"]
    assert evaluate.run(words, str(tmp_path / "out"), quiet=True, maker=Readers().maker()) == 130
    summary = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert summary["status"] == "interrupted"
    assert summary["variants"]["plain"]["quality"]["mills"]["count"] == 6
    assert summary["variants"]["ngram"]["quality"] == {}


def test_tasks_are_sorted_out(tmp_path: Path) -> None:
    planned = evaluate.plan(["tasks=arc_easy,perplexity,mine.jsonl.gz,tasks/own.yaml,humaneval", "limit=20", "shots=3"])
    told = [(one.kind, one.limit) for one in planned.quality]
    assert told == [("perplexity", None), ("humaneval", 20), ("choice", 20), ("lm-eval", 20)]
    assert planned.quality[2].path == "mine.jsonl.gz"
    assert (planned.quality[3].tasks, planned.quality[3].shots) == (("arc_easy", "tasks/own.yaml"), 3)
    (tmp_path / "wikitext2").mkdir()
    found = evaluate.plan(["tasks=perplexity", f"data={tmp_path}", "quality.0.stride=64"]).quality[0]
    assert (found.path, found.stride) == (str(tmp_path / "wikitext2"), 64)
    for words, says in (([], "nothing to measure"), (["a", "b"], "one config file"), (["tasks=gsm8k", "limit=many"], "limit")):
        with pytest.raises(UserError, match=says):
            evaluate.plan(words)
