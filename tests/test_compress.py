"""Compressing whole models: recipes in a row, what is written and read back."""

import copy
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressing import (
    ACTIVATION,
    CALIBRATION,
    GPTQ,
    HEADS,
    INPUT,
    MLP,
    OUTPUT,
    RTN,
    SIZES,
    config,
    logits,
    mute,
    opened,
    written,
)
from forerun import workload
from forerun.compress import apply, checkpoint, run
from forerun.compress.opened import open_model
from forerun.compress.run import MADE, compress
from forerun.config import CalibrationConfig, Compression, ModelConfig, WorkloadConfig, parse
from forerun.packed.codes import CodedLinear
from forerun.packed.pruned import L1PrunedInputLinear
from forerun.types import UserError
from models import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return written(tmp_path)


LISTS = {
    "rtn": [RTN],
    "rtn 8 bit a channel": [{"kind": "rtn", "bits": 8, "group_size": -1}],
    "gptq": [GPTQ],
    "input": [INPUT],
    "output": [OUTPUT],
    "input, global by activation": [INPUT | ACTIVATION | {"scope": "global"}],
    "output by activation": [OUTPUT | ACTIVATION],
    "mlp by activation": [MLP | ACTIVATION],
    "heads": [HEADS],
    "heads by activation, mlp, output": [HEADS | ACTIVATION, MLP, OUTPUT],
    "prune, then gptq": [MLP, INPUT | {"fraction": 0.5}, GPTQ],
    "gptq, then prune": [GPTQ, INPUT | {"fraction": 0.5}],
    "rtn, then coupled": [RTN, MLP | {"fraction": 0.5}],
    "rtn, then output": [RTN, OUTPUT],
    "input and output": [INPUT, OUTPUT],
    "input twice": [INPUT, INPUT],
}


@pytest.mark.parametrize("name", LISTS)
def test_what_is_saved_is_what_was_made(folder: Path, name: str) -> None:
    """Equal logits, fewer bytes on disk and in memory, a row for each recipe and layer."""
    settings = config(folder, *LISTS[name])
    made, rows, before = run.make(settings.model, settings.recipes, folder, "target", mute)
    report = compress(settings, folder / "out", mute)
    loaded = opened(folder / "out")
    torch.testing.assert_close(logits(loaded), logits(made.model), rtol=0, atol=1e-6)
    assert report.rows == tuple(rows)
    assert report.bytes_before == before > report.bytes_after == run.bytes_held(loaded)
    size = [(folder / at / "model.safetensors").stat().st_size for at in ("model", "out")]
    assert size[1] < 0.95 * size[0]
    assert {row.recipe for row in rows} == set(range(len(LISTS[name])))
    for row in rows:
        assert 0 < row.kept <= row.total
        assert (row.error is not None and 0 < row.error < 1) or row.kept == row.total
    assert json.loads((folder / "out" / MADE).read_text())["rows"][0]["layer"] == rows[0].layer
    assert sorted(path.name for path in folder.iterdir() if "partial" in path.name) == []


@pytest.mark.parametrize(("recipe", "change"), [(MLP, {"intermediate_size": 96}), (HEADS, {"num_key_value_heads": 1})])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "gemma3", "phi3"])
def test_coupled_pruning_leaves_a_plain_checkpoint(
    tmp_path: Path, name: str, recipe: dict[str, object], change: dict[str, int]
) -> None:
    """transformers alone reads it, and says what our own loading says."""
    tiny(name, dtype=torch.float32, **SIZES).save_pretrained(tmp_path / "model")
    compress(config(tmp_path, recipe | ACTIVATION), tmp_path / "out", mute)
    settings = json.loads((tmp_path / "out" / "config.json").read_text())
    assert settings.items() >= change.items()
    assert "forerun" not in settings
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(opened(tmp_path / "out")), logits(plain), rtol=0, atol=1e-6)
    assert not torch.allclose(logits(plain), logits(opened(tmp_path / "model")), atol=1e-2)


def test_pruned_inputs_are_zero_masks_in_the_whole_model(folder: Path) -> None:
    compress(config(folder, INPUT), folder / "out", mute)
    loaded, masked = opened(folder / "out"), copy.deepcopy(tiny("llama", dtype=torch.float32, **SIZES))
    for name, layer in apply.linears(masked).items():
        pruned = loaded.get_submodule(name)
        assert isinstance(pruned, L1PrunedInputLinear)
        assert len(pruned.keep) == 0.75 * layer.in_features
        lowest = layer.weight.abs().sum(0).argsort()[: layer.in_features // 4]
        assert not set(lowest.tolist()) & set(pruned.keep.tolist())
        layer.weight[:, lowest] = 0
    torch.testing.assert_close(logits(loaded), logits(masked), rtol=0, atol=1e-5)


def test_twice_pruned_is_one_index(folder: Path) -> None:
    compress(config(folder, INPUT, INPUT), folder / "out", mute)
    loaded, masked = opened(folder / "out"), copy.deepcopy(tiny("llama", dtype=torch.float32, **SIZES))
    for name, layer in apply.linears(masked).items():
        pruned = loaded.get_submodule(name)
        assert isinstance(pruned, L1PrunedInputLinear)
        assert isinstance(pruned.inner, torch.nn.Linear)
        highest = layer.weight.abs().sum(0).argsort(descending=True)[: round(0.75 * 0.75 * layer.in_features)]
        assert pruned.keep.tolist() == sorted(highest.tolist())
        layer.weight *= torch.zeros(layer.in_features).index_fill(0, highest, 1.0)
    torch.testing.assert_close(logits(loaded), logits(masked), rtol=0, atol=1e-5)


def test_codes_survive_pruning_bit_for_bit(folder: Path) -> None:
    compress(config(folder, RTN), folder / "whole", mute)
    compress(config(folder, RTN, INPUT | {"fraction": 0.5}), folder / "less", mute)
    again = config(folder, INPUT | {"fraction": 0.5}, model={"path": str(folder / "whole"), "dtype": "float32"})
    compress(again, folder / "later", mute)  # a compressed folder can be pruned, too
    whole = apply.linears(opened(folder / "whole"))
    less, later = opened(folder / "less"), opened(folder / "later")
    for name, layer in whole.items():
        assert isinstance(layer, CodedLinear)
        for model in (less, later):
            pruned = model.get_submodule(name)
            assert isinstance(pruned, L1PrunedInputLinear)
            assert isinstance(pruned.inner, CodedLinear)
            assert torch.equal(pruned.inner.codes().codes_NK, layer.codes().codes_NK[:, pruned.keep])
            assert pruned.inner.packed.nbytes == layer.packed.nbytes / 2


def test_pruning_leaves_what_quantization_can_take(folder: Path) -> None:
    """Whole groups of inputs, whole words of outputs: 0.3 of 128 is rounded to 96, not 90."""
    compress(config(folder, INPUT | {"fraction": 0.3}, GPTQ), folder / "out", mute)
    layer = opened(folder / "out").model.layers[1].mlp.down_proj
    assert (layer.inner.in_features, layer.inner.scales.shape[1]) == (96, 3)


def test_activations_choose_better_than_weights(folder: Path) -> None:
    """The error of the outputs on calibration texts, summed over layers, at the same fraction."""
    errors = []
    for score in ("l1", "activation"):
        pruned, calibrated = INPUT | {"score": score}, GPTQ | {"bits": 8, "group_size": -1}
        model = copy.deepcopy(tiny("llama", dtype=torch.float32, **SIZES))
        for name, layer in apply.linears(model).items():
            if "norm" not in name:
                layer.weight *= torch.rand(layer.in_features, generator=torch.Generator().manual_seed(1))
        for layer in model.model.layers:  # inputs of very different magnitudes, as in trained models
            for norm in (layer.input_layernorm, layer.post_attention_layernorm):
                norm.weight *= torch.rand(64, generator=torch.Generator().manual_seed(2)) ** 4 * 10
        model.save_pretrained(folder / "model")
        settings = config(folder, pruned | {"calibration": CALIBRATION}, calibrated)
        tokens_ST = run.calibration(settings.recipes[1].calibration, open_model(settings.model), mute)
        task = apply.Task(
            0, open_model(settings.model).model, tokens_ST if score == "activation" else None, run.units_for(()), mute
        )
        keep = {}
        apply.prune_single(task, settings.recipes[0])
        for name, module in task.model.named_modules():
            if isinstance(module, L1PrunedInputLinear):
                keep[name] = module.keep
        whole = apply.Task(0, open_model(settings.model).model, tokens_ST, run.units_for(()), mute)
        errors.append(sum(error for error, _ in apply.measured_errors(whole, keep, 1).values()))
    assert errors[1] < 0.9 * errors[0]


def test_bitsandbytes(folder: Path) -> None:
    """Saved before its first forward pass, so that a reloaded model says what the one in memory says."""
    pytest.importorskip("bitsandbytes")
    dense = opened(folder / "model")
    for bits in (4, 8):
        settings = config(folder, {"kind": "bnb", "bits": bits})
        report = compress(settings, folder / f"out{bits}", mute)
        loaded = opened(folder / f"out{bits}")
        made, _, _ = run.make(settings.model, settings.recipes, folder, "target", mute)
        torch.testing.assert_close(logits(loaded), logits(made.model), rtol=0, atol=1e-5)
        assert float((logits(loaded) - logits(dense)).norm() / logits(dense).norm()) < 0.6
        assert all(row.error is not None and row.error < 0.15 for row in report.rows)
        assert len(report.rows) == 14
        assert report.bytes_after < 0.5 * report.bytes_before


def test_pruned_before_bitsandbytes(folder: Path) -> None:
    """0.3 of 128 channels: 64 stay, because the 4-bit kernel takes multiples of 64."""
    pytest.importorskip("bitsandbytes")
    report = compress(config(folder, MLP | {"fraction": 0.3}, {"kind": "bnb"}), folder / "out", mute)
    assert report.rows[0].kept == 64
    assert logits(opened(folder / "out")).isfinite().all()
    tiny("llama", dtype=torch.float32).save_pretrained(folder / "narrow")
    narrow = config(folder, {"kind": "bnb"}, model={"path": str(folder / "narrow")})
    with pytest.raises(UserError, match="has no nf4 kernel"):
        compress(narrow, folder / "narrow-out", mute)
    assert not (folder / "narrow-out").exists()


def test_random_weights_and_the_models_own_recipes(folder: Path) -> None:
    """A geometry without weights can be compressed, and `model.recipes` come before `recipes`."""
    own = {"path": str(folder / "model" / "config.json"), "weights": "random", "dtype": "float32", "recipes": [MLP]}
    report = compress(parse(Compression, {"model": own, "recipes": [RTN]}, "test"), folder / "out", mute)
    assert [recipe["kind"] for recipe in report.recipes] == ["prune", "rtn"]
    assert opened(folder / "out").config.intermediate_size == 96


def test_checkpoint_is_the_way_in(folder: Path) -> None:
    """A plain folder is not taken for a compressed one, nor the other way round."""
    compress(config(folder, RTN), folder / "out", mute)
    assert [checkpoint.is_coded(folder / name) for name in ("model", "out")] == [False, True]


def test_calibration_texts_come_from_a_workload(folder: Path) -> None:
    """Laid end to end in a seeded order and cut; too few are one line."""
    loaded = open_model(ModelConfig())
    read = CalibrationConfig(workload=WorkloadConfig(kind="demo"), samples=5, length=64)
    tokens_ST = run.calibration(read, loaded, mute)
    assert tokens_ST.shape == (5, 64)
    assert torch.equal(tokens_ST, run.calibration(read, loaded, mute))
    assert not torch.equal(tokens_ST, run.calibration(read.model_copy(update={"seed": 1}), loaded, mute))
    assert loaded.tokenizer is not None
    shipped = {line.text for line in workload.read(WorkloadConfig(kind="demo"))}
    assert any(text.startswith(loaded.tokenizer.decode(tokens_ST[0, :40])[:60]) for text in shipped)
    (folder / "short.txt").write_text("a few words only")
    short = CalibrationConfig(workload=WorkloadConfig(kind="text", path=str(folder / "short.txt")), length=64)
    with pytest.raises(UserError, match="fewer than one window"):
        run.calibration(short, loaded, mute)


def test_recipes_find_their_texts(folder: Path) -> None:
    """A recipe's own workload, else that of the compression; data sets below the folder `data`."""
    (folder / "c4_sample").mkdir()
    own = {"samples": 4, "length": 24, "workload": {"kind": "demo"}}
    settings = config(folder, GPTQ, MLP | {"calibration": own}, RTN, workload={"kind": "c4"}, data=str(folder)).located()
    gptq, mlp, rtn = settings.recipes
    assert gptq.calibration.workload.path == str(folder / "c4_sample")
    assert mlp.calibration.workload.kind == "demo"
    assert rtn.kind == "rtn"
