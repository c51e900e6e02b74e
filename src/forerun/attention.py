"""Attention over a static cache: grouped queries without repeating keys and values.

Shape suffixes: B rows, N query tokens, Q query heads, K key-value heads, G = Q / K queries a group, S slots, H head size.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

GROUPED = "forerun_grouped"
"""The name to give to `model.set_attn_implementation` after `register`."""


SPECIAL = ("position_bias", "cache", "softcap", "output_attentions")
"""Arguments that change the scores or the keys, which transformers' own function knows how to serve."""


def register() -> None:
    """Make GROUPED known to transformers; masks are made as for its SDPA. Calling it twice changes nothing."""
    AttentionInterface.register(GROUPED, grouped_attention)
    AttentionMaskInterface.register(GROUPED, sdpa_mask)


def grouped_attention(
    module: nn.Module,
    query_BQNH: Tensor,
    key_BKSH: Tensor,
    value_BKSH: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention [B, N, Q, H] with a mask [B, 1, N, S], boolean or additive; anything else goes to transformers' SDPA.

    The G queries that share a key head become G x N queries of that head, so keys and values are read where they lie.
    """
    rows, query_heads, nodes, size = query_BQNH.shape
    heads = key_BKSH.shape[1]
    special = any(kwargs.get(name) is not None and kwargs[name] is not False for name in SPECIAL)
    if attention_mask is None or attention_mask.shape[1] != 1 or special or dropout or heads == query_heads:
        return sdpa_attention_forward(
            module, query_BQNH, key_BKSH, value_BKSH, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    group = query_heads // heads
    mask = attention_mask
    if nodes > 1:
        mask = mask[:, :, None].expand(-1, -1, group, -1, -1).reshape(mask.shape[0], 1, group * nodes, mask.shape[3])
    mixed = functional.scaled_dot_product_attention(
        query_BQNH.reshape(rows, heads, group * nodes, size), key_BKSH, value_BKSH, attn_mask=mask, scale=scaling
    )
    mixed_BQNH = mixed.reshape(rows, query_heads, nodes, value_BKSH.shape[3])
    return mixed_BQNH.transpose(1, 2).contiguous(), None
