"""bitsandbytes on the CPU: quantized, saved and read back exactly; shapes that its kernels refuse are told by layer."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from forerun.compress import bnb, checkpoint, run
from forerun.compress.bits import quantized_by_bnb
from forerun.compress.opened import open_model
from forerun.config import BnbConfig, Compression, ModelConfig, parse
from forerun.packed import weight_bytes
from forerun.types import UserError
from models import tiny

pytest.importorskip("bitsandbytes", reason="pip install 'forerun[bnb]'")
pytest.importorskip("accelerate", reason="pip install 'forerun[bnb]'")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

TOKENS = torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(5))
WIDE = {"hidden_size": 64, "intermediate_size": 128}
KINDS = [BnbConfig(bits=8), BnbConfig(), BnbConfig(double_quant=False), BnbConfig(quant_type="fp4")]


def mute(*_: object) -> None:
    pass


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    tiny("llama", dtype=torch.bfloat16, **WIDE).save_pretrained(tmp_path / "plain")
    return tmp_path / "plain"


@pytest.mark.parametrize("config", KINDS, ids=["int8", "nf4", "nf4-single", "fp4"])
def test_saved_before_its_first_pass_a_model_comes_back_exactly(config: BnbConfig, plain: Path, tmp_path: Path) -> None:
    model = bnb.load(plain, config, torch.bfloat16)
    kinds = {type(module).__name__ for module in model.modules() if isinstance(module, nn.Linear)}
    assert kinds == {"Linear8bitLt" if config.bits == 8 else "Linear4bit", "Linear"}  # the output head stays
    checkpoint.save(model, None, tmp_path / "small", {"recipes": ["bnb"]})
    assert not checkpoint.is_coded(tmp_path / "small")
    expected = model(input_ids=TOKENS).logits
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "small").requires_grad_(False)  # gradients take another kernel
    assert torch.equal(again(input_ids=TOKENS).logits, expected)
    exact = tiny("llama", dtype=torch.bfloat16, **WIDE)(input_ids=TOKENS).logits
    assert 0 < (expected - exact).norm() / exact.norm() < 0.5
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (plain, tmp_path / "small")]
    assert sizes[1] < 0.8 * sizes[0]


def test_after_its_first_pass_a_model_is_not_written(plain: Path, tmp_path: Path) -> None:
    model = bnb.load(plain, BnbConfig(double_quant=False), torch.bfloat16)
    if not model.model.layers[0].mlp.up_proj.support_avx512bf16_for_cpu:
        pytest.skip("this CPU has no AVX-512 bfloat16, for which bitsandbytes repacks weights")
    model(input_ids=TOKENS)
    with pytest.raises(UserError, match="save it before"):
        checkpoint.save(model, None, tmp_path / "small")
    assert not (tmp_path / "small").exists()


def test_a_layer_computes_in_the_type_that_was_asked_for(plain: Path) -> None:
    own = bnb.load(plain, BnbConfig(), torch.bfloat16)
    other = bnb.load(plain, BnbConfig(compute_dtype="float32"), torch.bfloat16)
    assert own.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16
    assert other.model.layers[0].mlp.up_proj.compute_dtype == torch.float32
    assert bnb.load(plain, BnbConfig(bits=8, threshold=3.5), torch.bfloat16).model.layers[0].mlp.up_proj.state.threshold == 3.5


def test_the_cast_of_every_layer_is_not_logged(plain: Path, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    for filtered in list(logger.filters):
        logger.removeFilter(filtered)
    model = bnb.load(plain, BnbConfig(bits=8), torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        model(input_ids=TOKENS)
        logger.warning("something else")
    assert [record.message for record in caplog.records if "bitsandbytes" in record.name] == ["something else"]
    bnb.hush()
    assert len(logger.filters) == 1


def test_shapes_without_a_kernel_are_told_by_layer() -> None:
    fine = tiny("llama", **WIDE)
    bnb.refuse_misfit(fine, BnbConfig())
    narrow = tiny("llama")  # 32 inputs
    bnb.refuse_misfit(narrow, BnbConfig(bits=8))
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj \[32, 32\] has no nf4 kernel"):
        bnb.refuse_misfit(narrow, BnbConfig())
    odd = copy.deepcopy(fine)
    odd.model.layers[1].mlp.gate_proj = nn.Linear(64, 100)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.gate_proj \[100, 64\] has no fp4 kernel"):
        bnb.refuse_misfit(odd, BnbConfig(quant_type="fp4"))


def test_a_damaged_model_and_a_missing_package_are_one_line(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plain / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be quantized by bitsandbytes") as caught:
        bnb.load(plain, BnbConfig(), torch.bfloat16)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'forerun\[bnb\]'"):
        bnb.load(plain, BnbConfig(), torch.bfloat16)


def test_a_saved_model_logs_no_casts_either(plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoint.save(bnb.load(plain, BnbConfig(bits=8), torch.bfloat16), None, tmp_path / "small")
    logger = logging.getLogger("bitsandbytes.autograd._functions")
    for filtered in list(logger.filters):
        logger.removeFilter(filtered)
    model = open_model(ModelConfig(path=str(tmp_path / "small"))).model
    with caplog.at_level(logging.WARNING):
        model(input_ids=TOKENS)
    assert [record for record in caplog.records if "bitsandbytes" in record.name] == []


@pytest.mark.parametrize("config", KINDS, ids=["int8", "nf4", "nf4-single", "fp4"])
def test_bytes_have_the_scales_before_and_after_the_first_pass(config: BnbConfig, plain: Path) -> None:
    model = bnb.load(plain, config, torch.bfloat16)
    layers = [module for module in model.modules() if type(module).__name__ in ("Linear4bit", "Linear8bitLt")]
    codes = sum(parameter.nbytes for parameter in model.parameters())
    inputs, outputs = sum(layer.in_features * layer.out_features for layer in layers), sum(one.out_features for one in layers)
    blocks, tables = inputs // 64, 1100 * len(layers)  # a table of 16 values, and with scales of scales one of 256
    least = {8: 4 * outputs, 4: blocks if config.double_quant else 4 * blocks}[config.bits]
    assert codes + least <= weight_bytes(model) <= codes + least + (tables if config.bits == 4 else 0)
    assert run.bytes_held(model) >= weight_bytes(model)
    model(input_ids=TOKENS)
    if config.bits == 4 and layers[0].support_avx512bf16_for_cpu:
        least = 2 * blocks  # repacked, in bfloat16
    assert codes + least <= weight_bytes(model) <= codes + least + (tables if config.bits == 4 else 0)


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_that_lie_transposed_are_compared_as_they_are_meant(bits: int, tmp_path: Path) -> None:
    tiny("gpt2", dtype=torch.float32, n_embd=64).save_pretrained(tmp_path)
    _, rows, _ = quantized_by_bnb(ModelConfig(path=str(tmp_path), dtype="float32"), BnbConfig(bits=bits), 0, mute)
    assert {row.layer.rpartition(".")[2] for row in rows} == {"c_attn", "c_proj", "c_fc"}  # c_proj of attention is square
    assert all(row.error is not None and 0 < row.error < {4: 0.15, 8: 0.01}[bits] for row in rows)
    with pytest.raises(UserError, match=r"c_attn \[96, 32\] has no nf4 kernel"):
        bnb.refuse_misfit(tiny("gpt2"), BnbConfig())


def test_a_source_that_cannot_be_read_is_one_line(plain: Path, tmp_path: Path) -> None:
    def refused(folder: Path, match: str) -> None:
        settings = parse(Compression, {"model": {"path": str(folder)}, "recipes": [{"kind": "bnb", "bits": 8}]}, "test")
        with pytest.raises(UserError, match=match) as caught:
            run.compress(settings, tmp_path / "out", mute)
        assert "\n" not in str(caught.value) and "cannot be written" not in str(caught.value)

    pruned = parse(Compression, {"model": {"path": str(plain)}, "recipes": [{"kind": "prune", "what": "input"}]}, "test")
    run.compress(pruned, tmp_path / "pruned", mute)
    refused(tmp_path / "pruned", "pruned' has pruned layers of forerun's own")
    path = plain / "config.json"
    said = path.read_text()
    path.write_text(json.dumps(json.loads(said) | {"model_type": "nonesuch"}))
    refused(plain, r"plain' cannot be read: .*nonesuch")
    path.write_text(said[:20])
    refused(plain, "plain' cannot be read")
    assert not (tmp_path / "out").exists()
