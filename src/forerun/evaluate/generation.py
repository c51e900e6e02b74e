"""Questions answered by generation: through the backend, so with its drafter, its rule and its batches."""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Collection, Sequence
from dataclasses import replace

from forerun.evaluate.encoding import encode
from forerun.evaluate.quality import Tell, limit_of, tokenizer_of
from forerun.types import Backend, Completion, Delta, Request, Sampling, UserError, join


def answer(name: str, backend: Backend, asked: Sequence[tuple[str, Sampling]], tell: Tell) -> tuple[list[str], int]:
    """What the backend writes after each prompt, and how many prompts lost their start to the model's limit.

    All are submitted at once. Where a seed is given, each draws numbers of its own, the same in every run and variant.
    Raises UserError where a prompt fits the model but not the backend's capacity.
    """
    tokenizer = tokenizer_of(backend, name)
    requests, clipped, call = [], 0, uuid.uuid4()  # an interrupted call may leave deltas behind, which are not for this one
    for number, (text, sampling) in enumerate(asked):
        prompt = encode(tokenizer, text)
        kept = fitting(name, backend, prompt, sampling.max_new)
        clipped += len(kept) < len(prompt)
        seed = None if sampling.seed is None else sampling.seed + zlib.crc32(f"{name} {number}".encode())
        requests.append(Request(f"{name} {number} {call}", tuple(kept), replace(sampling, seed=seed, n=1)))
    return run(name, backend, requests, tell), clipped


def fitting(name: str, backend: Backend, prompt: list[int], max_new: int) -> list[int]:
    """The end of a prompt that leaves room for the answer within what the model reads."""
    facts, limit = backend.facts, limit_of(backend)
    capacity, tree = facts.get("capacity"), facts.get("tree_size", 0)
    needed = len(prompt) + max_new + tree
    if capacity is not None and needed > capacity and (limit is None or capacity < min(limit, needed)):
        raise UserError(
            f"{name}: {len(prompt)} prompt + {max_new} new + {tree} tree tokens are more than engine.capacity={capacity}; "
            f"set engine.capacity={min(needed, limit or needed)} or more"
        )
    room = min(capacity or needed, limit or needed) - max_new - tree
    if room < 1:
        raise UserError(f"{name}: {max_new} new tokens leave no room for the prompt: the model reads {limit}; lower max_new")
    return prompt[-room:]


def run(name: str, backend: Backend, requests: Sequence[Request], tell: Tell) -> list[str]:
    """The texts, in the order of the requests; if anything interrupts, nothing stays in flight."""
    parts: dict[str, list[Delta]] = {one.id: [] for one in requests}
    done = 0
    try:
        for one in requests:
            backend.submit(one)
        while backend.busy:
            for delta in backend.step():
                if delta.id in parts:
                    parts[delta.id].append(delta)
                    done += delta.finish is not None
            tell(name, done, len(requests))
    except BaseException:
        for one in requests:
            backend.cancel(one.id)
        raise
    return [one.text for one in whole(name, parts.values())]


def whole(name: str, parts: Collection[list[Delta]]) -> list[Completion]:
    """The completions that deltas add up to. Raises UserError where the backend gave any up, as one does whose server went
    away: half an answer is neither right nor wrong.
    """
    found = [join(deltas) for deltas in parts]
    if lost := sum(one.finish == "cancelled" for one in found):
        raise UserError(f"{name}: {lost} of {len(found)} answers were lost, so there is no figure; measure it again")
    return found
