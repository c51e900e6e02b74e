"""`forerun generate`: continue one prompt, as it comes or as one JSON object."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from forerun.bench import labels, methods
from forerun.bench.lanes import Maker, explain, out_of_memory
from forerun.bench.metrics import Record, acceptance
from forerun.bench.serve import serve, to_record
from forerun.config import Experiment, Variant, load, parse
from forerun.types import Backend, Delta, Request, UserError
from forerun.verbs.common import hush_libraries, known_method
from forerun.workload import Prompt

ROOM = 1024  # slots that a cache has at least, where the configuration does not say


def run(
    words: Sequence[str],
    prompt: str | None,
    config: str | None,
    model: str | None,
    draft: str | None,
    method: str | None,
    k: int | None,
    sampling: dict[str, Any],
    *,
    as_json: bool = False,
    quiet: bool = False,
    maker: Maker | None = None,
) -> int:
    """Returns the exit status. `maker` stands in for the models in tests."""
    text, overrides = split(words, prompt)
    flags = {f"sampling.{key}": value for key, value in sampling.items() if value is not None}
    flags |= drafting(config, model, draft, method, k)
    experiment = load(config, overrides, flags | ({"model.path": model} if model is not None else {}))
    text = sys.stdin.read() if text == "-" else text
    if not text:
        raise UserError("the prompt is empty; give it as an argument, as --prompt, or on stdin with -")
    hush_libraries()
    settings = experiment.model_dump(include=set(Variant.model_fields))
    if "seed" not in experiment.sampling.model_fields_set:
        settings["sampling"]["seed"] = None  # a benchmark repeats itself; a text drawn twice should differ
    variant = parse(Variant, settings, "command line")
    try:
        backend, records = complete(experiment, variant, text, maker or methods.maker(), not as_json)
    except Exception as error:
        if out_of_memory(error):
            raise UserError(explain(error, variant)) from error
        raise
    if as_json:
        print(json.dumps(describe(backend, variant, records), ensure_ascii=False))
    elif not quiet:
        print(remark(backend, records), file=sys.stderr)
    return 0


def split(words: Sequence[str], prompt: str | None) -> tuple[str | None, list[str]]:
    """The prompt and the overrides: a word is an override where it starts with a key of the configuration."""
    overrides = [word for word in words if is_override(word)]
    texts = [word for word in words if not is_override(word)]
    if len(texts) + (prompt is not None) > 1:
        extra = texts[0] if prompt is not None else texts[1]
        raise UserError(f"one prompt at a time: {extra!r} is a second one; quote a prompt of several words")
    return (prompt if prompt is not None else next(iter(texts), None)), overrides


def is_override(word: str) -> bool:
    key, equals, _ = word.partition("=")
    parts = key.split(".")
    return bool(equals) and all(part.isidentifier() or part.isdigit() for part in parts) and (
        len(parts) > 1 or key in Experiment.model_fields
    )  # fmt: skip


def drafting(config: str | None, model: str | None, draft: str | None, method: str | None, k: int | None) -> dict[str, Any]:
    """Flags about the drafter. The embedded pair drafts; a model of one's own does where a draft or a method is named."""
    kind = known_method(method) if method is not None else "model" if draft is not None else None
    if kind is None and config is None and model is None:
        kind = "model"
    if draft is not None and kind != "model":
        raise UserError(f"--draft goes with --method draft, not {method}")
    if kind == "model" and draft is None and model is not None:
        raise UserError("--method draft with a --model of your own needs --draft, a smaller model of the same family")
    flags = {"drafter.kind": kind, "drafter.path": draft, "drafter.k": None if kind == "none" else k}
    return {key: value for key, value in flags.items() if value is not None}


def complete(experiment: Experiment, variant: Variant, text: str, maker: Maker, stream: bool) -> tuple[Backend, list[Record]]:
    tokenizer = maker.tokenizer(variant)
    if tokenizer is None:
        raise UserError("the model has no tokenizer, so it cannot read a prompt; name a folder that holds one")
    tokens = tuple(tokenizer(text, verbose=False)["input_ids"])
    if "capacity" not in experiment.engine.model_fields_set:
        capacity = max(ROOM, len(tokens) + variant.sampling.max_new + 4 * getattr(variant.drafter, "k", 0) + 1)
        variant = variant.model_copy(update={"engine": variant.engine.model_copy(update={"capacity": capacity})})
    backend = maker.build(variant)
    one = Request("prompt", tokens, variant.sampling.build())
    arrivals = serve(backend, [one], 1, writer(one.sampling.n) if stream else None)
    source = Prompt("prompt", "prompt", tokens, text)
    return backend, [to_record(source, 0, index, arrivals["prompt", index]) for index in range(one.sampling.n)]


def writer(completions: int) -> Callable[[Delta], None]:
    """Writes text as it comes; of several completions each is written whole, in the order in which they end."""
    parts: dict[int, str] = {}

    def write(delta: Delta) -> None:
        if completions == 1:
            sys.stdout.write(delta.text + ("\n" if delta.finish else ""))
        else:
            parts[delta.index] = parts.get(delta.index, "") + delta.text
            if delta.finish:
                sys.stdout.write(f"[{delta.index}] {parts[delta.index]}\n")
        sys.stdout.flush()

    return write


def figures(record: Record) -> dict[str, Any]:
    told = acceptance(record.rounds)
    return {
        "text": record.text,
        "tokens": list(record.tokens),
        "finish": record.finish,
        "prompt_tokens": record.prompt_tokens,
        "rounds": told["rounds"],
        "drafted": told["drafted"],
        "accepted": told["accepted"],
        "acceptance_rate": told["acceptance_rate"],
        "block_efficiency": told["block_efficiency"],
        "first_s": record.first_s,
        "total_s": record.total_s,
        "tokens_per_second": len(record.tokens) / record.total_s if record.total_s else None,
    }


def describe(backend: Backend, variant: Variant, records: list[Record]) -> dict[str, Any]:
    """The JSON object: the completion's figures, or a list of them where several were asked for.

    `lossless` is what exact enumeration of the rule says; of a backend that is not ours, what it says of itself.
    """
    told = labels.of(backend, variant, {})
    known = backend.facts | {key: value for key, value in told.items() if value is not None}
    facts = {key: known.get(key) for key in ("lossless", "rule", "label", "drafter", "dtype", "device")}
    found = [figures(record) for record in records]
    return (found[0] if len(found) == 1 else {"completions": found}) | facts


def remark(backend: Backend, records: list[Record]) -> str:
    """One line about speed and acceptance, and a rule that admits to change the text."""
    tokens, seconds = sum(len(record.tokens) for record in records), max(record.total_s for record in records)
    parts = [f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s"]
    told = [acceptance(record.rounds) for record in records]
    drafted = sum(one["drafted"] or 0 for one in told)
    if drafted:
        rounds = sum(one["rounds"] or 0 for one in told)
        accepted = sum(one["accepted"] or 0 for one in told)
        parts.append(f"{accepted} of {drafted} drafted tokens accepted in {rounds} rounds")
        if backend.facts.get("lossless") is False:
            parts.append(f"rule {backend.facts['rule']}: " + ("meaningless text" if backend.facts["meaningless"] else "LOSSY"))
    return "; ".join(parts)
