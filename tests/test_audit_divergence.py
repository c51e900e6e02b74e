"""Differences of greedy texts: honest rounding is told from a fault of the cache, the mask or the end of a text."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from forerun.accept import Verdict
from forerun.audit.divergence import divergence, first_difference, judge
from forerun.audit.verdict import Audit
from forerun.cache import KVCache
from forerun.config import Experiment, load
from forerun.tree import Tree
from forerun.types import Completion, UserError
from models import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A target and a draft that often agrees with it, on disk in bfloat16."""
    for name, layers in (("target", 2), ("draft", 1)):
        tiny("llama", num_hidden_layers=layers, dtype=torch.bfloat16).save_pretrained(tmp_path / name)
    return tmp_path


def experiment(folder: Path, *more: str) -> Experiment:
    words = [
        f"model.path={folder / 'target'}", "workload.kind=synthetic", "workload.prompts=12", "workload.prompt_tokens=9",
        "sampling.max_new=40", "engine.capacity=64", *more,
    ]  # fmt: skip
    return load(None, words)


def with_itself(folder: Path, *more: str) -> Experiment:
    """The target drafts for itself, so that nearly all is accepted and every fault of a long round shows."""
    return experiment(folder, "drafter.kind=model", f"drafter.path={folder / 'target'}", "drafter.k=3", *more)


def kinds(audit: Audit) -> list[str]:
    return [row["kind"] for row in audit.checks[0].figures["divergences"]]


@pytest.mark.parametrize("more", [(), ("drafter.kind=ngram", "drafter.k=3")])
def test_rounding_is_not_called_a_bug(folder: Path, more: tuple[str, ...]) -> None:
    audit = divergence(experiment(folder, "backend=reference", *more))
    assert audit.verdict == "lossless"
    assert kinds(audit), "the kernels round alike: nothing was tried"
    assert "bug" not in kinds(audit)
    assert f"{len(kinds(audit))} differ" in audit.checks[0].evidence
    for row in audit.checks[0].figures["divergences"]:
        assert row["plain"] != row["other"]
        assert 0 <= row["gap"] <= row["perturbation"] < 1


@pytest.mark.parametrize("rows", [1, 3])
def test_a_healthy_engine_is_lossless(folder: Path, rows: int) -> None:
    audit = divergence(with_itself(folder, f"engine.rows={rows}", "engine.debug=true"))
    assert audit.verdict == "lossless"
    assert audit.checks[0].figures["tokens"] == 12 * 40


def test_in_float32_nothing_differs(folder: Path) -> None:
    audit = divergence(experiment(folder, "model.dtype=float32", "backend=reference"))
    assert (audit.verdict, kinds(audit)) == ("lossless", [])


def test_a_rule_that_keeps_wrong_tokens_is_a_bug(folder: Path) -> None:
    wrong = ("drafter.kind=model", f"drafter.path={folder / 'draft'}", "rule.kind=synthetic", "rule.rates=[1.0]")
    audit = divergence(experiment(folder, *wrong))
    assert audit.verdict == "not lossless"
    assert kinds(audit).count("bug") > len(kinds(audit)) / 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_cache_that_keeps_one_slot_too_many_is_a_bug(folder: Path, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def commit(cache: KVCache, tree: Tree, verdict: Verdict, accepted: list[int]) -> None:
        cache.lengths = [length + count + (count > 2) for length, count in zip(cache.lengths, accepted, strict=True)]

    monkeypatch.setattr(KVCache, "commit", commit)
    audit = divergence(with_itself(folder, f"model.dtype={dtype}", "engine.capacity=128"))
    assert audit.verdict == "not lossless"
    assert kinds(audit).count("bug") > len(kinds(audit)) / 2
    assert f"{kinds(audit).count('bug')} bugs" in audit.checks[0].evidence


def test_a_fault_in_the_passes_themselves_does_not_excuse_itself(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = KVCache.place

    def place(cache: KVCache, nodes: int, device: torch.device) -> tuple[Tensor, int]:
        slots_BN, read = honest(cache, nodes, device)
        return slots_BN + (nodes > 1), read

    monkeypatch.setattr(KVCache, "place", place)
    audit = divergence(with_itself(folder))
    assert audit.verdict == "not lossless"
    assert kinds(audit).count("bug") > len(kinds(audit)) / 2
    assert "err by more than rounding" in audit.checks[0].evidence
    faulty = {name for row in audit.checks[0].figures["divergences"] for name in row["faulty"]}
    assert faulty, "no pass was found out"
    assert all(name.startswith("engine, 4 a pass") for name in faulty), "only the wide passes are faulty"


EXACT = torch.tensor([0.0, 4.01, 4.0, 1.0, -2.0, 3.0])


def moved(by: dict[int, float]) -> Tensor:
    """Low-precision scores: the exact ones, moved."""
    low_V = EXACT.clone()
    for token, shift in by.items():
        low_V[token] += shift
    return low_V


@pytest.mark.parametrize(
    ("theirs", "ours", "tokens", "kind"),
    [
        ({1: -0.01}, {}, (1, 2), "tie"),  # equal in a pass of transformers
        ({3: 0.03}, {1: -0.01}, (1, 2), "tie"),  # equal in a pass of the engine
        ({1: 0.02}, {3: -0.02}, (1, 2), "numerics"),
        ({1: 0.002}, {3: -0.002}, (1, 2), "bug"),  # the gap is .01
        ({1: 0.02}, {3: -0.02}, (1, 5), "bug"),  # no contender
        ({0: 1.0, 3: 0.03}, {}, (3, 0), "bug"),  # both tokens are equal, and far below the best
        ({1: 0.02}, {5: 1.1}, (1, 5), "bug"),  # the engine's own pass would excuse it, but errs too much
    ],
)
def test_the_judgement_of_one_position(
    theirs: dict[int, float], ours: dict[int, float], tokens: tuple[int, int], kind: str
) -> None:
    found = judge(EXACT, {"theirs": moved(theirs)}, {"ours": moved(ours)}, *tokens)
    assert found.kind == kind
    assert found.faulty == (("ours",) if ours == {5: 1.1} else ())
    assert found.gap == pytest.approx(float(4.01 - EXACT[list(tokens)].min()), abs=1e-6)


def done(*tokens: int) -> Completion:
    return Completion("a", 0, tokens, "", "length", ())


def test_where_texts_part() -> None:
    assert first_difference(done(1, 2), done(1, 2)) is None
    parted = first_difference(done(1, 2, 3), done(1, 4, 3))
    assert parted is not None
    assert (parted.position, parted.plain, parted.other) == (1, 2, 4)
    ended = first_difference(done(1, 2), done(1, 2, 3))
    assert ended is not None
    assert (ended.position, ended.plain, ended.other) == (2, None, 3)


def test_a_text_that_only_ends_early_is_a_bug(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from forerun import engine

    honest = engine.cut

    def cut(tokens: list[int], room: int, *rest: object) -> object:
        return honest(tokens, room - (len(tokens) > 1), *rest)

    monkeypatch.setattr(engine, "cut", cut)
    audit = divergence(with_itself(folder))
    assert audit.verdict == "not lossless"
    assert {(row["kind"], row["position"], row["other"]) for row in audit.checks[0].figures["divergences"]} == {
        ("bug", 39, None)
    }


def test_plain_decoding_is_not_compared_with_itself(folder: Path) -> None:
    audit = divergence(experiment(folder))
    assert audit.verdict == "undecided"
    assert "drafter.kind=ngram or backend=reference" in audit.checks[0].evidence


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("sampling.temperature=0.5", "say sampling.temperature=0"),
        ("sampling.repetition_penalty=1.1", "penalties and logit_bias"),
    ],
)
def test_sampling_that_cannot_be_compared_is_refused(folder: Path, word: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        divergence(experiment(folder, "backend=reference", word))
