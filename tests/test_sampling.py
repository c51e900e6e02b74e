"""Warpers and penalties against transformers' own processors, draws against the laws they are from."""

import math
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from forerun.sampling import Counts, Randomness, Warp, build_warp, exponentials, law, path_counts, penalize, race, uniforms
from forerun.tree import Tree
from forerun.types import Sampling, UserError

V = 40
CPU = torch.device("cpu")
PROMPT, OUTPUT = (1, 2, 3, 3, 7, 20), (5, 7, 7, 7, 30)
SETTINGS = [
    Sampling(temperature=1.0),
    Sampling(temperature=0.7),
    Sampling(temperature=1.9, top_k=1),
    Sampling(temperature=1.0, top_k=7),
    Sampling(temperature=1.0, top_k=10 * V),
    Sampling(temperature=1.0, top_p=0.9),
    Sampling(temperature=1.0, top_p=0.3),
    Sampling(temperature=1.0, top_p=1e-6),
    Sampling(temperature=1.0, min_p=0.1),
    Sampling(temperature=1.0, min_p=1.0),
    Sampling(temperature=1.3, repetition_penalty=1.7),
    Sampling(temperature=0.6, repetition_penalty=0.5),
    Sampling(temperature=0.8, top_k=12, top_p=0.8, min_p=0.05, repetition_penalty=1.2),
    Sampling(temperature=2.0, top_k=20, top_p=0.95, min_p=0.02),
]


def changed(sampling: Sampling) -> str:
    """A test's name: what the setting changes."""
    plain = Sampling()
    return ",".join(f"{f.name}={v}" for f in fields(sampling) if (v := getattr(sampling, f.name)) != getattr(plain, f.name))


def warp_of(samplings: list[Sampling | None], vocabulary: int = V) -> Warp:
    return build_warp(samplings, vocabulary, CPU)


def random_logits(rows: int, nodes: int, ties: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    logits = 3 * torch.randn(rows, nodes, V, generator=torch.Generator().manual_seed(rows + nodes), dtype=dtype)
    return (2 * logits).round() / 2 if ties else logits


def counts_of(outputs: list[tuple[int, ...]], prompts: list[tuple[int, ...]], vocabulary: int = V) -> Counts:
    output_BV = torch.stack([torch.bincount(torch.tensor(o, dtype=torch.long), minlength=vocabulary).float() for o in outputs])
    prompt_BV = torch.stack([torch.bincount(torch.tensor(p, dtype=torch.long), minlength=vocabulary) > 0 for p in prompts])
    return Counts(output_BV, prompt_BV)


def theirs(sampling: Sampling, tokens: tuple[int, ...], logits_V: Tensor) -> Tensor:
    """What transformers makes of the scores after these tokens; its processors in the order of `generate`."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(sampling.min_p))
    return processors(torch.tensor([tokens]), logits_V[None].clone())[0].softmax(-1)


def ours(samplings: list[Sampling], logits_BNV: Tensor) -> Tensor:
    warp = warp_of(list(samplings))
    counts = counts_of([OUTPUT] * len(samplings), [PROMPT] * len(samplings))
    return law(penalize(logits_BNV, warp, counts, None), warp)


def same(ours_V: Tensor, theirs_V: Tensor) -> None:
    assert (ours_V > 0).tolist() == (theirs_V > 0).tolist(), "other tokens survive"
    torch.testing.assert_close(ours_V, theirs_V, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
@pytest.mark.parametrize("sampling", SETTINGS, ids=changed)
def test_a_row_alone_is_warped_as_transformers_does(sampling: Sampling, ties: bool) -> None:
    logits_BNV = random_logits(1, 50, ties)
    for node, law_V in enumerate(ours([sampling], logits_BNV)[0]):
        same(law_V, theirs(sampling, PROMPT + OUTPUT, logits_BNV[0, node]))


@pytest.mark.parametrize("ties", [False, True], ids=["", "ties"])
def test_rows_of_different_settings_share_a_batch(ties: bool) -> None:
    logits_BNV = random_logits(len(SETTINGS), 6, ties)
    laws_BNV = ours(SETTINGS, logits_BNV)
    for row, sampling in enumerate(SETTINGS):
        for node in range(6):
            same(laws_BNV[row, node], theirs(sampling, PROMPT + OUTPUT, logits_BNV[row, node]))


@pytest.mark.parametrize("top_p", [0.1 * i for i in range(1, 10)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_top_p_cuts_where_transformers_cuts_when_the_mass_is_met_exactly(top_p: float, dtype: torch.dtype) -> None:
    """Equal probabilities: the sum reaches 1 - top_p up to the last bit."""
    sampling = Sampling(temperature=1.0, top_p=top_p)
    for vocabulary in (10, 20, 40):
        logits_V = torch.zeros(vocabulary, dtype=dtype)
        warp = warp_of([sampling], vocabulary)
        kept, expected = law(logits_V[None, None], warp)[0, 0] > 0, theirs(sampling, PROMPT, logits_V) > 0
        assert int(kept.sum()) == int(expected.sum())


def test_settings_are_not_rounded_below_the_scores_precision() -> None:
    sampling = Sampling(temperature=0.7, min_p=0.1, repetition_penalty=1.3)
    logits_BNV = random_logits(1, 20, dtype=torch.float64)
    for node, law_V in enumerate(ours([sampling], logits_BNV)[0]):
        expected_V = theirs(sampling, PROMPT + OUTPUT, logits_BNV[0, node])
        torch.testing.assert_close(law_V, expected_V, rtol=1e-12, atol=0)


def test_greedy_rows_are_one_hot_beside_sampled_ones() -> None:
    logits_BNV = random_logits(3, 5, ties=True)
    warp = warp_of([Sampling(), Sampling(temperature=1.0, top_k=3), None])
    laws_BNV = law(logits_BNV, warp)
    for row in (0, 2):
        assert laws_BNV[row].max(-1).values.tolist() == [1.0] * 5
        assert laws_BNV[row].argmax(-1).tolist() == logits_BNV[row].argmax(-1).tolist()
    assert bool((laws_BNV[1].max(-1).values < 1).any())
    assert law(logits_BNV, warp_of([Sampling()] * 3)).sum(-1).tolist() == [[1.0] * 5] * 3


def test_a_warper_that_no_row_uses_costs_nothing() -> None:
    warp = warp_of([Sampling(temperature=0.5), None])
    assert (warp.top_k_B, warp.top_p_B, warp.min_p_B, warp.bias_BV, warp.penalties_B3) == (None,) * 5
    assert not warp.plain
    assert warp_of([Sampling(), None]).plain
    assert not warp_of([Sampling(logit_bias={3: 1.0}), None]).plain
    assert not warp_of([Sampling(presence_penalty=0.1), None]).plain


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_scores_become_float32(dtype: torch.dtype) -> None:
    logits_BNV = random_logits(1, 2).to(dtype)
    warp = warp_of([Sampling(temperature=0.7)])
    probs_BNV = law(penalize(logits_BNV, warp, None, None), warp)
    assert probs_BNV.dtype == torch.float32
    torch.testing.assert_close(probs_BNV, (logits_BNV.float() / 0.7).softmax(-1))


# Penalties.


def explicit(sampling: Sampling, prompt: tuple[int, ...], output: tuple[int, ...], logits_V: Tensor) -> Tensor:
    """Bias, repetition (transformers), presence and frequency (vLLM), token by token on the sequence itself."""
    scores = logits_V.clone()
    for token, bias in sampling.logit_bias.items():
        scores[token] += bias
    for token in set(prompt + output):
        positive = float(scores[token]) > 0
        scores[token] = scores[token] / sampling.repetition_penalty if positive else scores[token] * sampling.repetition_penalty
    for token in set(output):
        scores[token] -= sampling.presence_penalty + sampling.frequency_penalty * output.count(token)
    return scores


PENALIZED = [
    Sampling(temperature=1.0, repetition_penalty=1.4),
    Sampling(presence_penalty=0.7),
    Sampling(temperature=1.0, frequency_penalty=-0.3),
    Sampling(repetition_penalty=0.8, presence_penalty=-0.2, frequency_penalty=0.5, logit_bias={3: -4.0, 7: 2.0}),
    Sampling(temperature=1.0, logit_bias={0: -100.0}),
    Sampling(temperature=1.0),
]


def test_penalties_along_a_path_are_those_of_the_sequence() -> None:
    """Nodes of a bushy tree see the prompt, the output, and their own path down to themselves, nothing of other branches."""
    rows = len(PENALIZED)
    draw = torch.Generator().manual_seed(0)
    parents = [0, 0, 0, 1, 1, 2, 3, 6]
    tokens_BN = torch.randint(0, 9, (rows, len(parents)), generator=draw)  # few tokens, so that paths repeat themselves
    outputs = [tuple(torch.randint(0, 9, (n,), generator=draw).tolist()) for n in range(rows)]
    outputs = [(*output, pending) for output, pending in zip(outputs, tokens_BN[:, 0].tolist(), strict=True)]
    prompts = [tuple(torch.randint(0, V, (4,), generator=draw).tolist()) for _ in range(rows)]
    tree = Tree(tokens_BN, torch.tensor([parents]).expand(rows, -1), 4)
    logits_BNV = random_logits(rows, len(parents), dtype=torch.float64)
    got_BNV = penalize(logits_BNV, warp_of(list(PENALIZED)), counts_of(outputs, prompts), path_counts(tree, V))
    paths: list[list[int]] = [[]]
    for node in range(1, len(parents)):
        paths.append([*paths[parents[node]], node])
    for row, sampling in enumerate(PENALIZED):
        for node, path in enumerate(paths):
            output = outputs[row] + tuple(tokens_BN[row, path].tolist())
            expected_V = explicit(sampling, prompts[row], output, logits_BNV[row, node])
            torch.testing.assert_close(got_BNV[row, node], expected_V, rtol=1e-6, atol=1e-6)


def test_repetition_penalty_is_transformers() -> None:
    sampling = Sampling(temperature=1.0, repetition_penalty=1.6)
    logits_V = random_logits(1, 1)[0, 0]
    got_V = penalize(logits_V[None, None], warp_of([sampling]), counts_of([OUTPUT], [PROMPT]), None)[0, 0]
    processor = RepetitionPenaltyLogitsProcessor(1.6)
    torch.testing.assert_close(got_V, processor(torch.tensor([PROMPT + OUTPUT]), logits_V[None].clone())[0])


def test_bias_needs_no_counts_and_moves_greedy_rows() -> None:
    logits_BNV = random_logits(1, 3)
    warp = warp_of([Sampling(logit_bias={11: 100.0})])
    assert law(penalize(logits_BNV, warp, None, None), warp).argmax(-1).tolist() == [[11] * 3]


@pytest.mark.parametrize(
    "field", [{"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"min_p": 2.0}, {"top_k": -1}, {"repetition_penalty": 0.0},
              {"max_new": 0}, {"n": 0}, {"temperature": math.nan}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(field: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(field))):
        replace(Sampling(), **field)


# Draws.


def chi_square(counts: Tensor, expected: Tensor) -> tuple[float, float]:
    """Statistic, and a limit ten standard deviations above its mean."""
    freedom = int((expected > 0).sum()) - 1
    statistic = ((counts - expected) ** 2 / expected.clamp_min(1e-12))[expected > 0].sum()
    return float(statistic), freedom + 10 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("sharpness", [0.3, 1.5])
def test_the_race_draws_the_law(sharpness: float) -> None:
    draws = 100_000
    generator = torch.Generator().manual_seed(0)
    probs_V = (sharpness * torch.randn(12, generator=generator)).softmax(-1)
    probs_V[3] = 0
    probs_V = probs_V / probs_V.sum()
    tokens = race(probs_V.expand(draws, -1), torch.empty(draws, 12).exponential_(generator=generator))
    counts = torch.bincount(tokens, minlength=12).double()
    assert float(counts[3]) == 0
    statistic, limit = chi_square(counts, probs_V.double() * draws)
    assert statistic < limit
    wrong = probs_V.double() ** 1.1
    statistic, limit = chi_square(counts, wrong / wrong.sum() * draws)
    assert statistic > limit, "a law that is slightly sharper must be told apart"


def test_the_race_of_ones_is_the_argmax_and_survives_extreme_draws() -> None:
    probs_BV = random_logits(1, 5)[0].softmax(-1)
    assert race(probs_BV, torch.ones(5, V)).tolist() == probs_BV.argmax(-1).tolist()
    one_hot = torch.zeros(2, V).index_fill_(1, torch.tensor([9]), 1.0)
    assert race(one_hot, torch.tensor([[0.0], [104.0]]).expand(2, V)).tolist() == [9, 9]


def test_the_same_seed_draws_the_same() -> None:
    def draw(seed: int, stream: str) -> list[float]:
        return uniforms([getattr(Randomness(seed, CPU), stream)], 50, CPU)[0].tolist()

    for stream in ("draft", "verify"):
        assert draw(7, stream) == draw(7, stream)
        assert len({tuple(draw(seed, stream)) for seed in range(50)}) == 50
    assert all(draw(seed, "draft") != draw(seed, "verify") for seed in range(50))
    assert draw(-1, "verify") != draw(2**62, "verify")


def test_streams_are_independent_of_each_other() -> None:
    """Drafting more does not shift what verification draws; a row's draws do not depend on the rows beside it."""
    one, other = Randomness(3, CPU), Randomness(3, CPU)
    exponentials([one.draft], 1000, CPU)
    beside = uniforms([None, one.verify, Randomness(4, CPU).verify], 6, CPU)
    assert beside[1].tolist() == uniforms([other.verify], 6, CPU)[0].tolist()
    assert beside[0].tolist() == [0.5] * 6
    assert exponentials([None], 4, CPU).tolist() == [[1.0] * 4]


def test_neighbouring_seeds_are_uncorrelated() -> None:
    draws = torch.stack([uniforms([stream], 4000, CPU)[0] for seed in range(4) for stream in both(seed)])
    correlation = torch.corrcoef(draws) - torch.eye(len(draws))
    assert float(correlation.abs().max()) < 6 / math.sqrt(4000)
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1


def both(seed: int) -> tuple[torch.Generator, torch.Generator]:
    randomness = Randomness(seed, CPU)
    return randomness.draft, randomness.verify
