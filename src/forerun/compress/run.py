"""From a model and recipes to a folder with the compressed model: whole or not there, and resumable."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from forerun import __version__
from forerun.compress import calibrate, checkpoint
from forerun.compress.apply import Task, Tell, prune_model, quantize, round_to_nearest
from forerun.compress.bits import quantized_by_bnb
from forerun.compress.fit import refuse_unfit
from forerun.compress.identity import identity
from forerun.compress.opened import model_place, open_model
from forerun.compress.partial import clear, exchange, held
from forerun.compress.recipes import Row, check, units_for
from forerun.config import (
    BnbConfig,
    CalibrationConfig,
    Compression,
    GPTQConfig,
    ModelConfig,
    PruneConfig,
    RecipeConfig,
    RoundConfig,
)
from forerun.model import Loaded, first_line
from forerun.packed import CodedLinear, scales_beside
from forerun.types import UserError
from forerun.workload import texts

MADE = "compression.json"
"""What was done; the last file of a compressed model's folder."""


@dataclass(frozen=True)
class Report:
    """What became of a model; written to compression.json."""

    model: str
    recipes: tuple[dict[str, Any], ...]
    rows: tuple[Row, ...]
    bytes_before: int  # of all weights, embeddings and output head too
    bytes_after: int
    seconds: float
    version: str


def compress(config: Compression, out: Path, tell: Tell, *, embedded: str = "target", overwrite: bool = False) -> Report:
    """Apply the recipes and write the model to `out`; `embedded` says which shipped model the path `embedded` means.

    Finished layers of GPTQ lie in `out`.partial until all is done: the same call goes on from them, another one starts anew.
    An old model at `out` stays until the new one is whole. UserError where recipes do not go together, `out` is taken, another
    run writes to it, or something cannot be read or written; `out` is then as it was.
    """
    began = time.perf_counter()
    config = config.located()
    recipes = (*config.model.recipes, *config.recipes)
    source = config.model.model_copy(update={"recipes": (), "pack": False})
    refuse_taken(out, overwrite)
    check(recipes)
    work = out.with_name(out.name + ".partial")
    try:
        with held(work, out) as mark:
            refuse_taken(out, overwrite)  # again: another run may have made it meanwhile
            resume(mark, identity(source, embedded, recipes))
            loaded, rows, before = make(source, recipes, work, embedded, tell)
            done = Report(
                config.model.path, tuple(recipe.model_dump(mode="json") for recipe in recipes), tuple(rows), before,
                bytes_held(loaded.model), time.perf_counter() - began, __version__,
            )  # fmt: skip
            report = joined(earlier(Path(source.path)), done)
            write(loaded, work, report)
            refuse_taken(out, overwrite)
            exchange(work / "model", work, out)
            shutil.rmtree(work, ignore_errors=True)  # the layers too
    except (OSError, SafetensorError) as error:
        raise UserError(f"{out} cannot be written: {first_line(error)}; what is finished is kept in {work}") from error
    return report


def earlier(folder: Path) -> Report | None:
    """What was done to a model that is a compressed one already."""
    try:
        said: dict[str, Any] = json.loads((folder / MADE).read_text(encoding="utf-8"))
        rows = tuple(Row(**row) for row in said["rows"])
        return Report(**{**said, "recipes": tuple(said["recipes"]), "rows": rows})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def joined(first: Report | None, then: Report) -> Report:
    """Both as one: what became of the first one's model."""
    if first is None:
        return then
    rows = tuple(replace(row, recipe=row.recipe + len(first.recipes)) for row in then.rows)
    return replace(
        then, model=first.model, recipes=first.recipes + then.recipes, rows=first.rows + rows, bytes_before=first.bytes_before,
        seconds=first.seconds + then.seconds,
    )  # fmt: skip


def refuse_taken(out: Path, overwrite: bool) -> None:
    if out.name in ("", ".."):  # what is unfinished gets a name beside it
        raise UserError(f"--out {out}: name a folder, such as {out / 'model'}")
    if out.is_symlink() or out.is_file():
        raise UserError(f"--out {out} is a file or a link; name a folder")
    if not out.exists():
        return
    if not any(out.iterdir()):
        return
    if not (out / MADE).exists():
        raise UserError(f"--out {out} holds other files than a compressed model; name another folder")
    if not overwrite:
        raise UserError(f"--out {out} already holds a compressed model; name another folder, or give --overwrite")


def resume(mark: Path, identity: str) -> None:
    """Keep what the same run has finished, and remove what another one has."""
    if mark.read_text(encoding="utf-8") != identity:
        clear(mark)
        mark.write_text(identity, encoding="utf-8")


def make(
    source: ModelConfig, recipes: Sequence[RecipeConfig], work: Path, embedded: str, tell: Tell
) -> tuple[Loaded, list[Row], int]:
    """The compressed model, what was done to it, and its bytes before."""
    last = recipes[-1]
    if not isinstance(last, BnbConfig):
        loaded = open_model(source, embedded)
        refuse_quantized(loaded.model, recipes, source.path)
        rows, before = apply_all(loaded, recipes, work, tell)
        return loaded, rows, before
    # bitsandbytes quantizes while it reads a folder, so what came before it is written to one.
    place, rows = model_place(source.path, embedded, weights=source.weights != "random"), []
    if len(recipes) > 1 or source.weights == "random" or not place.is_dir():
        loaded = open_model(source, embedded)
        refuse_quantized(loaded.model, recipes, source.path)
        rows, before = apply_all(loaded, recipes, work, tell)
        place = work / "plain"
        checkpoint.save(loaded.model, loaded.tokenizer, place)
        del loaded
    plain = source.model_copy(update={"path": str(place), "weights": "pretrained"})
    loaded, more, dense = quantized_by_bnb(plain, last, len(recipes) - 1, tell)
    return loaded, rows + more, before if rows else dense


def refuse_quantized(model: PreTrainedModel, recipes: Sequence[RecipeConfig], name: str) -> None:
    if getattr(model, "hf_quantizer", None) is not None:
        raise UserError(f"model {name!r} is quantized already; recipes take the original model")
    coded = any(isinstance(module, CodedLinear) for module in model.modules())
    if coded and not all(isinstance(recipe, PruneConfig) for recipe in recipes):
        raise UserError(f"model {name!r} is quantized already: it can be pruned, not quantized again")


def apply_all(loaded: Loaded, recipes: Sequence[RecipeConfig], work: Path, tell: Tell) -> tuple[list[Row], int]:
    """Carry out the recipes in order, but for a last bnb; what they did, and the model's bytes before.

    Calibration tokens are all made first, while the model is what it was.
    """
    model = loaded.model
    refuse_unfit(model, recipes)
    before = bytes_held(model)
    tokens = {one: calibration(one, loaded, tell) for one in dict.fromkeys(filter(None, map(needed, recipes)))}
    rows: list[Row] = []
    for index, recipe in enumerate(recipes):
        if isinstance(recipe, BnbConfig):
            break
        wanted = needed(recipe)
        task = Task(index, model, None if wanted is None else tokens[wanted], units_for(recipes[index + 1 :]), tell, work)
        with torch.no_grad():
            rows += apply(task, recipe)
    return rows, before


def apply(task: Task, recipe: PruneConfig | GPTQConfig | RoundConfig) -> list[Row]:
    match recipe:
        case PruneConfig():
            return prune_model(task, recipe)
        case GPTQConfig():
            return quantize(task, recipe)
        case RoundConfig():
            return round_to_nearest(task, recipe)


def needed(recipe: RecipeConfig) -> CalibrationConfig | None:
    """The calibration that a recipe learns from."""
    if isinstance(recipe, GPTQConfig) or (isinstance(recipe, PruneConfig) and recipe.score == "activation"):
        return recipe.calibration
    return None


def calibration(config: CalibrationConfig, loaded: Loaded, tell: Tell) -> Tensor:
    """Token ids [samples, length] from the workload's texts in a seeded order, or written by the model."""
    limit = getattr(loaded.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if limit is not None and config.length > limit:  # before such texts are written or read
        raise UserError(f"calibration.length={config.length}: the model takes at most {limit} tokens")
    if config.workload is None:
        say = partial(tell, "calibration texts that the model writes")
        return calibrate.written(loaded.model, config.samples, config.length, config.seed, tell=say)
    if loaded.tokenizer is None:
        raise UserError("calibration.workload: the model has no tokenizer; leave it out, and the model writes texts itself")
    tell("calibration texts", 0, 1)
    documents = list(texts(config.workload))
    random.Random(config.seed).shuffle(documents)
    rows: list[list[int]] = []
    missing = config.samples * config.length
    for document in documents:  # no more are tokenized than are wanted: a data set may have millions
        rows.append(loaded.tokenizer(document, verbose=False)["input_ids"])
        missing -= len(rows[-1])
        if missing <= 0:
            break
    tell("calibration texts", 1, 1)
    return calibrate.windows(rows, config.samples, config.length, config.seed)


def bytes_held(model: nn.Module) -> int:
    """Bytes of all distinct parameters and buffers, with bitsandbytes' scales: a tied output head counts once."""
    held = {tensor.data_ptr(): tensor.nbytes for tensor in [*model.parameters(), *model.buffers(), *scales_beside(model)]}
    return sum(held.values())


def write(loaded: Loaded, work: Path, report: Report) -> None:
    """Save the model in the folder beside `out`."""
    model: Any = loaded.model
    checkpoint.save(model, loaded.tokenizer, work / "model")
    (work / "model" / MADE).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
