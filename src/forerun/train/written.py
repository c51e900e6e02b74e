"""Self-distillation: the target continues prompts, and its own text is what students learn."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from forerun.accept import choose
from forerun.draft import NoDraft
from forerun.engine import Engine
from forerun.model import Target
from forerun.train.data import Sequences, padded
from forerun.train.settings import WriteConfig
from forerun.types import Request, Sampling, UserError, complete

PART = 64  # sequences a file: what an interruption loses at most


def continued(
    model: PreTrainedModel, source: Sequences, config: WriteConfig, folder: Path, ends: frozenset[int],
    tell: Callable[[int, int], None],
) -> Sequences:  # fmt: skip
    """Each prompt and what the target makes of it, read from `folder` where that was written already.

    A file is named by all that its text depends on; `tell` hears how many of how many sequences there are.
    """
    fitting = np.flatnonzero(source.lengths_N >= config.prompt)[: config.sequences]
    if not len(fitting):
        raise UserError(f"write.prompt={config.prompt}: no sequence of the data has so many tokens")
    prompts_NT = source.tokens_NT[fitting, : config.prompt]
    said = config.model_dump(exclude={"sequences", "rows"})  # neither changes a text
    weights = [float(held.double().abs().sum()) for held in (*model.parameters(), *model.buffers())]  # codes are buffers
    folder.mkdir(parents=True, exist_ok=True)
    texts: list[list[int]] = []
    engine: Engine | None = None
    for start in range(0, len(prompts_NT), PART):
        part = prompts_NT[start : start + PART]
        digest = hashlib.sha256(part.tobytes() + json.dumps([said, weights, start]).encode()).hexdigest()[:16]
        path = folder / f"{digest}.npz"
        if not path.exists():
            capacity = config.prompt + config.new + 1
            engine = engine or Engine(
                Target(model), NoDraft(), choose("auto", drawn=False), rows=config.rows, capacity=capacity, eos=ends
            )
            rows = write(engine, part, start, config)
            keep(path, rows)
        found = np.load(path)
        texts += [row[:length].tolist() for row, length in zip(found["tokens"], found["lengths"], strict=True)]
        tell(min(start + PART, len(prompts_NT)), len(prompts_NT))
    return padded(texts, config.prompt)


def write(
    engine: Engine, prompts: np.ndarray[tuple[int, int], np.dtype[np.int32]], first: int, config: WriteConfig
) -> Sequences:
    greedy = Sampling(max_new=config.new, ignore_eos=config.ignore_eos)
    requests = []
    for i, prompt in enumerate(prompts.tolist(), first):
        # The greedy ones lie evenly among the others, so that every share of the sequences has both.
        is_greedy = int((i + 1) * config.greedy) > int(i * config.greedy)
        sampling = greedy if is_greedy else replace(greedy, temperature=config.temperature, seed=i)
        requests.append(Request(str(i), tuple(prompt), sampling))
    done = complete(engine, requests)
    return padded([[*r.prompt, *c.tokens] for r, c in zip(requests, done, strict=True)], config.prompt)


def keep(path: Path, rows: Sequences) -> None:
    half_done = path.with_suffix(".part")
    with half_done.open("wb") as file:
        np.savez(file, tokens=rows.tokens_NT, lengths=rows.lengths_N)
    half_done.rename(path)
