"""Does a pipeline sample from the target's law? Its texts are compared with the law of every one of their tokens.

Shape suffixes: T tokens, V vocabulary, C cells.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from forerun.audit.statistics import LEAST_EXPECTED, ChiSquare, judged
from forerun.audit.subject import Subject, drafts_told, fresh
from forerun.audit.verdict import Check
from forerun.config import DraftModelConfig
from forerun.engine import Engine
from forerun.sampling import Counts, build_warp, law, penalize
from forerun.types import Completion, Request, complete

SHORTEST, LONGEST = 96, 224  # new tokens of a request
PROMPT = 8  # longest prompt
ROWS = 256  # at most, where the config has fewer: a step of many rows costs little more than one of a few


@dataclass(frozen=True)
class Drawn:
    """Every token that came out, in order, with the law that it should have been drawn from."""

    laws_TV: Tensor
    tokens_T: Tensor
    previous_T: Tensor  # the token before it
    position_T: Tensor  # from 0 at the first new token of a text
    draft_TV: Tensor | None  # the draft model's law


def sampled(subject: Subject, tokens: int, bound: float, seed: int) -> list[Check]:
    """Long texts of about so many tokens in all, from rows that join and leave, each token held against its exact law.

    The law of a token is what one plain forward pass over the finished text says after the tokens before it, under the
    request's sampling. The count of a cell less the sum of its probabilities is then a sum of martingale differences, and
    the covariance C of all cells is known exactly, so that d' C^-1 d is a chi-square. C is at most the multinomial covariance
    of the mean law: the test finds what one of as many independent draws would, so `detectable_tv` promises no more than it
    keeps. What is told apart are laws on average: over all places (`tokens`), over a range of positions, or after a class of
    previous tokens; by rank in the law (`ranks`, which sees sharpening and flattening); and by rank of the ratio to the
    draft model's law, along which a wrong acceptance or residual errs.

    bound: a check that passes but could not have seen this total variation is undecided.
    """
    requests = ask(subject, tokens, seed)
    rows = max(subject.variant.engine.rows, min(ROWS, len(requests) // 4))
    backend = subject.build(requests, rows)
    completions = complete(backend, requests)
    # transformers rounds scores to float32 before it warps them, which decides at the edge of a nucleus.
    drawn = collect(subject, requests, completions, torch.float64 if isinstance(backend, Engine) else torch.float32)
    how = f"{len(drawn.tokens_T)} tokens, rows={rows}, {drafts_told(completions)}"
    checks = [judge(name, found, bound, how) for name, found in statistics(drawn, subject.vocabulary).items()]
    never = int((drawn.laws_TV.gather(1, drawn.tokens_T[:, None]) <= 0).sum())
    if never or bool((drawn.laws_TV <= 0).any()):
        checks.insert(
            0, Check("sampled, outside the law", never == 0, f"{never} tokens of probability 0; {how}", {"tokens": never})
        )
    return checks


def ask(subject: Subject, tokens: int, seed: int) -> list[Request]:
    """Requests of about so many new tokens in all."""
    draw = random.Random(seed)
    count = max(1, round(tokens / ((SHORTEST + LONGEST) / 2)))
    lengths = [draw.randint(1, PROMPT) for _ in range(count)]
    new = [draw.randint(SHORTEST, LONGEST) for _ in range(count)]
    return subject.requests(lengths, new, draw.getrandbits(60), subject.temperature, "sampled")


def collect(subject: Subject, requests: Sequence[Request], completions: Sequence[Completion], dtype: torch.dtype) -> Drawn:
    """What came out with the exact laws, computed in `dtype`."""
    texts = [(*request.prompt, *completion.tokens) for request, completion in zip(requests, completions, strict=True)]

    def laws(model: PreTrainedModel) -> Tensor:
        scored = zip(requests, texts, fresh(model, texts), strict=True)
        return torch.cat([laws_after(request, text, scores_TV.to(dtype)).double() for request, text, scores_TV in scored])

    previous = [token for request, text in zip(requests, texts, strict=True) for token in text[len(request.prompt) - 1 : -1]]
    return Drawn(
        laws_TV=laws(subject.plain),
        tokens_T=torch.tensor([token for completion in completions for token in completion.tokens]),
        previous_T=torch.tensor(previous),
        position_T=torch.cat([torch.arange(len(completion.tokens)) for completion in completions]),
        draft_TV=laws(subject.plain_draft) if isinstance(subject.variant.drafter, DraftModelConfig) else None,
    )


def penalized(request: Request, text: Sequence[int], scores_TV: Tensor) -> Tensor:
    """[T, V]: scores for each new token of a text under the request's bias and penalties."""
    start, vocabulary = len(request.prompt), scores_TV.shape[1]
    warp = build_warp([request.sampling], vocabulary, torch.device("cpu"))
    counts = Counts(torch.zeros(1, vocabulary), torch.zeros(1, vocabulary, dtype=torch.bool))
    counts.prompt_BV[0, list(request.prompt)] = True
    new_TV = torch.nn.functional.one_hot(torch.tensor(text[start:]), vocabulary).to(scores_TV.dtype)
    so_far_BTV = (new_TV.cumsum(0) - new_TV)[None]
    return penalize(scores_TV[None, start - 1 : len(text) - 1], warp, counts, so_far_BTV)[0]


def laws_after(request: Request, text: Sequence[int], scores_TV: Tensor) -> Tensor:
    """[T, V]: the law of each new token of a text."""
    warp = build_warp([request.sampling], scores_TV.shape[1], torch.device("cpu"))
    return law(penalized(request, text, scores_TV)[None], warp)[0]


def statistics(drawn: Drawn, vocabulary: int) -> dict[str, ChiSquare]:
    """Each question of `sampled`; positions in ranges 1, 2-3, 4-7, ... and classes of tokens half as many as the vocabulary."""
    classes, anywhere_T = vocabulary // 2, torch.zeros_like(drawn.tokens_T)
    octave_T = (drawn.position_T + 1).double().log2().floor().long().clamp_max(classes - 1)
    found = {
        "sampled, tokens": deviation(drawn.laws_TV, drawn.tokens_T, anywhere_T),
        "sampled, tokens by position": deviation(drawn.laws_TV, drawn.tokens_T, octave_T),
        "sampled, tokens by previous token": deviation(drawn.laws_TV, drawn.tokens_T, drawn.previous_T % classes),
        "sampled, ranks": deviation(*ordered(drawn, drawn.laws_TV), anywhere_T),
    }
    if drawn.draft_TV is not None:
        ratio_TV = drawn.laws_TV / drawn.draft_TV.clamp_min(torch.finfo(torch.float64).tiny)
        found["sampled, ranks of the ratio to the draft's law"] = deviation(*ordered(drawn, ratio_TV), anywhere_T)
    return found


def ordered(drawn: Drawn, key_TV: Tensor) -> tuple[Tensor, Tensor]:
    """The laws with their cells in falling order of a key, and the cell that each token came in."""
    order_TV = key_TV.argsort(dim=-1, descending=True)
    return drawn.laws_TV.gather(1, order_TV), (order_TV == drawn.tokens_T[:, None]).int().argmax(-1)


def deviation(laws_TC: Tensor, cells_T: Tensor, group_T: Tensor) -> ChiSquare:
    """Chi-square of counts, draw t from laws_TC[t], against the sums of these laws, summed over groups of draws.

    A draw's group may depend on the draws before it only. Variances below LEAST_EXPECTED are raised to it, which makes the
    statistic smaller: rare cells are then no false alarm, and never overlooked. With C cells this costs no more power than
    the share LEAST_EXPECTED * C / T of the draws.
    """
    statistic, freedom, cells = 0.0, 0, 0
    for group in group_T.unique().tolist():
        laws_GC, cells_G = laws_TC[group_T == group], cells_T[group_T == group]
        means_C = laws_GC.sum(0)
        off_C = torch.bincount(cells_G, minlength=len(means_C)) - means_C
        variance_C, direction_CC = torch.linalg.eigh(means_C.diag() - laws_GC.T @ laws_GC)
        statistic += float(((direction_CC.T @ off_C) ** 2 / variance_C.clamp_min(LEAST_EXPECTED)).sum())
        possible = int((means_C > 0).sum())
        cells, freedom = cells + possible, freedom + possible - 1
    size = len(cells_T) ** 2 / (len(cells_T) + LEAST_EXPECTED * cells)
    return judged(statistic, max(freedom, 1), size)


def judge(name: str, found: ChiSquare, bound: float, how: str) -> Check:
    """Undecided where it passed and would have passed at a deviation of `bound` too."""
    blind = found.passed and found.detectable_tv > bound
    numbers = f"chi-square {found.statistic:.1f}, limit {found.limit:.1f} ({found.freedom} degrees of freedom)"
    seen = f"detectable TV {found.detectable_tv:.4f}" + (f" where {bound} is wanted: take more tokens" if blind else "")
    return Check(name, None if blind else found.passed, f"{numbers}; {seen}; {how}", asdict(found))
