"""What a report says of a rule: the enumeration's answer in every row, whatever the rule says of itself."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from transformers import LlamaConfig

from fakes import Fake
from forerun.accept import Law, Match, Rule, Standard, choose, describe
from forerun.accept.block import Block
from forerun.accept.choose import RULES
from forerun.accept.evidence import Evidence, examine
from forerun.accept.relaxations import Ensemble, TemperatureRelaxed, TopPResidual
from forerun.accept.rule import at_node
from forerun.accept.synthetic import Synthetic
from forerun.accept.thresholds import Relaxed, Typical
from forerun.bench import labels, measure, methods, report, show
from forerun.config import Variant, load, parse
from forerun.draft import Constant, NGram
from forerun.engine import Engine
from forerun.model import Target
from forerun.tree import Tree
from forerun.types import Sampling, UserError
from models import tiny

OUTSIDE = """
from forerun.accept.relaxations import TemperatureRelaxed

class Claims(TemperatureRelaxed):
    name, lossless = "claims", True

class Counted:
    name, lossless, trees, meaningless = "counted", True, False, False
    def __init__(self, temperature):
        self.inner = TemperatureRelaxed(temperature)
    def law(self, tree, p_BNV):
        return self.inner.law(tree, p_BNV)

class Broken:
    name, lossless, trees, meaningless = "broken", True, False, False
    def law(self, tree, p_BNV):
        return p_BNV.no_such_thing()
"""


class Claims(TemperatureRelaxed):
    lossless = True


class NeverDraws(Standard):
    """Right about every draft, wrong about the token after the last one."""

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        uniform_V = torch.full_like(p_BNV[0, 0], 1 / p_BNV.shape[2])
        return Law(super().law(tree, p_BNV).accept_BN, lambda end_B: uniform_V.expand(len(end_B), -1))


class NotANumber(Standard):
    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        return Law(super().law(tree, p_BNV).accept_BN, lambda end_B: at_node(p_BNV, end_B) * float("nan"))


def told(rule: Rule, drafts: bool = True, **sampling: Any) -> dict[str, Any]:
    return labels.told(rule, drafts, Sampling(**{"temperature": 1.0} | sampling), {})


# One rule.


@pytest.mark.parametrize(
    ("sampling", "name"),
    [
        ({}, "p"),
        ({"temperature": 0.7}, "p at temperature 0.7"),
        ({"temperature": 0.7, "top_p": 0.9}, "p at temperature 0.7, top-p 0.9"),
        ({"top_k": 40, "min_p": 0.05}, "p at top-k 40, min-p 0.05"),
        ({"repetition_penalty": 1.1, "logit_bias": {3: 1.0}}, "p at repetition penalty 1.1, logit bias"),
    ],
)
def test_a_lossless_rule_says_for_which_law(sampling: dict[str, Any], name: str) -> None:
    found = told(Block(), **sampling)
    assert (found["label"], found["lossless"], found["rule"]) == (f"lossless for {name}", True, "block")


@pytest.mark.parametrize("rule", [Block(), TemperatureRelaxed(2), TopPResidual(0.9)], ids=describe)
def test_the_figures_are_the_enumerations(rule: Rule) -> None:
    expected, found = examine(rule), told(rule)
    evidence = found["rule_evidence"]
    for name in ("worst_tv", "mean_tv", "joint_tv", "against_standard", "lossless"):
        assert evidence[name] == getattr(expected, name), name
    assert found["lossless"] is expected.lossless
    assert (f"TV up to {evidence['tv']:.2g} " in found["label"]) is not expected.lossless
    assert (f"accepts {expected.against_standard:.2f} times" in found["label"]) is not expected.lossless


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "min_p": 0.1}])
def test_a_false_claim_is_lossy(sampling: dict[str, Any]) -> None:
    rule = Claims(2.0)
    assert rule.lossless
    found = told(rule, **sampling)
    assert found["lossless"] is False
    assert found["label"].startswith("LOSSY: TV up to 0.2")


@pytest.mark.parametrize("name", RULES)
def test_greedy_is_judged_by_what_a_rule_does_there(name: str) -> None:
    found = told(choose(name), temperature=0.0, top_p=0.9)
    if name == "synthetic":
        assert (found["label"], found["lossless"], found["meaningless"]) == ("meaningless text (load test)", False, True)
    elif name == "ensemble":
        assert found["label"].startswith("LOSSY: greedy, TV up to 0.5 a round")
    else:
        assert (found["label"], found["lossless"]) == ("lossless (greedy: the target's best tokens)", True)


class FollowsTheYounger(Match):
    """On a tree, moves to the last child whatever it is."""

    lossless = False

    def law(self, tree: Tree, p_BNV: Tensor) -> Law:
        right = super().law(tree, p_BNV)
        elder_BN = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0]])
        return right if tree.is_chain or tree.size != 5 else Law(elder_BN.expand_as(right.accept_BN), right.residual)


def test_greedy_can_fail() -> None:
    """With delta 1 every token is near enough to the best one, even one that cannot come."""
    assert told(Relaxed(10, 0.6), temperature=0.0)["lossless"]
    assert told(Relaxed(10, 1.0), temperature=0.0)["rule_evidence"]["tv"] == 1
    assert told(NotANumber(), temperature=0.0)["lossless"] is False
    assert told(FollowsTheYounger(), temperature=0.0)["lossless"] is False


@pytest.mark.parametrize("rule", [Match(), Typical(0.09, 0.3), Synthetic((0.8,)), Claims(2.0)], ids=describe)
def test_without_drafts_every_rule_is_harmless(rule: Rule) -> None:
    found = told(rule, drafts=False, temperature=0.7)
    assert found == {
        "rule": None, "label": "lossless for p at temperature 0.7 (nothing drafted)", "lossless": True, "meaningless": False,
        "rule_evidence": None,
    }  # fmt: skip
    assert told(rule, drafts=False, temperature=0.0)["label"] == "lossless (greedy, nothing drafted)"


def test_a_rule_that_spoils_plain_decoding_is_not_excused() -> None:
    assert told(NeverDraws(), drafts=False)["lossless"] is False


def test_a_law_that_is_no_number_is_lossy_and_json() -> None:
    found = told(NotANumber())
    assert (found["lossless"], found["rule_evidence"]["tv"]) == (False, None)
    json.dumps(found, allow_nan=False)


# Whole runs, on random weights.


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs variants that draft with the target's own geometry and gives the summary; report files land in tmp_path/run."""
    LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
    ).save_pretrained(tmp_path / "geometry")  # fmt: skip
    (tmp_path / "outside.py").write_text(OUTSIDE)
    monkeypatch.chdir(tmp_path)

    def run(variants: dict[str, dict[str, Any]], temperature: float = 0.7) -> dict[str, Any]:
        config = str(tmp_path / "geometry" / "config.json")
        settings = {
            "model": {"path": config, "weights": "random", "dtype": "float32"}, "sampling": {"temperature": temperature},
            "drafter": {"kind": "model", "path": config, "weights": "random", "dtype": "float32", "k": 2},
            "workload": {"kind": "synthetic", "prompts": 2, "prompt_tokens": 4}, "sampling.max_new": 6, "repeats": 1,
            "engine.capacity": 64, "variants": {"plain": {"drafter.kind": "none"}} | variants,
        }  # fmt: skip
        experiment = load(None, [], settings)
        return measure.run(experiment, methods.maker(), tmp_path / "run", Console(quiet=True), measure_memory=False)

    return run


def test_every_row_says_its_rule_and_label(bench: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    summary = bench(
        {
            "auto": {},
            "ngram": {"drafter": {"kind": "ngram", "k": 2}, "sampling.top_p": 0.9},
            "claims": {"rule": {"kind": "import", "path": "outside:Claims", "options": {"temperature": 2.0}}},
            "load": {"rule": {"kind": "synthetic", "rates": (0.5,)}},
            "theirs": {"backend": "reference"},
        }
    )
    found = summary["variants"]
    assert {name: figures["error"] for name, figures in found.items()} == dict.fromkeys(found)
    assert {name: figures["rule"] for name, figures in found.items()} == {
        "plain": None, "auto": "block", "ngram": "match", "claims": "claims(temperature=2.0)",
        "load": "synthetic(rates=(0.5,))", "theirs": "transformers generate, assistant",
    }  # fmt: skip
    assert {name: figures["lossless"] for name, figures in found.items()} == {
        "plain": True, "auto": True, "ngram": True, "claims": False, "load": False, "theirs": None,
    }  # fmt: skip
    assert found["ngram"]["label"] == "lossless for p at temperature 0.7, top-p 0.9"
    assert found["claims"]["label"].startswith("LOSSY: TV up to 0.21 a token, 0.11 on average; accepts 1.28 times")
    assert found["theirs"]["label"] == "not enumerated: transformers generate, assistant"
    assert found["theirs"]["rule_evidence"] is None
    lines = (tmp_path / "run" / "report.md").read_text().splitlines()
    for name, figures in found.items():
        row = next(line for line in lines if line.startswith(f"| {name} |"))
        assert row.split(" | ")[1:3] == [figures["label"], figures["rule"] or "-"], "the label stands beside the speed-up"
    told = json.loads((tmp_path / "run" / "environment.json").read_text())["variants"]
    assert told["claims"]["lossless"] is False


def test_each_rule_is_enumerated_once(bench: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def noted(rule: Rule) -> Evidence:
        seen.append(describe(rule))
        return examine(rule)

    monkeypatch.setattr(labels, "examine", noted)
    outside = {"kind": "import", "path": "outside:Counted"}
    found = bench(
        {
            "auto": {}, "block": {"rule": {"kind": "block"}}, "more": {"drafter.k": 3},
            "one": {"rule": outside | {"options": {"temperature": 1.0}}},
            "two": {"rule": outside | {"options": {"temperature": 2.0}}},
        }
    )["variants"]  # fmt: skip
    assert seen == ["block", "counted", "counted"], "rules of one name with other options are other rules"
    assert [found[name]["lossless"] for name in ("auto", "block", "more", "one", "two")] == [True, True, True, True, False]


def test_a_rule_that_cannot_be_enumerated_is_a_failed_row(bench: Callable[..., dict[str, Any]]) -> None:
    found = bench({"bad": {"rule": {"kind": "import", "path": "outside:Broken"}}}, temperature=0.0)["variants"]
    assert found["bad"]["error"].startswith("rule broken: AttributeError: ")
    assert found["plain"]["error"] is None


def test_a_backend_that_is_not_ours_is_not_believed() -> None:
    found = labels.of(Fake(), Variant(), {})
    unknown = dict.fromkeys(("lossless", "meaningless", "rule_evidence"))
    assert found == unknown | {"label": "not enumerated: fake", "compressed": False}


def test_a_lossless_rule_on_a_compressed_target_keeps_that_targets_text() -> None:
    engine = Engine(Target(tiny("llama")), NGram(Constant(2), 1), choose("auto", drawn=False), rows=1, capacity=64)
    smaller = parse(Variant, {"model": {"recipes": [{"kind": "rtn"}]}}, "variant")
    found = labels.of(engine, smaller, {})
    assert found["lossless"]
    assert found["compressed"]
    assert found["label"].endswith("; of the compressed target")
    assert show.mark(found) == "compressed"
    assert show.mark(labels.of(engine, Variant(), {})) == "lossless"


def test_a_baseline_with_a_broken_rule_is_the_users_to_mend(tmp_path: Path, bench: Callable[..., dict[str, Any]]) -> None:
    with pytest.raises(UserError, match=r"baseline 'plain': rule broken: AttributeError.*; mend its law"):
        bench({"plain": {"rule": {"kind": "import", "path": "outside:Broken"}}})


# The tables and the chart.


def summary(**rules: Rule) -> dict[str, Any]:
    """A summary of made-up figures, each row with the label of its rule."""
    share = {"value": 1.84, "low": 1.71, "high": 11.97}
    figures = {
        "error": None, "tokens_per_second": {"total": 1259.1, "decode": 1312.9}, "ms_per_token": {"p50": 123.45},
        "speedup": share, "speedup_e2e": share, "acceptance_rate": 0.123, "block_efficiency": 3.21, "overhead": 1.5,
        "exact_share": 0.871, "peak_memory_bytes": 2**34, "quality": None,
    }  # fmt: skip
    rows = {name: figures | told(rule, temperature=0.7) for name, rule in rules.items()}
    return {"status": "complete", "baseline": "plain", "variants": {"plain": figures | told(Match(), drafts=False)} | rows}


def printed(found: dict[str, Any]) -> list[str]:
    console = Console(width=80, file=io.StringIO())
    with console.capture() as caught:
        console.print(report.table(found))
    return caught.get().splitlines()


ALL = {"standard": Standard(), "typical": Typical(0.09, 0.3), "cut": TopPResidual(0.9), "load": Synthetic((0.8,))}


def test_a_lossy_row_never_stands_without_the_quality_column() -> None:
    lossy, fine = summary(**ALL), summary(standard=Standard(), block=Block())
    assert "quality" in report.rows(lossy)[0]
    assert "quality" not in report.rows(fine)[0]
    at = report.rows(lossy)[0].index("quality")
    assert [line[at] for line in report.rows(lossy)[1:]] == ["-"] * 5
    assert any("quality" in line for line in printed(lossy))
    assert not any("quality" in line for line in printed(fine))


def test_the_terminal_holds_the_labels_in_80_columns() -> None:
    for found in (summary(**ALL), summary(standard=Standard()), summary(ensemble=Ensemble(0.5))):
        lines = printed(found)
        assert max(len(line.rstrip()) for line in lines) <= 80
        assert not any("…" in line for line in lines), "nothing is cut off"
    lines = printed(summary(**ALL))
    for name, mark in {"plain": "lossless", "standard": "lossless", "cut": "LOSSY .02", "load": "meaningless"}.items():
        assert any(line.split()[:1] == [name] and mark in line for line in lines), name
    tv = examine(Typical(0.09, 0.3)).worst_tv
    assert any(f"LOSSY .{100 * tv:.0f} " in line for line in lines)


def test_the_chart_marks_lossy_and_meaningless_bars(tmp_path: Path) -> None:
    report.write(summary(**ALL), load(None, [], {"variants.plain": {}}), tmp_path)
    text = (tmp_path / "report.html").read_text()
    chart = text[text.index("<svg") : text.index("</svg>")]
    assert chart.count('class="bar lossy"') == 3
    assert chart.count('class="bar"') == 2
    assert chart.count("1.84x, LOSSY, quality -<") == 2
    assert chart.count("1.84x, meaningless text<") == 1
