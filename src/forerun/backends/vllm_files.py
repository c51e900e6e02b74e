"""The folders that vLLM is to read: models with their recipes applied, and heads in a layout that it knows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from forerun import __version__
from forerun.backends.vllm_args import Draft
from forerun.compress.cache import cache_folder, compressed
from forerun.compress.identity import files
from forerun.compress.opened import model_place
from forerun.compress.restore import pruned_layers, read_settings
from forerun.config import EMBEDDED, DraftModelConfig, EagleConfig, MedusaConfig, MLPConfig, ModelConfig, Variant
from forerun.heads import Medusa, MLPSpeculator, formats
from forerun.heads.formats.files import Parts
from forerun.heads.store import Head, load, write_folder
from forerun.model import ASSETS, read_config
from forerun.types import UserError

HeadConfig = MedusaConfig | MLPConfig | EagleConfig
SPECULATORS = "speculators_model_type"
METHODS = {"medusa": "medusa", "mlp": "mlp_speculator"}


def target_folder(config: ModelConfig, embedded: str, say: Callable[[str], None]) -> str:
    """A folder, or the hub id as it is."""
    if config.recipes:
        return readable(compressed(config, embedded, say, lambda _what, _done, _all: None))
    if config.path != EMBEDDED and not Path(config.path).exists():
        return config.path
    place = model_place(config.path, embedded)
    return readable(place.parent if place.is_file() else place)  # random weights may come from a config.json alone


def readable(folder: Path) -> str:
    """The folder; UserError where layers in it are of forerun's own kind, which no other library reads."""
    try:
        pruned = pruned_layers(read_settings(folder))
    except UserError:  # vLLM says what is wrong with it
        pruned = {}
    if pruned:
        raise UserError(
            f"model folder {folder}: vLLM does not read layers that were pruned with what=input or what=output; prune with "
            "what=mlp or what=heads, or measure it with backend=forerun"
        )
    return str(folder)


def find_draft(variant: Variant, say: Callable[[str], None]) -> Draft | None:
    """The draft model or head; a head of forerun's own layout is written into the cache first. None without either."""
    drafter = variant.drafter
    if isinstance(drafter, DraftModelConfig):
        own = ModelConfig(path=drafter.path, dtype=drafter.dtype, weights=drafter.weights, recipes=drafter.recipes)
        return Draft(target_folder(own, "draft", say), "draft_model")
    return find_head(drafter, variant.model) if isinstance(drafter, HeadConfig) else None


def find_head(config: HeadConfig, target: ModelConfig) -> Draft:
    """A copy in the layout that vLLM reads as it is meant, made once; a head that forerun does not read goes as it is.

    Medusa drafts as many tokens as it has heads, at most.
    """
    folder = ASSETS / config.kind if config.path == EMBEDDED else Path(config.path)
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # a hub id, or what vLLM will say of it
        return Draft(config.path, METHODS.get(config.kind) or ("eagle3" if "eagle3" in config.path.lower() else "eagle"))
    said = [__version__, str(folder.resolve()), files(folder)]
    place = cache_folder() / f"vllm-{config.kind}-{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]}"
    if not place.exists():
        try:
            head, _ = load(folder, None, geometry(target))
        except UserError:
            if "kind" in settings:  # our own layout, which vLLM does not know
                raise
            return Draft(str(folder), method(config, settings))
        if head.shape.kind != config.kind:
            raise UserError(f"drafter.path={config.path} holds a head of kind {head.shape.kind}, not {config.kind}")
        parts = without_bias(formats.parts_of(head, layout(head), target.path, max(config.k, 1)))
        write_folder(place, parts.settings, parts.tensors)
    settings = json.loads((place / "config.json").read_text(encoding="utf-8"))
    return Draft(str(place), method(config, settings), settings["num_heads"] if config.kind == "medusa" else None)


def method(config: HeadConfig, settings: dict[str, Any]) -> str:
    """vLLM's name for a head of a public layout."""
    third = "draft_vocab_size" in settings or settings.get(SPECULATORS) == "eagle3"
    return METHODS.get(config.kind) or ("eagle3" if third else "eagle")


def layout(head: Head) -> str:
    """The one of our layouts that vLLM reads as it is meant.

    EAGLE-3 as `speculators`, for vLLM takes the layers of `eagle_config` for those one below, other than who writes them.
    """
    if isinstance(head, Medusa):
        return "vllm-medusa"
    if isinstance(head, MLPSpeculator):
        return "mlp"
    return "eagle" if head.shape.version == 1 else "speculators"


def without_bias(parts: Parts) -> Parts:
    """An EAGLE-1 head that computes the same without a bias b in its joining layer, which vLLM does not have.

    Its attention reads x + b, which is W x + W b; what passes the attention by gets b where the attention's output joins it.
    """
    tensors, at = dict(parts.tensors), "layers.0.self_attn."
    bias = tensors.pop("fc.bias", None)
    if bias is None:
        return parts
    for name in ("q_proj", "k_proj", "v_proj"):
        moved = (tensors[f"{at}{name}.weight"].double() @ bias.double()).to(bias.dtype)
        tensors[f"{at}{name}.bias"] = moved + tensors.get(f"{at}{name}.bias", 0)
    tensors[f"{at}o_proj.bias"] = bias
    return Parts(parts.settings | {"bias": False, "qkv_bias": True, "attention_bias": True}, tensors)


def geometry(config: ModelConfig, embedded: str = "target") -> PreTrainedConfig:
    path = target_folder(config.model_copy(update={"recipes": ()}), embedded, lambda _: None)
    return read_config(path)


def longest(variant: Variant) -> int | None:
    """Most positions that target and draft model both know; None where neither says."""
    fitting = [geometry(variant.model)]
    if isinstance(variant.drafter, DraftModelConfig):
        fitting.append(geometry(ModelConfig(path=variant.drafter.path), "draft"))
    limits = [getattr(one.get_text_config(decoder=True), "max_position_embeddings", None) for one in fitting]
    return min((limit for limit in limits if limit), default=None)
