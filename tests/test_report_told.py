"""What a report must not be read without: what was judged, on what, of how much, and under which circumstances."""

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import report_world as world
from fakes import Fakes
from forerun.bench import compare, measure, metrics, quality, report, show, table
from forerun.bench.quality import Finding
from forerun.config import load
from forerun.evaluate.quality import Quality
from forerun.evaluate.statistics import passes
from report_world import RICH, page

NAMES = ("plain", "model, k=4", "typical")
SANDBOX: dict[str, Any] = {
    "limits": {"timeout_s": 3.0, "memory_mb": 512}, "sandbox": {"mode": "landlock", "network": "TCP refused"},
    "refused": {"tasks": ["T/1", "T/2"], "first": "T/1 has 9999 tokens"},
}  # fmt: skip


def told(out: Path) -> str:
    return (out / "report.md").read_text()


def printed(summary: dict[str, Any]) -> str:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as caught:
        console.print(report.table(summary))
    return " ".join(caught.get().split())


# Which text a figure is of.


def test_a_score_is_not_the_lossy_variants_own(tmp_path: Path) -> None:
    bare = {name: (RICH[name][0], replace(RICH[name][1], gsm8k=None)) for name in NAMES}
    summary = world.make(tmp_path, bare, floor="perplexity<=200")
    typical, lossless = (summary["variants"][name]["quality"]["race-high"] for name in ("typical", "model, k=4"))
    assert (typical["of_target"], lossless["of_target"]) == (True, False)
    assert typical["mcnemar_p"] is lossless["mcnemar_p"] is None, "one score, nothing to test"
    assert show.warning(summary["variants"]["typical"]) == "LOSSY, quality -"
    assert show.quality(summary["variants"]["model, k=4"]) == "perplexity 9.10; race-high 0.620"
    ask = "Nothing judged the text of typical: perplexity and choices score the target"
    assert ask in told(tmp_path)
    assert ask in printed(summary)
    text = (tmp_path / "report.html").read_text()
    spots = [one.partition("</title>")[0] for one in text.split("<title>")]
    assert any(one.startswith("model, k=4: ") and "perplexity 9.10" in one for one in spots)
    assert not any(one.startswith("typical: ") and "perplexity" in one for one in spots), "no place in the plot"
    judged = world.make(tmp_path, {name: RICH[name] for name in NAMES})
    assert show.warning(judged["variants"]["typical"]) == "LOSSY, gsm8k 0.300"
    assert "Nothing judged" not in told(tmp_path) + printed(judged)
    assert "quality: gsm8k" in printed(judged), "the measure that speaks of all of them"
    assert judged["variants"]["typical"]["quality"]["gsm8k"]["mcnemar_p"] < 0.001


def test_lm_evals_likelihoods_are_scores_and_its_texts_are_not() -> None:
    figures = [passes("arc", metric, [True, False], {}) for metric in ("acc,none", "exact_match,strict")]
    found = quality.beside((Finding("lm-eval", tuple(figures)),), (), lossy=True)
    assert found is not None
    assert [one["of_target"] for one in found.values()] == [True, False]


def test_another_models_score_is_its_own() -> None:
    one = passes("race-high", "acc", [True] * 9 + [False], {})
    ours, theirs = (Finding("race-high", (one,), scored=model) for model in ("4-bit", "whole"))
    found = quality.beside((ours,), (theirs,))
    assert found is not None
    assert found["race-high"]["mcnemar_p"] == 1.0
    assert quality.sharing({"plain": (theirs,), "a": (ours,), "b": (theirs,)}) == {
        "plain": {}, "a": {}, "b": {"race-high": "plain"}
    }  # fmt: skip
    assert Finding.from_json(json.loads(json.dumps(ours.to_json()))) == ours
    old = {key: value for key, value in ours.to_json().items() if key != "scored"}
    assert Finding.from_json(old).scored is None, "of an older run"


# What else a measure says.


def test_everything_that_a_measure_was_told_of_is_printed(tmp_path: Path) -> None:
    one = passes("humaneval", "pass@1", [True] * 5, SANDBOX | {"nats": 12345.678901234567})
    figures = [one, Quality("perplexity", "bits_per_byte", 2.0, None, None, False, 9), replace(one, name="perplexity")]
    runs = {name: world.run(RICH[name][1]) for name in NAMES}
    runs["plain"] = replace(runs["plain"], quality=tuple(Finding(one.name, (one,)) for one in figures))
    summary = {"status": "complete"} | metrics.summarize(runs, "plain")
    report.write(summary, world.experiment({name: RICH[name] for name in NAMES}), tmp_path)
    text = told(tmp_path)
    for part in ("sandbox mode landlock", "limits memory_mb 512", "refused tasks T/1, T/2", "nats 12345.7"):
        assert part in text, part
    warning = "humaneval of plain: 2 tasks were refused and count as failed; the first: T/1 has 9999 tokens"
    assert warning in text
    assert warning in printed(summary)
    assert "(0.566-1.000), p 1.000, 2 refused |" in text, "beside the figure"
    page(tmp_path)


def test_headings_name_a_measure_once() -> None:
    assert show.titled("perplexity", "perplexity") == "perplexity"
    assert show.titled("perplexity/bits_per_byte", "bits_per_byte") == "perplexity bits per byte"
    assert show.titled("perplexity-demo", "perplexity") == "perplexity-demo"
    assert show.titled("race-high", "acc") == "race-high acc"


# Few prompts.


def test_few_prompts_are_said_and_give_no_tint(tmp_path: Path) -> None:
    summary = world.make(tmp_path, {name: RICH[name] for name in NAMES}, prompts=4)
    assert "(n=4)" in printed(summary)
    assert "n=4 prompts" in printed(summary)
    assert "4 prompts: no interval" in told(tmp_path)
    assert "is the fastest" not in told(tmp_path)
    assert " / - / - (n=4)" in told(tmp_path), "percentiles"
    _, tints = table.by_category(summary)
    assert {one for line in tints for one in line} == {None}
    page(tmp_path)
    enough = world.make(tmp_path, {name: RICH[name] for name in NAMES}, prompts=8)
    assert "(n=8)" not in printed(enough)
    assert "model, k=4 is the fastest lossless variant" in told(tmp_path)


# What was served.


def bench(out: Path, **more: object) -> str:
    shape = {"variants.plain.drafter.kind": "none", "variants.ngram.drafter.kind": "ngram", "sampling.max_new": 3}
    settings = shape | {"repeats": 1, "engine.rows": 2} | {key.replace("__", "."): value for key, value in more.items()}
    measure.run(load(None, [], settings), Fakes().maker(), out, Console(quiet=True), measure_memory=False)
    return next(line for line in told(out).splitlines() if line.startswith("- workload "))


def questions(folder: Path, count: int) -> Path:
    folder.mkdir()
    lines = [{"question_id": i, "category": "math", "turns": [f"Question {i}?", "And?"]} for i in range(count)]
    (folder / "question.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_report_says_what_was_served(tmp_path: Path) -> None:
    folder = questions(tmp_path / "mt_bench", 80)
    said = bench(
        tmp_path / "run", workload__kind="spec-bench", workload__path=str(folder), workload__limit=9,
        workload__max_prompt_tokens=11, workload__concurrency=3,
    )  # fmt: skip
    assert said == (
        f"- workload spec-bench: Spec-Bench, {folder}, split test, 9 of 80 rows found used, limit 9, clipped to 11 tokens "
        "(9 of them so long), licence Apache-2.0; each part under its own source's, closed loop, 3 in flight"
    )
    assert "- workload: 80 rows found, and Spec-Bench has 480 as published: is it that?" in told(tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["workload"]["rows"] == 80
    assert 0 < summary["variants"]["plain"]["in_flight"] <= 3


def test_a_limit_that_was_not_reached_and_an_open_loop_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n")
    said = bench(tmp_path / "run", workload__kind="text", workload__path=str(tmp_path / "a.txt"), workload__limit=2)
    assert "1 of 2 asked used, limit 2, closed loop, 2 (engine.rows) in flight" in said
    assert "is it that?" not in told(tmp_path / "run")
    said = bench(tmp_path / "open", workload__kind="synthetic", workload__prompts=2, workload__rate=500.0)
    assert said.endswith("open loop, 500 requests a second (Poisson)")


# Circumstances.


def test_commits_that_differ_are_said(tmp_path: Path) -> None:
    summary = world.make(tmp_path, {name: RICH[name] for name in NAMES})
    figures = summary["variants"]
    for name, commit in zip(NAMES, ("a" * 40, "a" * 40, "b" * 40 + "+"), strict=True):
        figures[name]["commit"] = commit
    said = f"Measured at different commits of forerun: commit {'a' * 12} (plain) and commit {'b' * 12}+ (typical)"
    assert table.remarks(figures) == [said]
    figures["typical"]["commit"] = "a" * 40
    assert table.remarks(figures) == []


def test_a_run_notes_the_commit_of_each_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forerun.bench.hardware.commit", lambda: "c" * 40)
    bench(tmp_path, workload__kind="synthetic")
    assert json.loads((tmp_path / "plain" / "finished.json").read_text())["facts"]["commit"] == "c" * 40
    assert json.loads((tmp_path / "summary.json").read_text())["variants"]["plain"]["commit"] == "c" * 40


def test_variants_measured_apart_are_named_on_the_terminal() -> None:
    summary = world.summary_of({name: RICH[name] for name in NAMES})
    summary["variants"]["typical"]["interleaved"] = False
    assert "Measured apart from the baseline, so that drift of the machine is in their speed-ups: typical" in printed(summary)


def test_what_differs_between_runs_holds_methods_and_quality(tmp_path: Path) -> None:
    for name, k, kind, limit in (("a", 4, "block", 50), ("b", 6, "typical", 80)):
        made = {
            "plain": RICH["plain"],
            "model": ({"drafter": {"kind": "model", "k": k}, "rule": {"kind": kind}}, RICH["ngram"][1]),
        }
        asked = load(None, [], {"quality": [{"kind": "gsm8k", "limit": limit}]}).quality
        world.make(tmp_path / name, made, quality=asked, floor=f"gsm8k>=0.{limit}")
    found = compare.compare(compare.sides([tmp_path / "a", tmp_path / "b"])).differences
    assert found["model, drafter"] == ["model, k 4", "model, k 6"]
    assert found["model, rule"] == ["block", "typical"]
    assert found["quality"] == ["gsm8k, limit 50", "gsm8k, limit 80"]
    assert found["floor"] == ["gsm8k>=0.50", "gsm8k>=0.80"]
    assert not any(name.startswith("plain,") for name in found)
    whole = compare.merged(compare.compare(compare.sides([tmp_path / "a", tmp_path / "b"])))
    assert whole.variants["b/model"]["quality"]["perplexity"]["shared_with"] == "b/plain"
