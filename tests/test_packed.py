"""Packed layers equal plain ones, whatever the order of calls; packed models decode the same tokens."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import models
from forerun.attention import GROUPED, register
from forerun.packed import Part, Prepacked, Shared, pack, weight_bytes
from forerun.packed.prepacked import can_prepack

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1.6e-2}


class Parent(nn.Module):
    """Projections named as in transformers' attention."""

    def __init__(self, dtype: torch.dtype, bias: bool, hidden: int = 40) -> None:
        super().__init__()
        self.q_proj = nn.Linear(hidden, 56, bias=bias, dtype=dtype)
        self.k_proj = nn.Linear(hidden, 24, bias=False, dtype=dtype)
        self.v_proj = nn.Linear(hidden, 7, bias=bias, dtype=dtype)
        self.o_proj = nn.Linear(hidden, 33, bias=bias, dtype=dtype)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 4, 64])
@torch.inference_mode()
def test_products_equal_plain_ones(dtype, bias, tokens):
    torch.manual_seed(0)
    plain = Parent(dtype, bias)
    packed = copy.deepcopy(plain)
    assert pack(packed) == (4 if can_prepack(plain.o_proj.weight) else 3)
    states = torch.randn(2 if tokens > 1 else 1, tokens, 40, dtype=dtype)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        layer = getattr(plain, name)
        assert error(getattr(packed, name)(states), functional.linear(states, layer.weight, layer.bias)) < TOLERANCE[dtype]
        assert torch.equal(getattr(packed, name).weight, layer.weight)


@pytest.mark.parametrize("inference", [False, True])
def test_any_order_of_calls_and_inputs(inference):
    torch.manual_seed(1)
    plain = Parent(torch.float64, bias=True).requires_grad_(False)
    packed = copy.deepcopy(plain)
    pack(packed)
    calls = ["q0", "k0", "v0", "v1", "q1", "q1", "q0", "k1", "v0", "q0", "k0", "v0", "k1"]
    with torch.inference_mode(inference):
        inputs = torch.randn(2, 1, 3, 40, dtype=torch.float64).unbind()
        for name, which in calls:
            actual = getattr(packed, f"{name}_proj")(inputs[int(which)])
            assert error(actual, getattr(plain, f"{name}_proj")(inputs[int(which)])) < 1e-12


def test_an_input_overwritten_between_siblings_is_noticed():
    plain = Parent(torch.float64, bias=False).requires_grad_(False)
    packed = copy.deepcopy(plain)
    pack(packed)
    states = torch.randn(1, 2, 40, dtype=torch.float64)
    packed.q_proj(states)
    states.mul_(-3)
    assert error(packed.k_proj(states), plain.k_proj(states)) < 1e-12


@torch.inference_mode()
def test_one_product_serves_the_siblings_and_nothing_outlives_the_pass():
    packed = Parent(torch.float32, bias=False)
    pack(packed)
    shared = packed.q_proj.shared
    products = []
    shared.product.register_forward_hook(lambda *_: products.append(1))
    states = torch.randn(1, 2, 40)
    for layer in (packed.k_proj, packed.q_proj, packed.v_proj):
        layer(states)
    assert len(products) == 1
    assert shared.memo.source is None and shared.memo.parts == [None] * 3


def test_packing_twice_changes_nothing_and_others_are_left_alone():
    class Special(nn.Linear):
        pass

    parent = Parent(torch.float32, bias=False)
    parent.special, parent.other = Special(4, 4), nn.Linear(4, 4, dtype=torch.float16)
    parent.hooked = nn.Linear(4, 4)
    parent.hooked.register_forward_hook(lambda *_: None)
    assert pack(parent) == 4
    before = dict(parent.named_modules())
    assert pack(parent) == 0
    assert dict(parent.named_modules()) == before
    assert [type(getattr(parent, name)) for name in ("special", "other", "hooked")] == [Special, nn.Linear, nn.Linear]
    assert isinstance(parent.o_proj, Prepacked) and isinstance(parent.q_proj, Part)


def test_training_a_packed_layer_is_refused():
    layer = Prepacked(nn.Linear(8, 8))
    with pytest.raises(RuntimeError, match="train the model first"):
        layer(torch.randn(2, 8, requires_grad=True))


@pytest.mark.parametrize("name", models.BUILDERS)
@pytest.mark.parametrize("grouped", [False, True], ids=["sdpa", "grouped"])
def test_packed_models_generate_the_same_tokens(name, grouped):
    torch.manual_seed(2)
    model = models.BUILDERS[name]().eval().requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(4)
    prompt = torch.randint(0, models.VOCABULARY, (1, 9))
    settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(prompt)}
    expected = model.generate(prompt, **settings)
    assert pack(model) > 0
    if grouped and model.config._attn_implementation == "sdpa":
        register()
        model.set_attn_implementation(GROUPED)
    assert torch.equal(model.generate(prompt, **settings), expected)


@pytest.mark.parametrize("nodes", [1, 5])
@pytest.mark.parametrize("additive", [False, True])
@torch.inference_mode()
def test_grouped_attention_equals_the_repeated_one(nodes, additive):
    torch.manual_seed(3)
    register()
    model = models.BUILDERS["llama"]().eval().double()
    mask = torch.rand(2, 1, nodes, nodes) < 0.5
    mask |= torch.eye(nodes, dtype=torch.bool)
    if additive:
        mask = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))
    tokens = torch.randint(0, models.VOCABULARY, (2, nodes))
    expected = model(tokens, attention_mask=mask, use_cache=False).logits
    model.set_attn_implementation(GROUPED)
    assert error(model(tokens, attention_mask=mask, use_cache=False).logits, expected) < 1e-12


def test_weight_bytes_counts_packed_weights_once():
    model = models.BUILDERS["llama"](tie_word_embeddings=True).eval().to(torch.bfloat16)
    if not can_prepack(model.get_output_embeddings().weight):
        pytest.skip("this machine has no bfloat16 products")
    plain = weight_bytes(model)
    head = model.get_output_embeddings().weight.nbytes
    pack(model)
    assert isinstance(model.get_output_embeddings(), Prepacked)
    assert weight_bytes(model) == plain + head  # the tied head's own copy


@torch.inference_mode()
def test_a_packed_model_is_traced_without_a_break():
    torch.manual_seed(4)
    model = models.BUILDERS["llama"]().eval()
    pack(model)
    shared = [module for module in model.modules() if isinstance(module, Shared)]
    tokens = torch.randint(0, models.VOCABULARY, (1, 3))
    forward = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager")
    assert error(forward(tokens), model(tokens, use_cache=False).logits) < 1e-6
    assert all(module.memo.source is None for module in shared)
