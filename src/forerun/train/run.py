"""A training run from its settings: load, read, write, teach, train, export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from forerun.build import Models, end_tokens
from forerun.heads import formats, store
from forerun.model import Loaded
from forerun.train import checkpoint
from forerun.train.data import Sequences, read, split
from forerun.train.loggers import LOG, Log, open_log
from forerun.train.loop import Run, memory, optimizers
from forerun.train.make import make
from forerun.train.processes import Processes, join
from forerun.train.settings import Training, WriteConfig
from forerun.train.students import DraftStudent, EagleStudent, MedusaStudent, MLPStudent, Student
from forerun.train.teacher import Streamed, Teacher, keep
from forerun.train.written import continued
from forerun.types import UserError

TRAINED = "trained"
"""The folder, inside a run's, of what was learned."""


class Teller(Protocol):
    """Hears how a run goes on."""

    def say(self, words: str) -> None: ...

    def preparing(self, what: str, done: int, total: int) -> None: ...

    def trained(self, step: int, loss: float, validation: dict[str, Any] | None) -> None: ...


class Mute:
    """What the processes beside the first one tell: nothing."""

    def say(self, words: str) -> None:
        pass

    def preparing(self, what: str, done: int, total: int) -> None:
        pass

    def trained(self, step: int, loss: float, validation: dict[str, Any] | None) -> None:
        pass


def train(config: Training, folder: Path, teller: Teller) -> dict[str, Any] | None:
    """Train, or go on where the last checkpoint was; what was learned is in folder/trained.

    Returns the last validation (losses.Hits.report); None in every process but the first.
    """
    processes = join()
    try:
        validation = _train(config, folder, teller if processes.first else Mute(), processes)
        return validation if processes.first else None
    finally:
        processes.close()


def _train(config: Training, folder: Path, teller: Teller, processes: Processes) -> dict[str, Any]:
    if processes.first:
        checkpoint.claim(folder, config)
    # The linear layers stay as they are: gradients pass through the output layer, and a head starts from its weights.
    place = {"pack": False} | ({"device": processes.device} if processes.device else {})
    loaded = Models(teller.say).target(config.model.model_copy(update=place))
    learned, held_out = sequences(config, loaded, folder, teller, processes)
    student = make(config, loaded.model, learned)
    refuse_layouts(student, config)
    teaching, examining = [
        teacher(student, part, config, loaded.model, folder, teller, processes) for part in (learned, held_out)
    ]
    chosen = optimizers(student.module, config)
    first = checkpoint.load(folder, student.module, chosen.each)
    if first:
        teller.say(f"resumed at step {first}")
    log = Log(folder / LOG)
    if processes.first:
        log = open_log(folder, first, config.loggers, config.model_dump(mode="json"))
    sizes = (len(learned), len(held_out))
    try:
        validation = Run(config, folder, student, teaching, examining, sizes, processes, log, first, chosen).steps(
            teller.trained
        )
    finally:
        log.close()
    if processes.first:
        export(student, loaded, folder / TRAINED, config, validation)
    return validation


def sequences(
    config: Training, loaded: Loaded, folder: Path, teller: Teller, processes: Processes
) -> tuple[Sequences, Sequences]:
    """What is learned and what validates; with `write`, continued by the target."""
    vocabulary = loaded.model.get_output_embeddings().out_features
    limit = loaded.model.config.get_text_config(decoder=True).max_position_embeddings
    sources = [read(data, loaded.tokenizer, vocabulary) for data in (config.data, config.validation) if data is not None]
    longest = max(source.tokens_NT.shape[1] for source in sources)
    if config.write is not None:
        longest = config.write.prompt + config.write.new
    if longest > limit:
        raise UserError(f"sequences of {longest} tokens are longer than the target's {limit}; set data.length or write.new")
    if config.write is not None:
        sources = [written(loaded.model, source, config.write, folder, teller, processes) for source in sources]
    return (sources[0], sources[1]) if len(sources) == 2 else split(sources[0], config.held_out, config.seed)


def written(
    model: PreTrainedModel, source: Sequences, config: WriteConfig, folder: Path, teller: Teller, processes: Processes
) -> Sequences:
    with processes.in_turn(), memory("while the target writes", f"set write.rows below {config.rows}; what is written is kept"):
        return continued(
            model, source, config, folder / "written", end_tokens(model),
            lambda done, total: teller.preparing("texts written by the target", done, total),
        )  # fmt: skip


def teacher(
    student: Student, part: Sequences, config: Training, model: PreTrainedModel, folder: Path, teller: Teller,
    processes: Processes,
) -> Teacher:  # fmt: skip
    embedding: Any = model.get_input_embeddings().weight
    streamed = Streamed(model, wanted(student), config.teach, part, embedding.device)
    if not config.teach.cache:
        return streamed
    with processes.in_turn(), memory("while the target reads", f"set batch below {config.batch}"):
        return keep(
            streamed, folder / "cache", config.batch,
            lambda done, total: teller.preparing("sequences read by the target", done, total),
        )  # fmt: skip


def wanted(student: Student) -> tuple[int, ...]:
    """The target's hidden states that a student reads."""
    if isinstance(student, DraftStudent):
        return ()
    return student.module.shape.features if isinstance(student, EagleStudent) else (-1,)


def refuse_layouts(student: Student, config: Training) -> None:
    """Before training rather than after it."""
    fitting: tuple[str, ...] = ()
    if isinstance(student, MedusaStudent | MLPStudent | EagleStudent):
        fitting = formats.layouts(student.module)
    if wrong := [layout for layout in config.layouts if layout not in fitting]:
        raise UserError(f"layouts: {wrong[0]} does not hold what is trained here; it could be {', '.join(fitting) or 'none'}")


def export(student: Student, loaded: Loaded, folder: Path, config: Training, validation: dict[str, Any]) -> None:
    """What was learned, in bfloat16: a head as forerun.heads.store has it, a draft as transformers has it."""
    facts = {"steps": config.steps, "validation": {k: v for k, v in validation.items() if k != "ranks"}}
    if isinstance(student, MedusaStudent | MLPStudent | EagleStudent):
        accuracies = [[round(rate, 4) for rate in rates] for rates in validation["ranks"]]
        head = store.cast(student.module, torch.bfloat16)
        store.save(head, folder, {"accuracies": accuracies, "training": facts})
        for layout in config.layouts:
            formats.write(head, folder.with_name(layout), layout, config.model.path)
        return
    assert isinstance(student, DraftStudent)
    half_done = folder.with_name(folder.name + ".part")
    shutil.rmtree(half_done, ignore_errors=True)
    student.module.bfloat16().save_pretrained(half_done)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(half_done)
    (half_done / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    half_done.rename(folder)
