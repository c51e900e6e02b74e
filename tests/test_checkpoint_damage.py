"""A damaged checkpoint never loads: whatever is missing, left over, cut short or out of range is one line."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from coded import Edit, coded, edited, logits
from forerun.compress import checkpoint, layout, prune
from forerun.types import UserError
from models import MIXTURES

DOWN = "model.layers.0.mlp.down_proj"


def drop(*keys: str) -> Edit:
    return lambda tensors, _: [tensors.pop(key) for key in keys]


def put(key: str, change: Callable[[Tensor], Tensor]) -> Edit:
    return lambda tensors, _: tensors.update({key: change(tensors[key])})


def at(index: object, value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


DAMAGE = [
    (drop(f"{DOWN}.scales"), "down_proj.scales is missing"),
    (drop(f"{DOWN}.qzeros"), "down_proj.qzeros is missing"),
    (drop(f"{DOWN}.qweight"), "down_proj.qweight is missing"),
    (drop("model.norm.weight"), "model.norm.weight is missing"),
    (drop("lm_head.weight"), "lm_head.weight is missing"),
    (drop("model.layers.1.self_attn.q_proj.bias"), "q_proj.bias is missing"),
    (drop(*(f"model.layers.1.mlp.up_proj.{part}" for part in layout.PARTS)), "up_proj.weight is missing"),
    (drop(f"{DOWN}.keep_inputs"), "disagree on whether it is pruned"),
    (put(f"{DOWN}.qweight", lambda t: t[:-1]), r"down_proj.qweight is int32 \[3, 32\], not int32 \[4, 32\]"),
    (put(f"{DOWN}.qweight", lambda t: t.float()), r"down_proj.qweight is float32"),
    (put(f"{DOWN}.scales", lambda t: t[:, :-1]), r"down_proj.scales is float16 \[1, 31\]"),
    (put(f"{DOWN}.scales", at((0, 3), float("nan"))), "down_proj.scales has values"),
    (put(f"{DOWN}.qzeros", lambda t: t[:, 1:]), "down_proj.qzeros"),
    (put(f"{DOWN}.g_idx", at(5, 1)), "down_proj.g_idx names groups beyond"),
    (put(f"{DOWN}.g_idx", at(5, -1)), "down_proj.g_idx names groups beyond"),
    (put(f"{DOWN}.keep_inputs", at(0, 64)), "keep_inputs does not name 32 different ones of 64 inputs"),
    (put(f"{DOWN}.keep_inputs", at(0, -1)), "keep_inputs does not name"),
    (put(f"{DOWN}.keep_inputs", at(0, 5)), "keep_inputs does not name"),
    (put(f"{DOWN}.keep_inputs", lambda t: t[:-1]), "keep_inputs is int32"),
    (put("model.embed_tokens.weight", lambda t: t[:-1]), r"embed_tokens.weight is \[96, 32\], not \[97, 32\]"),
    (
        lambda t, _: t.update({"model.layers.7.mlp.up_proj.weight": torch.ones(2)}),
        "layers.7.mlp.up_proj.weight is in the files",
    ),
    (lambda t, _: t.update({f"{DOWN}.weight": torch.ones(32, 64)}), "down_proj.weight is in the files"),
    (lambda t, _: t.update({f"{DOWN}.bias": torch.ones(32)}), "down_proj.bias is not zero"),
    (lambda _, config: config.pop("quantization_config"), "does not say how"),
    (lambda _, config: config["forerun"].pop("pruned"), "disagree on whether it is pruned"),
    (lambda _, config: config["quantization_config"].update(bits=8), "down_proj.qweight|qweight is int32"),
    (lambda _, config: config.update(hidden_size=64), "is"),
    (lambda _, config: config["quantization_config"].update(group_size=None), "group_size is None"),
    (lambda _, config: config["quantization_config"].update(group_size="many"), "group_size is 'many'"),
]


@pytest.mark.parametrize(("edit", "said"), DAMAGE, ids=[said[:40] for _, said in DAMAGE])
def test_a_damaged_checkpoint_never_loads(edit: Edit, said: str, tmp_path: Path) -> None:
    model = coded("qwen2")
    layer = model.model.layers[0].mlp
    layer.down_proj = prune.prune_inputs(layer.down_proj, torch.arange(0, 32))
    checkpoint.save(model, None, tmp_path / "one")
    assert torch.equal(logits(checkpoint.load(tmp_path / "one")), logits(model))
    with pytest.raises(UserError, match=said) as caught:
        checkpoint.load(edited(tmp_path / "one", edit))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "one") in str(caught.value)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_beside_coded_layers_never_load(name: str, tmp_path: Path) -> None:
    """transformers stores them apart and holds them together, and its way back takes tensors, not codes."""
    checkpoint.save(coded(name), None, tmp_path / "one")
    with pytest.raises(UserError, match="stores its tensors merged") as caught:
        checkpoint.load(tmp_path / "one")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 4, 100, -1000, -1])
def test_a_file_cut_short_never_loads(keep: int, tmp_path: Path) -> None:
    checkpoint.save(coded(), None, tmp_path / "one")
    path = tmp_path / "one" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match="write it again"):
        checkpoint.load(tmp_path / "one")


def test_missing_and_doubled_files_never_load(tmp_path: Path) -> None:
    checkpoint.save(coded(), None, tmp_path / "one", max_shard_size="20KB")
    folder, index = tmp_path / "one", tmp_path / "one" / "model.safetensors.index.json"
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    told = index.read_text()
    whole = first.read_bytes()
    first.unlink()
    with pytest.raises(UserError, match="00001"):
        checkpoint.load(folder)
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match=r"is in .*00001.* and in .*00002"):
        checkpoint.load(folder)
    first.write_bytes(whole)
    less = json.loads(told)
    name = next(iter(less["weight_map"]))
    del less["weight_map"][name]
    index.write_text(json.dumps(less))
    with pytest.raises(UserError, match="not in the index"):
        checkpoint.load(folder)
    index.write_text(told[:-20])
    with pytest.raises(UserError, match="write it again"):
        checkpoint.load(folder)
    index.unlink()
    with pytest.raises(UserError, match="no model"):
        checkpoint.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        checkpoint.load(folder)
