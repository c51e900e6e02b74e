"""Public layouts of heads: what folders made by hand compute, and that heads come back as they went."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional

from forerun.heads import Eagle, formats, store
from models import tiny
from published import (
    EPS,
    HEADS,
    HIDDEN,
    INNER,
    KEYS,
    LAYERS,
    MADE,
    SIZE,
    THETA,
    VOCABULARY,
    draw,
    eagle3,
    fetch,
    mlp,
    read,
    run,
    speculators3,
)  # fmt: skip

every_layout = pytest.mark.parametrize("name", MADE)


def rms(states: Tensor, weight: Tensor, eps: float = EPS) -> Tensor:
    return states / (states.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def turned(states: Tensor) -> Tensor:
    """Rotary positions 0, 1, ... on [heads, tokens, size]: halves as the two coordinates."""
    angles = torch.arange(states.shape[1])[:, None] * THETA ** (-torch.arange(0, SIZE, 2) / SIZE)
    one, two = states.chunk(2, -1)
    return torch.cat([one * angles.cos() - two * angles.sin(), two * angles.cos() + one * angles.sin()], -1)


def through(tensors: dict[str, Tensor], prefix: str, read: Tensor, residual: Tensor) -> Tensor:
    """A llama layer by hand, causal, on [tokens, size]."""
    heads = {
        name: functional.linear(
            read, tensors[f"{prefix}.self_attn.{name}_proj.weight"], tensors.get(f"{prefix}.self_attn.{name}_proj.bias")
        ).view(len(read), -1, SIZE).transpose(0, 1)
        for name in "qkv"
    }  # fmt: skip
    queries, keys = turned(heads["q"]), turned(heads["k"]).repeat_interleave(HEADS // KEYS, 0)
    scores = queries @ keys.mT / SIZE**0.5
    hidden = torch.full(scores.shape[1:], -torch.inf, dtype=scores.dtype).triu(1)
    mixed = (scores + hidden).softmax(-1) @ heads["v"].repeat_interleave(HEADS // KEYS, 0)
    states = residual + mixed.transpose(0, 1).flatten(1) @ tensors[f"{prefix}.self_attn.o_proj.weight"].T
    normed = rms(states, tensors[f"{prefix}.post_attention_layernorm.weight"])
    gate, up = (normed @ tensors[f"{prefix}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
    return states + (functional.silu(gate) * up) @ tensors[f"{prefix}.mlp.down_proj.weight"].T


def assert_near(given: Tensor, wanted: Tensor) -> None:
    """The networks take norms and rotary angles in float32."""
    torch.testing.assert_close(given, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in MADE if "medusa" in name])
def test_medusa_computes_what_its_tensors_say(name: str, tmp_path: Path) -> None:
    made, path = fetch(name, tmp_path)
    head = read(path)
    hidden = draw(5, HIDDEN)
    logits = []
    for k in range(3):
        states = hidden
        for block in range(2):
            own = f"blocks.{k}.layers.{block}" if "vllm" in name else f"{k}.{block}.linear"
            own = f"medusa_head.{own}" if "beside" in name else own
            bias = made.tensors.get(f"{own}.bias", torch.zeros(HIDDEN, dtype=torch.float64))
            states = states + functional.silu(states @ made.tensors[f"{own}.weight"].T + bias)
        output = f"lm_heads.{k}.weight" if "vllm" in name else f"{k}.2.weight"
        logits.append(states @ made.tensors[f"medusa_head.{output}" if "beside" in name else output].T)
    torch.testing.assert_close(head(hidden), torch.stack(logits, -2))


@pytest.mark.parametrize("tied", [False, True])
def test_mlp_computes_what_its_tensors_say(tied: bool, tmp_path: Path) -> None:
    made = mlp(tied)
    head = read(made.at(tmp_path / "head"))
    hidden, tokens = draw(5, HIDDEN), torch.randint(VOCABULARY, (3, 5))
    kept = 0.5 ** (0.5 / 3)
    state = hidden / (hidden.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() / 2**0.5 if tied else hidden
    given = head.first(hidden)
    for step in range(3):
        own, projection = (0, min(step, 1)) if tied else (step, step)
        mixed = state @ made.tensors[f"speculator.proj.{projection}.weight"].T
        drawn = ((1 - kept**2) * INNER / 2) ** 0.5 / kept
        mixed = mixed + drawn * made.tensors[f"speculator.emb.{own}.weight"][tokens[step]]
        normed = rms(mixed, made.tensors[f"speculator.ln.{own}.weight"], 1e-6) + made.tensors[f"speculator.ln.{own}.bias"]
        state = functional.gelu(normed)
        given, logits = head.step(step, given, tokens[step])
        torch.testing.assert_close(logits, state @ made.tensors[f"speculator.head.{own}.weight"].T)


@pytest.mark.parametrize("name", ["eagle", "eagle without fc.bias", "eagle with qkv biases", "speculators eagle"])
def test_version_1_computes_what_its_tensors_say(name: str, tmp_path: Path) -> None:
    made, path = fetch(name, tmp_path)
    head = read(path)
    prefix, join = ("transformer", "fusion_fc") if "speculators" in name else ("layers.0", "fc")
    embeds, features, output = draw(7, HIDDEN), draw(7, HIDDEN), torch.nn.Linear(HIDDEN, VOCABULARY, bias=False).double()
    joined = functional.linear(
        torch.cat([embeds, features], -1), made.tensors[f"{join}.weight"], made.tensors.get(f"{join}.bias")
    )
    states = through(made.tensors, prefix, joined, joined)
    assert_near(run(head, embeds, features), states)
    assert_near(head.logits(states, output), output(states))


@pytest.mark.parametrize("name", [name for name in MADE if "eagle3" in name])
def test_version_3_computes_what_its_tensors_say(name: str, tmp_path: Path) -> None:
    made, path = fetch(name, tmp_path)
    head, tensors = read(path), made.tensors
    prefix = "midlayer" if "midlayer.hidden_norm.weight" in tensors else "layers.0"
    embeds, features = draw(7, HIDDEN), draw(7, 3 * HIDDEN)
    states = features @ tensors["fc.weight"].T
    normed = rms(states, tensors[f"{prefix}.hidden_norm.weight"])
    read_here = torch.cat([rms(embeds, tensors[f"{prefix}.input_layernorm.weight"]), normed], -1)
    states = through(tensors, prefix, read_here, normed if made.settings.get("norm_before_residual") else states)
    assert_near(run(head, embeds, features), states)
    logits = head.logits(states, torch.nn.Identity())
    assert_near(logits, rms(states, tensors["norm.weight"]) @ tensors["lm_head.weight"].T)
    wanted = tensors["t2d"].nonzero()[:, 0] if "t2d" in tensors else torch.arange(VOCABULARY)
    assert torch.equal(head.token_ids, wanted)
    assert head.shape.features == (2, 6, 9)  # of 12 layers: by rule, as [1, 5, 8] that leave them, as [2, 6, 9] that enter them


@every_layout
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_written_head_comes_back_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    made, path = fetch(name, tmp_path)
    head = store.cast(read(path), dtype)
    for layout in formats.layouts(head):
        if layout != made.layout and (head.shape.kind == "eagle" and (head.shape.qkv_bias or head.shape.norm_before_residual)):
            continue  # which that layout cannot say: see test_what_a_layout_cannot_say_is_refused
        formats.write(head, tmp_path / layout, layout, "a/target")
        again = formats.read(tmp_path / layout)
        assert again.shape == replace(head.shape, **({"inner_size": INNER} if layout == "mlp" else {}))
        own, other = head.state_dict(), again.state_dict()
        assert own.keys() == other.keys()
        assert all(own[key].dtype == other[key].dtype and torch.equal(own[key], other[key]) for key in own)


@pytest.mark.parametrize("name", ["medusa", "vllm-medusa", "mlp", "eagle", "eagle3", "speculators eagle", "speculators eagle3"])
def test_the_writer_uses_the_documented_names_and_settings(name: str, tmp_path: Path) -> None:
    made, path = fetch(name, tmp_path)
    formats.write(read(path), tmp_path / "again", made.layout, "a/target", tokens=3)
    file = "medusa_lm_head.pt" if made.layout == "medusa" else "model.safetensors"
    tensors = (torch.load if file.endswith(".pt") else load_file)(tmp_path / "again" / file)
    wanted = {key: tensor for key, tensor in made.tensors.items() if key == "t2d" or key not in made.optional}
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[key], wanted[key]) for key in wanted)
    settings = json.loads((tmp_path / "again" / "config.json").read_text())
    chain = {"medusa_num_heads": 3, "n_candidates": 1, "top_k_tokens_per_head": [1, 1, 1]}  # all heads, and a chain of drafts
    wanted_settings = made.settings | {key: value for key, value in chain.items() if key in made.settings}
    for key in ("speculators_config", "transformer_layer_config"):
        if key in wanted_settings:
            assert contains(settings.pop(key), wanted_settings.pop(key))
    assert contains(settings, wanted_settings)


def contains(whole: dict[str, Any], part: dict[str, Any]) -> bool:
    """The verifier's architectures aside, which a head does not know."""
    missing = {key: value for key, value in part.items() if key != "verifier" and (key not in whole or whole[key] != value)}
    assert not missing, missing
    return whole.get("verifier", {}).get("name_or_path") == part.get("verifier", {}).get("name_or_path")


@every_layout
def test_load_knows_every_layout(name: str, tmp_path: Path) -> None:
    _, path = fetch(name, tmp_path)
    sizes = {"hidden_size": HIDDEN, "vocab_size": VOCABULARY, "num_hidden_layers": LAYERS}
    head, rest = store.load(path, torch.float32, tiny("llama", **sizes, intermediate_size=32).config)
    assert rest == {}
    assert {tensor.dtype for tensor in head.parameters()} == {torch.float32}
    store.save(head, tmp_path / "own", {"said": 1})
    again, rest = store.load(tmp_path / "own")
    assert rest == {"said": 1}
    assert again.shape == head.shape
    assert all(torch.equal(one, two) for one, two in zip(head.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": THETA}},
    ],
)
def test_stretched_positions_survive(scaling: dict[str, Any], tmp_path: Path) -> None:
    head = read(eagle3(**scaling).at(tmp_path / "head"))
    assert head.shape.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": THETA}
    formats.write(head, tmp_path / "out", "eagle3")
    assert formats.read(tmp_path / "out").shape == head.shape


def test_rotary_frequencies_are_not_rounded(tmp_path: Path) -> None:
    exact = THETA ** (-torch.arange(0, SIZE, 2) / SIZE)
    head, _ = store.load(speculators3().at(tmp_path / "head"), torch.bfloat16)
    assert isinstance(head, Eagle)
    torch.testing.assert_close(head.rotary.inv_freq, exact)
    assert not torch.equal(exact, exact.bfloat16().float())
