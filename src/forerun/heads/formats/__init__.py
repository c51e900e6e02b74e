"""Heads in the layouts of other projects: Medusa, MLP speculator, EAGLE, vLLM's speculators.

| layout | head | tensors in |
|---|---|---|
| `medusa` | medusa | medusa_lm_head.pt (or .safetensors) |
| `vllm-medusa` | medusa | model.safetensors |
| `mlp` | mlp | model.safetensors |
| `eagle`, `eagle3` | eagle, version 1 or 3 | model.safetensors (or pytorch_model.bin) |
| `speculators` | eagle | model.safetensors |

Each file of this package cites where its facts come from.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from huggingface_hub.errors import StrictDataclassError

from forerun.heads.eagle import Eagle
from forerun.heads.formats import eagle, medusa, mlp
from forerun.heads.formats.files import Found, Parts, Source, fill, open_folder
from forerun.heads.medusa import Medusa
from forerun.heads.mlp import MLPSpeculator
from forerun.heads.store import Head, refuse_misfit, write_folder
from forerun.types import UserError

__all__ = ["layouts", "read", "write"]


def read(
    folder: Path, target_hidden: int | None = None, target_vocab: int | None = None, target_layers: int | None = None
) -> Head:
    """The head in a folder of any public layout, in the type of its tensors.

    UserError where the layout is unknown, a tensor is missing, left over or misshapen, where the head is for another hidden
    size or vocabulary, and where only the number of the target's layers would tell which of them an EAGLE-3 head reads.
    """
    source = open_folder(folder, target_layers)
    try:
        found = recognize(source)(source)
        refuse_misfit(folder, found.shape, target_hidden, target_vocab)
        return fill(source, found)
    except KeyError as error:
        raise source.error(f"config.json lacks {error.args[0]}; fetch the whole folder") from error
    except (TypeError, ValueError, RuntimeError, StrictDataclassError) as error:
        raise source.error(f"config.json: {' '.join(str(error).split())}; fetch the folder anew") from error


def recognize(source: Source) -> Callable[[Source], Found]:
    """How to read a folder, by its settings and the names of its tensors."""
    if "speculators_model_type" in source.settings:
        return eagle.read_speculators
    if source.holds("speculator."):
        return mlp.read
    if source.holds("midlayer.") or source.holds("layers.0.hidden_norm.") or "draft_vocab_size" in source.settings:
        return eagle.read_3
    if source.holds("fc.") or source.holds("layers.0."):
        return eagle.read_1
    if source.holds("blocks.") or source.holds("lm_heads."):
        return medusa.read_vllm
    if any(map(medusa.NAME.fullmatch, source.tensors)):
        return medusa.read
    raise source.error("is of no layout that forerun reads: its own, Medusa, MLP speculator, EAGLE or speculators")


def layouts(head: Head) -> tuple[str, ...]:
    """The layouts that can hold a head."""
    if isinstance(head, Medusa):
        return ("medusa", "vllm-medusa")
    if isinstance(head, MLPSpeculator):
        return ("mlp",)
    return ("eagle" if head.shape.version == 1 else "eagle3", "speculators")


def write(head: Head, folder: Path, layout: str, target_name: str = "", tokens: int = 5) -> None:
    """The head in a public layout, in place of what the folder held, whole or not at all.

    `target_name` is the hub name or path of the target and `tokens` the length of a draft, for layouts that name them.
    UserError where a layout has no place for what the head computes.
    """
    if layout not in layouts(head):
        raise UserError(f"layout={layout} does not hold a head of this kind; choose one of {', '.join(layouts(head))}")
    parts = parts_of(head, layout, target_name, tokens)
    write_folder(folder, parts.settings, parts.tensors, parts.file)


def parts_of(head: Head, layout: str, target_name: str, tokens: int) -> Parts:
    if isinstance(head, Medusa):
        return medusa.write(head, target_name) if layout == "medusa" else medusa.write_vllm(head)
    if isinstance(head, MLPSpeculator):
        return mlp.write(head)
    assert isinstance(head, Eagle)
    return eagle.write_speculators(head, target_name, tokens) if layout == "speculators" else eagle.write(head)
