"""Compressed checkpoints: written and read back exactly, and others' layouts read."""

import copy
import filecmp
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, GenerationConfig

from coded import Edit, coded, edited, logits, pruned
from forerun.compress import checkpoint, layout, prune, rounding
from forerun.packed.codes import CodedLinear, Codes
from forerun.types import UserError
from models import BUILDERS, tiny

ARCHITECTURES = [name for name in BUILDERS if name != "gpt2"]


def same_files(one: Path, other: Path) -> bool:
    names = sorted(path.name for path in one.iterdir())
    return names == sorted(path.name for path in other.iterdir()) and not any(
        filecmp.cmpfiles(one, other, names, shallow=False)[1:]
    )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_comes_back_exactly_and_is_saved_as_the_same_files(name: str, tmp_path: Path) -> None:
    model = coded(name)
    checkpoint.save(model, None, tmp_path / "one")
    loaded = checkpoint.load(tmp_path / "one", attention=model.config._attn_implementation)
    assert torch.equal(logits(loaded), logits(model))
    checkpoint.save(loaded, None, tmp_path / "two")
    assert same_files(tmp_path / "one", tmp_path / "two")
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in [*loaded.parameters(), *loaded.buffers()])
    checkpoint.save(checkpoint.load(tmp_path / "two"), None, tmp_path / "three")
    assert same_files(tmp_path / "one", tmp_path / "three")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (4, -1), (8, 32), (8, -1)])
def test_the_layout_is_the_standard_one(bits: int, group_size: int, symmetric: bool, tmp_path: Path) -> None:
    model = coded(bits=bits, group_size=group_size, symmetric=symmetric)
    layer = model.model.layers[1].mlp.down_proj
    checkpoint.save(model, None, tmp_path / "one", {"recipes": ["gptq"]})
    told = json.loads((tmp_path / "one" / "config.json").read_text())
    settings = told["quantization_config"]
    assert told["forerun"] == {"recipes": ["gptq"]}
    assert (settings["quant_method"], settings["bits"], settings["group_size"]) == ("gptq", bits, group_size)
    assert (settings["sym"], settings["desc_act"], settings["lm_head"]) == (symmetric, False, False)
    assert settings["checkpoint_format"] == ("gptq" if symmetric else "gptq_v2")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    parts = {part: tensors[f"model.layers.1.mlp.down_proj.{part}"] for part in layout.PARTS}
    assert not any(key.endswith(("_proj.weight", ".packed", ".scales_NG")) for key in tensors)
    # Read with the plainest arithmetic there is: word by word, code by code.
    codes, groups, most = layer.codes(), 1 if group_size == -1 else 2, 2**bits - 1
    assert {part: (tensor.dtype, tuple(tensor.shape)) for part, tensor in parts.items()} == {
        "qweight": (torch.int32, (64 * bits // 32, 32)),
        "qzeros": (torch.int32, (groups, 32 * bits // 32)),
        "scales": (torch.float16, (groups, 32)),
        "g_idx": (torch.int32, (64,)),
    }
    for k in range(64):
        group = int(parts["g_idx"][k])
        assert group == (0 if group_size == -1 else k // group_size)
        for n in range(32):
            code = int(parts["qweight"][k * bits // 32, n]) >> (k % (32 // bits)) * bits & most
            zero = (int(parts["qzeros"][group, n * bits // 32]) >> (n % (32 // bits)) * bits & most) + (1 if symmetric else 0)
            assert code == int(codes.codes_NK[n, k])
            assert zero == int(codes.zeros_NG[n, group])
    assert torch.equal(logits(checkpoint.load(tmp_path / "one")), logits(model))


@pytest.mark.parametrize("quantized", [True, False])
def test_pruned_layers_come_back_exactly(quantized: bool, tmp_path: Path) -> None:
    model = pruned(coded(bits=8, group_size=-1) if quantized else copy.deepcopy(tiny("llama", dtype=torch.float32)))
    checkpoint.save(model, None, tmp_path / "one")
    assert checkpoint.is_coded(tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    assert tensors["model.layers.0.mlp.down_proj.keep_inputs"].tolist() == list(range(32, 64))
    assert not any("inner" in key for key in tensors)
    told = json.loads((tmp_path / "one" / "config.json").read_text())
    assert told["forerun"]["pruned"]["model.layers.0.mlp.gate_proj"] == [["inputs", 32, 32], ["outputs", 32, 64]]
    assert ("quantization_config" in told) == quantized
    loaded = checkpoint.load(tmp_path / "one")
    assert torch.equal(logits(loaded), logits(model))
    checkpoint.save(loaded, None, tmp_path / "two")
    assert same_files(tmp_path / "one", tmp_path / "two")


def test_plain_models_are_transformers_folders(tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.float32)
    checkpoint.save(model, None, tmp_path / "one", {"recipes": ["prune mlp"]})
    assert not checkpoint.is_coded(tmp_path / "one")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "one")), logits(model))


@pytest.mark.parametrize("quantized", [True, False])
def test_large_models_lie_in_several_files(quantized: bool, tmp_path: Path) -> None:
    model = coded() if quantized else pruned(copy.deepcopy(tiny("llama", dtype=torch.float32)))
    checkpoint.save(model, None, tmp_path / "one", max_shard_size="20KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) >= 2
    assert torch.equal(logits(checkpoint.load(tmp_path / "one")), logits(model))


def test_a_tied_head_is_stored_once_and_tied_again(tmp_path: Path) -> None:
    model = coded(tie_word_embeddings=True)
    model.tie_weights()
    checkpoint.save(model, None, tmp_path / "one")
    tensors = load_file(tmp_path / "one" / "model.safetensors")
    assert "lm_head.weight" not in tensors
    loaded = checkpoint.load(tmp_path / "one")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(logits(loaded), logits(model))
    # Written twice it must be the same tensor twice.
    edited(tmp_path / "one", lambda t, _: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert torch.equal(logits(checkpoint.load(tmp_path / "one")), logits(model))
    edited(tmp_path / "one", lambda t, _: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    with pytest.raises(UserError, match="tied"):
        checkpoint.load(tmp_path / "one")


def test_groups_of_several_sizes_are_stored_as_the_smallest(tmp_path: Path) -> None:
    model = coded(group_size=-1)
    down = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = CodedLinear.of(rounding.quantize(down.weight, 4, 32))
    checkpoint.save(model, None, tmp_path / "one")
    loaded = checkpoint.load(tmp_path / "one")
    assert json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]["group_size"] == 32
    assert torch.equal(logits(loaded), logits(model))


def test_type_device_and_generation_config(tmp_path: Path) -> None:
    model = coded()
    model.generation_config = GenerationConfig(temperature=0.5, do_sample=True)
    checkpoint.save(model, None, tmp_path / "one")
    loaded = checkpoint.load(tmp_path / "one", dtype=torch.bfloat16)
    assert loaded.generation_config.temperature == 0.5
    assert loaded.dtype == loaded.lm_head.weight.dtype == torch.bfloat16
    assert loaded.model.layers[0].mlp.up_proj.scales.dtype == torch.float16
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    assert not loaded.training


class Sizes(TorchDispatchMode):
    """Notes the shapes of all floating tensors that are made in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and not out.is_meta:
            self.seen.add(tuple(out.shape))
        return out


def test_no_quantized_layer_is_ever_dense(tmp_path: Path) -> None:
    checkpoint.save(coded(intermediate_size=192), None, tmp_path / "one")
    with Sizes() as sizes:
        checkpoint.load(tmp_path / "one")
    dense = {(192, 32), (32, 192), (16, 32)}
    assert (97, 32) in sizes.seen, "the embedding is dense"
    assert not sizes.seen & (dense | {shape[::-1] for shape in dense})
    with Sizes() as sizes:
        logits(checkpoint.load(tmp_path / "one"))
    assert dense <= sizes.seen, "the mode would have seen them"


def test_a_model_that_transformers_read_from_gptq_is_not_written(tmp_path: Path) -> None:
    model = copy.deepcopy(tiny("llama", dtype=torch.float32))
    model.hf_quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="gptq"))
    with pytest.raises(UserError, match="copy its folder"):
        checkpoint.save(model, None, tmp_path / "one")


def test_nothing_is_left_where_saving_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = coded()

    def full(folder: Path, **_: object) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", lambda self, folder, **kw: full(folder, **kw))
    with pytest.raises(UserError, match=r"cannot be written.*No space left"):
        checkpoint.save(model, None, tmp_path / "one")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "mine.txt").write_text("precious")
    with pytest.raises(UserError, match="there already"):
        checkpoint.save(model, None, tmp_path / "one")
    assert (tmp_path / "one" / "mine.txt").read_text() == "precious"


def test_what_has_no_layout_is_refused(tmp_path: Path) -> None:
    model = coded(bits=8, group_size=-1)
    q = model.model.layers[0].self_attn.q_proj
    model.model.layers[0].self_attn.q_proj = prune.prune_inputs(q, torch.arange(30))
    with pytest.raises(UserError, match=r"layers\.0\.self_attn\.q_proj: \[32, 30\] does not fit the GPTQ layout"):
        checkpoint.save(model, None, tmp_path / "one")
    model = coded()
    model.model.layers[0].self_attn.q_proj = CodedLinear.of(rounding.quantize(q.weight, 8, -1))
    with pytest.raises(UserError, match="4 and of 8 bits"):
        checkpoint.save(model, None, tmp_path / "one")


# What other libraries write.

LAYERS = [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "mlp.down_proj")]


def without_index(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    for key in [key for key in tensors if key.endswith("g_idx")]:
        del tensors[key]


def second_version(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    for key, tensor in tensors.items():
        if key.endswith("qzeros"):
            tensors[key] = tensor + 0x11111111
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"


def first_version_by_whole_words(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    for key, tensor in tensors.items():
        if key.endswith("qzeros"):
            tensors[key] = tensor - 0x11111111
    config["quantization_config"]["checkpoint_format"] = "gptq"


def with_zero_biases(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    for key in [key for key in tensors if key.endswith("qweight")]:
        tensors[key.replace("qweight", "bias")] = torch.zeros(tensors[key].shape[1], dtype=torch.float16)


def with_old_buffers(tensors: dict[str, Tensor], _: dict[str, Any]) -> None:
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)


@pytest.mark.parametrize(
    ("symmetric", "edit"),
    [
        (True, without_index),
        (True, second_version),
        (False, first_version_by_whole_words),
        (True, with_zero_biases),
        (True, with_old_buffers),
    ],
)
def test_other_writers_forms_are_read(symmetric: bool, edit: Edit, tmp_path: Path) -> None:
    model = coded(symmetric=symmetric)
    if not symmetric:  # where all weights of a group are positive, other writers make zero points of 0
        layer = model.model.layers[0].mlp.down_proj
        layer.zeros[3, 0] = layer.zeros[4, 1] = 0
    checkpoint.save(model, None, tmp_path / "one")
    assert torch.equal(logits(checkpoint.load(edited(tmp_path / "one", edit))), logits(model))


def test_a_checkpoint_of_autogptq_has_its_settings_beside(tmp_path: Path) -> None:
    model = coded()
    checkpoint.save(model, None, tmp_path / "one")
    folder = edited(tmp_path / "one", lambda _, config: config.pop("quantization_config"))
    (folder / "quantize_config.json").write_text(json.dumps({"bits": 4, "group_size": 32, "desc_act": False, "sym": True}))
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    assert checkpoint.is_coded(folder)
    assert torch.equal(logits(checkpoint.load(folder)), logits(model))


def test_groups_in_an_order_of_their_own_are_read_and_written(tmp_path: Path) -> None:
    model = coded()
    generator = torch.Generator().manual_seed(0)
    for _, layer in model.named_modules():
        if isinstance(layer, CodedLinear):
            layer.group = layer.codes().groups_K()[torch.randperm(layer.in_features, generator=generator)].int()
    checkpoint.save(model, None, tmp_path / "one")
    assert json.loads((tmp_path / "one" / "config.json").read_text())["quantization_config"]["desc_act"] is True
    loaded = checkpoint.load(tmp_path / "one")
    assert torch.equal(logits(loaded), logits(model))
    checkpoint.save(loaded, None, tmp_path / "two")
    assert same_files(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quant_method": "awq", "bits": 4}, "quantized by awq"),
        ({"quant_method": "compressed-tensors"}, "quantized by compressed-tensors"),
        ({"quant_method": "gptq", "bits": 3}, "3 bits"),
        ({"quant_method": "gptq", "bits": 2}, "2 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin"),
    ],
)
def test_other_quantizations_are_refused_in_a_sentence(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    checkpoint.save(coded(), None, tmp_path / "one")
    folder = edited(tmp_path / "one", lambda _, config: config.update(quantization_config=settings))
    assert checkpoint.is_coded(folder) == (settings["quant_method"] == "gptq")
    with pytest.raises(UserError, match=said):
        checkpoint.load(folder)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_hold_codes_in_order(bits: int) -> None:
    codes = torch.randint(2**bits, (64, 7), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for rows in (codes, codes[:, :1], codes.T.contiguous().T, codes[:, 1:2]):
        words = layout.pack(rows, bits)
        assert words.dtype == torch.int32
        assert torch.equal(layout.unpack(words, bits), rows)
    first = [int(code) for code in codes[: 32 // bits, 0]]
    assert int(layout.pack(codes, bits)[0, 0]) & 0xFFFFFFFF == sum(code << bits * i for i, code in enumerate(first))


def test_a_last_group_may_be_shorter() -> None:
    codes = Codes(torch.full((32, 48), 9, dtype=torch.uint8), torch.ones(32, 2).half(), torch.full((32, 2), 8).byte(), 4, 32)
    parts = {key.removeprefix("x."): tensor for key, tensor in layout.write("x", codes, 1).items()}
    back = layout.read("x", parts, (32, 48), 4, 32, 1)
    assert torch.equal(back.dequantize(torch.float32), torch.ones(32, 48))
    assert (back.group_size, back.group_K) == (32, None)
