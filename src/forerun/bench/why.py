"""Why a variant pays or does not: the cost model of speculative decoding with this run's own times.

A round drafts for T_draft, verifies for T_verify, spends T_o on the rest and emits E[e] tokens; a plain step takes T(1) and
emits one. Speed-up = E[e] T(1) / (T_draft + T_verify + T_o) (Leviathan et al. 2023, with measured times for gamma c + 1).
"""

from __future__ import annotations

from dataclasses import dataclass

from forerun.bench.show import Figures, at, bounds, number, share, times
from forerun.bench.table import count


@dataclass(frozen=True)
class Round:
    """What a round costs, in seconds, and what it brings, in tokens."""

    draft: float
    verify: float
    rest: float  # T_o: acceptance, and what the host does around a step
    emitted: float
    drafted: float  # depth of the draft; of a tree the deepest path

    @property
    def cost(self) -> float:
        return self.draft + self.verify + self.rest


@dataclass(frozen=True)
class Model:
    """A variant's round beside the plain step of its target."""

    round: Round
    plain: Round
    alpha: float | None  # of the drafted tokens that were reached, the share accepted
    positions: float | None = None  # that the target computes in a round

    def speedup(self, draft: float | None = None, verify: float | None = None, emitted: float | None = None) -> float:
        """Predicted; with anything given, what it would be with that alone changed."""
        one = self.round
        cost = (one.draft if draft is None else draft) + (one.verify if verify is None else verify) + one.rest
        return (one.emitted if emitted is None else emitted) * self.plain.cost / cost

    @property
    def free_drafting(self) -> float:
        return self.speedup(draft=0.0)

    @property
    def cheap_verification(self) -> float:
        """Where scoring all positions costs what scoring one does."""
        return self.speedup(verify=min(self.round.verify, self.plain.verify))

    @property
    def perfect_acceptance(self) -> float:
        return self.speedup(emitted=1 + self.round.drafted)

    @property
    def draft_cost(self) -> float | None:
        """c: seconds of drafting for each drafted token, in plain steps."""
        return self.round.draft / self.round.drafted / self.plain.cost if self.round.drafted else None

    @property
    def growth(self) -> float:
        """Seconds of verifying a round's positions over those of a plain step's one."""
        return self.round.verify / self.plain.verify

    @property
    def break_even_alpha(self) -> float | None:
        """The alpha at which the predicted speed-up is 1; None where none is.

        By E[e] = (1 - alpha^(gamma + 1)) / (1 - alpha), scaled so that this run's alpha gives this run's E[e].
        """
        if self.alpha is None or not self.round.drafted:
            return None
        needed = self.round.cost / self.plain.cost * expected(self.alpha, self.round.drafted) / self.round.emitted
        low, high = 0.0, 1.0
        if expected(high, self.round.drafted) < needed:
            return None
        for _ in range(60):
            between = (low + high) / 2
            low, high = (between, high) if expected(between, self.round.drafted) < needed else (low, between)
        return high


def expected(alpha: float, gamma: float) -> float:
    """Tokens a round when each of gamma drafted tokens is accepted with probability alpha while those before it were."""
    return gamma + 1 if alpha == 1 else (1 - alpha ** (gamma + 1)) / (1 - alpha)


def measured_round(figures: Figures) -> Round | None:
    """A variant's mean round; None where its backend tells no phases or rounds."""
    rounds, emitted = count(figures, "rounds"), figures.get("block_efficiency")
    spent = [at(figures, f"seconds.{name}") for name in ("draft", "verify", "accept", "other")]
    if not rounds or emitted is None or any(seconds is None for seconds in spent):
        return None
    draft, verify, accept, other = (seconds / rounds for seconds in spent)
    found = Round(draft, verify, accept + other, emitted, (count(figures, "drafted") or 0) / rounds)
    return found if found.cost > 0 and found.verify > 0 else None


def model(figures: Figures, plain: Figures) -> Model | None:
    """The cost model of a variant beside its plain decoding; None where either side lacks a time."""
    ours, theirs = measured_round(figures), measured_round(plain)
    if ours is None or theirs is None:
        return None
    nodes, rounds = count(figures, "nodes"), count(figures, "rounds")
    return Model(ours, theirs, pooled_alpha(figures), nodes / rounds if nodes and rounds else None)


def pooled_alpha(figures: Figures) -> float | None:
    """The conditional acceptances of all positions, weighted by how often each was reached: a / (a + rollbacks).

    Each round ends in a refusal (a rollback) or with its draft used up, so tokens that were reached are those accepted and
    one for each rollback: the maximum-likelihood alpha of censored rounds.
    """
    accepted, refused = count(figures, "accepted"), count(figures, "rollbacks")
    if accepted is None or refused is None or accepted + refused == 0:
        return None
    return accepted / (accepted + refused)


def paragraph(name: str, figures: Figures, plain: tuple[str, Figures] | None, own: bool) -> str:
    """Why this variant is as fast as it is. `plain` is the plain decoding beside it; `own` whether of the same target."""
    if figures.get("error") is not None:
        return f"Failed: {figures['error']}"
    if plain is None:
        return "There is no plain decoding beside it in this run, so its rounds have nothing to be measured in."
    beside, theirs = plain
    if name == beside:
        return yardstick(figures)
    found = model(figures, theirs)
    if found is None:
        missing = name if measured_round(figures) is None else beside
        return f"{missing} tells no times or counts of its rounds, so the cost model has nothing to work with."
    if not found.round.drafted:
        return plain_step(found, beside, figures)
    clock = bounds(figures.get("over_own_plain"))[0] if own else None
    return " ".join((
        account(found), prediction(found, beside, clock or bounds(figures.get("speedup"))[0], own), levers(found),
    ))  # fmt: skip


def yardstick(figures: Figures) -> str:
    one = measured_round(figures)
    if one is None:
        return "The yardstick, but it tells no times of its steps."
    share_of = share(one.verify / one.cost)
    return f"The yardstick: a plain step takes {ms(one.cost)} and emits one token; {share_of} of it is the target's own pass."


def plain_step(found: Model, beside: str, figures: Figures) -> str:
    """A variant that drafts nothing, such as a compressed target on its own."""
    ratio = found.plain.cost / found.round.cost
    steps = f"{ms(found.round.cost)} against {ms(found.plain.cost)} of {beside}"
    told = f"Drafts nothing: its step takes {steps}, which predicts {times(ratio)}"
    return f"{told}; {times(bounds(figures.get('speedup'))[0])} on the clock."


def account(found: Model) -> str:
    """alpha, c, the growth of verification and T_o."""
    one = found.round
    alpha = (
        f"each that is reached is accepted with probability α = {found.alpha:.2f}" if found.alpha is not None else "α unknown"
    )
    where = "its positions" if found.positions is None else f"its {found.positions:.1f} positions"
    return (
        f"A round drafts {one.drafted:.2f} tokens deep and emits {one.emitted:.2f}; {alpha}. A drafted token costs "
        f"c = {found.draft_cost:.2f} plain steps, verifying {where} {found.growth:.2f} times what one costs, "
        f"and the rest T_o = {ms(one.rest)}."
    )


def prediction(found: Model, beside: str, clock: float | None, own: bool) -> str:
    one, predicted = found.round, found.speedup()
    text = (
        f"So the model predicts {one.emitted:.2f} x {ms(found.plain.cost)} / "
        f"({ms(one.draft)} + {ms(one.verify)} + {ms(one.rest)}) = {times(predicted)} over {beside}"
    )
    text += f", {times(clock)} on the clock (residual {100 * (predicted / clock - 1):+.1f} %)." if clock else "."
    return text if own else f"{text} {beside} is plain decoding of another target or setting, so this holds that change too."


def levers(found: Model) -> str:
    """What each part would give if it alone were perfect, and which of them would make it pay."""
    alone = {
        "free drafting": found.free_drafting,
        "perfect acceptance": found.perfect_acceptance,
        "verification at the price of one position": found.cheap_verification,
    }
    told = [f"{times(value)} with {name}" for name, value in alone.items()]
    text = f"It would be {', '.join(told[:-1])} and {told[-1]}."
    if found.speedup() >= 1:
        text += f" It pays; the largest gain left is in {max(alone, key=lambda name: alone[name])}."
    elif enough := [name for name, value in alone.items() if value > 1]:
        text += f" It does not pay; {' or '.join(enough)} alone would change that."
    else:
        text += " It does not pay, and no one of these alone would change that."
    alpha = found.break_even_alpha
    if alpha is not None:
        return f"{text} At these times it breaks even at α = {alpha:.2f}."
    return text if found.perfect_acceptance > 1 else f"{text} At these times no α breaks even."


def ms(seconds: float) -> str:
    return number(1e3 * seconds, 2, " ms")
