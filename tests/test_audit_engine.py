"""The audit of whole pipelines: what is lossless passes, what is not fails by the check that is meant to see it."""

import json
from pathlib import Path

import pytest
import torch

import planted
from forerun.audit import Audit
from forerun.audit.engine import engine, greedy
from forerun.audit.inside import cached_scores, identical_draft
from forerun.audit.sampled import deviation, judge, laws_after, sampled
from forerun.audit.subject import Subject, fresh, prepare
from forerun.cache import KVCache
from forerun.config import Variant, load, parse
from forerun.draft import DraftModel
from forerun.sampling import Counts, build_warp, law, penalize
from forerun.types import Request, Sampling, UserError

EXACT = {"greedy texts", "greedy texts beside rows that sample", "cached scores, target"}
COUNTED = {"sampled, tokens", "sampled, tokens by position", "sampled, tokens by previous token", "sampled, ranks"}
OF_DRAFT_MODELS = {"identical draft, greedy", "identical draft, sampled", "cached scores, draft"}
RATIO = "sampled, ranks of the ratio to the draft's law"


def variant(*words: str) -> Variant:
    experiment = load(None, ["engine.rows=16", *words])
    return parse(Variant, experiment.model_dump(include=set(Variant.model_fields)), "test")


def audit(*words: str, tokens: int = 1000) -> Audit:
    return engine(variant(*words), tokens=tokens)


def passed(found: Audit) -> dict[str, bool | None]:
    return {check.name: check.passed for check in found.checks}


@pytest.fixture
def restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes back what planted rules do to the drafter."""
    monkeypatch.setattr(DraftModel, "_first_pass", planted.FIRST_PASS)
    monkeypatch.setattr(DraftModel, "observe", planted.OBSERVE)


# What is lossless.


@pytest.mark.parametrize(
    ("words", "more", "subject"),
    [
        (("drafter.kind=none",), set(), "drafter none, rule match, backend forerun"),
        (
            ("drafter.kind=model", "drafter.k=3", "drafter.confidence=0.1"),
            OF_DRAFT_MODELS | {RATIO},
            "drafter model (k=3, confidence=0.1), rule block, backend forerun",
        ),
        (
            ("drafter.kind=ngram", "drafter.policy=heuristic", "drafter.k=2", "rule.kind=standard", "sampling.temperature=0.7",
             "sampling.top_p=0.9", "sampling.repetition_penalty=1.2", "sampling.presence_penalty=0.3",
             "sampling.frequency_penalty=0.2", "sampling.logit_bias={1003: 0.5}"),
            {"sampled, outside the law"},
            "drafter ngram (policy=heuristic, k=2), rule standard, backend forerun",
        ),
    ],
)  # fmt: skip
def test_lossless_pipelines_pass_all_but_what_few_tokens_cannot_decide(
    words: tuple[str, ...], more: set[str], subject: str
) -> None:
    whole = audit(*words)
    found = passed(whole)
    assert (whole.subject, whole.verdict) == (subject, "undecided")
    assert set(found) == EXACT | COUNTED | more
    counted = COUNTED | {RATIO}
    assert {name for name, fine in found.items() if fine} == set(found) - counted
    assert {name for name, fine in found.items() if fine is None} == set(found) & counted


def test_enough_tokens_make_it_lossless() -> None:
    found = audit("backend=reference", tokens=30_000)
    assert (found.status, found.verdict) == (0, "lossless")
    assert found.subject == "drafter none, rule transformers generate, plain, backend reference"
    assert set(passed(found)) == {"greedy texts"} | COUNTED
    told = json.loads(json.dumps(found.to_json()))
    assert all(check["figures"]["detectable_tv"] <= 0.03 for check in told["checks"] if check["name"] in COUNTED)


def test_transformers_accepts_an_identical_draft(tmp_path: Path) -> None:
    reference = prepare(variant("backend=reference", "drafter.kind=model"), tmp_path, 8, 0)
    assert [check.passed for check in identical_draft(reference, 0)] == [True]


@pytest.mark.parametrize("words", [("rule.kind=match",), ("rule.kind=standard", "drafter.greedy=true")])
def test_an_identical_draft_that_may_be_refused_is_tried_greedily_only(words: tuple[str, ...], tmp_path: Path) -> None:
    """`match` draws a token of its own, and a draft that was chosen has a law of its own."""
    (check,) = identical_draft(prepare(variant("drafter.kind=model", *words), tmp_path, 16, 0), 0)
    assert (check.name, check.passed) == ("identical draft, greedy", True)


# What is not.


@pytest.mark.parametrize(
    "words",
    [
        ("rule.kind=typical", "drafter.kind=model", "drafter.k=3"),
        ("rule.kind=temperature-relaxed", "rule.temperature=2", "drafter.kind=model", "drafter.k=3"),
        ("rule.kind=relaxed", "drafter.kind=ngram", "drafter.k=3"),
        ("rule.kind=import", "rule.path=planted:FullDraftLaw", "drafter.kind=model", "drafter.greedy=true", "drafter.k=3"),
    ],
)
def test_lossy_rules_fail_by_their_counts(words: tuple[str, ...], tmp_path: Path) -> None:
    checks = sampled(prepare(variant(*words), tmp_path, 16, 0), 6000, 0.01, 0)
    assert [check.name for check in checks if check.passed is False]
    assert all(check.figures["statistic"] > check.figures["limit"] for check in checks if check.passed is False)


def test_a_lossy_pipeline_is_not_lossless() -> None:
    found = audit("rule.kind=typical", "drafter.kind=ngram", tokens=8000)
    assert (found.status, found.verdict) == (1, "not lossless")
    assert all(passed(found)[name] for name in EXACT)


def test_tokens_outside_the_nucleus_are_impossible(tmp_path: Path) -> None:
    words = ("rule.kind=ensemble", "drafter.kind=model", "drafter.greedy=true", "sampling.temperature=1", "sampling.top_k=2")
    outside = sampled(prepare(variant(*words), tmp_path, 16, 0), 500, 0.01, 0)[0]
    assert (outside.name, outside.passed) == ("sampled, outside the law", False)
    assert outside.figures["tokens"] > 0


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("after", ["acceptance", "rejection"])
def test_an_off_by_one_of_the_drafts_cache_lowers_the_acceptance_of_an_identical_draft(after: str, tmp_path: Path) -> None:
    rule = ("rule.kind=import", "rule.path=planted:OffByOne", f"rule.options.after={after}")
    faulty = prepare(variant(*rule, "drafter.kind=model", "drafter.k=3"), tmp_path, 16, 0)
    checks = identical_draft(faulty, 0)
    assert [check.name for check in checks] == ["identical draft, greedy", "identical draft, sampled"]
    assert all("acceptance below 1 for an identical draft" in check.evidence and check.passed is False for check in checks)
    assert [check.passed for check in cached_scores(faulty, 0)] == [True, False]
    assert greedy(faulty, 0, beside=False).passed, "what comes out is right all the same"


def test_an_off_by_one_of_the_targets_cache_shows_in_texts_and_scores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    place = KVCache.place

    def shifted(cache: KVCache, nodes: int, device: torch.device) -> tuple[torch.Tensor, int]:
        slots_BN, read = place(cache, nodes, device)
        return (slots_BN - 1).clamp_min(0), read

    monkeypatch.setattr("forerun.build.probe", lambda _: None)  # it refuses such a cache at once
    monkeypatch.setattr(KVCache, "place", shifted)
    faulty = prepare(variant("drafter.kind=ngram"), tmp_path, 16, 0)
    texts, (scores,) = greedy(faulty, 0, beside=False), cached_scores(faulty, 0)
    assert (texts.passed, scores.passed) == (False, False)
    assert "whose score is" in texts.evidence
    assert scores.figures["difference"] > 0.01


# The statistics.


def random_laws(count: int, cells: int, sharpness: float = 1.5) -> torch.Tensor:
    return (sharpness * torch.randn(count, cells, dtype=torch.float64)).softmax(-1)


def test_a_chi_square_of_draws_from_many_laws_is_as_large_as_its_freedom() -> None:
    """Not smaller, as the multinomial formula would have it, for laws this different."""
    statistics = []
    for _ in range(30):
        laws_TC = random_laws(2000, 8, 3.0)
        cells_T, group_T = laws_TC.multinomial(1)[:, 0], torch.randint(2, (2000,))
        found = deviation(laws_TC, cells_T, group_T)
        assert found.freedom == 14
        assert found.passed
        statistics.append(found.statistic)
    assert sum(statistics) / 30 == pytest.approx(14, abs=4)


def test_a_deviation_of_the_detectable_size_is_found() -> None:
    laws_TC = random_laws(40_000, 8)
    promised = deviation(laws_TC, laws_TC.multinomial(1)[:, 0], torch.zeros(40_000)).detectable_tv
    moved_TC = laws_TC + torch.tensor([1.0, -1.0] + [0.0] * 6, dtype=torch.float64) * laws_TC[:, 1:2] * 0.5
    size = float((moved_TC - laws_TC).mean(0).abs().sum() / 2)
    mixed_TC = laws_TC + (moved_TC - laws_TC) * promised / size
    assert promised < size
    assert not deviation(laws_TC, mixed_TC.multinomial(1)[:, 0], torch.zeros(40_000)).passed


def test_rare_tokens_are_neither_a_false_alarm_nor_overlooked() -> None:
    laws_TC = torch.tensor([[1 - 2e-4, 1e-4, 1e-4]], dtype=torch.float64).expand(1000, 3)
    cells_T = torch.zeros(1000, dtype=torch.long)
    cells_T[:2] = 1
    assert deviation(laws_TC, cells_T, torch.zeros(1000)).passed
    cells_T[:30] = 1
    assert not deviation(laws_TC, cells_T, torch.zeros(1000)).passed


def test_what_passes_without_the_power_to_fail_is_undecided() -> None:
    laws_TC = random_laws(1000, 4)
    right, wrong = laws_TC.multinomial(1)[:, 0], torch.zeros(1000, dtype=torch.long)
    fine, bad = (deviation(laws_TC, cells_T, torch.zeros(1000)) for cells_T in (right, wrong))
    assert [judge("c", fine, bound, "").passed for bound in (0.01, 0.5)] == [None, True]
    assert [judge("c", bad, bound, "").passed for bound in (0.01, 0.5)] == [False, False]
    assert "take more tokens" in judge("c", fine, 0.01, "").evidence


# The subject.


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    return prepare(variant("drafter.kind=model"), tmp_path_factory.mktemp("subject"), 16, 0)


def test_fresh_scores_do_not_see_padding_or_order(subject: Subject) -> None:
    texts = [(1, 2, 3, 4, 5), (6,), (7, 8, 9)]
    for text, scores_TV in zip(texts, fresh(subject.plain, texts), strict=True):
        alone_TV = subject.plain(input_ids=torch.tensor([text])).logits[0]
        torch.testing.assert_close(scores_TV, alone_TV, rtol=0, atol=1e-12)


def test_the_law_of_every_token_is_the_one_of_its_own_counts(subject: Subject) -> None:
    sampling = Sampling(
        temperature=0.8, top_k=9, top_p=0.9, min_p=0.02, repetition_penalty=1.3, presence_penalty=0.4, frequency_penalty=0.3,
        logit_bias={2: 1.0},
    )  # fmt: skip
    request, output = Request("a", (3, 1, 4, 1), sampling), (5, 1, 5, 2, 6)
    scores_TV = fresh(subject.plain, [(*request.prompt, *output)])[0]
    laws_TV, warp = laws_after(request, (*request.prompt, *output), scores_TV), build_warp([sampling], 16, torch.device("cpu"))
    for i in range(len(output)):
        counts = Counts(
            torch.bincount(torch.tensor(output[:i], dtype=torch.long), minlength=16)[None], torch.zeros(1, 16).bool()
        )
        counts.prompt_BV[0, list(request.prompt)] = True
        alone_V = law(penalize(scores_TV[None, None, 3 + i], warp, counts, None), warp)[0, 0]
        torch.testing.assert_close(laws_TV[i], alone_V, rtol=0, atol=1e-12)


def test_drafts_of_the_subject_are_neither_always_nor_never_right(subject: Subject) -> None:
    texts = torch.randint(16, (8, 50)).tolist()
    p, q = (torch.cat(fresh(model, texts)).softmax(-1) for model in (subject.plain, subject.plain_draft))
    assert 0.3 < float(torch.minimum(p, q).sum(-1).mean()) < 0.9
    assert 0.2 < float(p.amax(-1).mean()) < 0.7


# Mistakes.


@pytest.mark.parametrize(
    ("words", "tokens", "message"),
    [
        ((), 0, "tokens=0"),
        (("backend=reference", "sampling.presence_penalty=1", "sampling.temperature=1"), 10, "presence"),
        (("rule.kind=import", "rule.path=planted:Nothing"), 10, "rule.path"),
        (("backend=reference", "drafter.kind=medusa"), 10, "medusa"),
    ],
)
def test_what_cannot_run_is_one_line(words: tuple[str, ...], tokens: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        audit(*words, tokens=tokens)
