"""L1 pruning: what is kept, and that the smaller layers and models compute exactly what zero masks would."""

import copy
import itertools

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from forerun.compress import coupled, prune
from forerun.packed.codes import CodedLinear, Codes
from forerun.types import UserError
from models import prompts, tiny


def linear(inputs: int = 48, outputs: int = 32, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias, dtype=torch.float64).requires_grad_(False)
    layer.weight *= torch.rand(1, inputs, dtype=torch.float64) * torch.rand(outputs, 1, dtype=torch.float64)
    return layer


def coded(inputs: int = 256, outputs: int = 64, bits: int = 4, group_size: int = 128) -> CodedLinear:
    groups = 1 if group_size == -1 else inputs // group_size
    codes_NK = torch.randint(0, 2**bits, (outputs, inputs), dtype=torch.uint8)
    zeros_NG = torch.randint(4, 12, (outputs, groups), dtype=torch.uint8)
    scales_NG = torch.rand(outputs, groups, dtype=torch.float64) + 0.1
    return CodedLinear.of(Codes(codes_NK, scales_NG, zeros_NG, bits, group_size), torch.randn(outputs, dtype=torch.float64))


def test_the_lowest_norms_go() -> None:
    weight_NK = torch.tensor([[1.0, -9.0, 0.5, 4.0], [1.0, 2.0, -0.5, -4.0]])
    assert prune.best(prune.input_scores(weight_NK), 2).tolist() == [1, 3]
    assert prune.best(prune.output_scores(weight_NK), 1).tolist() == [0]
    # An input that is large in calibration makes up for small weights.
    magnitude_K = torch.tensor([50.0, 1.0, 1.0, 1.0])
    assert prune.best(prune.input_scores(weight_NK, magnitude_K), 2).tolist() == [0, 1]
    assert prune.output_scores(weight_NK, magnitude_K).tolist() == [50 + 9 + 0.5 + 4, 50 + 2 + 0.5 + 4]


def test_counts_are_multiples_and_never_none() -> None:
    assert prune.count(100, 0.25) == 75
    assert prune.count(5632, 0.35, 64) == 3648
    assert prune.count(64, 0.99, 32) == 32
    assert prune.count(8, 0.5, 32) == 8
    assert prune.count(128, 0.0, 32) == 128


def test_a_global_fraction_falls_where_norms_are_low() -> None:
    even, uneven = torch.ones(100), torch.cat([torch.full((50,), 0.1), torch.full((50,), 1.9)])
    few, many = prune.shares([even, uneven], [10, 10], 0.25)
    assert (few, many) == (0.0, 0.5)
    # The fraction is of weights: a layer of a tenth of the outputs gives up its whole half for a tenth as much.
    assert prune.shares([even, uneven], [100, 10], 0.5 / 11) == pytest.approx([0.0, 0.5])


@pytest.mark.parametrize("make", [linear, coded, lambda: coded(bits=8, group_size=-1)])
@pytest.mark.parametrize("fraction", [0.0, 0.25, 0.6])
def test_a_pruned_layer_is_the_zero_masked_one(make: object, fraction: float) -> None:
    layer = make()  # type: ignore[operator]
    weight_NK, states = prune.dense(layer), torch.randn(3, 5, layer.in_features, dtype=torch.float64)
    keep_K = prune.kept_inputs(layer, prune.input_scores(weight_NK), fraction)
    masked = states * torch.zeros(layer.in_features, dtype=torch.float64).index_fill(0, keep_K, 1.0)
    small = prune.prune_inputs(layer, keep_K)
    torch.testing.assert_close(small(states), layer(masked), rtol=0, atol=1e-10)
    assert (small.in_features, small.inner.in_features) == (layer.in_features, len(keep_K))
    keep_N = prune.kept_outputs(layer, prune.output_scores(weight_NK), fraction)
    mask_N = torch.zeros(layer.out_features, dtype=torch.float64).index_fill(0, keep_N, 1.0)
    less = prune.prune_outputs(layer, keep_N)
    torch.testing.assert_close(less(states), layer(states) * mask_N, rtol=0, atol=1e-10)
    assert less.inner.out_features == len(keep_N)


def bytes_of(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.state_dict().values())


def test_codes_lose_inputs_bit_for_bit_and_bytes_with_them() -> None:
    layer = coded(512)
    keep_K = prune.kept_inputs(layer, prune.input_scores(prune.dense(layer)), 0.25)
    small = prune.prune_inputs(layer, keep_K).inner
    assert isinstance(small, CodedLinear)
    assert torch.equal(small.codes().codes_NK, layer.codes().codes_NK[:, keep_K])
    assert torch.equal(small.weight, layer.weight[:, keep_K])
    assert small.group is None  # groups are runs of inputs, as kernels want them
    assert small.packed.nbytes == 0.75 * layer.packed.nbytes
    fine = CodedLinear.of(layer.codes().select_inputs(torch.arange(512)))
    same_groups = coded(512, group_size=small.group_size)
    assert fine.group_size == 128
    assert bytes_of(small) <= 0.8 * bytes_of(same_groups)


@pytest.mark.parametrize(("fraction", "dropped"), [(0.25, 128), (0.5, 256), (0.07, 64), (0.95, 480)])
def test_groups_keep_blocks_of_their_own_best(fraction: float, dropped: int) -> None:
    """Every group keeps a multiple of 32 and its best ones; no other choice of blocks has a higher score."""
    layer = coded(512)
    scores_K = torch.rand(512) ** 3 * (1 + torch.arange(4).repeat_interleave(128))
    keep_K = prune.kept_inputs(layer, scores_K, fraction)
    assert len(keep_K) == 512 - dropped == len(set(keep_K.tolist()))
    groups = keep_K // 128
    assert torch.equal(groups, groups.sort().values)
    counts = groups.bincount(minlength=4)
    assert all(count % 32 == 0 for count in counts.tolist())
    for group, count in enumerate(counts.tolist()):
        own = scores_K[group * 128 : (group + 1) * 128]
        kept = keep_K[groups == group] - group * 128
        assert set(kept.tolist()) == set(own.argsort(descending=True)[:count].tolist())
    ranked = scores_K.view(4, 128).sort(1, descending=True).values
    sums = torch.cat([torch.zeros(4, 1), ranked.view(4, 4, 32).sum(2).cumsum(1)], 1)
    splits = [split for split in itertools.product(range(5), repeat=4) if sum(split) * 32 == len(keep_K)]
    highest = max(float(sums[range(4), split].sum()) for split in splits)
    assert float(scores_K[keep_K].sum()) >= (1 - 1e-6) * highest * (prune.COARSE if dropped % 64 == 0 else 1)


def test_groups_are_halved_no_further_where_that_costs_nothing() -> None:
    """Equal columns: nothing is lost by blocks of 64, which need half the scales of blocks of 32."""
    groups_K = torch.arange(512) // 128
    even = prune.best_blocks(torch.ones(512), 0.25, groups_K, 4)
    assert set((even // 128).bincount(minlength=4).tolist()) <= {0, 64, 128}
    steep = prune.best_blocks(torch.tensor([8.0, 4.0, 2.0, 0.0]).repeat_interleave(32).repeat(4), 0.25, groups_K, 4)
    assert (steep // 128).bincount(minlength=4).tolist() == [96] * 4


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_pruned_codes_are_never_larger_than_whole_ones(bits: int, group_size: int) -> None:
    """Smaller groups have more scales: a tenth fewer inputs in groups of 32 instead of 128 would be more bytes."""
    layer = coded(1024, bits=bits, group_size=group_size)
    for fraction in (0.02, 0.05, 0.1, 0.15, 0.25, 0.5, 0.9):
        keep_K = prune.kept_inputs(layer, torch.rand(1024) ** 4, fraction)
        small = prune.with_inputs(layer, keep_K)
        held = [len(each.scales[0]) * 32 + bits * each.in_features for each in (small, layer)]
        assert held[0] < held[1] or len(keep_K) == 1024
        assert abs(len(keep_K) / 1024 - (1 - fraction)) <= 64 / 1024
        assert isinstance(small, CodedLinear)
        assert small.group is None


def test_foreign_codes_with_an_index_of_groups_become_runs() -> None:
    group_K = torch.randperm(256).remainder(2).to(torch.int32)
    whole = coded().codes()
    layer = CodedLinear.of(Codes(whole.codes_NK, whole.scales_NG, whole.zeros_NG, 4, 128, group_K))
    keep_K = prune.kept_inputs(layer, prune.input_scores(prune.dense(layer)), 0.5)
    small = prune.with_inputs(layer, keep_K)
    assert isinstance(small, CodedLinear)
    assert small.group is None
    assert torch.equal(small.weight, layer.weight[:, keep_K])


def test_groups_that_do_not_divide_are_refused() -> None:
    layer = coded(64, group_size=16)
    with pytest.raises(UserError, match="prune first and quantize afterwards"):
        prune.kept_inputs(layer, torch.ones(64), 0.5)


def test_outputs_of_codes_stay_aligned() -> None:
    small = prune.prune_outputs(layer := coded(outputs=256), prune.kept_outputs(layer, torch.rand(256), 0.1)).inner
    assert isinstance(small, CodedLinear)
    assert small.out_features == 224  # the multiple of 32 nearest to 230
    assert small.scales.shape == small.zeros.shape == (224, 2)


def test_the_error_is_that_of_the_outputs() -> None:
    weight_NK, inputs_TK = torch.randn(6, 8, dtype=torch.float64), torch.randn(50, 8, dtype=torch.float64)
    kept_NK = weight_NK * (torch.arange(8) > 2)
    right = float((inputs_TK @ (weight_NK - kept_NK).T).norm() / (inputs_TK @ weight_NK.T).norm())
    assert prune.lost(weight_NK, kept_NK, inputs_TK.T @ inputs_TK) == pytest.approx(right)
    assert prune.lost(weight_NK, kept_NK) == pytest.approx(float((weight_NK - kept_NK).norm() / weight_NK.norm()))


MLPS = ["llama", "mistral-window-8", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "opt"]


def layers_of(model: PreTrainedModel) -> list[nn.Module]:
    return list((model.model.decoder if hasattr(model.model, "decoder") else model.model).layers)


def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=torch.tensor([prompts()[2]])).logits


def prune_all(model: PreTrainedModel, what: coupled.What, keep_U: torch.Tensor) -> None:
    for layer in layers_of(model):
        where = coupled.site(layer, what, model.config)
        for name, module in coupled.smaller(layer, where, keep_U).items():
            layer.set_submodule(name, module)


def mask_readers(model: PreTrainedModel, what: coupled.What, keep_U: torch.Tensor) -> None:
    """The whole model with zeros in the columns of what is to go."""
    for layer in layers_of(model):
        where = coupled.site(layer, what, model.config)
        weight = layer.get_submodule(where.reader).weight
        kept = coupled.indices(keep_U, where.width)
        weight *= torch.zeros(weight.shape[1], dtype=weight.dtype).index_fill(0, kept, 1.0)


@pytest.mark.parametrize("name", MLPS)
def test_coupled_channels_are_the_zero_masked_model(name: str) -> None:
    model, masked = copy.deepcopy(tiny(name)), copy.deepcopy(tiny(name))
    keep_U = torch.randperm(64)[:40].sort().values
    before = logits(model)
    mask_readers(masked, "mlp", keep_U)
    prune_all(model, "mlp", keep_U)
    torch.testing.assert_close(logits(model), logits(masked), rtol=0, atol=1e-10)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    assert bytes_of(model) < bytes_of(masked)


@pytest.mark.parametrize("name", [name for name in MLPS if name != "opt"])
def test_pruned_heads_are_masked_heads(name: str, tmp_path: object) -> None:
    """8 query heads on 4 KV heads, 2 of which stay; the smaller model is built by transformers from its config alone."""
    sizes = {"num_attention_heads": 8, "num_key_value_heads": 4}
    model, masked = copy.deepcopy(tiny(name, **sizes)), copy.deepcopy(tiny(name, **sizes))
    keep_U = torch.tensor([0, 3])
    mask_readers(masked, "heads", keep_U)
    prune_all(model, "heads", keep_U)
    config = copy.deepcopy(model.config)
    for key, value in coupled.head_counts(config, 2).items():
        setattr(config, key, value)
    config._attn_implementation = model.config._attn_implementation
    small = (
        type(model)(type(config).from_dict(config.to_dict(), attn_implementation=config._attn_implementation)).double().eval()
    )
    small.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(small), logits(masked), rtol=0, atol=1e-10)


def test_units_are_scored_over_all_their_weights() -> None:
    model = copy.deepcopy(tiny("phi3"))
    layer = layers_of(model)[0]
    where = coupled.site(layer, "heads", model.config)
    qkv, reader = layer.self_attn.qkv_proj.weight, layer.self_attn.o_proj.weight
    found = coupled.scores(layer, where, {})
    right = [
        float(qkv[h * 16 : h * 16 + 16].abs().sum() + qkv[32 + 8 * h : 40 + 8 * h].abs().sum())
        + float(qkv[48 + 8 * h : 56 + 8 * h].abs().sum() + reader[:, h * 16 : h * 16 + 16].abs().sum())
        for h in range(2)
    ]
    assert found.tolist() == pytest.approx(right)
    loud = {where.reader: torch.cat([torch.ones(16), torch.full((16,), 1e6)]).double()}
    assert coupled.scores(layer, where, loud).argmax() == 1


def test_codes_lose_channels_in_blocks() -> None:
    """Coupled pruning of coded layers: rows of gate and up, blocks of down's groups, bit for bit."""
    layer = nn.Module()
    layer.mlp = nn.Module()
    layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj = coded(128, 256), coded(128, 256), coded(256, 128)
    where = coupled.site(layer, "mlp", None)
    keep_U = coupled.kept_channels(layer, where, coupled.scores(layer, where, {}), 0.5, 1)
    small = coupled.smaller(layer, where, keep_U)
    assert len(keep_U) == 128
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        assert torch.equal(small[name].weight, layer.get_submodule(name).weight[keep_U])
    assert torch.equal(small["mlp.down_proj"].weight, layer.mlp.down_proj.weight[:, keep_U])


def test_what_is_not_known_to_be_apart_is_refused() -> None:
    for name, what in (("gpt2", "mlp"), ("gpt-neox", "heads"), ("opt", "heads")):
        model = tiny(name)
        layer = next(module for module in model.modules() if isinstance(module, nn.ModuleList))[0]
        with pytest.raises(UserError, match="does not have the layers of a Llama"):
            coupled.site(layer, what, model.config)  # type: ignore[arg-type]
    model = copy.deepcopy(tiny("llama"))
    down = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = prune.prune_inputs(down, torch.arange(32))
    with pytest.raises(UserError, match="pruned already"):
        coupled.site(model.model.layers[0], "mlp", model.config)


def test_heads_stay_in_numbers_that_the_config_admits() -> None:
    config = tiny("llama", num_attention_heads=8, num_key_value_heads=8).config
    assert coupled.heads_that_can_stay(config) == [1, 2, 4, 8]  # the hidden size of 32 must be a multiple of them
    assert coupled.heads_kept(config, 0.5) == 4
    with pytest.raises(UserError, match="of 8 KV heads 1, 2, 4 can stay"):
        coupled.heads_kept(config, 0.1)
    assert coupled.heads_kept(tiny("qwen3", num_attention_heads=8, num_key_value_heads=8).config, 0.25) == 6
