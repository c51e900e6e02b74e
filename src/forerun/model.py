"""A transformers causal LM as the target of speculation: load it, fill its cache, score a tree in one pass.

Shape suffixes: B rows, N nodes, T tokens, V vocabulary, H hidden size (of all wanted layers together), S slots.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import get_layer_types_and_kwargs
from transformers.utils.import_utils import is_flash_attn_2_available

from forerun.attention import GROUPED, register
from forerun.cache import KVCache
from forerun.config import EMBEDDED, ModelConfig
from forerun.graph import Graph, Mode
from forerun.tree import Tree
from forerun.types import UserError

ASSETS = Path(__file__).parent / "assets"
SERVED_LAYERS = {"full_attention", "sliding_attention"}
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Scores:
    """What the target says after each position: logits, and the wanted layers' hidden states side by side."""

    logits: Tensor  # [B, N, V]; prefill: [V], after the last token
    hidden: Tensor | None  # [B, N, H]; prefill: [T, H]


@dataclass(frozen=True)
class Loaded:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None


def load(config: ModelConfig, embedded: str = "target") -> Loaded:
    """Load a model and its tokenizer; `embedded` says which of the shipped models the path `embedded` means."""
    path = str(ASSETS / embedded) if config.path == EMBEDDED else config.path
    if not Path(path).exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise UserError(f"model {path!r}: no such file or folder; give a folder, a config.json or a hub id")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    settings = read_config(path)
    kwargs: dict[str, Any] = {"dtype": "auto" if config.dtype == "auto" else getattr(torch, config.dtype)}
    kwargs["attn_implementation"] = verify_attention(settings, config.attention)
    told: dict[str, Any] = {}
    try:
        if config.weights == "random":
            if config.dtype == "auto":
                kwargs["dtype"] = getattr(settings, "dtype", None) or torch.float32
            with torch.random.fork_rng(), torch.device(device):
                torch.manual_seed(0)
                model: PreTrainedModel = AutoModelForCausalLM.from_config(settings, **kwargs)
        else:
            spread = {"device_map": device} if device in ("balanced", "sequential") else {}
            found: Any = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True, **spread, **kwargs)
            model, told = found
            if not spread:
                model.to(torch.device(device))  # type: ignore[arg-type]
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # a cut-off file, a wrong type in a config, a missing device: no common base class
        if "DefaultCPUAllocator" in str(error):
            raise
        raise UserError(f"model {path!r} cannot be loaded on {device!r}: {first_line(error)}") from error
    refuse_incomplete(path, told)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except Exception as error:  # noqa: BLE001 a geometry without a tokenizer is fine: prompts are token ids then
        logging.getLogger(__name__).info("no tokenizer at %s: %s", path, first_line(error))
        tokenizer = None
    return Loaded(model.eval().requires_grad_(False), tokenizer)


def read_config(path: Path | str) -> PreTrainedConfig:
    """UserError where there is none that transformers can read."""
    try:
        settings: PreTrainedConfig = AutoConfig.from_pretrained(path)
    except Exception as error:  # cut off, of no known type, a field of a wrong type, not on the hub: no common base class
        raise UserError(f"model {str(path)!r} cannot be read: {first_line(error)}; give a folder or a hub id") from error
    return settings


def kv_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes of keys and values that a token of one row takes."""
    text: Any = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(2 * text.num_hidden_layers * heads * size * dtype.itemsize)


def refuse_incomplete(path: str, told: Mapping[str, Any]) -> None:
    """UserError for tensors that transformers did not find, tied ones apart: it fills them with random numbers."""
    mismatched = {key if isinstance(key, str) else key[0] for key in told.get("mismatched_keys") or ()}  # or (key, shapes)
    absent = sorted({*(told.get("missing_keys") or ()), *mismatched})
    if absent:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise UserError(f"model {path!r}: {absent[0]}{more} missing or of another shape; fetch or write it again")


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def verify_attention(settings: Any, wanted: str) -> str:
    """The attention implementation that takes our 4-D masks: SDPA, or eager where scores are soft-capped."""
    text = settings.get_text_config(decoder=True)
    if getattr(text, "attn_logit_softcapping", None) or wanted == "eager":
        return "eager"
    if wanted in ("auto", "sdpa", "flash_attention_2"):
        return "sdpa"
    raise UserError(f"model.attention={wanted}: give auto, sdpa, eager or flash_attention_2")


class Target:
    """The seam to transformers: we hand a model positions, a mask and a cache, nothing else."""

    def __init__(
        self, model: PreTrainedModel, features: Sequence[int] = (), compile: Mode = "auto", attention: str = "auto"
    ) -> None:
        self.model = model
        self.features = list(features)
        text = model.config.get_text_config(decoder=True)
        self.config = text
        self.vocabulary: int = model.get_output_embeddings().out_features
        embedding = model.get_input_embeddings().weight
        assert isinstance(embedding, Tensor)
        self.device: torch.device = embedding.device
        self.dtype: torch.dtype = embedding.dtype
        self.prefill_attention = attention if attention == "flash_attention_2" else None
        if self.prefill_attention and not is_flash_attn_2_available():
            raise UserError("model.attention=flash_attention_2 needs flash-attn and a GPU: pip install 'forerun[flash]'")
        layer_kwargs: Any
        layer_types, layer_kwargs = get_layer_types_and_kwargs(text)
        refuse_unserved(model, layer_types)
        self.mask_by_type = getattr(text, "layer_types", None) is not None
        each = layer_kwargs if isinstance(layer_kwargs, list) else [layer_kwargs]  # one for all before transformers 5.17
        windows = {kwargs["sliding_window"] for kwargs in each if kwargs.get("sliding_window")}
        if len(windows) > 1:
            raise UserError(f"{type(model).__name__} has windows of several sizes ({sorted(windows)}), which cannot be served")
        self.window: int | None = next(iter(windows), None)
        self.layer_types = set(layer_types)
        if text._attn_implementation == "sdpa":
            register()
            model.set_attn_implementation(GROUPED)
        self.verify_attention: str = text._attn_implementation
        self.mode = compile

    def new_cache(self, rows: int, capacity: int) -> KVCache:
        cache = KVCache(self.model.config, rows, capacity)
        cache.graph = Graph(partial(self._forward, cache), self.mode)
        return cache

    def prefill(self, prompt: Sequence[int], cache: KVCache, row: int, chunk: int = 512) -> Scores:
        """Fill a row with a prompt, chunk by chunk; transformers makes the causal mask [chunk, filled so far] itself."""
        assert cache.lengths[row] == 0, "the row is in use"
        ids_T = torch.tensor(prompt, device=self.device)
        hidden: list[Tensor] = []
        logits_V = None
        for start in range(0, len(prompt), chunk):
            part_T = ids_T[start : start + chunk]
            cache.plan.row, cache.plan.start = row, start
            if self.prefill_attention:
                self.model.set_attn_implementation(self.prefill_attention)
            try:
                out = self.model(
                    input_ids=part_T[None],
                    position_ids=torch.arange(start, start + len(part_T), device=self.device)[None],
                    past_key_values=cache,
                    logits_to_keep=1,
                    **self._wanted(),
                )
            finally:
                cache.plan.row, cache.plan.start = None, 0
                if self.prefill_attention:
                    self.model.set_attn_implementation(self.verify_attention)
            logits_V = out.logits[0, -1]
            if (states := self._hidden(out)) is not None:
                hidden.append(states[0])
        assert logits_V is not None, "the prompt is empty"
        cache.lengths[row] = len(prompt)
        return Scores(logits_V.to(self.device), torch.cat(hidden) if hidden else None)

    def verify(self, tree: Tree, cache: KVCache) -> Scores:
        """Score every node of the tree in one pass; its keys and values land right after each row's committed tokens."""
        slots_BN, read = cache.place(tree.size, self.device)
        if tree.is_chain:
            positions_BN = slots_BN
            reached_S = torch.arange(read, device=self.device)
            full_BNS = reached_S <= positions_BN[:, :, None]
        else:
            ancestors_BNN = tree.ancestors_BNN()
            positions_BN = slots_BN[:, :1] + ancestors_BNN.sum(-1) - 1
            full_BNS = tree_mask(slots_BN[:, 0], ancestors_BNN, read)
        masks = self._masks(full_BNS, positions_BN, slots_BN)
        assert cache.graph is not None, "a cache comes from new_cache"
        logits, hidden = cache.graph(tree.tokens_BN, positions_BN, slots_BN, *masks)
        return Scores(logits, hidden)

    def _masks(self, full_BNS: Tensor, positions_BN: Tensor, slots_BN: Tensor) -> list[Tensor]:
        """The masks that this model's layers want: full attention, sliding window, or both (in this order)."""
        masks = [full_BNS] if "full_attention" in self.layer_types else []
        if "sliding_attention" in self.layer_types:
            assert self.window is not None
            # A committed slot is its own position; a node's slot stands at the node's depth.
            places_BS = torch.arange(full_BNS.shape[2], device=self.device).expand(len(slots_BN), -1)
            places_BS = places_BS.scatter(1, slots_BN, positions_BN)
            near_BNS = positions_BN[:, :, None] - places_BS[:, None, :] < self.window
            masks.append(full_BNS & near_BNS)
        # Additive: eager attention takes no other, and SDPA on the CPU turns a boolean mask into this one in every layer.
        lowest = torch.finfo(self.dtype).min
        return [torch.zeros_like(mask, dtype=self.dtype).masked_fill_(~mask, lowest)[:, None] for mask in masks]

    def _forward(
        self, cache: KVCache, tokens_BN: Tensor, positions_BN: Tensor, slots_BN: Tensor, *masks: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """One pass of the model over static shapes: what a graph captures."""
        first_B = torch.arange(len(slots_BN), device=slots_BN.device) * cache.capacity
        cache.plan.places, cache.plan.read = (slots_BN + first_B[:, None]).flatten(), masks[0].shape[-1]
        names = [name for name in ("full_attention", "sliding_attention") if name in self.layer_types]
        mask: Any = dict(zip(names, masks, strict=True)) if self.mask_by_type else masks[0]
        out = self.model(
            input_ids=tokens_BN, position_ids=positions_BN, attention_mask=mask, past_key_values=cache, **self._wanted()
        )
        return out.logits, self._hidden(out)

    def _wanted(self) -> dict[str, Any]:
        # All of them: which layer an index in a list means changed between transformers 5.19 and 5.23.
        return {"use_cache": True, "output_hidden_states": bool(self.features)}

    def _hidden(self, out: Any) -> Tensor | None:
        if not self.features:
            return None
        return torch.cat([out.hidden_states[i].to(self.device) for i in self.features], -1)


def tree_mask(lengths_B: Tensor, ancestors_BNN: Tensor, read: int) -> Tensor:
    """[B, N, S]: each node sees the committed slots and its own ancestors' slots."""
    rows, size, _ = ancestors_BNN.shape
    node_BS = torch.arange(read, device=lengths_B.device) - lengths_B[:, None]
    own_BNS = ancestors_BNN.gather(2, node_BS.clamp(0, size - 1)[:, None].expand(rows, size, read))
    return (node_BS < 0)[:, None] | (own_BNS & (node_BS < size)[:, None])


def refuse_unserved(model: PreTrainedModel, layer_types: Sequence[str]) -> None:
    """One sentence for a model that the cache and masks cannot serve."""
    name = type(model).__name__
    other = sorted(set(layer_types) - SERVED_LAYERS)
    if other:
        raise UserError(f"{name}: layers of type {', '.join(other)} cannot be served; full and sliding-window ones can")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UserError(f"{name} is an encoder-decoder; only decoder-only causal LMs can be served")
    text = model.config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise UserError(f"{name} uses multi-head latent attention, which the cache cannot serve yet")
    if getattr(text, "num_kv_shared_layers", 0) or getattr(text, "kv_sharing_modes", None):
        raise UserError(f"{name} shares keys and values between layers, which the cache cannot serve yet")


@torch.inference_mode()
def probe(target: Target) -> None:
    """Refuse a model whose scores through our cache and masks differ from its own plain forward pass."""
    ids = [(7 * i + 3) % target.vocabulary for i in range(8)]
    name = type(target.model).__name__
    try:
        plain_TV = target.model(input_ids=torch.tensor([ids], device=target.device), use_cache=False).logits[0].double()
        cache = target.new_cache(1, 16)
        cache.graph = Graph(partial(target._forward, cache), False)  # not worth a compilation
        first_V = target.prefill(ids[:5], cache, 0, chunk=3).logits.double()
        # Node 1 is a decoy beside the true continuation 2 -> 3; which token it is must not matter to them.
        parents_BN = torch.tensor([[0, 0, 0, 2]], device=target.device)
        decoys = [torch.tensor([[ids[5], decoy, ids[6], ids[7]]], device=target.device) for decoy in (ids[0], ids[1])]
        tree_NV, other_NV = (target.verify(Tree(t, parents_BN, 2), cache).logits[0, [0, 2, 3]].double() for t in decoys)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, ImportError) as error:
        raise UserError(f"{name} cannot be served: it does not take our cache and masks ({first_line(error)})") from error
    # What is added to all of a position's scores changes no probability.
    ours_TV, plain_TV = (s - s.mean(-1, keepdim=True) for s in (torch.cat([first_V[None], tree_NV]), plain_TV[4:8]))
    off = float((ours_TV - plain_TV).norm() / plain_TV.norm())
    leak = float((other_NV - tree_NV).norm() / plain_TV.norm())
    limit = 0.1 if target.dtype in HALF else 1e-3
    if not leak < limit / 10:  # rounding is the same both times
        raise UserError(f"{name} cannot be served: its attention does not keep to our mask: a hidden token moves its scores")
    if not off < limit:
        raise UserError(f"{name} cannot be served: its scores through our cache and masks are off by {off:.1%} of its own")
