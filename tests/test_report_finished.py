"""`forerun report`: one finished run reported anew, several compared, and speed-ups across machines or prompts refused."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

import report_world as world
from forerun.bench import compare, folder
from forerun.types import UserError
from forerun.verbs.report import run
from report_world import page


def test_one_run_is_reported_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    world.make(tmp_path / "run")
    before = {
        name: (tmp_path / "run" / name).read_text() for name in ("report.md", "report.html", "summary.csv", "summary.json")
    }
    (tmp_path / "run" / "report.html").write_text("gone")
    assert run([str(tmp_path / "run")], None) == 0
    assert {name: (tmp_path / "run" / name).read_text() for name in before} == before
    assert "report.html" in capsys.readouterr().out
    assert run([str(tmp_path / "run")], str(tmp_path / "elsewhere"), quiet=True) == 0
    assert (tmp_path / "elsewhere" / "report.html").read_text() == before["report.html"]
    assert run([str(tmp_path / "run")], None, as_json=True) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(before["summary.json"])


def test_folders_that_hold_no_run_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "foreign").mkdir()
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "config.yaml").write_text("{}")
    world.make(tmp_path / "cut")
    (tmp_path / "cut" / "summary.json").write_text('{"status": ')
    world.make(tmp_path / "list")
    (tmp_path / "list" / "summary.json").write_text('{"variants": [1]}')
    world.make(tmp_path / "good")
    for name, why_not in {
        "absent": "no such folder", "foreign": "not a run folder", "begun": "has not finished", "cut": "not readable as JSON",
        "list": "not a summary of forerun bench",
    }.items():  # fmt: skip
        for names in ([name], ["good", name]):
            with pytest.raises(UserError, match=why_not) as caught:
                run([str(tmp_path / one) for one in names], str(tmp_path / "out"))
            assert "\n" not in str(caught.value)
            assert not (tmp_path / "out" / "report.html").exists()
    with pytest.raises(UserError, match="name the folder"):
        run([], None)
    with pytest.raises(UserError, match="holds other files"):
        run([str(tmp_path / "good")] * 2, str(tmp_path / "good"))


def two(tmp_path: Path, prompts: int = 12, **machine: Any) -> compare.Comparison:
    made = {name: world.RICH[name] for name in ("plain", "model, k=4", "broken")}
    world.make(tmp_path / "a", made)
    world.make(tmp_path / "b", made, prompts, machine)
    return compare.write([tmp_path / "a", tmp_path / "b"], tmp_path / "out")


def test_runs_of_one_machine_are_compared_across(tmp_path: Path) -> None:
    found = two(tmp_path, packages={"torch": "2.12.0"}, commit="def")
    assert found.refused == []
    assert found.differences == {"packages": ["torch 2.13.0", "torch 2.12.0"], "commit": ["abc", "def"]}
    whole = compare.merged(found)
    across = compare.across(found, whole)
    assert list(across) == ["b/plain", "b/model, k=4"], "the failed one has nothing to compare"
    assert across["b/plain"]["value"] == pytest.approx(1.0)
    assert across["b/model, k=4"] == whole.variants["a/model, k=4"]["speedup"]
    page(tmp_path / "out")
    written = (tmp_path / "out" / "report.md").read_text()
    assert "| variant | over a/plain |" in written
    assert "They did not take turns" in written
    assert "## Speed, quality" not in written
    assert "## Swept" not in written


@pytest.mark.parametrize(
    ("changed", "why_not"),
    [
        ({"cpu": "Another Processor"}, "the machines differ"),
        ({"gpus": [{"name": "A GPU", "memory_bytes": 1}]}, "the machines differ"),
        ({"threads": 1}, "the machines differ"),
        ({"prompts": 9}, "the prompts differ"),
    ],
)
def test_no_speed_up_across_machines_or_prompts(tmp_path: Path, changed: dict[str, Any], why_not: str) -> None:
    found = two(tmp_path, **changed)
    assert [why_not in one for one in found.refused] == [True]
    whole = compare.merged(found)
    assert compare.across(found, whole) == {}
    own = found.sides[1].run.summary["variants"]["model, k=4"]["speedup"]
    assert whole.variants["b/model, k=4"]["speedup"] == own, "each keeps its own run's"
    page(tmp_path / "out")
    written = (tmp_path / "out" / "report.md").read_text()
    assert f"No speed-up across these runs is computed: {why_not}" in written
    assert "| over a/plain |" not in written


def test_runs_of_unknown_machines_are_not_taken_for_one(tmp_path: Path) -> None:
    two(tmp_path)
    for name in "ab":
        (tmp_path / name / "environment.json").unlink()
    assert compare.compare(compare.sides([tmp_path / "a", tmp_path / "b"])).refused == ["the machines differ"]


def test_the_verb_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two(tmp_path, cpu="Another Processor")
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert run(folders, str(tmp_path / "out")) == 0
    out = capsys.readouterr().out
    assert "machine differs: Some Processor | Another Processor" in out
    assert "no speed-up across the runs: the machines differ" in out
    assert run(folders, str(tmp_path / "out"), as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["refused"], told["across"], len(told["variants"])) == (["the machines differ"], {}, 6)
    lines = list(csv.DictReader(io.StringIO((tmp_path / "out" / "summary.csv").read_text())))
    assert [line["variant"] for line in lines[:2]] == ["a/plain", "a/model, k=4"]
    assert lines[1]["baseline"] == "a/plain"


def test_runs_have_names_that_tell_them_apart() -> None:
    assert compare.names([Path("x/a"), Path("x/b")]) == ["a", "b"]
    assert compare.names([Path("x/run"), Path("y/run")]) == ["x/run", "y/run"]
    assert compare.names([Path("x/run"), Path("x/run")]) == ["run#1", "run#2"]


def test_records_that_were_cut_short_are_left_out(tmp_path: Path) -> None:
    world.make(tmp_path, {"plain": world.RICH["plain"]}, prompts=3)
    path = tmp_path / "plain" / "records.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-40] + "\n[1]\n{}\n\n")
    assert [one.id for one in folder.records(tmp_path, ["plain"])["plain"]] == ["p0", "p1"]
    assert run([str(tmp_path)], None, quiet=True) == 0
