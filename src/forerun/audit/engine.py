"""Is a whole pipeline (drafter, rule, cache, batch) lossless? It runs on small random models, whose laws are known exactly."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console

from forerun.audit.inside import ROWS, cached_scores, identical_draft
from forerun.audit.sampled import penalized, sampled
from forerun.audit.subject import ROUNDING, Subject, drafter_name, drafts_told, fresh, prepare
from forerun.audit.verdict import Audit, Check
from forerun.config import DraftModelConfig, Variant
from forerun.types import Completion, Request, UserError, complete

VOCABULARY, TOKENS, BOUND = 16, 400_000, 0.01  # of our engine: so many drawn tokens tell this total variation
OTHER_VOCABULARY, OTHER_TOKENS, OTHER_BOUND = 8, 30_000, 0.03  # other backends are slow: fewer cells need fewer tokens
PROMPTS = 64  # greedy texts, or twice as many as rows
LONG = 250  # tokens of one prompt, so that a row grows past the slots that attention reads at first
TIE = 1e-5  # difference of scores within which a backend that rounds them to float32 may choose


def engine(variant: Variant, *, tokens: int | None = None, seed: int = 0, quiet: bool = True) -> Audit:
    """Run the variant's drafter, rule, sampling, batch and backend on small random models, and check its texts and caches.

    tokens: drawn for the checks by counts. The default takes a minute and tells a total variation of 0.01 for our engine, of
    0.03 for others; with fewer, what passes is undecided. seed: of models, prompts and draws. quiet: no progress on stderr.
    Checks: greedy texts are the plain model's own, alone and beside rows that sample; drawn tokens have the plain model's law
    (`sampled`; at temperature 1 where the config is greedy); of a draft that is the target itself every token is accepted;
    scores from the caches are those of a fresh forward pass. UserError where the parts do not fit or the backend has not got
    what the sampling asks for.
    """
    if tokens is not None and tokens < 1:
        raise UserError(f"tokens={tokens}: the audit draws at least one token; leave it out for enough of them")
    ours, console = variant.backend == "forerun", Console(stderr=True, quiet=quiet)
    wanted, bound, vocabulary = (TOKENS, BOUND, VOCABULARY) if ours else (OTHER_TOKENS, OTHER_BOUND, OTHER_VOCABULARY)
    with TemporaryDirectory() as folder:
        subject = prepare(variant, Path(folder), vocabulary, seed)
        stages: dict[str, Callable[[], list[Check]]] = {"greedy texts": lambda: [greedy(subject, seed, beside=False)]}
        if ours:
            stages["greedy texts beside others"] = lambda: [greedy(subject, seed, beside=True)]
        if isinstance(variant.drafter, DraftModelConfig):
            stages["identical draft"] = lambda: identical_draft(subject, seed)
        if ours:
            stages["cached scores"] = lambda: cached_scores(subject, seed)
        stages[f"law of {tokens or wanted} tokens"] = lambda: sampled(subject, tokens or wanted, bound, seed)
        checks: list[Check] = []
        for title, stage in stages.items():
            console.print(f"audit engine: {title}", markup=False, highlight=False)
            checks += stage()
        rule = subject.build(subject.requests([1], [1], seed, 0.0), 1).facts["rule"]
    return Audit(f"drafter {drafter_name(variant)}, rule {rule}, backend {variant.backend}", tuple(checks))


def greedy(subject: Subject, seed: int, *, beside: bool) -> Check:
    """Texts at temperature 0 of more requests than rows, held against what the plain model says after their own tokens.

    By induction that is equality with plain greedy decoding. beside: every other request samples, so that rows of both kinds
    share a batch.
    """
    rows = max(ROWS, subject.variant.engine.rows) if beside else subject.variant.engine.rows
    draw, count = random.Random(seed), max(PROMPTS, 2 * rows)
    lengths = [LONG, *(draw.randint(1, 40) for _ in range(count - 1))]
    new = [draw.randint(8, 32) for _ in range(count)]
    requests = subject.requests(lengths, new, seed, 0.0, "greedy")
    company = subject.requests(lengths[::-1], new, seed + 1, subject.temperature, "sampled") if beside else []
    mixed = [request for pair in zip(requests, company, strict=True) for request in pair] if beside else requests
    backend = subject.build(mixed, rows)
    completions = [found for found in complete(backend, mixed) if found.id.startswith("greedy")]
    wrong = [line for line in mistakes(subject, requests, completions) if line]
    name = "greedy texts" + (" beside rows that sample" if beside else "")
    told = f"{count - len(wrong)} of {count} texts are plain greedy decoding's, rows={rows}, {drafts_told(completions)}"
    figures = {"texts": count, "wrong": len(wrong), "rows": rows}
    return Check(name, not wrong, f"{told}; {wrong[0]}" if wrong else told, figures)


def mistakes(subject: Subject, requests: list[Request], completions: list[Completion]) -> list[str | None]:
    """The first wrong token of each greedy text."""
    tie = ROUNDING if subject.variant.backend == "forerun" else TIE
    texts = [(*request.prompt, *found.tokens) for request, found in zip(requests, completions, strict=True)]
    lines: list[str | None] = []
    for request, text, scores_TV in zip(requests, texts, fresh(subject.plain, texts), strict=True):
        scores = penalized(request, text, scores_TV)
        new = text[len(request.prompt) :]
        lower = [float(row.max() - row[token]) for row, token in zip(scores, new, strict=True)]
        at = next((i for i, gap in enumerate(lower) if gap > tie), None)
        if at is not None:
            lines.append(
                f"prompt of {len(request.prompt)} tokens: new token {at} is {new[at]} instead of {int(scores[at].argmax())}, "
                f"whose score is {lower[at]:.3g} higher"
            )
        else:
            short = len(new) != request.sampling.max_new
            lines.append(f"{len(new)} tokens instead of {request.sampling.max_new}" if short else None)
    return lines
