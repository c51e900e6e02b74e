"""Opens any model: a plain one, one that bitsandbytes quantized, or a folder of GPTQ or pruned layers."""

from __future__ import annotations

import logging
from fnmatch import fnmatch
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from forerun.compress import bnb, checkpoint
from forerun.config import EMBEDDED, ModelConfig
from forerun.model import ASSETS, Loaded, first_line, load, read_config, verify_attention
from forerun.types import UserError

SETTINGS = ("*.json", "*.model", "*.jinja", "*.tiktoken", "vocab.txt", "merges.txt")
"""Files of a hub model that are no weights: its config and its tokenizer."""
WEIGHTS = ("*.safetensors", "*.bin")
"""Its weights: those of the first kind that it has."""
OTHERS = ("*/*", "consolidated*", "optimizer.bin", "training_args.bin")
"""Files of these kinds that transformers does not load."""


def open_model(config: ModelConfig, embedded: str = "target") -> Loaded:
    """The model as it lies on disk, its recipes not applied; quantized and pruned layers are `CodedLinear` and pruned ones."""
    place = None if config.weights == "random" else coded_place(config.path)
    if place is None:
        bnb.hush()
        return load(config, embedded)
    device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device in ("auto", "balanced") else config.device
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    attention = verify_attention(read_config(place), config.attention)
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


def hub_files(place: Path, *, weights: bool) -> list[Path]:
    """The files of a hub model that `model_place` fetches, whatever else lies beside them."""
    found = sorted(path for path in place.iterdir() if not any(fnmatch(path.name, other) for other in OTHERS))
    held = [kind for kind in WEIGHTS if weights and any(fnmatch(path.name, kind) for path in found)]
    return [path for path in found if path.is_file() and any(fnmatch(path.name, one) for one in (*SETTINGS, *held[:1]))]


def coded_place(path: str) -> Path | None:
    """The folder of a GPTQ or pruned checkpoint, fetched from the Hub where it is there; None for any other model."""
    if path == EMBEDDED:
        return None
    if Path(path).exists():
        return Path(path) if checkpoint.is_coded(Path(path)) else None
    try:
        place = model_place(path)
    except UserError:
        return None  # loading says what is wrong with it
    return place if checkpoint.is_coded(place) else None


def model_place(path: str, embedded: str = "target", *, weights: bool = True) -> Path:
    """Where a model's files lie; those of a hub id are all fetched, but for its weights where they are not wanted."""
    if path == EMBEDDED:
        return ASSETS / embedded
    if Path(path).exists():
        return Path(path)
    from huggingface_hub import snapshot_download

    def fetch(*wanted: str) -> Path:
        return Path(snapshot_download(path, allow_patterns=[*SETTINGS, *wanted], ignore_patterns=list(OTHERS)))

    try:
        if not weights:
            return fetch()
        place = fetch(WEIGHTS[0])
        return place if any(place.glob(WEIGHTS[0])) else fetch(WEIGHTS[1])
    except Exception as error:  # no such model, no network: no common base class
        raise UserError(f"model {path!r} cannot be read: {first_line(error)}; give a folder or a hub id") from error
