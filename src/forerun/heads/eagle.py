"""EAGLE: one decoder layer that continues the target's hidden states (Li et al. 2024, 2025).

Version 1 (EAGLE-1 and EAGLE-2, which differ in the tree alone) predicts the target's last hidden state from the one before and
the token between, and guesses through the target's own output layer. Version 3 reads three of the target's layers, is free
in what its states mean, and has an output layer of its own, over the whole vocabulary or a part of it.

Entry j of its sequence is (the target's features at position j, the embedding of token j + 1) at rotary position j; what comes
out guesses token j + 2. Shape suffixes: B rows, N entries, H hidden size, F features' size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Cache, LlamaConfig, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding

from forerun.attention import GROUPED, register


@dataclass(frozen=True)
class EagleShape:
    hidden_size: int
    vocab_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    version: Literal[1, 3] = 3
    features: tuple[int, ...] = (-1,)  # indices into the target's hidden_states (0: the embeddings; -1: after the last norm)
    draft_vocab_size: int = 0  # 0: the whole vocabulary; version 3 only
    rms_norm_eps: float = 1e-6
    rope_parameters: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    max_position_embeddings: int = 2048
    fc_bias: bool = True  # version 1 only
    qkv_bias: bool = False  # heads for targets that have it (Qwen2)
    norm_before_residual: bool = False  # version 3: the layer adds to the normed state, not to the state as it came
    kind: Literal["eagle"] = "eagle"

    @property
    def draft_vocabulary(self) -> int:
        return self.draft_vocab_size or self.vocab_size

    def llama(self) -> LlamaConfig:
        """The layer's settings, as its attention and its cache read them."""
        register()
        config = LlamaConfig(
            vocab_size=self.vocab_size, hidden_size=self.hidden_size, intermediate_size=self.intermediate_size,
            num_hidden_layers=1, num_attention_heads=self.num_attention_heads, num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim, rms_norm_eps=self.rms_norm_eps, max_position_embeddings=self.max_position_embeddings,
            rope_parameters=dict(self.rope_parameters),
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        config._attn_implementation = GROUPED
        return config


def low_middle_high(layers: int) -> tuple[int, int, int]:
    """What version 3 reads of a target with so many layers: the states that enter layers 2, half and the last but two."""
    return min(2, layers), layers // 2, max(layers - 3, 1)


def shape_for(target: PreTrainedConfig, version: Literal[1, 3] = 3, **over: Any) -> EagleShape:
    """A head for a target: its widths, heads and rotary positions; version 3 reads a low, a middle and a high layer."""
    text: Any = target.get_text_config(decoder=True)
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    features = (-1,) if version == 1 else low_middle_high(layers)
    rope = getattr(text, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10000.0}
    rope = rope if "rope_type" in rope else next(iter(rope.values()))  # one for each type of layer: the first will do
    return EagleShape(
        **{
            "hidden_size": text.hidden_size, "vocab_size": text.vocab_size,
            "intermediate_size": getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            "num_attention_heads": heads, "num_key_value_heads": getattr(text, "num_key_value_heads", None) or heads,
            "head_dim": getattr(text, "head_dim", None) or text.hidden_size // heads,
            "version": version, "features": features, "rms_norm_eps": getattr(text, "rms_norm_eps", 1e-6),
            "rope_parameters": dict(rope), "max_position_embeddings": text.max_position_embeddings,
        }
        | over
    )  # fmt: skip


class Eagle(nn.Module):
    """The layer with its way in and, in version 3, its way out. Embeddings, and version 1's output layer, are the target's."""

    def __init__(self, shape: EagleShape) -> None:
        super().__init__()
        self.shape = shape
        config, size = shape.llama(), shape.hidden_size
        wide = 2 * size
        self.attention = LlamaAttention(config, 0)
        self.after_attention = LlamaRMSNorm(size, eps=shape.rms_norm_eps)
        self.mlp = LlamaMLP(config)
        self.rotary = LlamaRotaryEmbedding(config)
        reads = size if shape.version == 1 else wide  # version 3 reads token and state side by side
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self.attention, name, nn.Linear(reads, getattr(self.attention, name).out_features, bias=shape.qkv_bias))
        if shape.version == 1:
            self.join = nn.Linear(wide, size, bias=shape.fc_bias)
            return
        self.join = nn.Linear(len(shape.features) * size, size, bias=False)
        self.token_norm = LlamaRMSNorm(size, eps=shape.rms_norm_eps)
        self.state_norm = LlamaRMSNorm(size, eps=shape.rms_norm_eps)
        self.last_norm = LlamaRMSNorm(size, eps=shape.rms_norm_eps)
        self.output = nn.Linear(size, shape.draft_vocabulary, bias=False)
        # Token of the target's vocabulary that each entry of the output stands for.
        self.token_ids: Tensor
        self.register_buffer("token_ids", torch.arange(shape.draft_vocabulary))

    def enter(self, features: Tensor) -> Tensor:
        """The target's features [..., F] as states [..., H]; drafted states re-enter as they are."""
        return features if self.shape.version == 1 else self.join(features)

    def forward(
        self, embeds_BNH: Tensor, states_BNH: Tensor, positions_BN: Tensor, mask: Tensor | None, cache: Cache | None = None
    ) -> Tensor:
        """[B, N, H]: the states after each entry; `mask` additive [B, 1, N, S], None: causal (training)."""
        rotary = self.rotary(embeds_BNH, positions_BN)
        if self.shape.version == 1:
            residual = read = self.join(torch.cat([embeds_BNH, states_BNH], -1))
        else:
            normed = self.state_norm(states_BNH)
            residual = normed if self.shape.norm_before_residual else states_BNH
            read = torch.cat([self.token_norm(embeds_BNH), normed], -1)
        mixed = residual + self.attention(read, rotary, mask, past_key_values=cache)[0]
        states: Tensor = mixed + self.mlp(self.after_attention(mixed))
        return states

    def logits(self, states: Tensor, target_output: nn.Module) -> Tensor:
        """[..., V]: what is guessed after each state, over the target's vocabulary (version 3: the draft's, see token_ids)."""
        guessed: Tensor = target_output(states) if self.shape.version == 1 else self.output(self.last_norm(states))
        return guessed
