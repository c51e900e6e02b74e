"""What the tests of compression share: recipes for tiny models, and models from and to folders."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from forerun.compress.opened import open_model
from forerun.config import Compression, ModelConfig, parse
from models import prompts, tiny

SIZES = {"hidden_size": 64, "intermediate_size": 128}
CALIBRATION = {"samples": 4, "length": 24}
GPTQ = {"kind": "gptq", "bits": 4, "group_size": 32, "calibration": CALIBRATION}
RTN = {"kind": "rtn", "bits": 4, "group_size": 32}
INPUT = {"kind": "prune", "what": "input", "fraction": 0.25}
OUTPUT = {"kind": "prune", "what": "output", "fraction": 0.25}
MLP = {"kind": "prune", "what": "mlp", "fraction": 0.25}
HEADS = {"kind": "prune", "what": "heads", "fraction": 0.5}
ACTIVATION = {"score": "activation", "calibration": CALIBRATION}


def mute(what: str, done: int, total: int) -> None:
    pass


def written(folder: Path) -> Path:
    """A folder with a tiny model in it."""
    tiny("llama", dtype=torch.float32, **SIZES).save_pretrained(folder / "model")
    return folder


def config(folder: Path, *recipes: dict[str, object], model: dict[str, object] | None = None, **more: object) -> Compression:
    own = {"path": str(folder / "model"), "dtype": "float32", "device": "cpu"} | (model or {})
    return parse(Compression, {"model": own, "recipes": recipes, **more}, "test")


def opened(place: Path) -> PreTrainedModel:
    return open_model(ModelConfig(path=str(place), dtype="float32", device="cpu")).model


def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=torch.tensor([prompts()[2]])).logits
