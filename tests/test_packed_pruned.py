"""Pruned layers equal dense ones with zeros in place of what is gone; they hold less, plain and packed."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from forerun.packed import (
    CodedLinear,
    Int4Linear,
    Int8Linear,
    L1PrunedInputLinear,
    L1PrunedOutputLinear,
    Part,
    Prepacked,
    pack,
    weight_bytes,
)
from rounded import error, rounded

INPUTS, OUTPUTS = 256, 96
TOLERANCE = {16: 1e-6, 8: 0.03, 4: 2**-7}
KINDS = {16: Prepacked, 8: Int8Linear, 4: Int4Linear}
EIGHT = pytest.param(8, marks=pytest.mark.skipif(not Int8Linear.works(), reason="this machine has no 8-bit dot products"))


def half_of(count: int, seed: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: count // 2].sort()[0]


def inner(weight: torch.Tensor, bits: int, bias: bool) -> nn.Module:
    offsets = torch.randn(len(weight)) if bias else None
    if bits < 16:
        return CodedLinear.of(rounded(weight, bits, 32), offsets)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias).requires_grad_(False)
    layer.weight.copy_(weight)
    if bias:
        layer.bias.copy_(offsets)
    return layer


@pytest.mark.parametrize("bits", [4, EIGHT, 16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 5, 40])
@torch.inference_mode()
def test_fewer_inputs(bits, bias, rows):
    torch.manual_seed(0)
    keep = half_of(INPUTS, 1)
    layer = L1PrunedInputLinear(inner(torch.randn(OUTPUTS, len(keep)), bits, bias), keep, INPUTS)
    assert (layer.in_features, layer.out_features) == (INPUTS, OUTPUTS)
    gone = torch.ones(INPUTS, dtype=torch.bool).index_fill(0, keep, False)
    assert layer.weight[:, gone].eq(0).all()
    states = torch.randn(2, rows, INPUTS)
    expected = functional.linear(states, layer.weight, layer.inner.bias)
    assert error(layer(states), expected) < 1e-6
    parent = nn.Sequential(layer)
    assert pack(parent) == 1 and pack(parent) == 0
    assert isinstance(layer.inner, KINDS[bits])
    assert error(layer(states), expected) < TOLERANCE[bits]
    assert error(layer.weight, parent[0].weight) == 0
    assert layer.weight[:, gone].eq(0).all()


@pytest.mark.parametrize("bits", [4, EIGHT, 16])
@pytest.mark.parametrize("rows", [1, 5, 40])
@torch.inference_mode()
def test_fewer_outputs(bits, rows):
    torch.manual_seed(1)
    keep = half_of(OUTPUTS, 2)
    layer = L1PrunedOutputLinear(inner(torch.randn(len(keep), INPUTS), bits, False), keep, OUTPUTS)
    assert (layer.in_features, layer.out_features) == (INPUTS, OUTPUTS)
    states = torch.randn(2, rows, INPUTS)
    expected = functional.linear(states, layer.weight)
    gone = torch.ones(OUTPUTS, dtype=torch.bool).index_fill(0, keep, False)
    for _ in range(2):
        actual = layer(states)
        assert error(actual, expected) < TOLERANCE[bits]
        assert actual[..., gone].eq(0).all()
        pack(nn.Sequential(layer))
    assert isinstance(layer.inner, KINDS[bits])


@pytest.mark.parametrize("bits", [4, EIGHT, 16])
@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_the_layers_hold_less(bits, fraction):
    """At the same size of groups, with the index; only what is held for each output does not shrink."""
    kept = int(1024 * (1 - fraction)) // 32 * 32
    weight = torch.randn(512, 1024)
    whole, pruned = inner(weight, bits, False), inner(weight[:, :kept], bits, False)
    layers = nn.ModuleList([whole]), nn.ModuleList([L1PrunedInputLinear(pruned, torch.arange(kept), 1024)])
    for _ in range(2):
        before, after = (weight_bytes(layer) for layer in layers)
        assert after <= (1 - fraction) * before + 8 * kept + 4 * len(weight)
        for layer in layers:
            pack(layer)


class Parent(nn.Module):
    def __init__(self, keeps: list[torch.Tensor], bits: int) -> None:
        super().__init__()
        for name, keep in zip(("q_proj", "k_proj", "v_proj"), keeps, strict=True):
            layer = inner(torch.randn(16, len(keep)), bits, bias=name == "k_proj")
            setattr(self, name, L1PrunedInputLinear(layer, keep, INPUTS))

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(states) for layer in (self.q_proj, self.k_proj, self.v_proj)], -1)


@pytest.mark.parametrize("bits", [4, EIGHT, 16])
@torch.inference_mode()
def test_siblings_that_keep_the_same_inputs_share_one_product(bits):
    torch.manual_seed(2)
    keep = half_of(INPUTS, 3)
    parent = Parent([keep] * 3, bits)
    states = torch.randn(1, 3, INPUTS)
    expected = parent(states)
    key = parent.k_proj.weight
    assert pack(parent) == 3 and pack(parent) == 0
    assert isinstance(parent.q_proj, Part)
    product = parent.q_proj.shared.product
    assert isinstance(product, L1PrunedInputLinear) and isinstance(product.inner, KINDS[bits])
    assert error(parent(states), expected) < TOLERANCE[bits]
    assert error(parent.k_proj.weight, key) < TOLERANCE[bits]


@torch.inference_mode()
def test_siblings_that_keep_others_stay_apart():
    torch.manual_seed(3)
    parent = Parent([half_of(INPUTS, 3), half_of(INPUTS, 4), half_of(INPUTS, 3)], 16)
    states = torch.randn(1, 3, INPUTS)
    expected = parent(states)
    assert pack(parent) == 3
    assert isinstance(parent.q_proj, L1PrunedInputLinear)
    assert error(parent(states), expected) < 1e-6


def test_pruned_layers_survive_saving():
    torch.manual_seed(4)
    keep = half_of(INPUTS, 5)
    layer = L1PrunedInputLinear(CodedLinear.of(rounded(torch.randn(16, len(keep)), 4, 32)), keep, INPUTS)
    empty = L1PrunedInputLinear(CodedLinear(len(keep), 16, 4, 32), torch.zeros_like(keep), INPUTS)
    empty.load_state_dict(layer.state_dict())
    states = torch.randn(3, INPUTS)
    assert empty(states).equal(layer(states))
