"""`forerun eval`: every variant, every measure, what fails and what is interrupted."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from fakes import Fakes
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
    words = [str(tmp_path / "two.yaml"), "quality.1.kind=race-high", f"quality.1.path={tmp_path / 'none'}"]
    assert evaluate.run(words, str(tmp_path / "out"), maker=Readers().maker()) == 1
    assert "plain, race-high failed:" in capsys.readouterr().out
    assert evaluate.run(words[:1], str(tmp_path / "other"), maker=Readers(broken="ngram").maker()) == 1
    summary = json.loads((tmp_path / "other" / "quality.json").read_text())
    assert summary["variants"]["ngram"]["error"] == "cannot be built"
    assert summary["variants"]["plain"]["quality"]["mills"]["count"] == 6


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
