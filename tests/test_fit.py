"""What recipes cannot take is said from sizes alone, before any text is read or weight is changed."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from compressing import ACTIVATION, CALIBRATION, GPTQ, HEADS, INPUT, MLP, OUTPUT, RTN, SIZES, config, logits, mute, opened
from forerun.compress import apply, fit, rounding
from forerun.compress.calibrate import linears
from forerun.compress.recipes import Units, units_for
from forerun.compress.run import compress
from forerun.config import RecipeConfig
from forerun.packed.codes import CodedLinear
from forerun.types import UserError
from models import MIXTURES, tiny

WIDE = {"hidden_size": 128, "intermediate_size": 192}


def recipes(*given: dict[str, object]) -> list[RecipeConfig]:
    return list(config(Path(), *given).recipes)


def fresh(name: str = "llama", **sizes: object) -> PreTrainedModel:
    return copy.deepcopy(tiny(name, dtype=torch.float32, **SIZES | sizes))


@pytest.mark.parametrize("recipe", [RTN, GPTQ, INPUT, OUTPUT | ACTIVATION, MLP], ids=lambda r: r.get("what", r["kind"]))
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_in_one_tensor_are_refused(name: str, recipe: dict[str, object], tmp_path: Path) -> None:
    fresh(name).save_pretrained(tmp_path / "model")
    for given in ([recipe], [HEADS, recipe]):
        with pytest.raises(UserError, match=r"layers\.0\.mlp\.experts\.gate_up_proj \[4, .*no linear.*dense model") as caught:
            fit.refuse_unfit(fresh(name), recipes(*given))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no linear layer"):
        compress(config(tmp_path, recipe), tmp_path / "out", mute)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("name", MIXTURES)
def test_heads_of_a_mixture_can_go(name: str, tmp_path: Path) -> None:
    fresh(name).save_pretrained(tmp_path / "model")
    report = compress(config(tmp_path, HEADS | ACTIVATION), tmp_path / "out", mute)
    assert [(row.kept, row.total) for row in report.rows] == [(1, 2), (1, 2)]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(opened(tmp_path / "out")), logits(plain), rtol=0, atol=1e-6)


def test_small_matrices_beside_linear_layers_are_let_pass() -> None:
    """Such as a router, a short convolution or an embedding of places."""
    model = fresh()
    for layer in model.model.layers:
        layer.mlp.router = nn.Parameter(torch.zeros(8, 64))
        layer.mlp.places = nn.Embedding(4096, 64)
    fit.refuse_unfit(model, recipes(RTN))
    model.model.layers[1].mlp.experts = nn.Parameter(torch.zeros(4, 64, 64))
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts \[4, 64, 64\]"):
        fit.refuse_unfit(model, recipes(RTN))


MISFITS = [
    (WIDE, [GPTQ | {"group_size": 128}], r"layers\.0\.mlp\.down_proj has 192 inputs, which group_size=128 does not divide"),
    (WIDE, [RTN | {"group_size": 128}], "has 192 inputs"),
    (WIDE, [HEADS, GPTQ | {"group_size": 128}], "has 64 inputs"),
    (WIDE, [INPUT | {"fraction": 0.0}, GPTQ | {"group_size": 128}], r"down_proj has 128|down_proj has 192"),
    ({"intermediate_size": 132}, [GPTQ | {"group_size": -1}], r"gate_proj: \[132, 64\] does not fit .* multiples of 8"),
    ({"intermediate_size": 130}, [GPTQ | {"group_size": -1, "bits": 8}], r"\[130, 64\] does not fit .* multiples of 4"),
    ({"num_key_value_heads": 4}, [HEADS | {"fraction": 0.1}, GPTQ], "KV heads 1, 2 can stay"),
]


@pytest.mark.parametrize(("sizes", "given", "said"), MISFITS)
def test_a_shape_that_does_not_fit_is_refused(sizes: dict[str, int], given: list[dict[str, object]], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        fit.refuse_unfit(fresh(**sizes), recipes(*given))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("sizes", "given", "said"), MISFITS)
def test_nothing_is_read_or_written_before_the_refusal(
    sizes: dict[str, int], given: list[dict[str, object]], said: str, tmp_path: Path
) -> None:
    fresh(**sizes).save_pretrained(tmp_path / "model")
    told: list[object] = []
    with pytest.raises(UserError, match=said):
        compress(config(tmp_path, *given), tmp_path / "out", lambda *words: told.append(words))
    assert told == []
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


FITTING = [
    [MLP, GPTQ],
    [INPUT, GPTQ],
    [HEADS, MLP | {"fraction": 0.4}, INPUT | {"fraction": 0.4}, OUTPUT, RTN],
    [MLP, MLP, OUTPUT],
    [HEADS, HEADS],
    [INPUT | {"fraction": 0.1}],
]


@pytest.mark.parametrize("given", FITTING, ids=lambda given: " ".join(each.get("what", each["kind"]) for each in given))
@pytest.mark.parametrize("name", ["llama", "phi3", "qwen3"])
def test_sizes_are_foreseen_as_they_become(name: str, given: list[dict[str, object]]) -> None:
    """Each pruning leaves the layers of the sizes that were known before any was carried out."""
    model = fresh(name, num_attention_heads=8, num_key_value_heads=8, intermediate_size=192)
    started, settings = copy.deepcopy(model), copy.deepcopy(model.config)
    sizes = {name: (layer.out_features, layer.in_features) for name, layer in linears(model).items()}
    listed = recipes(*given)
    fit.refuse_unfit(model, listed)
    for index, recipe in enumerate(listed):
        later = listed[index + 1 :]
        if recipe.kind != "prune":
            break
        apply.prune_model(apply.Task(index, model, None, units_for(later), mute), recipe)
        sizes |= fit.pruned(started, settings, sizes, recipe, later)
        found = {name.replace(".inner", ""): (made.out_features, made.in_features) for name, made in linears(model).items()}
        assert found == sizes


def test_pruning_may_make_a_group_size_fit(tmp_path: Path) -> None:
    """192 channels are no multiple of 128; the 128 that stay are."""
    fresh(**WIDE).save_pretrained(tmp_path / "model")
    report = compress(config(tmp_path, MLP, GPTQ | {"group_size": 128}), tmp_path / "out", mute)
    assert report.rows[0].kept == 128


@pytest.mark.parametrize(("sizes", "given"), [(sizes, given) for sizes, given, _ in MISFITS[:5] if len(given) == 1])
def test_nothing_is_quantized_before_the_refusal(sizes: dict[str, int], given: list[dict[str, object]]) -> None:
    model, told = fresh(**sizes), []
    task = apply.Task(0, model, torch.zeros(1, 8, dtype=torch.long), Units(), lambda *said: told.append(said))
    [recipe] = recipes(*given)
    with pytest.raises(UserError):
        apply.quantize(task, recipe) if recipe.kind == "gptq" else apply.round_to_nearest(task, recipe)
    assert told == []
    assert not any(isinstance(module, CodedLinear) for module in model.modules())


def with_spare() -> PreTrainedModel:
    """A layer that no text reaches, as an expert that is never routed to."""
    model = fresh()
    model.model.layers[1].mlp.spare = nn.Linear(64, 64)
    return model.requires_grad_(False)


TEXTS = torch.randint(97, (CALIBRATION["samples"], CALIBRATION["length"]), generator=torch.Generator().manual_seed(1))
SPARE = "model.layers.1.mlp.spare"


def test_a_layer_that_no_text_reaches_is_rounded_and_its_row_says_so() -> None:
    model = with_spare()
    expected = rounding.quantize(model.get_submodule(SPARE).weight, 4, 32)
    rows = apply.quantize(apply.Task(0, model, TEXTS, Units(), mute), recipes(GPTQ)[0])
    layer = model.get_submodule(SPARE)
    assert isinstance(layer, CodedLinear)
    assert torch.equal(layer.codes().codes_NK, expected.codes_NK)
    told = {row.layer: (row.did, row.of) for row in rows}
    assert told.pop(SPARE) == ("rtn 4 bit g32", "weights")
    assert set(told.values()) == {("gptq 4 bit g32", "outputs")}
    assert len(told) == 14
    assert all(row.error is not None and 0 < row.error < 1 for row in rows)


@pytest.mark.parametrize("recipe", [INPUT, OUTPUT])
def test_a_layer_that_no_text_reaches_is_pruned_by_its_weights(recipe: dict[str, object]) -> None:
    model = with_spare()
    rows = apply.prune_single(apply.Task(0, model, TEXTS, Units(), mute), recipes(recipe | ACTIVATION)[0])
    assert {row.of for row in rows if row.layer != SPARE} == {"outputs"}
    [spare] = [row for row in rows if row.layer == SPARE]
    assert (spare.kept, spare.of) == (48, "weights")
    assert spare.error is not None and 0 < spare.error < 1
