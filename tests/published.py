"""Folders of heads as other projects document them, made by hand: settings, names and shapes of tensors, at tiny sizes."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from forerun.heads import Eagle, formats

HIDDEN, INNER, WIDE, VOCABULARY, SPOKEN, HEADS, KEYS, SIZE = 16, 12, 24, 23, 9, 4, 2, 4
THETA, EPS, LAYERS = 5000.0, 1e-5, 12
IDS = "eagle_aux_hidden_state_layer_ids"
LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": HIDDEN,
    "intermediate_size": WIDE, "max_position_embeddings": 64, "num_attention_heads": HEADS, "num_key_value_heads": KEYS,
    "num_hidden_layers": 1, "rms_norm_eps": EPS, "vocab_size": VOCABULARY, "rope_theta": THETA, "tie_word_embeddings": False,
}  # fmt: skip


@dataclass(frozen=True)
class Folder:
    """Settings and tensors as a project documents them; `layout` is the name by which forerun writes the same."""

    layout: str
    settings: dict[str, Any]
    tensors: dict[str, Tensor]
    file: str = "model.safetensors"
    optional: tuple[str, ...] = ()  # tensors that a folder may go without

    def at(self, path: Path) -> Path:
        path.mkdir()
        (path / "config.json").write_text(json.dumps(self.settings))
        if self.file.endswith(".safetensors"):
            save_file(self.tensors, path / self.file)
        else:
            torch.save(self.tensors, path / self.file)
        return path


def draw(*sizes: int) -> Tensor:
    return torch.randn(*sizes, dtype=torch.float64) * 0.4


def layer(prefix: str, reads: int, bias: bool = False) -> dict[str, Tensor]:
    """A llama layer's attention, feed-forward and second norm."""
    tensors = {
        f"{prefix}.self_attn.q_proj.weight": draw(HEADS * SIZE, reads),
        f"{prefix}.self_attn.k_proj.weight": draw(KEYS * SIZE, reads),
        f"{prefix}.self_attn.v_proj.weight": draw(KEYS * SIZE, reads),
        f"{prefix}.self_attn.o_proj.weight": draw(HIDDEN, HEADS * SIZE),
        f"{prefix}.mlp.gate_proj.weight": draw(WIDE, HIDDEN),
        f"{prefix}.mlp.up_proj.weight": draw(WIDE, HIDDEN),
        f"{prefix}.mlp.down_proj.weight": draw(HIDDEN, WIDE),
        f"{prefix}.post_attention_layernorm.weight": draw(HIDDEN),
    }
    rows = {"q": HEADS * SIZE, "k": KEYS * SIZE, "v": KEYS * SIZE} if bias else {}
    return tensors | {f"{prefix}.self_attn.{name}_proj.bias": draw(count) for name, count in rows.items()}


def medusa(file: str = "medusa_lm_head.pt", prefix: str = "") -> Folder:
    tensors = {}
    for head in range(3):
        for block in range(2):
            tensors |= {
                f"{prefix}{head}.{block}.linear.weight": draw(HIDDEN, HIDDEN),
                f"{prefix}{head}.{block}.linear.bias": draw(HIDDEN),
            }
        tensors[f"{prefix}{head}.2.weight"] = draw(VOCABULARY, HIDDEN)
    if prefix:  # beside the model's own
        tensors["base_model.model.norm.weight"] = draw(HIDDEN)
    settings = {"base_model_name_or_path": "a/target", "medusa_num_heads": 2, "medusa_num_layers": 2}
    return Folder("medusa", settings, tensors, file)


def vllm_medusa(bias: bool = True) -> Folder:
    tensors = {}
    for head in range(3):
        for block in range(2):
            tensors[f"blocks.{head}.layers.{block}.weight"] = draw(HIDDEN, HIDDEN)
            if bias:
                tensors[f"blocks.{head}.layers.{block}.bias"] = draw(HIDDEN)
        tensors[f"lm_heads.{head}.weight"] = draw(VOCABULARY, HIDDEN)
    settings = {
        "architectures": ["MedusaModel"], "model_type": "medusa", "hidden_size": HIDDEN, "vocab_size": VOCABULARY,
        "num_heads": 3, "num_hidden_layers": 2, "medusa_fc_bias": bias,
    }  # fmt: skip
    return Folder("vllm-medusa", settings, tensors)


def mlp(tied: bool = False) -> Folder:
    tensors = {}
    for step in range(3):
        if not tied or step == 0:
            tensors |= {
                f"speculator.emb.{step}.weight": draw(VOCABULARY, INNER),
                f"speculator.ln.{step}.weight": draw(INNER),
                f"speculator.ln.{step}.bias": draw(INNER),
                f"speculator.head.{step}.weight": draw(VOCABULARY, INNER),
            }
        if not tied or step < 2:
            tensors[f"speculator.proj.{step}.weight"] = draw(INNER, INNER if step else HIDDEN)
    settings = {
        "architectures": ["MLPSpeculatorPreTrainedModel"], "model_type": "mlp_speculator", "emb_dim": HIDDEN,
        "inner_dim": INNER, "n_candidates": 5, "n_predict": 3, "top_k_tokens_per_head": [5, 3, 2], "vocab_size": VOCABULARY,
    } | ({"tie_weights": True, "scale_input": True} if tied else {})  # fmt: skip
    return Folder("mlp", settings, tensors)


def eagle1(bias: bool = True, qkv_bias: bool = False, file: str = "pytorch_model.bin") -> Folder:
    extras = {"embed_tokens.weight": draw(VOCABULARY, HIDDEN), "layers.0.self_attn.rotary_emb.inv_freq": draw(SIZE // 2)}
    tensors = layer("layers.0", HIDDEN, qkv_bias) | extras | {"fc.weight": draw(HIDDEN, 2 * HIDDEN)}
    settings = LLAMA | ({"qkv_bias": True} if qkv_bias else {}) | ({} if bias else {"bias": False})
    return Folder("eagle", settings, tensors | ({"fc.bias": draw(HIDDEN)} if bias else {}), file, tuple(extras))


def vocabulary_maps() -> dict[str, Tensor]:
    ids = torch.randperm(VOCABULARY)[:SPOKEN].sort().values
    return {"d2t": ids - torch.arange(SPOKEN), "t2d": torch.isin(torch.arange(VOCABULARY), ids)}


def eagle3(prefix: str = "midlayer", whole: bool = False, **extra: Any) -> Folder:
    tensors = layer(prefix, 2 * HIDDEN) | {
        f"{prefix}.hidden_norm.weight": draw(HIDDEN),
        f"{prefix}.input_layernorm.weight": draw(HIDDEN),
        "norm.weight": draw(HIDDEN),
        "fc.weight": draw(HIDDEN, 3 * HIDDEN),
        "lm_head.weight": draw(VOCABULARY if whole else SPOKEN, HIDDEN),
    }
    settings = LLAMA | {"draft_vocab_size": VOCABULARY if whole else SPOKEN} | extra
    return Folder("eagle3", settings, tensors | ({} if whole else vocabulary_maps()), optional=("t2d",))


def speculators(kind: str, settings: dict[str, Any], tensors: dict[str, Tensor], optional: tuple[str, ...] = ()) -> Folder:
    proposal = {"proposal_type": "greedy", "speculative_tokens": 3, "accept_tolerance": 0.0, "verifier_accept_k": 1}
    common = {
        "speculators_model_type": kind, "transformer_layer_config": {k: v for k, v in LLAMA.items() if k != "architectures"},
        "speculators_config": {
            "algorithm": kind, "default_proposal_method": "greedy", "proposal_methods": [proposal],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "a/target"},
        },
    }  # fmt: skip
    return Folder("speculators", common | settings, tensors, optional=optional)


def speculators1() -> Folder:
    tensors = layer("transformer", HIDDEN) | {"fusion_fc.weight": draw(HIDDEN, 2 * HIDDEN), "fusion_fc.bias": draw(HIDDEN)}
    return speculators("eagle", {"architectures": ["EagleSpeculator"], "layernorms": False, "fusion_bias": True}, tensors)


def speculators3(norm_before_residual: bool = True) -> Folder:
    own = eagle3("layers.0")
    settings = {
        "architectures": ["Eagle3Speculator"], "draft_vocab_size": SPOKEN, "norm_before_residual": norm_before_residual,
        "target_hidden_size": None, IDS: [2, 6, 9],
    }  # fmt: skip
    extras = {"embed_tokens.weight": draw(VOCABULARY, HIDDEN)}
    return speculators("eagle3", settings, own.tensors | extras, ("t2d", *extras))


MADE: dict[str, Callable[[], Folder]] = {
    "medusa": medusa,
    "medusa in safetensors": lambda: medusa("medusa_lm_head.safetensors"),
    "medusa beside its model": lambda: medusa("model.safetensors", "medusa_head."),
    "vllm-medusa": vllm_medusa,
    "vllm-medusa without biases": lambda: vllm_medusa(bias=False),
    "mlp": mlp,
    "mlp tied": lambda: mlp(tied=True),
    "eagle": eagle1,
    "eagle without fc.bias": lambda: eagle1(bias=False, file="model.safetensors"),
    "eagle with qkv biases": lambda: eagle1(qkv_bias=True),
    "eagle3": eagle3,
    "eagle3 under vllm's name": lambda: eagle3("layers.0"),
    "eagle3 with the whole vocabulary": lambda: eagle3(whole=True),
    "eagle3 with its layers": lambda: eagle3(eagle_config={IDS: [1, 5, 8], "use_aux_hidden_state": True}),
    "speculators eagle": speculators1,
    "speculators eagle3": speculators3,
    "speculators eagle3, norm after": lambda: speculators3(norm_before_residual=False),
}


def fetch(name: str, path: Path) -> tuple[Folder, Path]:
    """A folder from MADE, and where it was put."""
    made = MADE[name]()
    return made, made.at(path / "head")


def read(path: Path) -> Any:
    """With all that its target could say."""
    return formats.read(path, HIDDEN, VOCABULARY, LAYERS)


def run(head: Eagle, embeds: Tensor, features: Tensor) -> Tensor:
    """States [tokens, size] of one sequence, causal."""
    return head(embeds[None], head.enter(features[None]), torch.arange(len(embeds))[None], None)[0]
