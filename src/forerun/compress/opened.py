"""Opens any model: a plain one, one that bitsandbytes quantized, or a folder of GPTQ or pruned layers."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils.hub import cached_file

from forerun.compress import checkpoint
from forerun.config import EMBEDDED, ModelConfig
from forerun.model import ASSETS, Loaded, first_line, load, verify_attention
from forerun.types import UserError


def open_model(config: ModelConfig, embedded: str = "target") -> Loaded:
    """The model as it lies on disk, its recipes not applied; quantized and pruned layers are `CodedLinear` and pruned ones."""
    place = None if config.weights == "random" else coded_place(config.path)
    if place is None:
        return load(config, embedded)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device in ("auto", "balanced") else config.device
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    attention = verify_attention(AutoConfig.from_pretrained(place), config.attention)
    try:
        model = checkpoint.load(place, device, dtype, attention)
    except (RuntimeError, AssertionError) as error:  # no such device, or a torch without it
        raise UserError(f"model {config.path!r} cannot be loaded on {device!r}: {first_line(error)}") from error
    return Loaded(model, read_tokenizer(place))


def read_tokenizer(place: Path | str) -> PreTrainedTokenizerBase | None:
    """None where there is none: prompts are token ids then."""
    try:
        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(place)
        return found
    except Exception as error:  # noqa: BLE001 as forerun.model.load does
        logging.getLogger(__name__).info("no tokenizer at %s: %s", place, first_line(error))
        return None


def coded_place(path: str) -> Path | None:
    """The folder of a GPTQ or pruned checkpoint, fetched from the Hub where it is there; None for any other model."""
    if path == EMBEDDED:
        return None
    if Path(path).exists():
        return Path(path) if checkpoint.is_coded(Path(path)) else None
    try:
        settings = model_place(path)
    except UserError:
        return None  # loading says what is wrong with it
    if not checkpoint.is_coded(settings):
        return None
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path))


def model_place(path: str, embedded: str = "target") -> Path:
    """Where a model's files lie; a hub id's are those of the revision that was fetched."""
    if path == EMBEDDED:
        return ASSETS / embedded
    if Path(path).exists():
        return Path(path)
    try:
        return Path(str(cached_file(path, "config.json"))).parent
    except Exception as error:  # no such model, no network: no common base class
        raise UserError(f"model {path!r} cannot be read: {first_line(error)}; give a folder or a hub id") from error
