"""Sweeps: what a second run need not measure again, variants in processes of their own, quality, and what is logged."""

import csv
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console
from transformers import LlamaConfig

from fakes import Fakes
from forerun.bench import alone, kept, measure
from forerun.config import ChoiceConfig, Experiment, load
from forerun.evaluate.quality import Quality
from forerun.types import UserError
from forerun.verbs.bench import plan
from forerun.verbs.bench import run as run_verb

BASE = {
    "workload.kind": "synthetic", "workload.prompts": 3, "workload.prompt_tokens": 5, "sampling.max_new": 9, "repeats": 2,
    "variants.plain.drafter.kind": "none", "variants.ngram.drafter.kind": "ngram", "variants.ngram.drafter.k": 3,
}  # fmt: skip
QUIET = Console(quiet=True)


def experiment(**more: object) -> Experiment:
    return load(None, [], BASE | {key.replace("__", "."): value for key, value in more.items()})


def bench(out: Path, fakes: Fakes | None = None, *, resume: bool = True, **more: object) -> dict[str, Any]:
    return measure.run(experiment(**more), (fakes or Fakes()).maker(), out, QUIET, measure_memory=False, resume=resume)


def built(out: Path, **more: object) -> tuple[list[int], dict[str, Any]]:
    """Tokens a round of each backend that a resumed run had to build, and its figures."""
    fakes = Fakes()
    summary = bench(out, fakes, **more)
    return [fake.width for fake in fakes.made], summary["variants"]


# Resuming.


def test_a_finished_run_is_not_measured_again(tmp_path: Path) -> None:
    first = bench(tmp_path)
    widths, figures = built(tmp_path)
    assert widths == []
    assert figures == first["variants"]
    assert json.loads((tmp_path / "summary.json").read_text())["variants"] == first["variants"]
    assert json.loads((tmp_path / "environment.json").read_text())["variants"]["ngram"]["rule"] == "fake"
    fakes = Fakes()
    bench(tmp_path, fakes, resume=False)
    assert len(fakes.made) == 2, "without --resume all is measured"


def test_a_changed_variant_is_measured_again_beside_the_finished_baseline(tmp_path: Path) -> None:
    before = bench(tmp_path)["variants"]
    assert before["ngram"]["interleaved"]
    widths, figures = built(tmp_path, variants__ngram__drafter__k=4)
    assert widths == [5]
    assert figures["plain"] == before["plain"]
    assert figures["ngram"]["hash"] != before["ngram"]["hash"]
    assert figures["ngram"]["exact_share"] == 1.0
    assert figures["ngram"]["interleaved"] is False, "it had no turns with this baseline"
    assert figures["ngram"]["speedup"]["value"] is not None


def test_a_new_variant_joins(tmp_path: Path) -> None:
    bench(tmp_path)
    widths, figures = built(tmp_path, **{"variants.more.drafter.kind": "ngram", "variants.more.drafter.k": 6})
    assert widths == [7]
    assert list(figures) == ["plain", "ngram", "more"]


def test_what_is_not_whole_is_measured_again(tmp_path: Path) -> None:
    bench(tmp_path)
    (tmp_path / "ngram" / kept.FILE).write_text("{")
    assert built(tmp_path)[0] == [4]
    (tmp_path / "plain" / "records.jsonl").unlink()
    assert built(tmp_path)[0] == [1]
    assert built(tmp_path, repeats=3)[0] == [1, 4], "the workload of both has changed"


def test_a_failed_variant_is_tried_again(tmp_path: Path) -> None:
    failed = bench(tmp_path, Fakes(drafting={"fail_at": 8}))["variants"]
    assert failed["ngram"]["error"] == "RuntimeError: broke"
    widths, figures = built(tmp_path)
    assert widths == [4]
    assert figures["ngram"]["error"] is None


def test_a_failing_baseline_keeps_what_others_measured(tmp_path: Path) -> None:
    bench(tmp_path)
    with pytest.raises(UserError, match="baseline 'ngram': cannot be built"):
        bench(tmp_path, Fakes(broken="ngram"), baseline="ngram", variants__ngram__drafter__k=4)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert summary["variants"]["plain"]["requests"] == 6


def test_an_interrupt_leaves_nothing_half_finished(tmp_path: Path) -> None:
    fakes = Fakes()

    def interrupt() -> None:
        if fakes.made[-1].steps > 20:
            raise KeyboardInterrupt

    fakes.settings = {"on_step": interrupt}
    assert bench(tmp_path, fakes)["status"] == "interrupted"
    assert not list(tmp_path.glob(f"*/{kept.FILE}"))
    assert built(tmp_path)[0] == [1, 4]


def test_the_hash_sees_files_machine_and_settings(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n")
    given = experiment(workload__kind="text", workload__path=str(prompts))
    variant = given.expand()["plain"]
    first = kept.content_hash(variant, given, {"cpu": "a"})
    assert kept.content_hash(variant, given, {"cpu": "a", "load_average": [9]}) == first
    assert kept.content_hash(variant, given, {"cpu": "b"}) != first
    assert kept.content_hash(given.expand()["ngram"], given, {"cpu": "a"}) != first
    other = experiment(workload__kind="text", workload__path=str(prompts), quality=["race-high"])
    assert kept.content_hash(variant, other, {"cpu": "a"}) != first
    os.utime(prompts, ns=(1, 1))
    assert kept.content_hash(variant, given, {"cpu": "a"}) != first


def test_files_of_a_path(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    [(place, size, _)] = kept.files(str(tmp_path / "model"))
    assert (place, size) == (str(tmp_path / "model" / "config.json"), 2)
    assert kept.files("embedded")
    assert kept.files("nobody/has-this-model") == kept.files("not/a/name: at all") == []


def test_requests_of_all_variants_as_csv(tmp_path: Path) -> None:
    bench(tmp_path)
    with (tmp_path / "requests.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["variant"] for line in lines] == ["plain"] * 6 + ["ngram"] * 6
    assert {line["speedup"] for line in lines[:6]} == {"1.0"}
    one, partner = lines[6], lines[0]
    assert (one["id"], one["tokens"], one["rounds"], one["acceptance_rate"]) == ("synthetic-0", "9", "2", "1.0")
    assert float(one["speedup"]) == pytest.approx(float(partner["ms_per_token"]) / float(one["ms_per_token"]))


# The verb.


CONFIG = """
workload: {kind: race-high, limit: 2}
sampling: {max_new: 9}
repeats: 1
quality: [gsm8k, {kind: perplexity, text: wikitext2}]
variants: {plain: {}, ngram: {drafter: {kind: ngram, k: 3}}}
small: {sampling: {max_new: 5}, workload: {kind: synthetic, prompts: 2}}
"""


def verb(*words: str, **more: Any) -> int:
    return run_verb(list(words), more.pop("out", None), {}, {}, None, maker=Fakes().maker(), memory=False, quiet=True, **more)


def test_the_small_size_of_a_config_needs_no_data(tmp_path: Path, examiner: "Examiner") -> None:
    config, out = tmp_path / "table.yaml", tmp_path / "run"
    config.write_text(CONFIG)
    assert verb(str(config), out=str(out), small=True) == 0
    figures = json.loads((out / "summary.json").read_text())["variants"]["ngram"]
    assert (figures["requests"], figures["tokens"]) == (2, 10)
    assert [kind for kind, _ in examiner.asked] == ["perplexity"], "GSM8K is not here, and nothing is fetched"
    with pytest.raises(UserError, match="--small asks for a config's own small size"):
        verb(out=str(out), small=True)


def test_going_on_with_a_run(tmp_path: Path, examiner: "Examiner") -> None:
    config, out = tmp_path / "table.yaml", str(tmp_path / "run")
    config.write_text(CONFIG.replace("race-high", "demo"))
    examiner.failing = "gsm8k"
    assert verb(str(config), out=out) == 1, "a measure failed"
    with pytest.raises(UserError, match="give --overwrite or --resume"):
        verb(str(config), out=out)
    examiner.failing = None
    assert verb(str(config), out=out, resume=True) == 0
    examiner.asked.clear()
    assert verb(str(config), out=out, resume=True) == 0
    assert examiner.asked == []
    assert verb(str(config), out=out, overwrite=True) == 0
    assert len(examiner.asked) == 3, "the score is shared"
    for wrong in ({"out": None}, {"out": out, "overwrite": True}):
        with pytest.raises(UserError, match="--resume goes on with the run that --out holds"):
            verb(str(config), resume=True, **wrong)


def test_a_folder_of_data_sets(tmp_path: Path) -> None:
    (tmp_path / "data" / "mt_bench").mkdir(parents=True)
    found = plan(["workload.kind=mt-bench"], {"data": str(tmp_path / "data")}, {}, None)
    assert found.located().workload.path == str(tmp_path / "data" / "mt_bench")


# A process for each variant.


def test_a_process_that_dies_says_how() -> None:
    assert alone.start({}, [sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"]) == (
        "its process was ended by SIGKILL, as the system does when memory runs out; lower engine.rows or engine.capacity, "
        "or take a smaller model"
    )
    assert (
        alone.start({}, [sys.executable, "-c", "raise ValueError('no')"]) == "its process ended with status 1: ValueError: no"
    )
    assert alone.start({}, [sys.executable, "-c", "print('bye')"]) == "its process did not say how it ended"
    assert alone.start({}, [sys.executable, "-c", 'print(\'{"error": "why"}\')']) == "why"
    assert str(alone.start({}, ["/nowhere/python"])).startswith("no process: ")


KILLER = """
import os
class Rule:
    name, lossless, trees, meaningless = "killer", True, True, False
    def law(self, tree, p_BNV):
        os.kill(os.getpid(), 9)
"""


def test_each_variant_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real processes on random weights; one is killed at work, and the others are measured and compared all the same."""
    LlamaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=None,
    ).save_pretrained(tmp_path / "geometry")  # fmt: skip
    (tmp_path / "killer.py").write_text(KILLER)
    monkeypatch.chdir(tmp_path)
    settings = BASE | {
        "model.path": str(tmp_path / "geometry" / "config.json"), "model.weights": "random", "model.dtype": "float32",
        "engine.capacity": 64, "sampling.temperature": 1.0, "fresh": True,
        "variants.ngram.rule.kind": "import", "variants.ngram.rule.path": "killer:Rule",
    }  # fmt: skip
    summary = measure.run(load(None, [], settings), Fakes().maker(), tmp_path / "run", QUIET)
    plain, killed = summary["variants"]["plain"], summary["variants"]["ngram"]
    assert summary["status"] == "complete"
    assert (plain["error"], plain["requests"], plain["interleaved"]) == (None, 6, True)
    assert plain["peak_memory_bytes"] > 2**26
    assert plain["kv_bytes"] > 0
    assert "SIGKILL" in killed["error"]


# Quality.


class Examiner:
    """Stands in for the measures: notes who was asked, and fails where it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.failing: str | None = None

    def measure(self, config: Any, backend: Any, sampling: Any, folder: Path, tell: Any) -> list[Quality]:
        self.asked.append((config.kind, backend.width))
        tell("asking", 1, 2)
        if config.kind == self.failing:
            raise UserError("no such data")
        if isinstance(config, ChoiceConfig):
            return [made("race-high", "acc", (True, False)), made("race-high", "acc_norm", (True, True))]
        (folder / f"{config.kind}.jsonl").write_text(f"answers of {min(backend.width, 5)}")
        return [made(config.kind, "exact_match", (backend.width < 6,) * 8)]


def made(name: str, metric: str, items: tuple[bool, ...]) -> Quality:
    return Quality(name, metric, sum(items) / len(items), 0.0, 1.0, True, len(items), items, {"shots": 5})


@pytest.fixture
def examiner(monkeypatch: pytest.MonkeyPatch) -> Examiner:
    found = Examiner()
    monkeypatch.setattr("forerun.bench.assess.measure", found.measure)
    monkeypatch.setattr("forerun.verbs.bench.check", lambda _: None)  # no data sets are here
    return found


ASKED = {"quality": ["race-high", "gsm8k"], "variants.far.drafter.kind": "ngram", "variants.far.drafter.k": 9}


def test_quality_beside_speed(tmp_path: Path, examiner: Examiner) -> None:
    figures = bench(tmp_path, **ASKED)["variants"]
    assert examiner.asked == [("race-high", 1), ("gsm8k", 1), ("gsm8k", 4), ("gsm8k", 10)], "scores are of the model alone"
    near, far = figures["ngram"]["quality"], figures["far"]["quality"]
    assert list(near) == ["race-high", "race-high/acc_norm", "gsm8k"]
    assert near["race-high"] == {
        "metric": "acc", "value": 0.5, "low": 0.0, "high": 1.0, "higher_is_better": True, "count": 2, "details": {"shots": 5},
        "mcnemar_p": None, "greedy_equal": None, "of_target": True, "shared_with": "plain",
    }, "a fake's rule is not enumerated, and there is nothing to test between a score and itself"  # fmt: skip
    assert not near["gsm8k"]["of_target"]
    assert not figures["plain"]["quality"]["race-high"]["of_target"]
    assert (near["gsm8k"]["mcnemar_p"], near["gsm8k"]["greedy_equal"]) == (1.0, False)
    assert figures["plain"]["quality"]["gsm8k"]["greedy_equal"] is True
    assert far["gsm8k"]["value"] == 0.0
    assert far["gsm8k"]["mcnemar_p"] == pytest.approx(2 * 0.5**8)


def test_a_failing_measure_is_no_failing_variant(tmp_path: Path, examiner: Examiner) -> None:
    examiner.failing = "race-high"
    figures = bench(tmp_path, **ASKED)["variants"]
    for one in figures.values():
        assert one["error"] is None
        assert one["quality"]["race-high"] == {"error": "no such data"}
        assert one["quality"]["gsm8k"]["count"] == 8
    assert [kind for kind, _ in examiner.asked].count("race-high") == 1, "it would fail again"
    examiner.failing = None
    widths, figures = built(tmp_path, **ASKED)
    assert widths == [1, 4, 10], "what failed is not finished"
    assert figures["far"]["quality"]["race-high"]["value"] == 0.5


def test_a_resumed_run_has_its_quality_and_shares_its_scores(tmp_path: Path, examiner: Examiner) -> None:
    both = {"quality": ["race-high", "gsm8k"]}
    first = bench(tmp_path, **both)["variants"]
    examiner.asked.clear()
    widths, figures = built(tmp_path, **ASKED)
    assert widths == [10]
    assert examiner.asked == [("gsm8k", 10)]
    assert figures["ngram"]["quality"] == first["ngram"]["quality"]


def test_the_same_measure_twice_has_two_names(tmp_path: Path, examiner: Examiner) -> None:
    found = bench(tmp_path, quality=["gsm8k", {"kind": "gsm8k", "shots": 0}])["variants"]["plain"]["quality"]
    assert list(found) == ["gsm8k", "gsm8k 2"]


# Weights & Biases.


class Logged:
    """Stands in for the library: what a run was told."""

    def __init__(self, fails: bool = False) -> None:
        self.fails, self.settings, self.figures, self.files, self.ended = fails, {}, {}, [], False

    def init(self, **settings: Any) -> "Logged":
        if self.fails:
            raise ConnectionError("no route\nto anywhere")
        self.settings = settings
        return self

    def log(self, figures: dict[str, float], step: int) -> None:
        self.figures |= figures

    def save(self, path: str, **_: Any) -> None:
        self.files.append(Path(path).name)

    def finish(self) -> None:
        self.ended = True


def library(monkeypatch: pytest.MonkeyPatch, logged: Logged) -> None:
    stand_in: Any = ModuleType("wandb")
    stand_in.init = logged.init
    monkeypatch.setitem(sys.modules, "wandb", stand_in)


def test_the_final_figures_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, logged := Logged())
    summary = bench(tmp_path / "mine", wandb={"project": "p", "entity": "e"})
    assert {key: logged.settings[key] for key in ("project", "entity", "name", "dir")} == {
        "project": "p", "entity": "e", "name": "mine", "dir": str(tmp_path / "mine")
    }  # fmt: skip
    assert logged.settings["config"]["repeats"] == 2
    assert "id" not in logged.settings, "a second run of this name is no continuation"
    assert logged.figures["ngram/speedup/value"] == summary["variants"]["ngram"]["speedup"]["value"]
    assert "ngram/rule" not in logged.figures
    assert (logged.files, logged.ended) == (["report.html"], True)


def test_logging_that_fails_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(monkeypatch, Logged(fails=True))
    console = Console(width=200, record=True, quiet=False, file=(tmp_path / "said.txt").open("w"))
    measure.run(experiment(wandb={}), Fakes().maker(), tmp_path / "run", console, measure_memory=False)
    console.file.close()
    assert "ConnectionError: no route; without a network set WANDB_MODE=offline" in (tmp_path / "said.txt").read_text()
    assert (tmp_path / "run" / "report.html").exists()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"wandb.*forerun\[loggers\]"):
        bench(tmp_path / "other", wandb={})
    assert not (tmp_path / "other").exists(), "said before anything is measured"


def test_a_run_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself, offline: everything stays in the folder."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    bench(tmp_path, wandb={"project": "p", "name": "n"})
    wandb.teardown()  # at the end of a process it happens of itself
    [written] = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert b"ngram/speedup/value" in written.read_bytes()
    assert (written.parent / "files" / "report.html").exists()
