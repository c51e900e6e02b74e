"""What the reader and writer of public layouts refuse, in one line that names the fault."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from forerun.heads import EagleShape, Medusa, MedusaShape, MLPShape, MLPSpeculator, formats, store
from forerun.types import UserError
from models import tiny
from published import (
    HEADS,
    HIDDEN,
    IDS,
    KEYS,
    LAYERS,
    LLAMA,
    MADE,
    SIZE,
    SPOKEN,
    VOCABULARY,
    WIDE,
    Folder,
    draw,
    eagle1,
    eagle3,
    mlp,
    read,
    run,
    speculators3,
)  # fmt: skip

every_layout = pytest.mark.parametrize("name", MADE)


@every_layout
def test_every_missing_and_every_strange_tensor_is_named(name: str, tmp_path: Path) -> None:
    made = MADE[name]()
    needed = {key for key in made.tensors if not key.startswith("base_model.")} - set(made.optional)
    for count, key in enumerate(sorted(needed)):
        rest = {other: tensor for other, tensor in made.tensors.items() if other != key}
        path = replace(made, tensors=rest).at(tmp_path / str(count))
        with pytest.raises(UserError, match=rf"lacks .*{key.removeprefix('medusa_head.')}"):
            read(path)
    strange = ("medusa_head." if "beside" in name else "") + "strange.bias"
    path = replace(made, tensors=made.tensors | {strange: draw(1)}).at(tmp_path / "strange")
    with pytest.raises(UserError, match=r"holds unknown strange\.bias"):
        read(path)


@every_layout
def test_a_misshapen_tensor_is_named(name: str, tmp_path: Path) -> None:
    made = MADE[name]()
    key = [key for key in made.tensors if key.endswith("weight") and not key.startswith(("base", "embed"))][-1]
    path = replace(made, tensors=made.tensors | {key: draw(3, 5, 2)}).at(tmp_path / "head")
    with pytest.raises(UserError, match=rf"{key.removeprefix('medusa_head.')} has shape \[3, 5, 2\]"):
        read(path)


@every_layout
def test_a_head_that_holds_nan_is_refused(name: str, tmp_path: Path) -> None:
    made = MADE[name]()
    key = next(iter(made.tensors))
    path = replace(made, tensors=made.tensors | {key: torch.full_like(made.tensors[key], float("nan"))}).at(tmp_path / "head")
    with pytest.raises(UserError, match=rf"NaN in {key.removeprefix('medusa_head.')}"):
        read(path)


@every_layout
def test_a_head_for_another_target_is_refused(name: str, tmp_path: Path) -> None:
    path = MADE[name]().at(tmp_path / "head")
    with pytest.raises(UserError, match=rf"is for hidden size {HIDDEN}, the target has 384"):
        formats.read(path, 384, VOCABULARY, LAYERS)
    with pytest.raises(UserError, match=rf"is for a vocabulary of size {VOCABULARY}, the target has 97"):
        formats.read(path, HIDDEN, 97, LAYERS)
    other = tiny("llama", num_hidden_layers=LAYERS).config
    store.save(read(path), tmp_path / "own")
    for folder in (path, tmp_path / "own"):
        with pytest.raises(UserError, match=rf"is for hidden size {HIDDEN}, the target has {other.hidden_size}"):
            store.load(folder, target=other)


@pytest.mark.parametrize(
    "shape",
    [
        MedusaShape(HIDDEN, VOCABULARY),
        MLPShape(HIDDEN, VOCABULARY),
        EagleShape(HIDDEN, VOCABULARY, WIDE, HEADS, KEYS, SIZE, version=1, qkv_bias=True),
        EagleShape(HIDDEN, VOCABULARY, WIDE, HEADS, KEYS, SIZE, features=(1, 2, 3)),
    ],
    ids=["medusa", "mlp", "eagle", "eagle3"],
)
def test_a_tensor_that_is_never_filled_is_loud(shape: store.Shape) -> None:
    head = store.build(shape)
    assert all(parameter.isnan().all() for parameter in head.parameters())
    assert all(output.isnan().all() for output in outputs_of(head))
    for name, parameter in head.named_parameters():
        if any(part in name for part in ("q_proj", "k_proj")):
            continue  # torch's attention on the CPU makes zeros of scores that are NaN; names and values are checked for that
        for other in head.parameters():
            torch.nn.init.constant_(other, 0.1)
        torch.nn.init.constant_(parameter, float("nan"))
        assert any(output.isnan().any() for output in outputs_of(head)), name


def outputs_of(head: store.Head) -> list[Tensor]:
    hidden = torch.ones(3, HIDDEN)
    if isinstance(head, Medusa):
        return [head(hidden)]
    if isinstance(head, MLPSpeculator):
        state, outputs = head.first(hidden), []
        for step in range(head.shape.heads):
            state, logits = head.step(step, state, torch.tensor([0, 1, 2]))
            outputs.append(logits)
        return outputs
    states = run(head, hidden, hidden.repeat(1, len(head.shape.features)))
    return [states if head.shape.version == 1 else head.logits(states, torch.nn.Identity())]


def test_only_its_target_can_say_which_layers_a_head_reads(tmp_path: Path) -> None:
    path = eagle3().at(tmp_path / "head")
    with pytest.raises(UserError, match="does not say which of its target's layers it reads"):
        store.load(path)
    assert formats.read(path, target_layers=32).shape.features == (2, 16, 29)
    deep = eagle3(eagle_config={IDS: [1, 5, 11]}).at(tmp_path / "deep")
    assert formats.read(deep).shape.features == (2, 6, 12)
    with pytest.raises(UserError, match=r"hidden states \(2, 6, 12\) of a target with 12 layers"):
        formats.read(deep, target_layers=12)  # what leaves the last layer is to be had after the last norm alone


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_output": True}, "norm_output"),
        ({"eagle_config": {"norm_before_fc": True}}, "norm_before_fc"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
        ({"embed_requires_grad": True}, "embed_requires_grad"),
        ({"target_hidden_size": 4096}, "target's 4096"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu"),
        ({"num_attention_heads": None}, "config.json: "),
        ({"num_attention_heads": 3}, "config.json: "),
    ],
)
def test_variants_that_are_not_computed_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(eagle3(**change).at(tmp_path / "head"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"speculators_model_type": "dflash"}, "speculators_model_type=dflash"),
        ({"transformer_layer_config": LLAMA | {"model_type": "qwen3"}}, "model_type=qwen3"),
        ({"layernorms": True}, "layernorms"),
    ],
)
def test_speculators_of_other_kinds_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    made = speculators3()
    with pytest.raises(UserError, match=message):
        read(replace(made, settings=made.settings | change).at(tmp_path / "head"))


def test_a_missing_setting_is_named(tmp_path: Path) -> None:
    made = speculators3()
    settings = {key: value for key, value in made.settings.items() if key != "norm_before_residual"}
    with pytest.raises(UserError, match=r"config\.json lacks norm_before_residual"):
        read(replace(made, settings=settings).at(tmp_path / "head"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: {"d2t": tensors["d2t"] + VOCABULARY}, "does not give each token"),
        (lambda tensors: {"d2t": -torch.arange(SPOKEN)}, "does not give each token"),
        (lambda tensors: {"t2d": ~tensors["t2d"]}, "disagree"),
        (lambda tensors: {"d2t": tensors["d2t"][1:]}, "d2t has shape"),
        (lambda tensors: {"embed_tokens.weight": torch.zeros(5, HIDDEN)}, "embed_tokens.weight has shape"),
        (lambda tensors: {"norm.weight": torch.zeros(HIDDEN, dtype=torch.int8)}, "torch.int8"),
    ],
)
def test_tensors_that_cannot_be_are_refused(change: Callable[..., dict[str, Tensor]], message: str, tmp_path: Path) -> None:
    made = eagle3()
    path = replace(made, tensors=made.tensors | change(made.tensors)).at(tmp_path / "head")
    with pytest.raises(UserError, match=message):
        read(path)


class Trap:
    """What a pickle may do when it is opened carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_can_hold_tensors_alone(tmp_path: Path) -> None:
    made = eagle1()
    path = made.at(tmp_path / "head")
    torch.save(made.tensors | {"trap": Trap(tmp_path / "sprung")}, path / made.file)
    with pytest.raises(UserError, match="UnpicklingError"):
        read(path)
    (path / made.file).write_bytes(b"not a pickle")
    with pytest.raises(UserError, match="fetch the folder anew"):
        read(path)
    torch.save([draw(3)], path / made.file)
    with pytest.raises(UserError, match="not a dict of tensors"):
        read(path)
    assert not (tmp_path / "sprung").exists()


def test_a_folder_of_no_known_layout_is_refused(tmp_path: Path) -> None:
    path = Folder("", {"model_type": "bert"}, {"pooler.weight": draw(3)}).at(tmp_path / "head")
    with pytest.raises(UserError, match="no layout that forerun reads"):
        store.load(path)
    (path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="fetch the folder anew"):
        store.load(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"needs config\.json and one of"):
        store.load(path)


def test_what_a_layout_cannot_say_is_refused(tmp_path: Path) -> None:
    head = read(speculators3().at(tmp_path / "one"))
    with pytest.raises(UserError, match="layout=eagle3 has no norm_before_residual"):
        formats.write(head, tmp_path / "out", "eagle3")
    with pytest.raises(UserError, match="choose one of eagle3, speculators"):
        formats.write(head, tmp_path / "out", "medusa")
    with pytest.raises(UserError, match="layout=speculators has no bias"):
        formats.write(read(eagle1(qkv_bias=True).at(tmp_path / "two")), tmp_path / "out", "speculators")
    with pytest.raises(UserError, match="features="):
        formats.write(store.build(replace(head.shape, features=(2, 4, -1))), tmp_path / "out", "speculators")
    assert not (tmp_path / "out").exists()


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (read(mlp().at(tmp_path / name)) for name in ("one", "two"))
    formats.write(one, tmp_path / "out", "mlp")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(store, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        formats.write(two, tmp_path / "out", "mlp")
    again = formats.read(tmp_path / "out")
    assert all(torch.equal(tensor, again.state_dict()[key]) for key, tensor in one.state_dict().items())
