"""`forerun audit` as it is typed: verdicts, evidence, exit statuses; planted faults are caught from the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from forerun.cli import run

HERE = Path(__file__).parent


def planted(*words: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own: planted rules change modules."""
    environment = os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "forerun.cli", "audit", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


@pytest.mark.parametrize("name", ["match", "standard", "block", "multi-round", "auto"])
def test_lossless_rules_pass(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["audit", "rule", name]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0] == f"rule {'block' if name == 'auto' else name}: lossless"
    assert "worst TV" in said


@pytest.mark.parametrize(
    "name", ["typical", "temperature-relaxed", "top-p-residual", "min-p-ratio", "relaxed", "ensemble", "synthetic"]
)
def test_lossy_rules_fail_with_the_distribution_that_shows_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["audit", "rule", name]) == 1
    said = capsys.readouterr().out
    assert "not lossless" in said.splitlines()[0]
    assert "p = (" in said
    assert "comes out with" in said


def test_parameters_of_a_rule_are_overrides(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["audit", "rule", "ensemble", "rule.weight=1.0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == "lossless"
    assert found["subject"] == "rule ensemble(weight=1.0)"
    assert all(check["passed"] for check in found["checks"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rule", "typcal"], "is none of"),
        (["rule", "typical", "rule.epsilom=0.1"], "did you mean 'rule.epsilon'"),
        (["rule", "import"], "rule.path"),
        (["rule", "import", "rule.path=nowhere:Rule"], "module:Name"),
        (["rule"], "NAME"),
        (["engine", "standard"], "forerun audit rule NAME"),
        (["engine", "nowhere.yaml"], "no such config file"),
        (["endpoint", "http://localhost:1"], "--against"),
    ],
)
def test_mistakes_are_one_line_and_status_2(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["audit", *words]) == 2
    said = capsys.readouterr()
    assert len(said.err.splitlines()) == 1
    assert message.lower() in said.err.lower()
    assert said.out == ""


@pytest.mark.parametrize("name", ["FullDraftLaw", "UnnormalizedResidual"])
def test_planted_rules_are_caught_by_enumeration(name: str) -> None:
    done = planted("rule", "import", f"rule.path=planted:{name}")
    assert done.returncode == 1, done.stderr
    assert "not lossless" in done.stdout


PIPELINE = ("rule.kind=import", "drafter.kind=model", "engine.rows=16", "--quiet")


def test_a_planted_noise_that_is_shared_is_caught_by_the_engine() -> None:
    done = planted("engine", "rule.path=planted:SharedNoise", *PIPELINE, "--tokens", "60000")
    assert done.returncode == 1, done.stderr
    assert "not lossless" in done.stdout


def test_a_planted_cache_fault_lowers_the_acceptance_of_an_identical_draft() -> None:
    done = planted("engine", "rule.path=planted:OffByOne", *PIPELINE, "--tokens", "2000")
    assert done.returncode == 1, done.stderr
    assert "acceptance below 1 for an identical draft" in done.stdout
