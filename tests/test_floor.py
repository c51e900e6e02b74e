"""The search for the largest fraction above a floor of quality: where it ends, and how few questions it asks."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from rich.console import Console

from forerun.compress.floor import Floor, look, parse, search
from forerun.compress.run import compress
from forerun.config import Compression, QualityConfig
from forerun.config import parse as parse_config
from forerun.engine import Engine
from forerun.evaluate.quality import Quality, Tell
from forerun.types import Backend, Sampling, UserError
from forerun.verbs.floor import at
from forerun.verbs.floor import search as search_model
from models import tiny


@dataclass(frozen=True)
class Figure:
    value: float
    low: float | None
    high: float | None
    count: int


@dataclass
class Falling:
    """A quality of 0.9 - fraction whose interval is as wide as that many questions make it."""

    questions: int = 1000
    width: float = 1.0
    intervals: bool = True

    def __post_init__(self) -> None:
        self.asked: list[tuple[float, int | None]] = []

    def __call__(self, fraction: float, questions: int | None) -> Figure:
        self.asked.append((fraction, questions))
        count = min(questions or self.questions, self.questions)
        value, half = 0.9 - fraction, self.width / count**0.5
        return Figure(value, value - half if self.intervals else None, value + half if self.intervals else None, count)


FLOOR = Floor("race-high", True, 0.5)


@pytest.mark.parametrize(("limit", "expected"), [(0.5, 0.4), (0.85, 0.05), (0.011, 0.889)])
def test_the_largest_fraction_is_found(limit: float, expected: float) -> None:
    fraction, probes = search(Falling(), Floor("race-high", True, limit))
    assert fraction is not None
    assert expected - 0.01 <= fraction <= expected
    assert all(probe.kept is (probe.fraction <= expected) for probe in probes)


def test_the_ends_are_said() -> None:
    assert search(Falling(), Floor("x", True, 0.95)) == (None, [look(Falling(), Floor("x", True, 0.95), 0.0, 100, None)])
    assert search(Falling(), Floor("x", True, -1.0))[0] == 0.9


def test_clear_cases_ask_few_questions_and_close_ones_all() -> None:
    measure = Falling()
    _, probes = search(measure, FLOOR)
    assert [probe.count for probe in probes if abs(0.4 - probe.fraction) > 0.11] == [100, 100, 100]
    assert [probe.count for probe in probes if 0.05 < abs(0.4 - probe.fraction) < 0.1] == [400]
    near = probes[-1]
    assert (near.count, near.decided) == (1000, False)
    assert [n for fraction, n in measure.asked if fraction == near.fraction] == [100, 200, 400, 800, 1600]


def test_undecided_is_decided_by_the_value() -> None:
    for value, kept in ((0.501, True), (0.499, False)):
        found = look(lambda _, n, value=value: Figure(value, 0.4, 0.6, min(n, 150)), FLOOR, 0.1, 100, None)  # type: ignore[misc]
        assert (found.kept, found.decided, found.count) == (kept, False, 150)


def test_a_limit_of_ones_own_is_kept() -> None:
    measure = Falling()
    search(measure, FLOOR, most=150)
    assert {n for _, n in measure.asked} == {100, 150}


def test_without_an_interval_all_are_asked() -> None:
    measure = Falling(intervals=False)
    fraction, probes = search(measure, FLOOR)
    assert fraction == pytest.approx(0.4, abs=0.011)
    assert {probe.count for probe in probes} == {1000}


def test_perplexity_has_a_ceiling() -> None:
    """`<=`: high values are bad; a text of n tokens has n - 1 that count, which does not mean that it has ended."""
    asked = []

    def measure(fraction: float, tokens: int | None) -> Figure:
        asked.append(tokens)
        count = min(tokens or 5000, 5000) - 1
        value, half = 10 + 20 * fraction, 100 / count
        return Figure(value, value - half, value + half, count)

    fraction, _ = search(measure, parse("perplexity<=12"))
    assert fraction == pytest.approx(0.1, abs=0.0101)
    assert fraction <= 0.1
    assert max(n for n in asked if n) > 1000


def test_floors_are_read() -> None:
    assert parse("race-high>=0.5") == FLOOR
    assert parse(" perplexity <= 1e1 ") == Floor("perplexity", False, 10.0)
    assert str(parse("pass@1>=.3")) == "pass@1>=0.3"
    for wrong in ("race-high", "race-high>0.5", ">=0.5", "race-high>=half", ""):
        with pytest.raises(UserError, match="say a measure and a limit"):
            parse(wrong)


def by_channels(quality: QualityConfig, backend: Backend, sampling: Sampling, folder: Path, tell: Tell) -> list[Quality]:
    """A stand-in for a measure: the share of the MLP channels that are left, told exactly by 200 questions."""
    assert isinstance(backend, Engine)
    count = min(quality.limit or 200, 200)
    value, half = backend.target.model.config.intermediate_size / 128, 0.3 if count < 200 else 0.0
    return [
        Quality("other", "acc", 0.0, 0.0, 0.0, True, count),
        Quality("race-high", "acc", value, value - half, value + half, True, count),
    ]


def mute(*_: object) -> None:
    """In the place of what looks for the data of a measure."""


@pytest.fixture
def config(tmp_path: Path) -> Compression:
    tiny("llama", dtype=torch.float32, intermediate_size=128).save_pretrained(tmp_path / "model")
    data = {
        "model": {"path": str(tmp_path / "model"), "dtype": "float32"},
        "recipes": [{"kind": "rtn", "bits": 8, "group_size": -1}, {"kind": "prune", "what": "mlp", "fraction": 0.1}],
    }
    return parse_config(Compression, data, "test")


def test_the_verb_writes_the_smallest_model_above_the_floor(
    config: Compression, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Channels stay in steps of 16 of 128 (8-bit kernels), so 0.4 means 80, the last number above 0.6."""
    quiet = Console(quiet=True)
    out = tmp_path / "out"
    assert search_model(config, out, "race-high>=0.6", None, quiet, as_json=True, measure=by_channels, check=mute) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["axis"] == "recipes.1.fraction"
    assert 0.42 <= said["fraction"] <= 0.4376  # at 7/16 half of a step is passed, and 64 stay
    assert json.loads((out / "config.json").read_text())["intermediate_size"] == 80
    kept = json.loads((out / "floor.json").read_text())
    assert [probe["fraction"] for probe in kept["probes"]] == [probe["fraction"] for probe in said["probes"]]
    assert {probe["count"] for probe in said["probes"]} == {100, 200}
    by_fraction = sorted((probe["fraction"], probe["bytes"]) for probe in said["probes"])
    assert [size for _, size in by_fraction] == sorted((size for _, size in by_fraction), reverse=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]
    # Quantized once, pruned at each fraction; the record is that of both.
    made = json.loads((out / "compression.json").read_text())
    assert (made["model"], [one["kind"] for one in made["recipes"]]) == (config.model.path, ["rtn", "prune"])
    assert {row["recipe"] for row in made["rows"]} == {0, 1}
    direct = compress(at(config, "recipes.1.fraction", said["fraction"]), tmp_path / "direct", lambda *_: None)
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "direct" / "model.safetensors").read_bytes()
    assert [dict(row) for row in made["rows"]] == [asdict(row) for row in direct.rows]
    assert made["bytes_before"] == direct.bytes_before


def test_a_floor_out_of_reach_writes_nothing(config: Compression, tmp_path: Path) -> None:
    out, quiet = tmp_path / "out", Console(quiet=True)
    assert search_model(config, out, "race-high>=1.5", "recipes.1.fraction", quiet, measure=by_channels, check=mute) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_failure_in_mid_search_leaves_nothing(config: Compression, tmp_path: Path) -> None:
    def broken(*_: object) -> list[Quality]:
        raise UserError("the data set has gone")

    with pytest.raises(UserError, match="has gone"):
        search_model(config, tmp_path / "out", "race-high>=0.5", None, Console(quiet=True), measure=broken, check=mute)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_fractions_too_small_for_a_head_are_the_whole_model(tmp_path: Path) -> None:
    """Of 8 KV heads fractions below 1/16 prune none: no new work for them, and never the answer."""
    tiny("qwen3", dtype=torch.float32, num_attention_heads=8, num_key_value_heads=8).save_pretrained(tmp_path / "model")
    recipes = [{"kind": "prune", "what": "heads"}]
    config = parse_config(
        Compression, {"model": {"path": str(tmp_path / "model"), "dtype": "float32"}, "recipes": recipes}, "t"
    )
    measured = []

    def by_heads(quality: QualityConfig, backend: Backend, *_: object) -> list[Quality]:
        assert isinstance(backend, Engine)
        heads, count = backend.target.model.config.num_key_value_heads, min(quality.limit or 200, 200)
        measured.append(heads)
        half = 0.3 if count < 200 else 0.0
        return [Quality("race-high", "acc", heads / 8, heads / 8 - half, heads / 8 + half, True, count)]

    for limit, left in ((0.9, 8), (0.6, 5)):
        out = tmp_path / str(limit)
        assert search_model(config, out, f"race-high>={limit}", None, Console(quiet=True), measure=by_heads, check=mute) == 0
        assert json.loads((out / "config.json").read_text())["num_key_value_heads"] == left
        found = json.loads((out / "floor.json").read_text())
        assert (found["fraction"] == 0) is (left == 8)
        kept = [probe["fraction"] for probe in found["probes"] if probe["kept"]]
        assert max(kept) == pytest.approx((8.5 - left) / 8, abs=0.011)
        if left == 8:
            assert measured.count(8) == 2  # on 100 questions and on 200, at fraction 0 alone
            assert len([fraction for fraction in kept if fraction]) >= 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.6", "0.9", "model"]


def test_a_folder_of_others_beside_the_model_is_let_be(config: Compression, tmp_path: Path) -> None:
    (tmp_path / "out.search").mkdir()
    (tmp_path / "out.search" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"out\.search holds other files"):
        search_model(config, tmp_path / "out", "race-high>=0.6", None, Console(quiet=True), measure=by_channels, check=mute)
    assert (tmp_path / "out.search" / "thesis.txt").read_text() == "mine"


def test_missing_data_shows_before_anything_is_compressed(config: Compression, tmp_path: Path) -> None:
    asked = config.model_copy(update={"data": str(tmp_path)})
    with pytest.raises(UserError, match="race"):
        search_model(asked, tmp_path / "out", "race-high>=0.5", None, Console(quiet=True), measure=by_channels)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
