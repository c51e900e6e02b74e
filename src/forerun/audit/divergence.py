"""Greedy decoding in finite precision: is every difference from plain decoding just rounding?

Shape suffixes: N nodes, V vocabulary.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from forerun import workload
from forerun.audit.verdict import Audit, Check
from forerun.bench.lanes import room_for_prompts
from forerun.bench.serve import request
from forerun.build import Models, build
from forerun.config import Experiment, LosslessRuleConfig, NoDraftConfig
from forerun.engine import Engine
from forerun.model import HALF
from forerun.tree import chain
from forerun.types import Completion, UserError, complete

CONTENDERS = 16  # best tokens of the exact scores, over which the perturbation is measured
FAULT = 3.0  # an engine's pass that errs this many times more than transformers' own passes is faulty, not rounding

Kind = Literal["tie", "numerics", "bug"]
Way = Callable[[Sequence[int], int], Tensor]
"""(context, how many of its tokens are the prompt) -> scores [V] of the token after it, in low precision."""


@dataclass(frozen=True, slots=True)
class Difference:
    """Where two texts of one prompt part: the position among the new tokens; None stands for a text that has ended."""

    prompt: str
    position: int
    plain: int | None
    other: int | None


@dataclass(frozen=True, slots=True)
class Judgement:
    """Why two tokens differ. Both figures are differences of logits, None where a text just ended.

    gap: how far the worse of the two tokens lies below the exact best one.
    perturbation: how far rounding was seen to move a contender against the best one at this position.
    faulty: the engine's passes that err by more than rounding.
    """

    kind: Kind
    gap: float | None
    perturbation: float | None
    faulty: tuple[str, ...] = ()


def divergence(experiment: Experiment, models: Models | None = None, *, quiet: bool = True) -> Audit:
    """Decode the workload greedily with the base variant and with its plain twin, and find the cause of every difference.

    The plain twin has the same model and engine, no drafter, and is forerun's own. Of each pair of texts the first different
    token is judged: the target's weights, cast up to float32 (float64 where they are float32 already) and run by transformers
    over prompt and common tokens in one pass, give the exact scores; the same position is scored in the model's own precision
    by all passes that either text may have come from (`Replay`); `judge` says what these allow. Undecided where the variant
    is plain decoding itself. UserError where the sampling is not greedy, or changes the scores.
    """
    models, console = models or Models(), Console(stderr=True, quiet=quiet)
    refuse_sampling(experiment)
    subject = f"{experiment.drafter.kind} drafter on {experiment.backend} against plain decoding, {experiment.model.path}"
    if experiment.backend == "forerun" and isinstance(experiment.drafter, NoDraftConfig):
        told = "the variant is plain decoding itself; name another, such as drafter.kind=ngram or backend=reference"
        return Audit(subject, (Check("greedy divergences", None, told),))
    other = experiment.model_copy(update={"sampling": experiment.sampling.model_copy(update={"n": 1})})
    plain = other.model_copy(update={"drafter": NoDraftConfig(), "rule": LosslessRuleConfig(), "backend": "forerun"})
    with console.status("building both sides"):
        backends = [build(variant, models) for variant in (plain, other)]
    own = backends[0]
    assert isinstance(own, Engine)
    room = min(room_for_prompts(backend.facts, other) for backend in backends)
    prompts = workload.load(experiment.workload, own.tokenizer, own.target.vocabulary, room)
    requests = [request(prompt, other, experiment, prompt.id) for prompt in prompts]
    texts: list[list[Completion]] = []
    for name, backend in zip(("plain", "other"), backends, strict=True):
        with console.status(f"{name}: decoding {len(prompts)} prompts"):
            texts.append(complete(backend, requests))
    found = [one for pair in zip(*texts, strict=True) if (one := first_difference(*pair)) is not None]
    judgements: list[Judgement] = []
    if any(None not in (one.plain, one.other) for one in found):
        replay = Replay.build(experiment, models, [backend for backend in backends if isinstance(backend, Engine)])
        contexts = {prompt.id: prompt.tokens for prompt in prompts}
        common = {done.id: done.tokens for done in texts[0]}
        for count, one in enumerate(found, 1):
            with console.status(f"replaying difference {count} of {len(found)}"):
                judgements.append(replay.judge(one, contexts[one.prompt], common[one.prompt][: one.position]))
    else:
        judgements = [Judgement("bug", None, None) for _ in found]
    return Audit(f"{subject}, {own.facts['dtype']}", (conclude(texts, found, judgements),))


def refuse_sampling(experiment: Experiment) -> None:
    sampling = experiment.sampling
    if sampling.temperature != 0:
        raise UserError(
            f"audit divergence compares greedy texts, not temperature {sampling.temperature}; say sampling.temperature=0"
        )
    if sampling.build().penalized or sampling.logit_bias:
        raise UserError("audit divergence compares the model's own scores; leave out the sampling's penalties and logit_bias")


def first_difference(plain: Completion, other: Completion) -> Difference | None:
    """Where two texts part; where one is the beginning of the other, at the end of the shorter (an end token is a token)."""
    if plain.tokens == other.tokens:
        return None
    both = list(zip(plain.tokens, other.tokens, strict=False))
    at = next((i for i, (a, b) in enumerate(both) if a != b), len(both))
    ends = [tokens[at] if at < len(tokens) else None for tokens in (plain.tokens, other.tokens)]
    return Difference(plain.id, at, *ends)


@dataclass(frozen=True)
class Replay:
    """One position scored again: exactly, and in low precision, the context taken whole, token by token and in chains."""

    exact: Way
    theirs: Mapping[str, Way]  # transformers' own kernels and cache: what rounding does, whatever fault the engine has
    ours: Mapping[str, Way]

    @classmethod
    def build(cls, experiment: Experiment, models: Models, engines: Sequence[Engine]) -> Replay:
        """The weights are cast up from low precision, so that only arithmetic differs between the scores."""
        low = models.target(experiment.model, "reference").model
        exact = copy.deepcopy(low)
        exact.to(torch.float32 if low.dtype in HALF else torch.float64)  # type: ignore[arg-type]
        size = getattr(experiment.drafter, "k", 0) + 1
        theirs = {"transformers, one pass": transformers_way(low, None)}
        theirs |= {f"transformers, {step} a pass": transformers_way(low, step) for step in {1, size}}
        ours = {"engine, prefill": engine_way(engines[0], None)}
        for engine in engines:
            size = engine.drafter.size
            ours |= {f"engine, {size} a pass, {kept} kept": engine_way(engine, kept) for kept in {1, (size + 1) // 2, size}}
        return cls(transformers_way(exact, None), theirs, ours)

    def judge(self, one: Difference, prompt: Sequence[int], common: Sequence[int]) -> Judgement:
        if one.plain is None or one.other is None:  # one text ended and the other went on with the same tokens
            return Judgement("bug", None, None)
        context = (*prompt, *common)
        theirs, ours = (
            {name: way(context, len(prompt)) for name, way in ways.items()} for ways in (self.theirs, self.ours)
        )  # fmt: skip
        return judge(self.exact(context, len(prompt)), theirs, ours, one.plain, one.other)


def judge(exact_V: Tensor, theirs: Mapping[str, Tensor], ours: Mapping[str, Tensor], plain: int, other: int) -> Judgement:
    """What the scores of one position allow two tokens to be.

    With s the exact scores, c their best token, l those of a low-precision pass:
    - gap: s[c] - min(s[plain], s[other]). A pass chose each token, so its scores must have been off by that much.
    - perturbation: the largest |(l[c] - l[t]) - (s[c] - s[t])| over the passes and the CONTENDERS best tokens t of s. Over
      many tokens, since a text may have come about in a pass a little unlike those that are measured here.
    - faulty: a pass of the engine whose error (standard deviation of l - s over the vocabulary) is more than FAULT times the
      largest of transformers' own passes, or of one rounding of the scores. It measures a fault: it excuses nothing.
    A faulty pass makes a `bug`. Else it is a `tie` where both tokens share the best score in some pass, or exactly; `numerics`
    where the gap is within the perturbation; and a `bug` otherwise.
    """
    exact_V = exact_V.double()
    error = {name: float((low_V.double() - exact_V).std(correction=0)) for name, low_V in {**theirs, **ours}.items()}
    dtype = next(iter(theirs.values())).dtype
    rounding = max(*(error[name] for name in theirs), torch.finfo(dtype).eps * float(exact_V.std()))
    faulty = tuple(name for name in ours if not error[name] <= FAULT * rounding)
    passes = [*theirs.values(), *(low_V for name, low_V in ours.items() if name not in faulty)]
    best, contenders = int(exact_V.argmax()), exact_V.topk(min(CONTENDERS, len(exact_V))).indices
    moved = [(low_V.double() - exact_V)[contenders] - (low_V.double() - exact_V)[best] for low_V in passes]
    perturbation = max(float(one.abs().max()) for one in moved)
    gap = float(exact_V[best] - torch.minimum(exact_V[plain], exact_V[other]))
    shared = any(bool(scores_V[plain] == scores_V[other] == scores_V.max()) for scores_V in (exact_V, *passes))
    innocent: Kind = "tie" if shared else "numerics" if gap <= perturbation else "bug"
    return Judgement("bug" if faulty else innocent, gap, perturbation, faulty)


def transformers_way(model: PreTrainedModel, step: int | None) -> Way:
    """transformers' own pass: over the whole context (None), or over the prompt and then `step` tokens at a time."""

    @torch.inference_mode()
    def score(context: Sequence[int], prompt: int) -> Tensor:
        ids_1N = torch.tensor([context], device=model.device)
        cache = DynamicCache(config=model.config)
        starts = [0] if step is None else [0, *range(prompt, len(context), step)]
        for start, end in zip(starts, [*starts[1:], len(context)], strict=True):
            out = model(input_ids=ids_1N[:, start:end], past_key_values=cache, use_cache=True, logits_to_keep=1)
        scores_V: Tensor = out.logits[0, -1]
        return scores_V.cpu()

    return score


def engine_way(engine: Engine, kept: int | None) -> Way:
    """The engine's own pass: one prefill (None), or rounds of chains as wide as it verifies, of which `kept` tokens stay."""

    @torch.inference_mode()
    def score(context: Sequence[int], prompt: int) -> Tensor:
        target, cache, width = engine.target, engine.cache, engine.drafter.size
        start = len(context) if kept is None else prompt
        scores_V = target.prefill(context[:start], cache, 0, engine.chunk).logits
        try:
            while kept is not None and start < len(context):
                taken = context[start : start + kept]
                nodes = [*taken, *[taken[-1]] * (width - len(taken))]
                pending_B = torch.tensor([nodes[0]] * len(engine.rows), device=target.device)
                tree = chain(pending_B, [nodes[1:]] * len(engine.rows))
                scores_V = target.verify(tree, cache).logits[0, len(taken) - 1]
                # Not by `commit`, so that a fault in it does not excuse itself; an accepted chain is in its place already.
                cache.lengths[0] += len(taken)
                start += len(taken)
        finally:
            cache.release(0)
        return scores_V.cpu()

    return score


def conclude(texts: list[list[Completion]], found: list[Difference], judgements: list[Judgement]) -> Check:
    """The check and its evidence, one row of figures for each difference."""
    counts = Counter(judgement.kind for judgement in judgements)
    tokens = sum(len(done.tokens) for done in texts[0])
    evidence = f"{len(texts[0])} prompts, {tokens} tokens, {len(found)} differ"
    if found:
        evidence += f": {counts['tie']} ties, {counts['numerics']} numerics, {counts['bug']} bugs"
    measured = [(one.gap, one.perturbation) for one in judgements if one.gap is not None and one.perturbation is not None]
    if measured:
        gap, perturbation = max(measured, key=lambda pair: pair[0] - pair[1])
        evidence += f"; the worst gap is {gap:.3g} against a perturbation of {perturbation:.3g}"
    if any(judgement.faulty for judgement in judgements):
        evidence += "; passes of the engine err by more than rounding"
    rows = [asdict(one) | asdict(judgement) for one, judgement in zip(found, judgements, strict=True)]
    figures = {"prompts": len(texts[0]), "tokens": tokens, "divergences": rows}
    return Check("greedy divergences", counts["bug"] == 0, evidence, figures)
