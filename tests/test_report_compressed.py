"""The acceptance that drafters lose on a compressed target, as the report shows it."""

from pathlib import Path

import pytest

import report_world as world
from forerun.bench.blocks import Grid
from forerun.bench.compressed import HEADER, acceptance_lost, uncompressed
from forerun.bench.material import gather
from forerun.bench.metrics import summarize
from forerun.bench.show import number, share
from report_world import RICH, Truth


def test_a_drafter_finds_itself_on_the_uncompressed_target() -> None:
    configs = world.experiment(RICH).expand()
    assert uncompressed(configs) == {"4-bit, model k=4": "model, k=4"}
    assert "4-bit plain" not in uncompressed(configs), "plain decoding drafts nothing"
    other = {"model, k=4": RICH["model, k=4"], "other": (RICH["4-bit, model k=4"][0] | {"model.dtype": "float32"}, Truth())}
    assert uncompressed(world.experiment(other).expand()) == {}, "what differs in more than the recipes is no comparison"


def test_both_acceptances_stand_side_by_side_with_the_ratio_of_paired_rounds(tmp_path: Path) -> None:
    names = ("plain", "model, k=4", "4-bit, model k=4")
    chosen = {name: RICH[name] for name in names}
    runs = {name: world.run(truth) for name, (_, truth) in chosen.items()}
    summary = summarize(runs, "plain")
    records = {name: one.records for name, one in runs.items()}
    section = acceptance_lost(gather(summary, world.experiment(chosen).expand(), records, None, ()))
    grid = section.blocks[0]
    assert isinstance(grid, Grid)
    [header, line] = grid.rows
    assert header == HEADER
    ours, theirs = (summary["variants"][name] for name in ("4-bit, model k=4", "model, k=4"))
    assert line[:4] == ["4-bit, model k=4", "model, k=4", share(ours["acceptance_rate"]), share(theirs["acceptance_rate"])]
    assert line[4:6] == [number(one["block_efficiency"], 2) for one in (ours, theirs)]
    assert ours["acceptance_rate"] < theirs["acceptance_rate"], "the world was made so"
    value = float(line[6].partition("x")[0])
    assert value == pytest.approx(ours["block_efficiency"] / theirs["block_efficiency"], abs=0.006)
    world.make(tmp_path, chosen)
    assert "Acceptance lost to compression" in (tmp_path / "report.md").read_text()


def test_a_run_without_both_has_no_such_section(tmp_path: Path) -> None:
    world.make(tmp_path, {name: RICH[name] for name in ("plain", "model, k=4", "4-bit plain")})
    assert "Acceptance lost" not in (tmp_path / "report.md").read_text()
