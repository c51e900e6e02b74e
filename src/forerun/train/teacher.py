"""What the target says of a batch: hidden states to draft from and the laws to learn; computed each time, or kept on disk.

Shape suffixes: B sequences, T tokens, F features' size, H hidden size, K kept tokens of a law, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from forerun.train.data import Numbers, Sequences
from forerun.train.settings import TeachConfig


@dataclass(frozen=True)
class Lesson:
    """One batch with all that a student may read."""

    tokens_BT: Tensor
    lengths_B: Tensor
    features_BTF: Tensor  # the wanted hidden states of the target, side by side
    ids_BTK: Tensor | None  # tokens of the laws; None: the whole vocabulary in order
    probs_BTK: Tensor  # the target's law of the token after each position; where ids are given, the most probable comes first
    prompt: int  # tokens at the start that nobody drafts


class Teacher(Protocol):
    def lesson(self, picked: Numbers) -> Lesson:
        """The lesson of the sequences with these numbers."""


@dataclass(frozen=True)
class Streamed:
    """Runs the target for every lesson."""

    model: PreTrainedModel
    features: Sequence[int]
    config: TeachConfig
    sequences: Sequences
    device: torch.device

    @torch.no_grad()
    def lesson(self, picked: Numbers) -> Lesson:
        part = self.sequences.take(picked)
        tokens_BT = torch.from_numpy(part.tokens_NT).long().to(self.device)
        # Padding comes last, where causal attention keeps it from everything that counts.
        out: Any = self.model(input_ids=tokens_BT, use_cache=False, output_hidden_states=bool(self.features))
        hidden = [out.hidden_states[i].to(self.device) for i in self.features]
        features_BTF = torch.cat(hidden, -1) if hidden else tokens_BT.new_zeros((*tokens_BT.shape, 0))
        laws = (wide(out.logits.to(self.device)) / self.config.temperature).softmax(-1)
        ids = None
        if self.config.top:
            laws, ids = laws.topk(min(self.config.top, laws.shape[-1]), -1)
            laws = laws / laws.sum(-1, keepdim=True)
        return Lesson(
            tokens_BT, torch.from_numpy(part.lengths_N).to(self.device), wide(features_BTF), ids, laws, part.prompt
        )  # fmt: skip


def wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


@dataclass(frozen=True)
class Kept:
    """Lessons read from memory-mapped arrays."""

    sequences: Sequences
    features: NDArray[np.int16]  # bfloat16, which numpy does not know
    ids: NDArray[np.int32]
    probs: NDArray[np.float16]
    device: torch.device

    def lesson(self, picked: Numbers) -> Lesson:
        part = self.sequences.take(picked)
        return Lesson(
            torch.from_numpy(part.tokens_NT).long().to(self.device),
            torch.from_numpy(part.lengths_N).to(self.device),
            torch.from_numpy(self.features[picked]).view(torch.bfloat16).to(self.device).float(),
            torch.from_numpy(self.ids[picked]).long().to(self.device),
            torch.from_numpy(self.probs[picked]).to(self.device).float(),
            part.prompt,
        )  # fmt: skip


PARTS = ("features", "ids", "probs")


def keep(teacher: Streamed, folder: Path, batch: int, tell: Callable[[int, int], None]) -> Kept:
    """Run the target over all sequences once; a folder named by what went in is read back instead."""
    place = folder / key(teacher)
    if not place.exists():
        half_done = place.with_suffix(".part")
        write(teacher, half_done, batch, tell)
        half_done.rename(place)
    arrays = {name: np.load(place / f"{name}.npy", mmap_mode="r") for name in PARTS}
    return Kept(teacher.sequences, **arrays, device=teacher.device)


def key(teacher: Streamed) -> str:
    """A name that changes with the tokens, the target's weights and what is kept of it."""
    digest = hashlib.sha256(np.ascontiguousarray(teacher.sequences.tokens_NT).tobytes())
    digest.update(np.ascontiguousarray(teacher.sequences.lengths_N).tobytes())
    sums = [float(parameter.double().abs().sum()) for parameter in teacher.model.parameters()]
    digest.update(json.dumps([list(teacher.features), teacher.config.model_dump(), sums]).encode())
    return digest.hexdigest()[:16]


def write(teacher: Streamed, place: Path, batch: int, tell: Callable[[int, int], None]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {}
    count = len(teacher.sequences)
    for start in range(0, count, batch):
        picked = np.arange(start, min(start + batch, count))
        lesson = teacher.lesson(picked)
        assert lesson.ids_BTK is not None, "only laws of kept tokens go to disk"
        parts = {
            "features": lesson.features_BTF.bfloat16().view(torch.int16).cpu().numpy(),
            "ids": lesson.ids_BTK.int().cpu().numpy(),
            "probs": lesson.probs_BTK.half().cpu().numpy(),
        }
        for name, part in parts.items():
            if name not in arrays:
                shape = (count, *part.shape[1:])
                arrays[name] = np.lib.format.open_memmap(place / f"{name}.npy", mode="w+", dtype=part.dtype, shape=shape)
            arrays[name][picked] = part
        tell(start + len(picked), count)
    for array in arrays.values():
        array.flush()
