"""EAGLE heads as their project and as vLLM's speculators store them. EAGLE-2 heads are EAGLE-1's; the tree alone differs.

Sources: SafeAILab/EAGLE, eagle/model/cnets1.py (version 1), eagle/model/cnets.py (version 3, d2t and t2d),
eagle/model/modeling_llama_kv.py (which states version 3 reads: those that enter layers 2, n / 2 and n - 3),
eagle/train/EAGLE-LLaMA3-Instruct-8B.json, eagle/traineagle3/config.json; sgl-project/sglang,
python/sglang/srt/models/llama.py, and sgl-project/SpecForge, configs/*-eagle3.json (eagle_config counts layers by what leaves
them, so that its 1 is our state 2); vllm-project/speculators, src/speculators/models/eagle.py, models/eagle3/config.py,
convert/eagle/eagle_converter.py and eagle3_converter.py; vllm-project/vllm, vllm/model_executor/models/llama_eagle3.py and
vllm/transformers_utils/configs/speculators/algos.py (there the layer ids outside eagle_config are our numbers).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from forerun.heads.eagle import Eagle, EagleShape, low_middle_high
from forerun.heads.formats.files import Found, Parts, Source, renamer, type_name
from forerun.types import UserError

LAYERS_READ = "eagle_aux_hidden_state_layer_ids"
# What heads of later versions compute, some of it without a tensor that would tell.
VARIANTS = ("fc_norm", "norm_before_fc", "norm_output", "embed_requires_grad", "layernorms", "add_para_norm")
# Tensors that a file may hold beside the head's own: the target's, and what follows from the settings.
EXTRAS = ("embed_tokens.weight", "verifier_lm_head.weight", "verifier_norm.weight", "d2t", "t2d")


def read_1(source: Source) -> Found:
    """The project's EAGLE-1 and EAGLE-2; without `bias` in config.json the joining layer has one."""
    settings = source.settings
    return version_1(source, settings, "layers.0", "fc", settings.get("bias", True), settings.get("qkv_bias", False))


def read_3(source: Source) -> Found:
    """The project's EAGLE-3; its layer may have vLLM's name for it."""
    settings = source.settings
    layer = "midlayer" if source.holds("midlayer.") else "layers.0"
    return version_3(source, settings, layer, settings.get("norm_before_residual", False))


def read_speculators(source: Source) -> Found:
    settings = source.settings
    kind, layer = settings["speculators_model_type"], settings["transformer_layer_config"]
    if kind not in ("eagle", "eagle3"):
        raise source.error(f"speculators_model_type={kind}; forerun reads eagle and eagle3")
    if layer.get("model_type", "llama") != "llama":
        raise source.error(f"transformer_layer_config.model_type={layer['model_type']}; forerun computes llama layers alone")
    if kind == "eagle":
        return version_1(source, layer, "transformer", "fusion_fc", settings.get("fusion_bias", False))
    return version_3(source, layer, "layers.0", settings["norm_before_residual"])


def version_1(source: Source, layer: dict[str, Any], prefix: str, join: str, bias: bool, qkv_bias: bool = False) -> Found:
    shape = llama_shape(source, layer, layer["vocab_size"], version=1, features=(-1,), fc_bias=bias, qkv_bias=qkv_bias)
    return Found(shape, names(prefix, join), own_tensors(source, shape))


def version_3(source: Source, layer: dict[str, Any], prefix: str, norm_before_residual: bool) -> Found:
    tensors = source.tensors
    vocabulary: int = tensors["t2d"].shape[0] if "t2d" in tensors else layer["vocab_size"]
    speaks = source.settings.get("draft_vocab_size") or vocabulary
    shape = llama_shape(
        source, layer, vocabulary, version=3, features=layers_read(source), norm_before_residual=norm_before_residual,
        draft_vocab_size=0 if speaks == vocabulary else speaks,
    )  # fmt: skip
    return Found(shape, names(prefix), own_tensors(source, shape) | {"token_ids": token_ids(source, shape)})


def names(layer: str, join: str = "fc") -> Callable[[str], str]:
    return renamer(
        {
            "attention": f"{layer}.self_attn",
            "mlp": f"{layer}.mlp",
            "after_attention": f"{layer}.post_attention_layernorm",
            "token_norm": f"{layer}.input_layernorm",
            "state_norm": f"{layer}.hidden_norm",
            "last_norm": "norm",
            "output": "lm_head",
            "join": join,
        }
    )


def llama_shape(source: Source, layer: dict[str, Any], vocabulary: int, version: Literal[1, 3], **own: Any) -> EagleShape:
    """A shape from a llama layer's settings; UserError where they ask for what forerun does not compute."""
    settings, size, heads = source.settings, layer["hidden_size"], layer["num_attention_heads"]
    asked = settings | (settings.get("eagle_config") or {})
    for variant in VARIANTS:
        if asked.get(variant):
            raise source.error(f"{variant} is set: a variant of EAGLE that forerun does not compute")
    if not asked.get("use_aux_hidden_state", True):
        raise source.error("use_aux_hidden_state is off: a variant of EAGLE-3 that forerun does not compute")
    if (settings.get("target_hidden_size") or size) != size:
        raise source.error(f"hidden_size={size} is not the target's {settings['target_hidden_size']}, which forerun needs")
    if layer.get("hidden_act", "silu") != "silu":
        raise source.error(f"hidden_act={layer['hidden_act']}; forerun computes silu alone")
    return EagleShape(
        hidden_size=size, vocab_size=vocabulary, intermediate_size=layer["intermediate_size"], num_attention_heads=heads,
        num_key_value_heads=layer.get("num_key_value_heads") or heads, head_dim=layer.get("head_dim") or size // heads,
        version=version, rms_norm_eps=layer.get("rms_norm_eps", 1e-6), rope_parameters=rotary(layer),
        max_position_embeddings=layer.get("max_position_embeddings", 2048), **own,
    )  # fmt: skip


def rotary(layer: dict[str, Any]) -> dict[str, Any]:
    """Rotary positions as transformers wants them, from either way to say them."""
    given = dict(layer.get("rope_parameters") or layer.get("rope_scaling") or {})
    kind = given.pop("type", "default")
    return {"rope_type": kind, "rope_theta": layer.get("rope_theta") or 10000.0} | given


def layers_read(source: Source) -> tuple[int, ...]:
    """Indices into the target's hidden states, 0 being the embeddings; its last, before the last norm, is not to be had."""
    settings, layers = source.settings, source.target_layers
    leaving, entering = (settings.get("eagle_config") or {}).get(LAYERS_READ), settings.get(LAYERS_READ)
    if leaving:
        read = tuple(number + 1 for number in leaving)
    elif entering:
        read = tuple(entering)
    elif layers is None:
        raise source.error(f"does not say which of its target's layers it reads ({LAYERS_READ}); load it with its target")
    else:
        read = low_middle_high(layers)
    if min(read) < 0 or (layers is not None and max(read) >= layers):
        raise source.error(
            f"{LAYERS_READ} asks for hidden states {read} of a target with {layers} layers; give a head made for it"
        )
    return read


def own_tensors(source: Source, shape: EagleShape) -> dict[str, Tensor]:
    """Without the target's embeddings and other extras."""
    embeddings = source.tensors.get("embed_tokens.weight")
    if embeddings is not None and embeddings.shape != (shape.vocab_size, shape.hidden_size):
        raise source.error(f"embed_tokens.weight has shape {list(embeddings.shape)}; its config.json is of another head")
    return {
        name: tensor
        for name, tensor in source.tensors.items()
        if name not in EXTRAS and not name.endswith("rotary_emb.inv_freq")
    }


def token_ids(source: Source, shape: EagleShape) -> Tensor:
    """The target's token for each of the head's: i + d2t[i]; t2d must mark the same tokens."""
    own, offsets, marks = torch.arange(shape.draft_vocabulary), source.tensors.get("d2t"), source.tensors.get("t2d")
    if offsets is None:
        if shape.draft_vocab_size:
            raise source.error(f"lacks d2t, which says what its {shape.draft_vocab_size} tokens are to the target")
        return own
    if offsets.shape != own.shape:
        raise source.error(f"d2t has shape {list(offsets.shape)}, draft_vocab_size is {shape.draft_vocabulary}")
    ids = own + offsets
    if len(ids.unique()) < len(ids) or ids.min() < 0 or ids.max() >= shape.vocab_size:
        raise source.error("d2t does not give each token of the head one of the target's")
    if shape.draft_vocab_size and marks is not None and not torch.equal(marks.nonzero()[:, 0], ids.sort().values):
        raise source.error("d2t and t2d disagree about the tokens that the head can say; fetch the folder anew")
    return ids


def write(head: Eagle) -> Parts:
    """The project's own layout, EAGLE-1 or EAGLE-3 by the head's version; UserError where it cannot say what the head does."""
    shape = head.shape
    settings: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "torch_dtype": type_name(head)} | llama_settings(shape)
    refuse_unsayable(shape)
    if shape.version == 1:
        return Parts(settings | {"bias": shape.fc_bias, "qkv_bias": shape.qkv_bias}, written(head, "layers.0"))
    if shape.norm_before_residual or shape.qkv_bias:
        raise UserError("layout=eagle3 has no norm_before_residual and no qkv_bias; write this head in forerun's own layout")
    settings |= {
        "draft_vocab_size": shape.draft_vocabulary,
        "eagle_config": {LAYERS_READ: [number - 1 for number in shape.features], "use_aux_hidden_state": True},
    }
    return Parts(settings, written(head, "midlayer"))


def write_speculators(head: Eagle, target_name: str, tokens: int) -> Parts:
    """vLLM's speculators: `tokens` is how many it drafts a round where nobody says otherwise."""
    shape = head.shape
    refuse_unsayable(shape)
    if shape.qkv_bias:
        raise UserError("layout=speculators has no bias on queries, keys and values alone; write this head in layout eagle")
    proposal = {"proposal_type": "greedy", "speculative_tokens": tokens, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    kind = "eagle" if shape.version == 1 else "eagle3"
    settings: dict[str, Any] = {
        "speculators_model_type": kind,
        "speculators_config": {
            "algorithm": kind, "proposal_methods": [proposal], "default_proposal_method": "greedy",
            "verifier": {"name_or_path": target_name, "architectures": []},
        },
        "transformer_layer_config": llama_settings(shape), "torch_dtype": type_name(head),
    }  # fmt: skip
    if shape.version == 1:
        settings |= {"architectures": ["EagleSpeculator"], "layernorms": False, "fusion_bias": shape.fc_bias}
        return Parts(settings, written(head, "transformer", "fusion_fc"))
    settings |= {
        "architectures": ["Eagle3Speculator"], "draft_vocab_size": shape.draft_vocabulary, "target_hidden_size": None,
        "norm_before_residual": shape.norm_before_residual, LAYERS_READ: list(shape.features),
    }  # fmt: skip
    return Parts(settings, written(head, "layers.0"))


def refuse_unsayable(shape: EagleShape) -> None:
    if not (shape.features == (-1,) if shape.version == 1 else min(shape.features) >= 0):
        raise UserError(
            f"features={shape.features}: public layouts have no name for them; write the head in forerun's own layout"
        )


def written(head: Eagle, layer: str, join: str = "fc") -> dict[str, Tensor]:
    """Tensors under public names; the maps between the vocabularies where the head speaks a part of its target's."""
    rename, own = names(layer, join), head.state_dict()
    ids = own.pop("token_ids", None)
    tensors = {rename(name): tensor for name, tensor in own.items()}
    if ids is None:
        return tensors
    ids = ids.cpu()
    if not head.shape.draft_vocab_size and torch.equal(ids, torch.arange(len(ids))):
        return tensors
    marks = torch.zeros(head.shape.vocab_size, dtype=torch.bool)
    marks[ids] = True
    return tensors | {"d2t": ids - torch.arange(len(ids)), "t2d": marks}


def llama_settings(shape: EagleShape) -> dict[str, Any]:
    scaling = dict(shape.rope_parameters)
    theta, kind = scaling.pop("rope_theta", 10000.0), scaling.get("rope_type", "default")
    return {
        "model_type": "llama", "hidden_act": "silu", "num_hidden_layers": 1, "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False,
        "hidden_size": shape.hidden_size, "intermediate_size": shape.intermediate_size, "vocab_size": shape.vocab_size,
        "num_attention_heads": shape.num_attention_heads, "num_key_value_heads": shape.num_key_value_heads,
        "head_dim": shape.head_dim, "rms_norm_eps": shape.rms_norm_eps,
        "max_position_embeddings": shape.max_position_embeddings,
        "rope_theta": theta, "rope_scaling": None if kind == "default" else scaling | {"type": kind},
    }  # fmt: skip
