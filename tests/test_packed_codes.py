"""Codes stand for the weights they say; kernels for 4 and 8 bits compute what codes stand for, whatever the shape."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

import models
from forerun.packed import CodedLinear, Codes, Int4Linear, Int8Linear, Part, pack, weight_bytes
from forerun.packed.codes import pack_nibbles, unpack_nibbles
from forerun.packed.int4 import FEW, MANY, CpuKernel, CudaKernel, Runs, cuda_unlay, tile_order
from forerun.packed.int8 import CudaInt8Linear
from rounded import error, rounded

SHAPES = [(16, 32), (50, 33), (7, 96), (64, 200), (130, 128), (96, 257), (1, 1)]
BF16 = 2**-8
EIGHT = pytest.mark.skipif(not Int8Linear.works(), reason="this machine has no 8-bit dot products")
BITS = [4, pytest.param(8, marks=EIGHT)]


@pytest.fixture(scope="module")
def kernel() -> CpuKernel:
    found = CpuKernel.found()
    if found is None:
        pytest.skip("this machine's 4-bit kernel is the reference loop")
    return found


def packed_layer(codes: Codes, bias: torch.Tensor | None = None) -> nn.Module:
    parent = nn.Sequential(CodedLinear.of(codes, bias))
    assert pack(parent) == 1
    return parent[0]


def coded_model(bits: int, group_size: int, name: str = "llama", **sizes: int) -> nn.Module:
    """A tiny model whose layers of the body are codes."""
    model = copy.deepcopy(models.tiny(name, dtype=torch.float32, **sizes))
    for parent in list(model.model.modules()):
        for child, layer in list(parent.named_children()):
            if type(layer) is nn.Linear:
                bias = layer.bias
                setattr(parent, child, CodedLinear.of(rounded(layer.weight, bits, group_size), bias))
    return model


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [-1, 32, 5])
def test_a_weight_is_code_less_zero_times_scale(bits, group_size):
    torch.manual_seed(0)
    codes = rounded(torch.randn(6, 70, dtype=torch.float64), bits, group_size, symmetric=False)
    weight = codes.dequantize(torch.float64)
    for n, k in [(0, 0), (3, 31), (5, 32), (2, 69)]:
        group = 0 if group_size == -1 else k // group_size
        expected = (int(codes.codes_NK[n, k]) - int(codes.zeros_NG[n, group])) * float(codes.scales_NG[n, group])
        assert float(weight[n, k]) == expected
    assert CodedLinear.of(codes).codes().dequantize(torch.float64).equal(weight)


def test_an_index_of_groups_is_obeyed():
    torch.manual_seed(1)
    plain = rounded(torch.randn(4, 64), 4, 16)
    order = torch.randperm(64)
    mixed = Codes(plain.codes_NK[:, order], plain.scales_NG, plain.zeros_NG, 4, 16, plain.groups_K()[order])
    assert mixed.dequantize(torch.float32).equal(plain.dequantize(torch.float32)[:, order])


def test_groups_that_do_not_fit_are_refused():
    plain = rounded(torch.randn(4, 64), 4, 16)
    with pytest.raises(AssertionError, match="64 inputs in groups of 32 are not 4 groups"):
        Codes(plain.codes_NK, plain.scales_NG, plain.zeros_NG, 4, 32)


@pytest.mark.parametrize("inputs", [1, 2, 7, 64])
def test_nibbles_come_back(inputs):
    codes = torch.randint(16, (5, inputs), dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed.shape == (5, (inputs + 1) // 2)
    assert unpack_nibbles(packed, inputs).equal(codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [-1, 32])
@pytest.mark.parametrize("indexed", [False, True])
def test_the_plain_layer_computes_exactly_and_survives_saving(bits, group_size, indexed):
    torch.manual_seed(2)
    codes = rounded(torch.randn(9, 75, dtype=torch.float64), bits, group_size, symmetric=False)
    if indexed:
        codes = Codes(codes.codes_NK, codes.scales_NG, codes.zeros_NG, bits, group_size, codes.groups_K()[torch.randperm(75)])
    layer = CodedLinear.of(codes, torch.randn(9, dtype=torch.float64))
    states = torch.randn(2, 3, 75, dtype=torch.float64)
    expected = functional.linear(states, codes.dequantize(torch.float64), layer.bias)
    assert layer(states).equal(expected)
    groups = codes.scales_NG.shape[1] if indexed else None
    empty = CodedLinear(75, 9, bits, group_size, bias=True, groups=groups, dtype=torch.float64)
    empty.load_state_dict(layer.state_dict())
    assert empty(states).equal(expected)
    assert weight_bytes(layer) == sum(tensor.nbytes for tensor in layer.state_dict().values())


def test_dropped_inputs_and_outputs_leave_the_rest_bit_for_bit():
    torch.manual_seed(3)
    codes = rounded(torch.randn(10, 512), 4, 128)
    weight = codes.dequantize(torch.float32)
    outputs = torch.tensor([0, 3, 9])
    assert codes.select_outputs(outputs).dequantize(torch.float32).equal(weight[outputs])
    for counts, size in [((128, 0, 128, 128), 128), ((64, 128, 0, 64), 64), ((32, 96, 128, 0), 32), ((16, 16, 128, 0), None)]:
        keep = torch.cat([128 * group + torch.randperm(128)[:count].sort()[0] for group, count in enumerate(counts)])
        some = codes.select_inputs(keep)
        assert some.dequantize(torch.float32).equal(weight[:, keep])
        assert (None if some.group_K is not None else some.group_size) == size
    whole = rounded(torch.randn(10, 60), 8)
    keep = torch.tensor([59, 1, 7])
    assert whole.select_inputs(keep).dequantize(torch.float32).equal(whole.dequantize(torch.float32)[:, keep])
    assert whole.select_inputs(keep).group_K is None


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("group_size", [-1, 32, 128])
@pytest.mark.parametrize("symmetric", [True, False])
@torch.inference_mode()
def test_4_bit_products(kernel, shape, group_size, symmetric):
    torch.manual_seed(4)
    codes = rounded(torch.randn(shape), 4, group_size, symmetric)
    bias = torch.randn(shape[0])
    layer = packed_layer(codes, bias)
    assert isinstance(layer, Int4Linear)
    assert error(layer.weight, codes.dequantize(torch.float32)) < BF16
    for rows in (1, 4, 5, 11, MANY, MANY + 1):  # whole blocks of four rows, and a rest of each kind
        states = torch.randn(1, rows, shape[1])
        expected = functional.linear(states.double(), layer.weight.double(), bias.double())
        assert error(layer(states), expected) < 2 * BF16
        assert layer(states).dtype == torch.float32


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_both_4_bit_paths_hold_every_code_exactly(kernel, wide):
    """Rows of an identity matrix read the weight out; scales that are powers of two leave nothing to round."""
    torch.manual_seed(5)
    codes = rounded(torch.randn(70, 96), 4, 32, symmetric=False)
    codes = Codes(codes.codes_NK, torch.full_like(codes.scales_NG, 0.25), codes.zeros_NG, 4, 32)
    parent = nn.Sequential(CodedLinear.of(codes))
    pack(parent)
    layer = parent[0]
    layer.kernel = CpuKernel(kernel.block, wide)
    weight, identity = codes.dequantize(torch.float32), torch.eye(96)
    assert layer.weight.equal(weight)
    assert layer(identity).T.equal(weight)
    assert torch.cat([layer(rows) for rows in identity.split(7)]).T.equal(weight)


@torch.inference_mode()
def test_groups_out_of_order_are_gathered_and_uneven_ones_left_alone(kernel):
    torch.manual_seed(6)
    plain = rounded(torch.randn(40, 256), 4, 64, symmetric=False)
    order = torch.randperm(256)
    mixed = Codes(plain.codes_NK[:, order], plain.scales_NG, plain.zeros_NG, 4, 64, plain.groups_K()[order])
    layer = packed_layer(mixed)
    assert isinstance(layer, Int4Linear) and layer.size == 64
    assert error(layer.weight, mixed.dequantize(torch.float32)) < BF16
    for rows in (1, MANY + 1):
        states = torch.randn(rows, 256)
        assert error(layer(states), states @ layer.weight.T) < 2 * BF16
    for odd in (rounded(torch.randn(40, 96), 4, 48), plain.select_inputs(torch.arange(0, 200))):
        parent = nn.Sequential(CodedLinear.of(odd))
        assert pack(parent) == 0 and isinstance(parent[0], CodedLinear)


@EIGHT
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@torch.inference_mode()
def test_8_bit_products_are_exact_where_inputs_have_8_bits(shape, symmetric):
    torch.manual_seed(7)
    codes = rounded(torch.randn(shape), 8, -1, symmetric)
    bias = torch.randn(shape[0])
    layer = packed_layer(codes, bias)
    assert isinstance(layer, Int8Linear)
    weight = codes.dequantize(torch.float32)
    assert error(layer.weight, weight) < 1e-6
    for rows in (1, 5, 70):
        states = torch.randint(-127, 128, (2, rows, shape[1])).float()
        states[..., 0] = 127
        expected = functional.linear(states.double(), weight.double(), bias.double())
        assert error(layer(states), expected) < 1e-5
    states = torch.randn(3, shape[1])
    assert error(layer(states) - bias, functional.linear(states, weight)) < 0.05
    assert layer(0 * states).equal(bias.expand(3, -1))


@EIGHT
@torch.inference_mode()
def test_an_8_bit_row_does_not_depend_on_its_company():
    torch.manual_seed(8)
    layer = packed_layer(rounded(torch.randn(50, 64), 8))
    states = torch.randn(40, 64) * torch.logspace(-3, 3, 40)[:, None]
    assert torch.cat([layer(row[None]) for row in states]).equal(layer(states))


@EIGHT
@torch.inference_mode()
def test_8_bit_inputs_are_rounded_to_nearest():
    identity = Codes(
        (128 + 127 * torch.eye(40)).to(torch.uint8), torch.full((40, 1), 1 / 127), torch.full((40, 1), 128).byte(), 8
    )
    states = torch.randn(60, 40)
    off = (packed_layer(identity)(states) - states).abs() / states.abs().amax(1, keepdim=True)
    assert 0.49 / 127 < float(off.max()) < 0.5001 / 127


@EIGHT
@torch.inference_mode()
def test_8_bit_groups_become_one_scale_an_output():
    torch.manual_seed(9)
    weight = torch.randn(48, 256) * torch.rand(48, 2).repeat_interleave(128, 1)
    codes = rounded(weight, 8, 128)
    layer = packed_layer(codes)
    within = (layer.weight - codes.dequantize(torch.float32)).abs() / weight.abs().amax(1, keepdim=True)
    assert float(within.max()) < 1 / 250
    assert error(layer.weight, codes.dequantize(torch.float32)) < 0.012


@pytest.mark.parametrize("bits", BITS)
@torch.inference_mode()
def test_a_coded_model_is_packed_with_its_siblings(bits, kernel):
    torch.manual_seed(10)
    model = coded_model(bits, 32, hidden_size=64)
    tokens = torch.randint(0, models.VOCABULARY, (1, 6))
    expected, held = model(tokens).logits, weight_bytes(model)
    packed = copy.deepcopy(model)
    layers = sum(isinstance(module, CodedLinear) for module in packed.modules())
    assert pack(packed) == layers + 1  # and the output head
    assert pack(packed) == 0
    attention = packed.model.layers[0].self_attn
    assert isinstance(attention.q_proj, Part) and attention.q_proj.shared is attention.v_proj.shared
    assert isinstance(attention.o_proj, {4: Int4Linear, 8: Int8Linear}[bits])
    assert attention.k_proj.weight.shape == (attention.k_proj.out_features, 64)
    assert not any(isinstance(module, CodedLinear) for module in packed.modules())
    assert error(packed(tokens).logits, expected) < 0.1
    head = packed.get_output_embeddings().weight.nbytes  # float32 heads are kept in both layouts
    assert weight_bytes(packed) < 1.1 * held + head
    many = torch.randint(0, models.VOCABULARY, (2, MANY))
    assert error(packed(many).logits, model(many).logits) < 0.1


@pytest.mark.parametrize("bits", BITS)
@torch.inference_mode()
def test_a_packed_model_of_codes_is_traced_without_a_break(bits, kernel):
    model = coded_model(bits, 32)
    pack(model)
    forward = torch.compile(lambda ids: model(ids, use_cache=False).logits, fullgraph=True, backend="aot_eager")
    for count in (3, MANY + 2):
        tokens = torch.randint(0, models.VOCABULARY, (1, count))
        assert error(forward(tokens), model(tokens, use_cache=False).logits) < 1e-2


@pytest.mark.parametrize("bits", BITS)
def test_gradients_are_refused_and_hooked_layers_left_alone(bits, kernel):
    layer = packed_layer(rounded(torch.randn(16, 32), bits))
    with pytest.raises(RuntimeError, match="train the model first"):
        layer(torch.randn(2, 32, requires_grad=True))
    hooked = nn.Sequential(CodedLinear.of(rounded(torch.randn(16, 32), bits)))
    hooked[0].register_forward_hook(lambda *_: None)
    assert pack(hooked) == 0


@EIGHT
@torch.inference_mode()
def test_siblings_of_unlike_codes_stay_apart():
    class Parent(nn.Module):
        def __init__(self, *groups: int) -> None:
            super().__init__()
            for name, size in zip(("q_proj", "k_proj", "v_proj"), groups, strict=True):
                setattr(self, name, CodedLinear.of(rounded(torch.randn(16, 64), 8, size)))

    alike, unlike = Parent(32, 32, 32), Parent(32, -1, 32)
    pack(alike)
    pack(unlike)
    assert isinstance(alike.q_proj, Part) and isinstance(unlike.q_proj, Int8Linear)


@torch.inference_mode()
def test_the_8_bit_kernel_for_cuda_agrees_with_the_one_of_its_name_here():
    torch.manual_seed(11)
    assert CudaInt8Linear.works(torch.device("cpu"))
    for symmetric in (True, False):
        codes = rounded(torch.randn(48, 64), 8, -1, symmetric)
        layer = CudaInt8Linear(codes, torch.randn(48))
        assert error(layer.weight, codes.dequantize(torch.float32)) < (1e-6 if symmetric else 0.01)
        for rows in (1, 16, 17):
            states = torch.randn(2, rows, 64)
            assert error(layer(states), functional.linear(states, layer.weight, layer.bias)) < 2 * BF16


def test_the_4_bit_kernel_for_cuda_has_the_shapes_that_torch_states_and_is_not_used_where_it_is_missing():
    with FakeTensorMode():
        codes_NK = torch.empty(50, 96, dtype=torch.uint8)
        groups_NG = torch.empty(50, 3)
        codes = Codes(codes_NK, groups_NG, groups_NG.to(torch.uint8), 4, 32)
        layer = Int4Linear(codes, Runs(32, None), None, CudaKernel(torch.arange(256)))
        for rows in (1, FEW, FEW + 1):
            assert layer(torch.empty(rows, 96)).shape == (rows, 50)
    assert CudaKernel.found(torch.device("cpu")) is None


class Shuffled(CudaKernel):
    """Stores the codes of a tile in an order that none knows beforehand, in the shape that CUDA's layout has."""

    def lay_out(self, codes_NK: torch.Tensor) -> torch.Tensor:
        return shuffled(codes_NK)


def shuffled(codes_NK: torch.Tensor) -> torch.Tensor:
    outputs, inputs = codes_NK.shape
    tiles = codes_NK.view(outputs // 8, 8, inputs // 32, 32).transpose(1, 2).reshape(outputs // 8, inputs // 32, 256)
    tiles = tiles[..., torch.randperm(256, generator=torch.Generator().manual_seed(12))]
    return (tiles[..., ::2] | tiles[..., 1::2] << 4).contiguous().view(torch.int32)[..., None]


@pytest.mark.parametrize("shape", [(64, 128), (50, 96), (7, 75)], ids=str)
@torch.inference_mode()
def test_many_rows_on_cuda_take_the_weight_that_the_layout_holds_whatever_its_order(shape):
    torch.manual_seed(13)
    kernel = Shuffled(tile_order(shuffled, torch.device("cpu")))
    whole = torch.randint(16, (64, 128), dtype=torch.uint8)
    assert cuda_unlay(shuffled(whole), kernel.order_T).equal(whole)
    codes = rounded(torch.randn(shape), 4, 32, symmetric=False)
    bias = torch.randn(shape[0])
    layer = Int4Linear(codes, Runs(32, None), bias, kernel)
    states = torch.randn(FEW + 1, shape[1])
    expected = functional.linear(states.double(), codes.dequantize(torch.float64), bias.double())
    assert error(layer(states), expected) < 2 * BF16
    with pytest.raises(NotImplementedError):
        layer(states[:FEW])  # the kernel for few rows, which is not here


SATURATED = """
import torch
from forerun.packed import CodedLinear, Codes, pack
codes = Codes(torch.full((64, 256), 255, dtype=torch.uint8), torch.ones(64, 1), torch.full((64, 1), 128).byte(), 8)
model = torch.nn.Sequential(CodedLinear.of(codes))
pack(model)
assert all(model(torch.ones(rows, 256)).eq(127 * 256).all() for rows in (1, 5)), model(torch.ones(1, 256))
"""


@pytest.mark.parametrize("instructions", ["AVX2", "AVX512_CORE"])
def test_the_largest_8_bit_codes_are_summed_right_without_8_bit_dot_products(instructions):
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": instructions}
    done = subprocess.run([sys.executable, "-c", SATURATED], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
