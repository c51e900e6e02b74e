"""Reports of one run: two baselines, sweeps, well-formed pages for any run, nulls, escapes, CSV, charts."""

import csv
import io
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import report_world as world
from forerun.bench import charts, folder, report
from forerun.bench.charts import Paint, Point, Series, Spot
from forerun.bench.material import gather
from forerun.bench.sweeps import own_plains, sweeps
from forerun.config import Experiment, load
from forerun.verbs.report import run
from report_world import Page, Truth, page

# Two baselines, and what was swept.


def test_each_variant_finds_its_own_plain_decoding() -> None:
    configs = world.experiment(world.RICH).expand()
    plains = own_plains(configs)
    assert plains["4-bit, model k=4"] == "4-bit plain"
    assert plains["model, k=4"] == plains["typical"] == "plain"
    assert "plain" not in plains


def test_the_speed_up_over_ones_own_plain_is_the_ratio_of_paired_totals(tmp_path: Path) -> None:
    summary = world.make(tmp_path)
    records = folder.records(tmp_path, list(summary["variants"]))
    found = gather(summary, world.experiment(world.RICH).expand(), records, None, ()).variants
    ours, theirs = (sum(one.decode_s for one in records[name]) for name in ("4-bit, model k=4", "4-bit plain"))
    own = found["4-bit, model k=4"]["over_own_plain"]
    assert own["value"] == pytest.approx(theirs / ours)
    assert own["low"] < own["value"] < own["high"]
    assert found["model, k=4"]["over_own_plain"] == summary["variants"]["model, k=4"]["speedup"]
    header, *lines = report.rows({**summary, "variants": found})
    assert "over its own plain" in header
    assert "over its own plain" not in report.rows(summary)[0]
    bare = gather(summary, world.experiment(world.RICH).expand(), {}, None, ()).variants["4-bit, model k=4"]["over_own_plain"]
    assert bare["value"] == pytest.approx(own["value"]), "without records from the two speed-ups"
    assert bare["low"] is None
    assert len(lines) == len(world.RICH)


def swept(settings: dict[str, Any]) -> Experiment:
    return load(None, [], settings)


def test_axes_become_lines_one_for_each_combination_of_the_rest() -> None:
    made = swept(
        {
            "variants": {"plain": {"drafter": {"kind": "none"}}, "ngram": {"drafter": {"kind": "ngram"}}},
            "axes": {"drafter.k": [7, 3], "sampling.temperature": [0.0, 0.7], "model.recipes": [[], [{"kind": "gptq"}]]},
        }
    )
    found = {one.key: one for one in sweeps(made.expand(), list(made.axes))}
    assert set(found) == set(made.axes)
    assert [line.label for line in found["drafter.k"].lines] == [
        "ngram,sampling.temperature=0.0,model.recipes=[]", "ngram,sampling.temperature=0.0,model.recipes=[{'kind': 'gptq'}]",
        "ngram,sampling.temperature=0.7,model.recipes=[]", "ngram,sampling.temperature=0.7,model.recipes=[{'kind': 'gptq'}]",
    ]  # fmt: skip
    assert [value for value, _ in found["drafter.k"].lines[0].points] == [3, 7], "numbers in their order"
    assert len(found["sampling.temperature"].lines) == 6, "plain decoding too"
    assert not found["model.recipes"].numeric


def test_variants_that_differ_in_one_key_are_a_sweep_too() -> None:
    names = {f"model {k}": {"drafter": {"kind": "model", "k": k}} for k in (2, 4)}
    made = swept(
        {"variants": {"plain": {"drafter": {"kind": "none"}}, "other": {"drafter": {"kind": "ngram", "k": 3}}} | names}
    )
    [found] = sweeps(made.expand(), [])
    assert (found.key, [line.label for line in found.lines]) == ("drafter.k", ["model"])
    assert found.lines[0].points == ((2, "model 2"), (4, "model 4"))
    assert sweeps({"one": made.expand()["plain"]}, []) == []


# Whole reports.

MANY = {"plain": world.RICH["plain"]} | {
    f"variant number {i} of many,drafter.k={i},engine.rows=16": (
        {"drafter": {"kind": "model", "k": i}},
        Truth(i, 0.75, 0.002, 0.012, facts=world.LOSSY if i % 3 == 0 else world.LOSSLESS),
    )
    for i in range(1, 31)
}


def test_a_rich_run_tells_everything(tmp_path: Path) -> None:
    world.make(tmp_path, floor="race-high>=0.5")
    found = page(tmp_path)
    text = " ".join(found.texts)
    for part in (
        "is the fastest lossless variant", "keeps race-high >= 0.5", "Speed, quality and memory", "Acceptance by position",
        "Where a round's time goes", "Speed-up by category", "Latency", "Swept: drafter.k", "Why", "over its own plain",
        "perplexity (lower is better)", "race-high acc (higher is better)", "Some Processor",
    ):  # fmt: skip
        assert part in text, part
    written = (tmp_path / "report.md").read_text()
    for part in (
        "## All variants",
        "## Speed-up by category",
        "## Swept: drafter.k",
        "## Why",
        "breaks even at α",
        "Some Processor",
    ):
        assert part in written, part
    assert "<" not in written.replace("<=", ""), "a name cannot become a tag"
    lossy = next(line for line in written.splitlines() if line.startswith("| typical |"))
    assert lossy.count(" of the target |") == 2, "perplexity and RACE"
    assert "0.300 (0.241-0.367), p &lt;.001" in lossy
    drafted = next(line for line in written.splitlines() if line.startswith("| model, k=4 |"))
    assert drafted.count(" as plain |") == 2, "a score of the same model stands once"
    assert written.count("| race-high | acc |") == 2, "plain's and the 4-bit target's"


@pytest.mark.parametrize(
    "made", [{"plain": world.RICH["plain"]}, MANY, dict.fromkeys(("plain", "b"), ({}, Truth(error="broke")))]
)
def test_any_number_of_variants_makes_a_page(tmp_path: Path, made: dict[str, Any]) -> None:
    if all(truth.error for _, truth in made.values()):
        summary = {"status": "failed", "baseline": "plain", "variants": {name: {"error": "broke"} for name in made}}
        report.write(summary, world.experiment(made), tmp_path)
    else:
        world.make(tmp_path, made)
    found = page(tmp_path)
    assert all(name in "".join(found.texts) for name in made)
    assert len(list(csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text())))) == len(made)


def without(value: Any, how: int) -> Any:
    """A summary as an older version, or a backend that tells less, would write it: every figure null, or missing."""
    if isinstance(value, dict):
        return {} if how == 2 else {key: without(one, how) for key, one in value.items()}
    return None


@pytest.mark.parametrize("how", [1, 2])
@pytest.mark.parametrize("records", [True, False])
def test_nulls_everywhere_survive(tmp_path: Path, how: int, records: bool) -> None:
    summary = world.make(tmp_path)
    if not records:
        for path in tmp_path.glob("*/records.jsonl"):
            path.unlink()
    (tmp_path / "environment.json").unlink()
    bare = summary | {"variants": {name: without(one, how) for name, one in summary["variants"].items()}}
    report.write(bare, world.experiment(world.RICH, floor="race-high>=0.5"), tmp_path)
    page(tmp_path)
    Console(file=io.StringIO()).print(report.table(bare))
    assert run([str(tmp_path)], None, quiet=True) == 0


def test_each_figure_alone_may_be_null(tmp_path: Path) -> None:
    names = ("plain", "typical", "4-bit plain", "4-bit, model k=4")
    made = {name: world.RICH[name] for name in names}
    summary = world.summary_of(made)
    for key in summary["variants"]["plain"]:
        bare = {name: {one: value for one, value in found.items() if one != key} for name, found in summary["variants"].items()}
        for variants in (bare, {name: found | {key: None} for name, found in summary["variants"].items()}):
            report.write(summary | {"variants": variants}, world.experiment(made), tmp_path)
            page(tmp_path)


def test_everything_is_escaped(tmp_path: Path) -> None:
    evil = "<script>alert('x')</script>&amp;\"'|`\n"
    made = {"plain": world.RICH["plain"], evil: world.RICH["model, k=4"], evil + "2": ({}, Truth(error=evil))}
    summary = world.make(tmp_path, made, floor=evil)
    summary["variants"][evil] |= {
        "label": evil,
        "rule": evil,
        "categories": {evil: {"speedup": {"value": 1.5, "low": 1.4, "high": 1.6}}, "b": {}},
    }
    summary["variants"][evil]["quality"] = {evil: {"metric": evil, "value": 1.0, "details": {evil: evil}}, "x": {"error": evil}}
    report.write(summary, world.experiment(made, floor=evil), tmp_path)
    assert "<script" not in (tmp_path / "report.html").read_text()
    assert page(tmp_path).texts.count(evil) > 5
    assert "<script" not in (tmp_path / "report.md").read_text()
    lines = (tmp_path / "report.md").read_text().splitlines()
    line = next(line for line in lines if line.startswith("| &lt;script") and "failed: " in line)
    assert line.count("|") - line.count(r"\|") == len(report.rows(summary)[0]) + 1


def test_the_csv_holds_the_summary(tmp_path: Path) -> None:
    summary = world.make(tmp_path)
    lines = {line["variant"]: line for line in csv.DictReader(io.StringIO((tmp_path / "summary.csv").read_text()))}
    assert list(lines) == list(summary["variants"])
    for name, found in summary["variants"].items():
        flat = report.flat(found)
        assert flat["speedup.value"] == found["speedup"]["value"]
        for key, value in flat.items():
            assert lines[name][key] == ("" if value is None else str(value)), (name, key)
            if isinstance(value, float):
                assert float(lines[name][key]) == value
    assert lines["model, k=4"]["config.drafter.k"] == "4"
    assert lines["model, k=4"]["conditional_acceptance.3"] != ""
    assert (lines["plain"]["lossless"], lines["typical"]["lossless"], lines["broken"]["speedup.value"]) == ("true", "false", "")


def test_the_terminal_stays_within_80_columns(tmp_path: Path) -> None:
    for made in (world.RICH, MANY):
        console = Console(width=80, file=io.StringIO())
        with console.capture() as caught:
            console.print(report.table(world.summary_of(made)))
        lines = caught.get().splitlines()
        assert max(len(line.rstrip()) for line in lines) <= 80
        assert not any("…" in line for line in lines)
    assert "quality: perplexity" in caught.get(), "measured on plain decoding"


def test_an_interrupted_run_says_so(tmp_path: Path) -> None:
    summary = world.make(tmp_path) | {"status": "interrupted"}
    report.write(summary, world.experiment(world.RICH), tmp_path)
    assert "interrupted" in (tmp_path / "report.md").read_text().splitlines()[0]


# Charts.


def test_the_front_is_what_nothing_beats() -> None:
    spots = [
        Spot(name, Paint("c0"), x, y) for name, x, y in [("a", 1, 5), ("b", 2, 4), ("c", 2, 3), ("d", 3, 4), ("e", 0.5, 5)]
    ]
    assert [spot.name for spot in charts.front(spots, less_is_better=False)] == ["d", "a"]
    assert [spot.name for spot in charts.front(spots, less_is_better=True)] == ["d", "c"]


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.0], [0.0, 0.0], [-3.0, 5.0], [1e-9, 1e9]])
def test_any_range_of_values_is_drawn_within_the_chart(values: list[float]) -> None:
    points = [Point(value, value, value, value) for value in values]
    drawn = charts.plot([Series("a", Paint("c0"), points)], "x", "y", reference=1.0)
    Page(drawn)
    places = [float(one) for one in re.findall(r'(?:cx|x1|x2)="([^"]+)"', drawn)]
    assert all(0 <= one <= 400 for one in places)


def test_lossy_is_dashed_and_hollow() -> None:
    assert "dashed" in Paint("c0", lossy=True).line
    assert "hollow" in Paint("c0", lossy=True).mark
    assert "dashed" not in Paint("c0").line
