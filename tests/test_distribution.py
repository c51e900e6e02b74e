"""Sampling end to end: the joint law of the first three tokens, by chi-square against the model's exact law.

The limit is df + 10 sqrt(2 df), ten standard deviations of a chi-square, so that chance does not fail the test.
"""

import math

import pytest
import torch

from forerun.accept import choose
from forerun.draft import Constant, Drafter, DraftModel, NGram, NoDraft
from forerun.engine import Engine
from forerun.model import Target
from forerun.sampling import build_warp, law
from forerun.types import Request, Sampling, complete
from models import near_copy, tiny

V, LENGTH, SAMPLES, ROWS = 5, 3, 5000, 250
PROMPT = (3, 1, 4, 1, 2, 3, 1)  # repeats itself, so that n-gram lookup finds something
SAMPLINGS = {
    "temperature-1": Sampling(temperature=1.0, max_new=LENGTH),
    "warped-and-penalized": Sampling(
        temperature=0.8,
        top_k=4,
        top_p=0.95,
        min_p=0.02,
        repetition_penalty=1.3,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias={2: 1.0},
        max_new=LENGTH,
    ),
}


def model() -> torch.nn.Module:
    return tiny("llama", vocab_size=V, num_hidden_layers=1, scale=3.0, dtype=torch.float32)


def exact(sampling: Sampling) -> torch.Tensor:
    """[V, V, V]: the law of the first three tokens, by scoring every prefix; penalties on explicit sequences."""
    from forerun.sampling import Counts, penalize

    warp = build_warp([sampling], V, torch.device("cpu"))

    def next_law(output: tuple[int, ...]) -> torch.Tensor:
        logits = model()(torch.tensor([PROMPT + output])).logits[:, -1:]
        counts = Counts(
            torch.bincount(torch.tensor(output, dtype=torch.long), minlength=V)[None].float(), torch.zeros(1, V).bool()
        )
        counts.prompt_BV[0, list(PROMPT)] = True
        return law(penalize(logits, warp, counts, None), warp)[0, 0].double()

    joint = torch.zeros(V, V, V, dtype=torch.float64)
    first = next_law(())
    for a in range(V):
        second = next_law((a,)) if first[a] > 0 else torch.zeros(V)
        for b in range(V):
            if first[a] * second[b] > 0:
                joint[a, b] = first[a] * second[b] * next_law((a, b))
    return joint


def drafter(kind: str) -> Drafter:
    noisy = near_copy(model(), 0.6)
    builders = {
        "none": NoDraft,
        "ngram": lambda: NGram(Constant(2), ROWS),
        "model-sampled": lambda: DraftModel(Target(noisy), Constant(2), ROWS, 16),
        "model-greedy": lambda: DraftModel(Target(noisy), Constant(2), ROWS, 16, greedy=True),
        "model-confident": lambda: DraftModel(Target(noisy), Constant(2), ROWS, 16, confidence=0.5),
    }
    return builders[kind]()


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Statistic and limit, cells that expect less than 5 pooled into one."""
    large = expected >= 5
    pairs = [(counts[large], expected[large]), (counts[~large].sum()[None], expected[~large].sum()[None])]
    statistic = sum(float(((c - e) ** 2 / e.clamp_min(1e-12)).sum()) for c, e in pairs if float(e.sum()) > 0)
    freedom = int(large.sum())
    return statistic, freedom + 10 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("law_name", SAMPLINGS)
@pytest.mark.parametrize(
    ("kind", "rule"),
    [("none", "auto"), ("ngram", "auto"), ("model-sampled", "auto"), ("model-sampled", "match"), ("model-greedy", "auto"),
     ("model-confident", "auto")],
)  # fmt: skip
def test_the_joint_law_of_three_tokens(kind: str, rule: str, law_name: str) -> None:
    sampling = SAMPLINGS[law_name]
    draft = drafter(kind)
    engine = Engine(Target(model()), draft, choose(rule, draft.drawn), rows=ROWS, capacity=16, seed=5)
    completions = complete(engine, [Request(str(i), PROMPT, sampling) for i in range(SAMPLES)])
    drawn = torch.tensor([c.tokens for c in completions])
    counts = torch.zeros(V, V, V, dtype=torch.float64)
    counts.index_put_(tuple(drawn.T), torch.ones(SAMPLES, dtype=torch.float64), accumulate=True)
    joint = exact(sampling)
    assert float(joint.sum()) == pytest.approx(1, abs=1e-5)
    assert float(counts[joint == 0].sum()) == 0, "a token that the warpers exclude was drawn"
    statistic, limit = chi_square(counts, joint * SAMPLES)
    assert statistic < limit
    if kind.startswith("model"):
        rounds = [r for c in completions for r in c.rounds]
        assert 0 < sum(r.accepted for r in rounds) < sum(r.drafted for r in rounds), "both outcomes must occur"


def test_the_chi_square_can_fail() -> None:
    """Three tokens drawn at another temperature are told apart."""
    joint, other = exact(SAMPLINGS["temperature-1"]), exact(Sampling(temperature=0.6, max_new=LENGTH))
    statistic, limit = chi_square(other * SAMPLES, joint * SAMPLES)
    assert statistic > limit
