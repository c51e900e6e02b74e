"""The seam to transformers: what is served, what is refused and how it is said, prefill in chunks, hidden states."""

import copy
import importlib.util
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3NextConfig, T5Config, T5ForConditionalGeneration

from forerun.config import ModelConfig
from forerun.model import Loaded, Target, load, probe, refuse_unserved, verify_attention
from forerun.tree import Tree, chain
from forerun.types import UserError
from models import BUILDERS, MIXTURES, VOCABULARY, tiny


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", BUILDERS)
def test_every_served_architecture_passes_the_probe(architecture: str, dtype: torch.dtype) -> None:
    probe(Target(tiny(architecture, dtype=dtype)))


class Wrapped(torch.nn.Module):
    """A model whose forward pass does something else with what it is given."""

    def __init__(self, model: PreTrainedModel, change: Any) -> None:
        super().__init__()
        self.inner, self.change, self.config = model, change, model.config

    def set_attn_implementation(self, name: str) -> None:
        self.inner.set_attn_implementation(name)

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.inner.get_output_embeddings()

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.inner.get_input_embeddings()

    def forward(self, **kwargs: Any) -> Any:
        return self.inner(**self.change(kwargs))


def ignores_the_mask(kwargs: dict[str, Any]) -> dict[str, Any]:
    """All nodes see everything before them, as the model itself would have it."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        return kwargs
    width = mask.shape[-1]
    slots_BN = kwargs["past_key_values"].plan.slots_BN
    return kwargs | {"attention_mask": (torch.arange(width) <= slots_BN[:, :, None])[:, None]}


def ignores_positions(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Nodes are numbered as they come, not by their depth."""
    if kwargs.get("past_key_values") is None or kwargs.get("attention_mask") is None:
        return kwargs
    return kwargs | {"position_ids": kwargs["past_key_values"].plan.slots_BN}


def ignores_the_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in kwargs.items() if name == "input_ids"}


def takes_no_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    if "past_key_values" in kwargs:
        raise TypeError("forward() got an unexpected keyword argument 'past_key_values'")
    return kwargs


def refused(model: PreTrainedModel, change: Any) -> str:
    """The sentence that a changed model is refused with; unchanged, it is served."""
    probe(Target(Wrapped(model, lambda kwargs: kwargs)))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^Wrapped cannot be served: .* mask") as error:
        probe(Target(Wrapped(model, change)))  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("change", [ignores_the_mask, ignores_positions, ignores_the_cache, takes_no_cache])
def test_a_model_that_goes_its_own_way_is_refused(change: Any) -> None:
    refused(tiny("llama", dtype=torch.float32), change)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "opt"])
def test_a_mask_that_is_not_kept_is_noticed_in_any_precision(architecture: str, dtype: torch.dtype, scale: float) -> None:
    """Rounding in half precision is of the size of what a hidden token does, unless one looks at the hidden token alone."""
    refused(tiny(architecture, dtype=dtype, scale=scale), ignores_the_mask)


def test_the_probe_is_not_blinded_by_scores_far_from_zero() -> None:
    """What is added to all scores alike changes no probability, and must not make a wrong score look nearly right."""
    model = copy.deepcopy(tiny("llama", dtype=torch.bfloat16))
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: out.float() + 100)
    refused(model, ignores_the_mask)
    refused(model, ignores_the_cache)


# Refusals by configuration.


def faked(model: PreTrainedModel, **text: Any) -> Any:
    """A stand-in with a model's configuration, some of it changed."""
    config = SimpleNamespace(**{**model.config.to_dict(), "is_encoder_decoder": False} | text)
    config.get_text_config = lambda decoder: config
    return type("SomeForCausalLM", (), {"config": config})()


def test_other_kinds_of_layers_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"^SomeForCausalLM: layers of type linear_attention cannot be served"):
        refuse_unserved(faked(tiny("llama")), ["linear_attention", "full_attention"])
    with pytest.raises(UserError, match="chunked_attention, mamba"):
        refuse_unserved(faked(tiny("llama")), ["mamba", "chunked_attention"])
    refuse_unserved(faked(tiny("llama")), ["full_attention", "sliding_attention"])


def test_encoder_decoders_and_latent_attention_are_refused() -> None:
    with pytest.raises(UserError, match="encoder-decoder"):
        refuse_unserved(faked(tiny("llama"), is_encoder_decoder=True), ["full_attention"])
    with pytest.raises(UserError, match="latent attention"):
        refuse_unserved(faked(tiny("llama"), kv_lora_rank=8), ["full_attention"])


SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def test_a_real_hybrid_model_is_refused_when_it_becomes_a_target(tmp_path: Path) -> None:
    config = Qwen3NextConfig(
        **SMALL, intermediate_size=32, num_key_value_heads=1, head_dim=16, linear_num_value_heads=2, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    loaded = load(ModelConfig(path=str(tmp_path), weights="random", dtype="float32", device="cpu"))
    with pytest.raises(UserError, match="linear_attention"):
        Target(loaded.model)


def test_a_real_encoder_decoder_is_refused_when_it_is_loaded(tmp_path: Path) -> None:
    T5ForConditionalGeneration(T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(UserError) as error:
        load(ModelConfig(path=str(tmp_path), device="cpu"))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


# Loading.


@pytest.mark.parametrize("path", ["/no/such/folder", "no-such-owner/no-such-model", "no such name"])
def test_a_path_that_is_not_there_is_one_line(path: str) -> None:
    with pytest.raises(UserError) as error:
        load(ModelConfig(path=path, device="cpu"))
    assert repr(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_folder_without_weights_is_one_line(tmp_path: Path) -> None:
    tiny("llama").config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="cannot be loaded") as error:
        load(ModelConfig(path=str(tmp_path), device="cpu"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["{", '{"model_type": "no-such-type"}', "{}"])
def test_a_config_that_makes_no_sense_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError) as error:
        load(ModelConfig(path=str(tmp_path), device="cpu"))
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_device_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    tiny("llama", dtype=torch.float32).save_pretrained(tmp_path)
    for device in ("cuda:99", "toaster"):
        with pytest.raises(UserError, match=device) as error:
            load(ModelConfig(path=str(tmp_path), device=device))
        assert "\n" not in str(error.value)


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    model = tiny("llama", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = load(ModelConfig(path=str(tmp_path), device="cpu"))
    assert loaded.tokenizer is None
    assert loaded.model.dtype == torch.float32
    assert not loaded.model.training
    ids = torch.tensor([[1, 2, 3]])
    assert loaded.model(ids).logits.equal(model(ids).logits)
    assert load(ModelConfig(path=str(tmp_path), device="cpu", dtype="bfloat16")).model.dtype == torch.bfloat16


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", [*BUILDERS, *MIXTURES])
def test_a_whole_checkpoint_is_loaded_and_one_that_misses_a_tensor_is_not(
    architecture: str, tied: bool, tmp_path: Path
) -> None:
    """transformers fills what it does not find with random numbers; what is tied is not missing."""
    tiny(architecture, dtype=torch.float32, tie_word_embeddings=tied).save_pretrained(tmp_path)
    config = ModelConfig(path=str(tmp_path), device="cpu")
    load(config)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    for name in (sorted(whole)[0], sorted(whole)[-1], next(name for name in whole if "norm" in name or "ln" in name)):
        save_file({key: tensor for key, tensor in whole.items() if key != name}, file, {"format": "pt"})
        with pytest.raises(UserError, match=r"missing or of another shape|cannot be loaded") as error:
            load(config)
        assert str(tmp_path) in str(error.value)
        assert "\n" not in str(error.value)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    tiny("llama", dtype=torch.float32).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = load_file(file)
    gone = ["model.layers.1.mlp.down_proj.weight", "model.layers.1.mlp.up_proj.weight"]
    save_file({key: tensor for key, tensor in whole.items() if key not in gone}, file, {"format": "pt"})
    for device in ("cpu", "sequential"):
        if device == "cpu" or importlib.util.find_spec("accelerate"):
            with pytest.raises(UserError, match=r"layers\.1\.mlp\.down_proj\.weight and 1 more missing"):
                load(ModelConfig(path=str(tmp_path), device=device))
    save_file(whole | {gone[0]: whole[gone[0]][:5].clone()}, file, {"format": "pt"})
    with pytest.raises(UserError, match=str(tmp_path)) as error:
        load(ModelConfig(path=str(tmp_path), device="cpu"))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["", "config.json", "geometry.json"])
def test_random_weights_come_from_a_geometry(tmp_path: Path, name: str) -> None:
    (tmp_path / (name or "config.json")).write_text(json.dumps(tiny("llama").config.to_dict() | {"dtype": "bfloat16"}))
    config = ModelConfig(path=str(tmp_path / name), weights="random", device="cpu")
    loaded = load(config)
    assert loaded.tokenizer is None
    assert loaded.model.config.hidden_size == 32
    assert loaded.model.dtype == torch.bfloat16
    same = load(config).model
    assert all(one.equal(other) for one, other in zip(loaded.model.parameters(), same.parameters(), strict=True))
    assert load(config.model_copy(update={"dtype": "float32"})).model.dtype == torch.float32
    probe(Target(loaded.model))


def test_attention_is_sdpa_except_where_scores_are_capped() -> None:
    assert verify_attention(tiny("llama").config, "auto") == "sdpa"
    assert verify_attention(tiny("llama").config, "flash_attention_2") == "sdpa"
    assert verify_attention(tiny("llama").config, "eager") == "eager"
    assert verify_attention(tiny("gemma2").config, "auto") == "eager"
    with pytest.raises(UserError, match="attention=paged"):
        verify_attention(tiny("llama").config, "paged")


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(words)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="a")))


def test_another_vocabulary_is_refused_with_sizes_and_the_first_difference() -> None:
    build = pytest.importorskip("forerun.build")
    target = Loaded(tiny("llama"), word_tokenizer(["a", "b", "c", "d"]))
    build.refuse_other_vocabulary(target, Loaded(tiny("gpt2"), word_tokenizer(["a", "b", "c", "d"])))
    build.refuse_other_vocabulary(target, Loaded(tiny("gpt2"), None))
    with pytest.raises(UserError, match=r"97.*97.*token 2 is 'c' in the target and 'x' in the draft"):
        build.refuse_other_vocabulary(target, Loaded(tiny("gpt2"), word_tokenizer(["a", "b", "x", "d"])))
    with pytest.raises(UserError, match=r"token 3 is 'd' in the target and None in the draft"):
        build.refuse_other_vocabulary(target, Loaded(tiny("gpt2"), word_tokenizer(["a", "b", "c"])))
    with pytest.raises(UserError, match=r"draft's vocabulary \(50 tokens\) is not the target's \(97 tokens\)"):
        build.refuse_other_vocabulary(target, Loaded(tiny("llama", vocab_size=50), None))


# Prefill and hidden states.


@pytest.mark.parametrize("architecture", BUILDERS)
def test_prefill_in_chunks_equals_prefill_in_one_pass(architecture: str) -> None:
    target = Target(tiny(architecture))
    prompt = torch.randint(0, VOCABULARY, (21,), generator=torch.Generator().manual_seed(0)).tolist()
    cache = target.new_cache(rows=4, capacity=32)
    with torch.inference_mode():
        logits = [target.prefill(prompt, cache, row, chunk).logits for row, chunk in enumerate((512, 1, 5, 20))]
    close = 1e-6 if target.verify_attention == "eager" else 1e-10  # eager attention takes its softmax in float32
    for other_V in logits[1:]:
        torch.testing.assert_close(other_V, logits[0], rtol=0, atol=close)
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            assert states is not None
            torch.testing.assert_close(states[1:, :, :21], states[:1, :, :21].expand(3, -1, -1, -1), rtol=0, atol=close)


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "gpt2"])
def test_hidden_states_are_those_of_the_wanted_layers(architecture: str) -> None:
    model = tiny(architecture)
    target, wanted = Target(model, features=(0, 2)), [0, 2]
    tokens = torch.randint(0, VOCABULARY, (16,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.inference_mode():
        states = model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False).hidden_states
        expected_TH = torch.cat([states[i][0] for i in wanted], -1)
        cache = target.new_cache(1, 32)
        prefilled_TH = target.prefill(tokens[:10], cache, 0, chunk=4).hidden
        chained = target.verify(chain(torch.tensor(tokens[10:11]), [tokens[11:13]]), cache).hidden
        cache.lengths = [13]
        decoy = Tree(torch.tensor([[tokens[13], 0, tokens[14], 1, tokens[15]]]), torch.tensor([[0, 0, 0, 1, 2]]), 2)
        branched = target.verify(decoy, cache).hidden
    assert prefilled_TH is not None and chained is not None and branched is not None
    assert prefilled_TH.shape == (10, 2 * 32)
    ours_TH = torch.cat([prefilled_TH, chained[0], branched[0, [0, 2, 4]]])
    torch.testing.assert_close(ours_TH, expected_TH, rtol=0, atol=1e-10)


def test_no_hidden_states_where_none_are_wanted() -> None:
    target = Target(tiny("llama"))
    cache = target.new_cache(1, 8)
    with torch.inference_mode():
        assert target.prefill([1, 2], cache, 0).hidden is None
        assert target.verify(chain(torch.tensor([3]), [[]]), cache).hidden is None
