"""GPTQ against a slow implementation of its formulas, rounding, and calibration layer by layer on every architecture."""

import copy
import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from coded import coded
from forerun.compress import calibrate, checkpoint, gptq, rounding
from forerun.compress.calibrate import Observed
from forerun.packed.codes import CodedLinear, Codes
from forerun.types import UserError
from models import BUILDERS, prompts, tiny

ARCHITECTURES = [name for name in BUILDERS if name != "gpt2"]


def case(outputs: int = 24, inputs: int = 192, samples: int = 600, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(inputs, inputs, generator=generator) / inputs**0.5
    inputs_TK = torch.randn(samples, inputs, generator=generator) @ (mix + 0.5 * torch.eye(inputs))
    return torch.randn(outputs, inputs, generator=generator) * 0.05, inputs_TK.T @ inputs_TK


def lost(weight: Tensor, codes: Codes, hessian: Tensor) -> float:
    """||WX - W'X|| / ||WX||."""
    gone, whole = (weight - codes.dequantize(torch.float32)).double(), weight.double()
    return float((torch.trace(gone @ hessian.double() @ gone.T) / torch.trace(whole @ hessian.double() @ whole.T)).sqrt())


def slow(
    weight: Tensor, hessian: Tensor, bits: int, group_size: int, symmetric: bool, act_order: bool, damping: float
) -> Tensor:
    """The paper's step on the paper's terms: the inverse Hessian of the inputs that are left is made anew for each input."""
    work, inputs = weight.double().clone(), weight.shape[1]
    hessian = hessian.double() + damping * hessian.double().diagonal().mean() * torch.eye(inputs)
    size = inputs if group_size == -1 else group_size
    order = hessian.diagonal().argsort(descending=True).tolist() if act_order else list(range(inputs))
    codes = torch.zeros_like(weight, dtype=torch.uint8)
    grids: dict[int, tuple[Tensor, Tensor]] = {}
    for step, k in enumerate(order):
        group = k // size
        if group not in grids:
            source = weight if act_order else work.float()
            grids[group] = rounding.grid(source[:, group * size : (group + 1) * size], bits, symmetric)
        scale, zero = (each.double() for each in grids[group])
        codes[:, k] = (work[:, k] / scale + zero).round().clamp(0, 2**bits - 1)
        left = order[step:]
        inverse = torch.linalg.inv(hessian[left][:, left])
        error = (work[:, k] - (codes[:, k] - zero) * scale) / inverse[0, 0]
        work[:, left] -= error[:, None] * inverse[0]
    return codes


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "group_size", "symmetric"), [(4, 32, True), (4, 64, False), (8, -1, True), (4, -1, False)])
def test_blocks_compute_what_the_formulas_say(bits: int, group_size: int, symmetric: bool, act_order: bool) -> None:
    weight, hessian = case()
    fast = gptq.quantize(weight, hessian, bits, group_size, symmetric, act_order, damping=0.01)
    expected = slow(weight, hessian, bits, group_size, symmetric, act_order, damping=0.01)
    assert (fast.codes_NK == expected).double().mean() > (0.999 if bits == 4 else 0.98)  # float32 tips a few roundings


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_outputs_keep_better_than_by_rounding(bits: int, group_size: int, symmetric: bool, act_order: bool) -> None:
    weight, hessian = case(inputs=256)
    codes = gptq.quantize(weight, hessian, bits, group_size, symmetric, act_order)
    rounded = rounding.quantize(weight, bits, group_size, symmetric)
    assert codes.scales_NG.shape == rounded.scales_NG.shape == (24, 1 if group_size == -1 else 256 // group_size)
    assert int(codes.codes_NK.max()) < 2**bits
    assert codes.group_K is None
    assert lost(weight, codes, hessian) < 0.9 * lost(weight, rounded, hessian)


@pytest.mark.parametrize("bits", [4, 8])
def test_rounding_is_off_by_half_a_step_at_most(bits: int) -> None:
    weight, _ = case()
    codes = rounding.quantize(weight, bits, 64, symmetric=False)
    steps = codes.scales_NG.float().repeat_interleave(64, 1)
    # Beside half a step: the zero point is rounded too, and the scale to float16.
    assert ((codes.dequantize(torch.float32) - weight).abs() / steps).max() < 1.01
    assert (codes.dequantize(torch.float32) - weight).abs().div(steps).mean() < 0.26
    symmetric = rounding.quantize(weight, bits, 64)
    assert (symmetric.zeros_NG == 2 ** (bits - 1)).all()


@pytest.mark.parametrize("symmetric", [False, True])
def test_groups_without_a_spread_have_finite_grids(symmetric: bool) -> None:
    weight = torch.cat([torch.zeros(4, 32), torch.full((4, 32), 0.3), torch.full((4, 32), -0.3), torch.full((4, 32), 1e-12)], 1)
    codes = rounding.quantize(weight, 4, 32, symmetric)
    assert codes.zeros_NG.min() >= 1
    assert codes.scales_NG.isfinite().all()
    torch.testing.assert_close(codes.dequantize(torch.float32), weight, atol=0.03, rtol=0)


def test_inputs_that_calibration_never_saw_are_rounded() -> None:
    weight, hessian = case(inputs=64)
    dead = torch.arange(64) % 5 == 0
    hessian[dead] = 0
    hessian[:, dead] = 0
    codes = gptq.quantize(weight, hessian, 4, -1)
    rounded = rounding.quantize(weight, 4, -1)
    assert torch.equal(codes.codes_NK[:, dead], rounded.codes_NK[:, dead])
    assert not torch.equal(codes.codes_NK, rounded.codes_NK)
    nothing = gptq.quantize(weight, torch.zeros(64, 64), 4, -1)
    assert torch.equal(nothing.codes_NK, rounded.codes_NK)


def test_a_hessian_without_an_inverse_gets_more_damping() -> None:
    weight, hessian = case(inputs=64)
    few = torch.randn(3, 64, generator=torch.Generator().manual_seed(3))
    codes = gptq.quantize(weight, few.T @ few, 4, 32, damping=1e-9)
    assert lost(weight, codes, few.T @ few) < lost(weight, rounding.quantize(weight, 4, 32), few.T @ few)
    indefinite = hessian - 0.05 * hessian.diagonal().mean() * torch.eye(64)
    assert torch.linalg.cholesky_ex(indefinite + 0.01 * hessian.diagonal().mean() * torch.eye(64)).info
    assert gptq.quantize(weight, indefinite, 4, 32).scales_NG.isfinite().all()
    with pytest.raises(UserError, match=r"layer 7.*has no inverse"):
        gptq.quantize(weight, hessian - 1e5 * hessian.diagonal().diag(), 4, 32, name="layer 7")
    with pytest.raises(UserError, match=r"layer 7.*not finite"):
        gptq.quantize(weight, hessian * float("nan"), 4, 32, name="layer 7")


@pytest.mark.parametrize(
    "quantize", [rounding.quantize, lambda w, *args, **kw: gptq.quantize(w, torch.eye(w.shape[1]), *args, **kw)]
)
def test_a_group_size_that_does_not_divide_is_refused(quantize) -> None:
    with pytest.raises(UserError, match=r"mlp\.down_proj has 96 inputs, which group_size=64 does not divide; take 32 or -1"):
        quantize(torch.zeros(8, 96), 4, 64, name="mlp.down_proj")


def test_pruned_inputs_use_their_part_of_the_hessian() -> None:
    weight, hessian = case(inputs=256)
    keep = weight.abs().sum(0).argsort(descending=True)[:128].sort().values
    after = gptq.quantize(weight[:, keep], hessian[keep][:, keep], 4, 32)
    before = gptq.quantize(weight, hessian, 4, -1).select_inputs(keep)
    assert lost(weight[:, keep], after, hessian[keep][:, keep]) < lost(weight[:, keep], before, hessian[keep][:, keep])


def test_layers_that_read_the_same_inputs_are_quantized_together() -> None:
    weight, hessian = case(outputs=40)
    together = gptq.quantize_together({"q": weight[:24], "k": weight[24:32], "v": weight[32:]}, hessian, 4, 32, act_order=True)
    for name, part in (("q", weight[:24]), ("k", weight[24:32]), ("v", weight[32:])):
        alone = gptq.quantize(part, hessian, 4, 32, act_order=True)
        assert (together[name].codes_NK == alone.codes_NK).double().mean() > 0.999
        assert torch.equal(together[name].scales_NG, alone.scales_NG)


TOKENS = torch.randint(97, (5, 24), generator=torch.Generator().manual_seed(5))


def seen_by_whole_passes(model: nn.Module) -> dict[str, Tensor]:
    """The Hessian of every linear layer of the decoder, from ordinary forward passes."""
    found: dict[str, Tensor] = {}
    prefix, layers = calibrate.decoder_layers(model)

    def add(name: str):
        def hook(module, args) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1]).float()
            found[name] = found.get(name, 0) + rows.T @ rows

        return hook

    hooks = [m.register_forward_pre_hook(add(f"{prefix}.{n}")) for n, m in layers.named_modules() if isinstance(m, nn.Linear)]
    for row in TOKENS:
        model(input_ids=row[None])
    for hook in hooks:
        hook.remove()
    return found


def quantized(observed: Observed) -> dict[str, CodedLinear]:
    return {
        name: CodedLinear.of(gptq.quantize(layer.weight, hessian, 4, 32), layer.bias)
        for name, (layer, hessian) in observed.items()
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_run_one_by_one_as_in_the_model(name: str) -> None:
    model = copy.deepcopy(tiny(name))
    prefix, layers = calibrate.decoder_layers(model)
    expected = seen_by_whole_passes(model)
    found: dict[str, Tensor] = {}
    calibrate.sequential(
        model, TOKENS, lambda i, seen: found.update({f"{prefix}.{i}.{n}": h for n, (_, h) in seen.items()}) or {}
    )
    assert found.keys() == expected.keys()
    for layer, hessian in expected.items():
        torch.testing.assert_close(found[layer], hessian, rtol=1e-4, atol=1e-4 * float(hessian.abs().max()))
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert len(layers) == 2


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt-neox", "opt"])
def test_a_layer_sees_what_the_compressed_ones_before_it_give(name: str) -> None:
    model = copy.deepcopy(tiny(name))
    prefix, _ = calibrate.decoder_layers(model)
    untouched = seen_by_whole_passes(model)
    second: dict[str, Tensor] = {}

    def visit(index: int, observed: Observed) -> dict[str, CodedLinear]:
        if index == 0:
            return quantized(observed)
        second.update({f"{prefix}.1.{name}": hessian for name, (_, hessian) in observed.items()})
        return {}

    calibrate.sequential(model, TOKENS, visit)
    now = seen_by_whole_passes(model)
    for layer, hessian in second.items():
        limit = 1e-4 * float(hessian.abs().max())
        torch.testing.assert_close(hessian, now[layer], rtol=1e-4, atol=limit)
        assert (hessian - untouched[layer]).abs().max() > 10 * limit


def test_layers_that_read_one_tensor_share_its_statistic_and_only_one_layer_is_held() -> None:
    model = copy.deepcopy(tiny("llama"))
    held: list[weakref.ref[Tensor]] = []

    def visit(index: int, observed: Observed) -> dict[str, CodedLinear]:
        assert not any(ref() is not None for ref in held)
        statistics = {name: statistic for name, (_, statistic) in observed.items()}
        assert statistics["self_attn.q_proj"] is statistics["self_attn.k_proj"] is statistics["self_attn.v_proj"]
        assert statistics["mlp.gate_proj"] is statistics["mlp.up_proj"]
        assert len({id(each) for each in statistics.values()}) == 4
        held.extend(weakref.ref(each) for each in statistics.values())
        return {}

    calibrate.sequential(model, TOKENS, visit)
    assert len(held) == 14


def test_magnitudes_are_means_of_what_layers_read() -> None:
    model = copy.deepcopy(tiny("llama"))
    read: list[Tensor] = []
    hook = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    model(input_ids=TOKENS)
    hook.remove()
    found: dict[int, Tensor] = {}
    calibrate.sequential(model, TOKENS, lambda i, seen: found.update({i: seen["mlp.down_proj"][1]}) or {}, "magnitude")
    torch.testing.assert_close(found[1], read[0].float().abs().mean((0, 1)))


@pytest.mark.parametrize("amx", [True, False])
def test_in_bfloat16_layers_run_in_the_faster_type(amx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    exact = copy.deepcopy(tiny("qwen2", scale=1.0, dtype=torch.bfloat16))
    prefix, _ = calibrate.decoder_layers(exact)
    expected = seen_by_whole_passes(exact)
    found: dict[str, Tensor] = {}
    types: set[type] = set()

    def visit(index: int, observed: Observed) -> dict[str, CodedLinear]:
        types.update(type(layer) for layer, _ in observed.values())
        found.update({f"{prefix}.{index}.{name}": hessian for name, (_, hessian) in observed.items()})
        return {"mlp.up_proj": CodedLinear.of(rounding.quantize(observed["mlp.up_proj"][0].weight, 8, -1))}

    calibrate.sequential(exact, TOKENS, visit)
    assert types == {nn.Linear}
    assert isinstance(exact.model.layers[0].mlp.up_proj, CodedLinear)
    for name, hessian in expected.items():
        assert (found[name] - hessian).norm() < 0.03 * hessian.norm()


def test_an_interrupted_run_goes_on_from_finished_layers() -> None:
    whole, broken = copy.deepcopy(tiny("llama")), copy.deepcopy(tiny("llama"))
    kept: dict[int, dict[str, CodedLinear]] = {}
    told: list[tuple[int, int]] = []
    calibrate.sequential(whole, TOKENS, lambda i, seen: kept.setdefault(i, quantized(seen)), tell=lambda *n: told.append(n))
    visited: list[int] = []
    calibrate.sequential(
        broken,
        TOKENS,
        lambda i, seen: visited.append(i) or quantized(seen),
        done=lambda i: copy.deepcopy(kept[i]) if i == 0 else None,
    )
    assert visited == [1]
    assert told == [(1, 2), (2, 2)]
    assert torch.equal(whole(input_ids=TOKENS).logits, broken(input_ids=TOKENS).logits)


def test_layers_within_pruned_ones_and_coded_ones_are_seen() -> None:
    from forerun.compress.prune import prune_inputs

    model = copy.deepcopy(tiny("llama"))
    keep = torch.arange(0, 64, 2)
    down = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = prune_inputs(down, keep)
    model.model.layers[0].mlp.up_proj = CodedLinear.of(rounding.quantize(model.model.layers[0].mlp.up_proj.weight, 8, -1))
    found: dict[str, Tensor] = {}
    calibrate.sequential(model, TOKENS, lambda i, seen: found.update({f"{i}.{n}": h for n, (_, h) in seen.items()}) or {})
    assert found["0.mlp.down_proj.inner"].shape == (32, 32)
    assert found["0.mlp.up_proj"].shape == (32, 32)


def test_what_cannot_be_run_layer_by_layer_is_refused_in_a_sentence() -> None:
    with pytest.raises(UserError, match=r"GPT2LMHeadModel cannot be compressed: its decoder layers have Conv1D"):
        calibrate.sequential(tiny("gpt2"), TOKENS, lambda *_: {})
    with pytest.raises(UserError, match=r"calibration\.length=300: LlamaForCausalLM takes at most 256 tokens"):
        calibrate.sequential(tiny("llama"), torch.zeros(1, 300, dtype=torch.long), lambda *_: {})
    model = copy.deepcopy(tiny("llama"))
    plain = model.model.layers[0].forward
    model.model.layers[0].forward = lambda states, **kw: plain(states, **{k: v for k, v in kw.items() if k != "extra"})
    embed = model.model.embed_tokens
    bare = model.model.forward

    def forward(input_ids=None, **kw):
        return bare(input_ids=input_ids, extra=embed(input_ids), **kw)

    model.model.forward = forward
    model.model.layers[1].forward = model.model.layers[0].forward
    with pytest.raises(UserError, match="read more of a text than hidden states"):
        calibrate.sequential(model, TOKENS, lambda *_: {})


def test_windows_are_texts_end_to_end() -> None:
    texts = prompts()
    assert sum(map(len, texts)) == 91
    tokens = calibrate.windows(texts, samples=3, length=20)
    assert tokens.shape == (3, 20)
    line = tokens.flatten().tolist()
    joined = [text for text in texts if any(line[i : i + len(text)] == list(text) for i in range(len(line)))]
    assert sum(map(len, joined)) > 30
    assert torch.equal(tokens, calibrate.windows(texts, 3, 20))
    assert not torch.equal(tokens, calibrate.windows(texts, 3, 20, seed=1))
    assert calibrate.windows(texts, samples=50, length=20).shape == (4, 20)
    with pytest.raises(UserError, match=r"91 tokens, fewer than one window of calibration\.length=92"):
        calibrate.windows(texts, samples=1, length=92)


def test_a_model_writes_its_own_calibration_texts() -> None:
    model = copy.deepcopy(tiny("llama", scale=0.2))
    told: list[tuple[int, int]] = []
    own = calibrate.written(model, samples=40, length=12, seed=3, rows=16, tell=lambda *counts: told.append(counts))
    assert own.shape == (40, 12)
    assert told == sorted(told)
    assert told[-1] == (40 * 12, 40 * 12)
    assert torch.equal(own, calibrate.written(model, 40, 12, seed=3, rows=16))
    assert not torch.equal(own, calibrate.written(model, 40, 12, seed=4, rows=16))
    assert len(own[:, 0].unique()) > 10
    state = torch.get_rng_state()
    model.lm_head.weight.data.zero_()
    model.config.bos_token_id = 7
    many = calibrate.written(model, samples=200, length=6)
    assert (many[:, 0] == 7).all()
    counts = many[:, 1:].flatten().bincount(minlength=97)
    assert counts.max() < 40, "a model of equal logits draws evenly: 10.3 of each token on average"
    assert torch.equal(torch.get_rng_state(), state)


def test_texts_are_drawn_from_the_models_own_laws() -> None:
    model, start = copy.deepcopy(tiny("llama", scale=0.2)), 5
    laws_V = model(input_ids=torch.tensor([[start]]), use_cache=False).logits[0, -1].softmax(-1)
    model.config.bos_token_id = start
    counts_V = calibrate.written(model, samples=4000, length=2, seed=1)[:, 1].bincount(minlength=len(laws_V))
    expected_V = 4000 * laws_V
    score = float(((counts_V - expected_V) ** 2 / expected_V).sum())
    assert score < 160, "chi-square of 96 degrees of freedom: 160 is exceeded once in 20,000 times"


def test_as_many_texts_at_a_time_as_their_cache_leaves_room_for() -> None:
    model = tiny("llama")
    assert calibrate.rows_at_once(model, 512) == 128, "a small model's cache is no limit"
    text = model.config
    assert calibrate.rows_at_once(model, 10**9) == 8
    row = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * model.dtype.itemsize
    assert calibrate.rows_at_once(model, calibrate.CACHE_BYTES // (40 * row)) == 40


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("bits", "symmetric", "ordered"), [(4, True, False), (4, False, False), (8, True, False), (4, True, True)]
)
def test_gptqmodel_reads_what_is_written(
    bits: int, symmetric: bool, ordered: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GPTQMODEL_CPU_WORKERS", "2")  # it fails at once on a machine of one or two cores
    for package in ("gptqmodel", "optimum"):
        pytest.importorskip(package, exc_type=ImportError)
    from transformers import AutoModelForCausalLM

    model = coded(bits=bits, symmetric=symmetric, hidden_size=128, intermediate_size=256, num_key_value_heads=4)
    if ordered:
        for layer in [module for module in model.modules() if isinstance(module, CodedLinear)]:
            layer.group = layer.codes().groups_K()[torch.randperm(layer.in_features)].int()
    expected = model(input_ids=TOKENS).logits
    checkpoint.save(model, None, tmp_path / "one")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype=torch.bfloat16, device_map="cpu")
    found = theirs(input_ids=TOKENS).logits.float()
    assert (found - expected).norm() < 0.03 * expected.norm()
