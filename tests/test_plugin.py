"""The plugin for vLLM, without a vLLM: its settings, the releases it knows, its laws on vLLM's layout, the repair."""

import logging
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from forerun.accept import choose
from forerun.accept.exact import Process, accepted, drawn_chains, first_tokens, random_process, score
from forerun.audit.statistics import goodness
from forerun.config import Variant, parse
from forerun.plugin import register, settings, versions
from forerun.plugin.repair import expand, mend, once, repaired, works
from forerun.plugin.rounds import Dice, Rules, emitted, judge, rules
from forerun.types import UserError

VOCABULARY, DRAFTS, ROWS = 4, 2, 40_000
KINDS = ("auto", "standard", "match", "block", "temperature-relaxed", "top-p-residual", "min-p-ratio", "typical", "synthetic")


@dataclass
class Speculation:
    method: str = "draft_model"
    rejection_sample_method: str = "standard"
    draft_sample_method: str = "probabilistic"


@dataclass
class Engine:
    """What the plugin reads of vLLM's VllmConfig."""

    additional_config: dict[str, Any] = field(default_factory=dict)
    speculative_config: Speculation | None = field(default_factory=Speculation)
    ready: bool = False

    def __post_init__(self) -> None:
        self.ready = True


def rule_of(kind: str) -> Rules:
    return rules(parse(Variant, {"rule": {"kind": kind}}, "rule").rule)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[Engine]:
    """A vLLM of an unknown release, whose configuration can be read."""

    class VllmConfig(Engine):
        pass

    vllm, config = ModuleType("vllm"), ModuleType("vllm.config")
    vars(vllm)["__version__"], vars(config)["VllmConfig"] = "0.99.1", VllmConfig
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.config", config)
    return VllmConfig


def test_the_package_says_where_vllm_finds_the_plugin() -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    said = project["entry-points"]["vllm.general_plugins"]
    assert [EntryPoint(name, value, "vllm.general_plugins").load() for name, value in said.items()] == [register]


@pytest.mark.parametrize(("version", "known"), [("0.32.0", True), ("0.32.4+cu130", True), ("0.33.0", False), ("0.3.2", False)])
def test_releases_that_are_not_known_are_named(version: str, known: bool) -> None:
    trouble = versions.trouble(version)
    assert trouble is None if known else trouble is not None and f"this is {version}" in trouble


def test_an_unknown_vllm_is_refused_only_where_a_configuration_names_forerun(stand_in: type[Engine]) -> None:
    register()
    register()  # vLLM says that it may happen twice
    assert stand_in().ready
    with pytest.raises(UserError, match=r"know vLLM 0\.32 and this is 0\.99\.1"):
        stand_in({"forerun": {"rule": {"kind": "typical"}}})


def test_a_known_vllm_s_configuration_is_judged_where_it_is_made(stand_in: type[Engine]) -> None:
    settings.install(None)
    assert stand_in({"forerun": {"rule": {"kind": "typical"}}}).ready
    with pytest.raises(UserError, match=r"additional_config\.forerun: unknown key 'rule\.delte'.*'rule\.delta'"):
        stand_in({"forerun": {"rule": {"kind": "typical", "delte": 1}}})
    with pytest.raises(UserError, match="draft_sample_method"):
        stand_in({"forerun": {"rule": {"kind": "min-p-ratio"}}}, Speculation(draft_sample_method="greedy"))


def test_settings_are_a_rule_and_a_warp() -> None:
    assert settings.settings(Engine()) is None
    assert settings.settings(Engine({"other": {}})) is None
    assert settings.settings(None) is None
    found = settings.settings(Engine({"forerun": {"rule": {"kind": "typical", "epsilon": 0.2}, "min_p": 0.1}}))
    assert found is not None
    assert (found.rule.kind, found.min_p) == ("typical", 0.1)
    warp = settings.settings(Engine({"forerun": {"min_p": 0.1}}))
    assert warp is not None
    assert rules(warp.rule) == Rules(choose("block"), choose("match"))


@pytest.mark.parametrize(
    ("kind", "speculation", "fine"),
    [
        ("min-p-ratio", Speculation(), True),
        ("min-p-ratio", Speculation(draft_sample_method="greedy"), False),
        ("min-p-ratio", Speculation("ngram", draft_sample_method="greedy"), True),  # its laws are one-hot
        ("typical", Speculation(draft_sample_method="greedy"), True),  # it looks at the target's law only
        ("block", Speculation(draft_sample_method="greedy"), True),  # lossless with chosen drafts too
        ("typical", Speculation(rejection_sample_method="synthetic"), False),
        ("min-p-ratio", None, True),
    ],
)
def test_rules_that_compare_laws_need_the_draft_s(kind: str, speculation: Speculation | None, fine: bool) -> None:
    config = settings.settings(Engine({"forerun": {"rule": {"kind": kind}}}))
    assert config is not None
    if fine:
        settings.check(config, speculation)
    else:
        with pytest.raises(UserError, match=r"speculative_config\.(draft|rejection)_sample_method"):
            settings.check(config, speculation)


def processes() -> tuple[Process, Process]:
    draw = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return random_process(VOCABULARY, DRAFTS + 1, draw[0]), random_process(VOCABULARY, DRAFTS, draw[1])


def drawn_rows(target: Process, draft: Process, draw: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Drafts drawn for many requests as vLLM's runner has them: tokens, the target's logits, the drafts' laws."""
    tokens_BN, laws = torch.zeros(ROWS, DRAFTS + 1, dtype=torch.long), [torch.zeros(ROWS, VOCABULARY, dtype=torch.float64)]
    for node in range(1, DRAFTS + 1):
        laws.append(draft.after(tokens_BN[:, 1:node]))
        tokens_BN[:, node] = torch.multinomial(laws[-1], 1, generator=draw)[:, 0]
    scores = [target.after(tokens_BN[:, 1 : 1 + node]).log() for node in range(DRAFTS + 1)]
    return tokens_BN, torch.stack(scores, 1), torch.stack(laws, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_rounds_have_the_rule_s_own_law(kind: str) -> None:
    """The first token that comes out and the number of drafts kept, held against exact enumeration."""
    draw, (target, draft), ours = torch.Generator().manual_seed(7), processes(), rule_of(kind)
    tokens_BN, logits_BNV, probs_BNV = drawn_rows(target, draft, draw)
    lengths_B = torch.full((ROWS,), DRAFTS)
    kept_B, next_B = judge(ours, tokens_BN, lengths_B, logits_BNV, probs_BNV, None, False, Dice(draw, {}))
    tree, weights_B = drawn_chains(draft, DRAFTS)
    law = ours.drawn.law(tree, score(tree, target))
    assert goodness(torch.bincount(kept_B, minlength=DRAFTS + 1), accepted(tree, law, weights_B) * ROWS).passed
    first = torch.bincount(emitted(tokens_BN, kept_B, next_B)[:, 0], minlength=VOCABULARY)
    right = first_tokens(tree, law, target, weights_B).flatten(1).sum(1)
    assert goodness(first, right * ROWS).passed


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_requests_follow_the_best_tokens_whatever_their_drafts_scored(kind: str) -> None:
    draw, (target, draft), ours = torch.Generator().manual_seed(3), processes(), rule_of(kind)
    tokens_BN, logits_BNV, probs_BNV = (part[:50] for part in drawn_rows(target, draft, draw))
    lengths_B, greedy_B = torch.full((50,), DRAFTS), torch.ones(50, dtype=torch.bool)
    best_BN = logits_BNV.argmax(-1)
    right_B = (tokens_BN[:, 1:] == best_BN[:, :-1]).long().cumprod(1).sum(1)
    for probs, all_greedy in ((probs_BNV, True), (probs_BNV, False), (None, True)):
        kept_B, next_B = judge(ours, tokens_BN, lengths_B, logits_BNV, probs, greedy_B, all_greedy, Dice(draw, {}))
        if kind != "synthetic":
            assert torch.equal(kept_B, right_B)
        assert torch.equal(next_B, best_BN.gather(1, kept_B[:, None])[:, 0])


@pytest.mark.parametrize("kind", ["auto", "typical", "synthetic"])
def test_drafts_that_are_not_there_are_not_kept(kind: str) -> None:
    """Shorter drafts than others' and a place that vLLM marks with -1: the walk ends there, and goes on from the target."""
    draw, (target, draft) = torch.Generator().manual_seed(5), processes()
    tokens_BN, logits_BNV, probs_BNV = drawn_rows(target, draft, draw)
    lengths_B = torch.full((ROWS,), DRAFTS)
    lengths_B[::4], lengths_B[1::4] = 0, 1
    tokens_BN[2::4, 1] = -1
    kept_B, next_B = judge(rule_of(kind), tokens_BN, lengths_B, logits_BNV, probs_BNV, None, False, Dice(draw, {}))
    assert bool((kept_B <= lengths_B).all())
    assert not kept_B[2::4].any()
    for start in (0, 2):
        assert goodness(torch.bincount(next_B[start::4], minlength=VOCABULARY), target.laws[0] * (ROWS // 4)).passed
    out_BN = emitted(tokens_BN, kept_B, next_B)
    assert torch.equal((out_BN >= 0).sum(1), kept_B + 1)


def test_a_request_with_a_seed_draws_alone_what_it_draws_in_company() -> None:
    def seeded() -> torch.Generator:
        return torch.Generator().manual_seed(11)

    alone, company = Dice(torch.Generator(), {0: seeded()}), Dice(torch.Generator(), {2: seeded()})
    assert torch.equal(alone.uniforms(1, 3)[0], company.uniforms(4, 3)[2])
    assert torch.equal(alone.exponentials(1, 5)[0], company.exponentials(4, 5)[2])
    others = company.uniforms(4, 3)
    assert others.unique().numel() == others.numel()


def faulty(x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> Tensor:
    return torch.zeros(num_tokens, dtype=x.dtype)


def test_the_repair_is_made_where_it_is_needed(caplog: pytest.LogCaptureFixture) -> None:
    module = ModuleType("sampler")
    vars(module)["expand_batch_to_tokens"] = faulty
    assert repaired(module) is None
    with caplog.at_level(logging.WARNING):
        assert mend(module)
        assert not mend(module)
    assert works(module)
    assert repaired(module) == "sampler.expand_batch_to_tokens"
    assert [record.getMessage() for record in caplog.records if "sampler.expand_batch_to_tokens" in record.getMessage()]
    assert len(caplog.records) == 1


def test_expansion_repeats_and_replaces() -> None:
    ends_B = torch.tensor([2, 2, 3], dtype=torch.int32)
    assert expand(torch.tensor([0.0, 0.5, 0.7]), ends_B, 3, replace_from=0, replace_to=1).tolist() == pytest.approx([1, 1, 0.7])
    whole = expand(torch.tensor([5, 6, 0], dtype=torch.int32), ends_B, 3)
    assert whole.dtype == torch.int32
    assert whole.tolist() == [5, 5, 0]


def test_a_kernel_is_registered_once() -> None:
    known: dict[str, int] = {}
    calls: list[list[str]] = []

    def register_kernels(overrides: Mapping[str, int]) -> None:
        calls.append(list(overrides))
        known.update(overrides)

    ours = once(register_kernels, known)
    ours({"expand": 1})
    ours({"expand": 1})
    ours({"expand": 1, "other": 2})
    assert calls == [["expand"], ["other"]]
