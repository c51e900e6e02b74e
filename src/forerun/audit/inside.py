"""What shows inside a pipeline: the acceptance of a draft that is the target itself, and the scores that its caches give.

Shape suffixes: B rows, N nodes, V vocabulary.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from forerun.accept import Law, Rule
from forerun.accept.evidence import identical
from forerun.accept.synthetic import Synthetic
from forerun.audit.subject import ROUNDING, Subject, fresh
from forerun.audit.verdict import Check
from forerun.cache import KVCache
from forerun.draft import DraftModel
from forerun.engine import Engine
from forerun.model import Scores
from forerun.tree import Tree, chain
from forerun.types import Request, Round

REQUESTS = 24  # of each look inside, or three times as many as rows
ROWS = 4  # at least: the rows of a batch differ in length and depth
CERTAIN = 1 - 1e-9  # least chance at which a rule is said to accept an identical draft


@dataclass
class Interrupted:
    """A rule, but that every other round accepts half of what it would: the caches' state after a refusal is seen too."""

    rule: Rule
    rounds: int = 0

    name = "interrupted"
    lossless = False  # the engine then asks for a law where all rows are greedy, too
    trees = True
    meaningless = False

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        self.rounds += 1
        return (self.rule if self.rounds % 2 else Synthetic((0.5,))).law(tree, p_BNV)


def ask(subject: Subject, seed: int, temperature: float) -> tuple[list[Request], int]:
    """Requests for a look inside, and the rows that serve them."""
    rows = max(ROWS, subject.variant.engine.rows)
    draw, count = random.Random(seed), max(REQUESTS, 3 * rows)
    lengths, new = [draw.randint(1, 40) for _ in range(count)], [draw.randint(16, 48) for _ in range(count)]
    return subject.requests(lengths, new, seed, temperature, "inside"), rows


def identical_draft(subject: Subject, seed: int) -> list[Check]:
    """With the target as its own draft model: greedy, and where the rule's law is to accept such a draft, sampled too.

    `match` draws a token of its own, hence is left out where it samples. UserError as `Subject.build`.
    """
    checks = [acceptance(subject, seed, 0.0, "identical draft, greedy")]
    requests, rows = ask(subject, seed, 0.0)
    backend = subject.build(requests, rows, self_draft=True)
    if isinstance(backend, Engine) and backend.drafter.drawn and identical(backend.rule) > CERTAIN:
        checks.append(acceptance(subject, seed, subject.temperature, "identical draft, sampled"))
    return checks


def acceptance(subject: Subject, seed: int, temperature: float, name: str) -> Check:
    """Whether every draft was accepted; our engine goes through it once more with interruptions."""
    requests, rows = ask(subject, seed, temperature)
    rounds: list[Round] = []
    for interrupted in (False, True):
        backend = subject.build(requests, rows, self_draft=True)
        if isinstance(backend, Engine):
            rounds += judged_rounds(backend, requests, interrupted)
        elif not interrupted:
            for request in requests:
                backend.submit(request)
            while backend.busy:  # transformers counts what it cuts off a text's last round as refused
                rounds += [delta.round for delta in backend.step() if delta.round and not delta.finish]
    drafted, accepted = sum(round.drafted for round in rounds), sum(round.accepted for round in rounds)
    told = f"{accepted} of {drafted} drafts accepted in {len(rounds)} rounds"
    figures = {"drafted": drafted, "accepted": accepted}
    if accepted < drafted:
        return Check(name, False, f"acceptance below 1 for an identical draft: {told}", figures)
    return Check(name, True if drafted else None, told, figures)


def judged_rounds(engine: Engine, requests: list[Request], interrupted: bool) -> list[Round]:
    """The rounds that the engine's own rule judged."""
    interruption = Interrupted(engine.rule)
    if interrupted:
        engine.rule = interruption
    for request in requests:
        engine.submit(request)
    rounds = []
    while engine.busy:
        deltas = engine.step()
        if not interrupted or interruption.rounds % 2:
            rounds += [delta.round for delta in deltas if delta.round]
    return rounds


def cached_scores(subject: Subject, seed: int) -> list[Check]:
    """Scores of every verified node against a pass without a cache over the row's tokens and the path to the node; and what
    the draft model's cache says of the next token between rounds.
    """
    requests, rows = ask(subject, seed, subject.temperature)
    engine = subject.build(requests, rows)
    assert isinstance(engine, Engine)
    verify = engine.target.verify
    of_target: list[float] = []
    of_draft: list[float] = []

    def watched(tree: Tree, cache: KVCache) -> Scores:
        scores = verify(tree, cache)
        of_target.append(off(subject, engine, tree, scores.logits))
        return scores

    engine.target.verify = watched  # type: ignore[method-assign]  # of this one engine, which ends here
    for request in requests:
        engine.submit(request)
    while engine.busy:
        engine.step()
        if isinstance(engine.drafter, DraftModel):
            of_draft.append(draft_off(subject, engine, engine.drafter))
    return [
        Check(
            f"cached scores, {whose}",
            max(worst) < ROUNDING,
            f"off by {max(worst):.2g} at most from a fresh pass, over {len(worst)} rounds, rows={rows}",
            {"difference": max(worst), "rounds": len(worst)},
        )
        for whose, worst in (("target", of_target), ("draft", of_draft))
        if worst
    ]


def off(subject: Subject, engine: Engine, tree: Tree, logits_BNV: Tensor) -> float:
    """The largest difference from fresh scores, of any node of any running row."""
    contexts: list[list[int]] = []
    found: list[Tensor] = []
    for i, row in enumerate(engine.rows):
        for node in range(tree.size) if row else ():
            if row and bool(tree.valid_BN[i, node]):
                contexts.append(row.tokens + path_to(tree, i, node))
                found.append(logits_BNV[i, node].double().cpu())
    scores = fresh(subject.plain, contexts)
    return max((float((ours_V - theirs[-1]).abs().max()) for ours_V, theirs in zip(found, scores, strict=True)), default=0.0)


def path_to(tree: Tree, row: int, node: int) -> list[int]:
    """The drafted tokens from below node 0 down to a node."""
    path: list[int] = []
    while node:
        path.insert(0, int(tree.tokens_BN[row, node]))
        node = int(tree.parents_BN[row, node])
    return path


@torch.inference_mode()
def draft_off(subject: Subject, engine: Engine, drafter: DraftModel) -> float:
    """The largest difference from fresh scores after the first token that the draft's cache lacks; infinite if it lacks none.

    A pass between two rounds writes behind the rows' lengths only, where nothing is read.
    """
    known = [(i, row.tokens, drafter.cache.lengths[i]) for i, row in enumerate(engine.rows) if row]
    if any(length >= len(tokens) for _, tokens, length in known):
        return float("inf")
    next_B = torch.zeros(len(engine.rows), dtype=torch.long)
    for i, tokens, length in known:
        next_B[i] = tokens[length]
    logits_BNV = drafter.target.verify(chain(next_B.to(drafter.target.device), [[]] * len(engine.rows)), drafter.cache).logits
    scores = fresh(subject.plain_draft, [tokens[: length + 1] for _, tokens, length in known])
    differences = [
        float((logits_BNV[i, 0].double().cpu() - fresh_TV[-1]).abs().max())
        for (i, *_), fresh_TV in zip(known, scores, strict=True)
    ]
    return max(differences, default=0.0)
