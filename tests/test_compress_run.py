"""A run of `forerun compress`: what is refused, interruptions, full disks, what is told."""

import errno
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from compressing import GPTQ, HEADS, INPUT, MLP, RTN, config, mute, opened, written
from forerun.compress import apply, partial, run
from forerun.compress.floor import parse as parse_floor
from forerun.compress.recipes import check
from forerun.compress.run import MADE, compress
from forerun.config import load_compression
from forerun.types import UserError
from forerun.verbs import compress as verb
from forerun.verbs.floor import chosen
from models import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path)


@pytest.mark.parametrize(
    ("recipes", "message"),
    [
        ([{"kind": "bnb"}, GPTQ], r"recipes\.1: gptq after bnb would quantize twice"),
        ([GPTQ, RTN], r"recipes\.1: rtn after gptq would quantize twice"),
        ([GPTQ, {"kind": "bnb"}], "quantize twice"),
        ([{"kind": "bnb"}, INPUT], "put prune before bnb"),
        ([INPUT, {"kind": "bnb"}], "bitsandbytes reads plain checkpoints"),
        ([INPUT, MLP], "put it before recipes.0"),
        ([MLP | {"scope": "global"}], "take scope=layer"),
        ([HEADS | {"fraction": 0.1}], "of 2 KV heads 1 can stay"),
        ([RTN | {"group_size": 128}], "group_size=128 does not divide"),
        ([GPTQ | {"group_size": 128}], "group_size=128 does not divide"),
        ([GPTQ | {"calibration": {"length": 512}}], "takes at most 256 tokens"),
        ([GPTQ | {"calibration": {"length": 64, "workload": {"kind": "demo"}}}], "no tokenizer"),
    ],
)
def test_what_cannot_be_is_one_line_and_writes_nothing(folder: Path, recipes: list[dict[str, object]], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        compress(config(folder, *recipes), folder / "out", mute)
    assert "\n" not in str(caught.value)
    assert [path.name for path in folder.iterdir()] == ["model"]


def test_gpt2_is_refused(tmp_path: Path) -> None:
    tiny("gpt2", dtype=torch.float32).save_pretrained(tmp_path / "model")
    for recipe in (RTN, INPUT, MLP):
        with pytest.raises(UserError, match="Conv1D"):
            compress(config(tmp_path, recipe), tmp_path / "out", mute)


def test_a_quantized_model_is_not_quantized_again(folder: Path) -> None:
    compress(config(folder, RTN), folder / "out", mute)
    again = config(folder, RTN, model={"path": str(folder / "out")})
    with pytest.raises(UserError, match="quantized already"):
        compress(again, folder / "again", mute)
    assert not (folder / "again").exists()


def test_a_damaged_model_is_one_line(folder: Path) -> None:
    weights = folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:3000])
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        compress(config(folder, RTN), folder / "out", mute)
    assert "\n" not in str(caught.value)
    assert [path.name for path in folder.iterdir()] == ["model"]


def test_what_is_there_is_not_overwritten(folder: Path) -> None:
    compress(config(folder, RTN), folder / "out", mute)
    with pytest.raises(UserError, match="give --overwrite"):
        compress(config(folder, MLP), folder / "out", mute)
    compress(config(folder, MLP), folder / "out", mute, overwrite=True)
    assert json.loads((folder / "out" / MADE).read_text())["recipes"][0]["kind"] == "prune"
    with pytest.raises(UserError, match="other files"):
        compress(config(folder, RTN), folder / "model", mute, overwrite=True)
    (folder / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        compress(config(folder, RTN), folder / "file", mute)


@pytest.mark.parametrize("name", [".", "..", "sub/.."])
def test_a_folder_without_a_name_of_its_own_is_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (folder / "empty" / "sub").mkdir(parents=True)
    monkeypatch.chdir(folder / "empty")
    with pytest.raises(UserError, match="name a folder, such as"):
        compress(config(folder, RTN), Path(name), mute, overwrite=True)
    assert sorted(path.name for path in folder.rglob("*") if path.is_dir()) == ["empty", "model", "sub"]


def test_a_coded_model_of_an_unknown_type_is_one_line(folder: Path) -> None:
    compress(config(folder, RTN), folder / "out", mute)
    settings = folder / "out" / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"model_type": "nonesuch"}))
    with pytest.raises(UserError, match=r"out' cannot be read: .*nonesuch") as caught:
        opened(folder / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["thesis.txt", "identity"])
def test_files_of_others_beside_the_model_are_let_be(folder: Path, name: str) -> None:
    (folder / "out.partial").mkdir()
    compress(config(folder, RTN), folder / "out", mute)  # an empty one may be ours
    (folder / "out.partial").mkdir()
    (folder / "out.partial" / name).write_text("mine")
    with pytest.raises(UserError, match=r"out\.partial holds other files"):
        compress(config(folder, RTN), folder / "out", mute, overwrite=True)
    assert (folder / "out.partial" / name).read_text() == "mine"


def test_two_runs_do_not_write_to_one_folder(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(config(folder, GPTQ), folder / "out", stop_at(1, KeyboardInterrupt()))
    with partial.held(folder / "out.partial", folder / "out"):
        with pytest.raises(UserError, match=r"another run writes to .*out just now"):
            compress(config(folder, RTN), folder / "out", mute)
        assert len(list((folder / "out.partial").glob("*.safetensors"))) == 1
    compress(config(folder, RTN), folder / "out", mute)
    assert sorted(path.name for path in folder.iterdir()) == ["model", "out"]


def test_an_old_model_stays_until_the_new_one_is_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compress(config(folder, RTN), folder / "out", mute)
    old = {path.name: path.read_bytes() for path in (folder / "out").iterdir()}
    real = Path.rename

    def stuck(self: Path, target: Path) -> Path:
        if self.name == "model":
            raise OSError(errno.EBUSY, "Device or resource busy")
        return real(self, target)

    with monkeypatch.context() as broken:
        broken.setattr(Path, "rename", stuck)
        with pytest.raises(UserError, match="resource busy"):
            compress(config(folder, MLP), folder / "out", mute, overwrite=True)
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == old
    assert sorted(path.name for path in folder.iterdir()) == ["model", "out"]
    # Killed between the two steps of the exchange: the next run puts the old one back first.
    (folder / "out.partial").mkdir()
    (folder / "out.partial" / partial.MARK).touch()
    (folder / "out").rename(folder / "out.partial" / partial.REPLACED)
    with pytest.raises(UserError, match="give --overwrite"):
        compress(config(folder, MLP), folder / "out", mute)
    assert {path.name: path.read_bytes() for path in (folder / "out").iterdir()} == old
    assert sorted(path.name for path in folder.iterdir()) == ["model", "out"]


def stop_at(layer: int, error: BaseException) -> Callable[[str, int, int], None]:
    def tell(what: str, done: int, total: int) -> None:
        if "gptq" in what and done == layer:
            raise error

    return tell


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers that GPTQ quantizes from now on."""
    calls: list[str] = []
    real = apply.gptq.quantize_together

    def count(weights: dict[str, torch.Tensor], *more: object) -> object:
        calls.extend(weights)
        return real(weights, *more)

    monkeypatch.setattr(apply.gptq, "quantize_together", count)
    return calls


def test_an_interrupted_run_goes_on_where_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(folder, MLP, GPTQ)
    compress(settings, folder / "whole", mute)
    with pytest.raises(KeyboardInterrupt):
        compress(settings, folder / "out", stop_at(1, KeyboardInterrupt()))
    assert not (folder / "out").exists()
    calls = counted(monkeypatch)
    report = compress(settings, folder / "out", mute)
    assert {name.split(".")[2] for name in calls} == {"1"}
    assert len(report.rows) == 2 + 14
    files = [(folder / at / "model.safetensors").read_bytes() for at in ("whole", "out")]
    assert files[0] == files[1]
    assert not (folder / "out.partial").exists()


def test_another_recipe_starts_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(config(folder, GPTQ), folder / "out", stop_at(1, KeyboardInterrupt()))
    calls = counted(monkeypatch)
    compress(config(folder, GPTQ | {"damping": 0.1}), folder / "out", mute)
    assert {name.split(".")[2] for name in calls} == {"0", "1"}


def test_a_damaged_layer_of_an_interrupted_run_is_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt):
        compress(config(folder, GPTQ), folder / "out", stop_at(1, KeyboardInterrupt()))
    [kept] = (folder / "out.partial").glob("*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-100])
    calls = counted(monkeypatch)
    compress(config(folder, GPTQ), folder / "out", mute)
    assert {name.split(".")[2] for name in calls} == {"0", "1"}


def test_a_full_disk_is_one_line_and_loses_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(PreTrainedModel, "save_pretrained", full)
        with pytest.raises(UserError, match="No space left on device"):
            compress(config(folder, GPTQ), folder / "out", mute)
        assert not (folder / "out").exists()
        with pytest.raises(UserError, match="No space left on device"):
            compress(config(folder, MLP), folder / "mlp", mute)
    assert sorted(path.name for path in folder.iterdir()) == ["model", "out.partial"]  # finished layers, and nothing of `mlp`
    calls = counted(monkeypatch)
    compress(config(folder, GPTQ), folder / "out", mute)
    assert calls == []


def test_the_verb_tells_and_writes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"model.path={folder / 'model'}", "model.dtype=float32", "recipes.0.kind=rtn", "recipes.0.group_size=32"]
    assert verb.run(words, str(folder / "out"), quiet=True) == 0
    assert verb.run(words, str(folder / "out"), as_json=True, overwrite=True, quiet=True) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["folder"] == str(folder / "out")
    assert len(said["rows"]) == 14
    assert math.isclose(said["bytes_after"], run.bytes_held(opened(folder / "out")))
    shown = verb.table(compress(config(folder, MLP, GPTQ), folder / "more", mute).rows)
    assert list(shown.columns[1].cells) == ["2 x mlp"] + [f"2 x {name}" for name in KINDS]
    assert next(iter(shown.columns[2].cells)) == "96 of 128"


KINDS = [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("words", "out", "options", "message"),
    [
        ([], "out", {}, "recipes: say what to do"),
        (["recipes.0.kind=rtn"], None, {}, "--out"),
        (["a.yaml", "b.yaml"], "out", {}, "one config file"),
        (["recipes.0.kind=rtn", "recipes.0.bit=4"], "out", {}, "did you mean 'recipes.0.bits'"),
        (["recipes.0.kind=rtn"], "out", {"axis": "recipes.0.bits"}, "--axis goes with --floor"),
        (["recipes.0.kind=rtn"], "out", {"floor": "race-high>=0.5"}, "0 recipes prune"),
        (["recipes.0.kind=prune"], "out", {"floor": "race-high>=0.5", "axis": "recipes.1.fraction"}, "no such number"),
        (["recipes.0.kind=prune"], "out", {"floor": "race-high>=0.5", "axis": "recipes.0.what"}, "is 'mlp'"),
        (["recipes.0.kind=prune"], "out", {"floor": "race>=0.5"}, "none of"),
    ],
)
def test_mistakes_of_the_verb(words: list[str], out: str | None, options: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        verb.run(words, out, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["gptq", "pruned", "floor"])
def test_the_shipped_configs_are_sound(name: str) -> None:
    path = str(Path(__file__).parent.parent / "configs" / f"compress-{name}.yaml")
    for small in (False, True) if name == "floor" else (False,):
        check(load_compression(path, [], small).located().recipes)
    if name == "floor":
        floor = parse_floor("race-high>=0.5")
        assert chosen(load_compression(path, []), floor).kind == "race-high"
