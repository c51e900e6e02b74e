"""The training loop: batches that are a function of the step, checkpoints between steps, one line for what fails."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from forerun.train import checkpoint
from forerun.train.data import Numbers
from forerun.train.loggers import Log
from forerun.train.losses import Hits, anchors, hits, loss
from forerun.train.processes import Processes
from forerun.train.settings import EagleTraining, Training
from forerun.train.students import Student
from forerun.train.teacher import Teacher
from forerun.types import UserError

TOKEN_LAYERS = {"output", "outputs", "embeddings", "embed_tokens", "lm_head"}
"""Modules between tokens and states, whose matrices AdamW learns where Muon learns the others."""


@dataclass(frozen=True)
class Optimizers:
    """AdamW for all, or Muon for the hidden matrices and AdamW for the rest."""

    each: tuple[Optimizer, ...]
    rates: tuple[float, ...]

    def step(self, share: float) -> None:
        for optimizer, rate in zip(self.each, self.rates, strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def optimizers(module: nn.Module, config: Training) -> Optimizers:
    named = dict(module.named_parameters())
    muons = [n for n, p in named.items() if config.matrix_rate and p.ndim == 2 and not TOKEN_LAYERS & set(n.split("."))]
    rest = [p for n, p in named.items() if n not in muons]
    each: list[Optimizer] = [torch.optim.AdamW(rest, lr=config.rate, betas=(0.9, 0.95), weight_decay=config.weight_decay)]
    rates = [config.rate]
    if config.matrix_rate and muons:
        matrices = [named[n] for n in muons]
        decay = config.weight_decay
        each.append(torch.optim.Muon(matrices, config.matrix_rate, decay, adjust_lr_fn="match_rms_adamw"))
        rates.append(config.matrix_rate)
    return Optimizers(tuple(each), tuple(rates))


def rate_share(step: int, config: Training) -> float:
    """Of the full rate: up linearly, constant, then down linearly over the last steps to almost nothing."""
    left = (config.steps - step) / max(config.decay * config.steps, 1)
    return min(1.0, (step + 1) / max(config.warmup, 1), left)


def picked(place: int, batch: int, count: int, seed: int) -> Numbers:
    """The sequences of the place-th forward pass; each pass over the data has an order of its own."""
    places = np.arange(place * batch, (place + 1) * batch)
    orders = {int(p): np.random.default_rng((seed, 0, int(p))).permutation(count) for p in np.unique(places // count)}
    return np.array([orders[int(place // count)][place % count] for place in places])


@dataclass(frozen=True)
class Run:
    """All that a training run is made of."""

    config: Training
    folder: Path
    student: Student
    teacher: Teacher
    examiner: Teacher  # of the held-out sequences
    sizes: tuple[int, int]  # sequences learned, held out
    processes: Processes
    log: Log
    first_step: int
    optimizers: Optimizers

    @property
    def device(self) -> torch.device:
        return next(self.student.module.parameters()).device

    def steps(self, tell: Callable[[int, float, dict[str, Any] | None], None]) -> dict[str, Any]:
        """Train to the end; `tell` hears of step, loss and validation. Returns the last validation."""
        config, saved, last = self.config, time.monotonic(), self.first_step
        report: dict[str, Any] | None = None
        for step in range(self.first_step, config.steps):
            with self.mishaps(step, last):
                total, each = self.step(step)
                self.optimizers.step(rate_share(step, config))
            done = step + 1
            ends = done == config.steps
            report = None
            if ends or done % config.validate_every == 0:
                with self.mishaps(step, last):
                    report = self.validate()
            if self.processes.first:
                self.log.write(done, {"loss": total, "nats": each} | ({"validation": report} if report else {}))
                if ends or time.monotonic() - saved > 60 * config.save_minutes:
                    checkpoint.save(self.folder, done, self.student.module, self.optimizers.each)
                    saved, last = time.monotonic(), done
            tell(done, total, report)
        return self.validate() if report is None else report  # None: there was nothing left to do

    def step(self, step: int) -> tuple[float, list[float]]:
        """Gradients of one step; its mean loss and each guess's nats."""
        config, parts = self.config, self.config.accumulate
        share = config.anchors if isinstance(config, EagleTraining) else 1.0
        told = torch.zeros((), device=self.device)
        for part in range(parts):
            place = (step * parts + part) * self.processes.count + self.processes.rank
            random = torch.Generator().manual_seed(int(np.random.SeedSequence((config.seed, 2, place)).generate_state(1)[0]))
            lesson = self.teacher.lesson(picked(place, config.batch, self.sizes[0], config.seed))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.bf16):
                total, each = loss(self.student, lesson, anchors(lesson, share, random), random, config.depth_weight)
            (total / parts).backward()
            told = told + torch.cat([total.detach()[None], each]) / parts
        parameters = list(self.student.module.parameters())
        self.processes.average([told, *(p.grad for p in parameters)])
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.clip)
        if not (math.isfinite(float(told[0])) and math.isfinite(float(norm))):
            raise FloatingPointError("loss" if not math.isfinite(float(told[0])) else "gradient")
        return float(told[0]), told[1:].tolist()

    @contextmanager
    def mishaps(self, step: int, last: int) -> Iterator[None]:
        """What can go wrong in a step, in one line; the last checkpoint stays as it is."""
        config = self.config
        kept = f"the checkpoint of step {last} is kept in {self.folder}" if last else "there is no checkpoint yet"
        smaller = (
            f"batch={config.batch // 2} accumulate={config.accumulate * 2}" if config.batch > 1 else "a smaller data.length"
        )
        try:
            with memory(f"step {step + 1}", f"{kept}; a new run with {smaller} needs less"):
                yield
        except FloatingPointError as error:
            lower = f"rate={config.rate / 2:g}" + (f" matrix_rate={config.matrix_rate / 2:g}" if config.matrix_rate else "")
            raise UserError(f"step {step + 1}: the {error} is not finite; {kept}; a new run with {lower} may hold") from error

    def validate(self) -> dict[str, Any]:
        """Acceptance on the held-out sequences; the same on every process."""
        module, batch, found = self.student.module, self.config.batch, None
        module.eval()
        for start in range(0, self.sizes[1], batch):
            lesson = self.examiner.lesson(np.arange(start, min(start + batch, self.sizes[1])))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
                part: Hits = hits(self.student, lesson)
            found = part if found is None else found + part
        module.train()
        assert found is not None, "there is a held-out sequence"
        return found.report()


@contextmanager
def memory(what: str, remedy: str) -> Iterator[None]:
    """Running out of memory in one line."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch has a class for the GPU and a sentence for the CPU
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise UserError(f"{what}: out of memory; {remedy}") from error
        raise
