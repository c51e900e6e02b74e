"""`forerun train` from settings to what it leaves: every kind, resuming, and one line for what goes wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from forerun.build import Models
from forerun.compress.run import compress
from forerun.config import Compression, ModelConfig, parse
from forerun.heads import store
from forerun.train import loop
from forerun.train import run as running
from forerun.train.data import read
from forerun.train.run import train
from forerun.train.settings import Training, load
from forerun.train.teacher import Streamed
from forerun.train.written import continued
from forerun.types import UserError
from forerun.verbs import train as verb
from models import BUILDERS, VOCABULARY

KINDS = {
    "medusa": {"heads": 2},
    "mlp": {"heads": 2},
    "eagle": {"depth": 3, "anchors": 0.5},
    "draft": {"layers": 1, "hidden_size": 16, "heads": 2, "depth": 3},
}
FAST = {"steps": 6, "batch": 4, "warmup": 0, "decay": 0.0, "rate": 3e-3, "validate_every": 4, "held_out": 0.2}


class Silent:
    """A teller that keeps the losses, and may stop the run after a step."""

    def __init__(self, stop: int = 0) -> None:
        self.stop, self.losses, self.words = stop, [], []

    def say(self, words: str) -> None:
        self.words.append(words)

    def preparing(self, what: str, done: int, total: int) -> None:
        self.words.append(what)

    def trained(self, step: int, loss: float, validation: dict[str, Any] | None) -> None:
        self.losses.append(loss)
        if step == self.stop:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    BUILDERS["llama"](num_hidden_layers=4).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts with something to learn: each counts up from its first token."""
    path = tmp_path_factory.mktemp("data") / "tokens.npy"
    np.save(path, (np.arange(40)[:, None] * 7 + np.arange(24)) % VOCABULARY)
    return path


def settings(kind: str, target: Path, tokens: Path, folder: Path, **over: object) -> Training:
    config = {
        "kind": kind, "model": {"path": str(target), "dtype": "float32", "device": "cpu"},
        "data": {"kind": "tokens", "path": str(tokens), "prompt": 4}, **KINDS[kind], **FAST, **over,
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    path = folder / "settings.yaml"
    path.write_text(json.dumps(config))  # JSON is YAML
    return load(str(path), [])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "state.pt", weights_only=True)["module"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_falls_and_what_was_learned_reloads(kind: str, target: Path, tokens: Path, tmp_path: Path) -> None:
    teller = Silent()
    config = settings(kind, target, tokens, tmp_path, steps=30, rate=1e-2)
    report = train(config, tmp_path / "run", teller)
    assert teller.losses[-1] < teller.losses[0]
    assert len(report["acceptance"]) == len(report["top1"]) > 1
    trained = tmp_path / "run" / "trained"
    if kind == "draft":
        found: Any = AutoModelForCausalLM.from_pretrained(trained)
        rest = json.loads((trained / "training.json").read_text())
    else:
        found, settings_left = store.load(trained)
        assert np.array(settings_left["accuracies"]).shape == (len(report["top1"]), 10)
        rest = settings_left["training"]
    assert rest["validation"]["efficiency"] == report["efficiency"]
    kept = weights(tmp_path / "run")
    for name, tensor in found.state_dict().items():
        rounded = kept[name].bfloat16().float() if tensor.is_floating_point() else kept[name]
        assert torch.equal(tensor.to(rounded.dtype), rounded), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_as_an_unbroken_one(kind: str, target: Path, tokens: Path, tmp_path: Path) -> None:
    over = {"matrix_rate": 1e-2, "accumulate": 2, "save_minutes": 1e-9}
    config = settings(kind, target, tokens, tmp_path, **over)
    whole, broken = Silent(), Silent(stop=3)
    train(config, tmp_path / "whole", whole)
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "broken", broken)
    assert torch.load(tmp_path / "broken" / "state.pt", weights_only=True)["step"] == 3
    resumed = Silent()
    train(config, tmp_path / "broken", resumed)
    assert resumed.words == ["resumed at step 3"]
    assert broken.losses + resumed.losses == whole.losses
    one, other = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert all(torch.equal(one[name], other[name]) for name in one)
    logs = [[json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("whole", "broken")]
    assert logs[0] == logs[1]
    assert [line["step"] for line in logs[0]] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in logs[0] if "validation" in line] == [4, 6]


def test_a_finished_run_does_nothing_more(target: Path, tokens: Path, tmp_path: Path) -> None:
    config = settings("medusa", target, tokens, tmp_path)
    report = train(config, tmp_path / "run", Silent())
    again = Silent()
    assert train(config, tmp_path / "run", again) == report
    assert again.losses == []


def test_a_folder_with_another_run_is_refused(target: Path, tokens: Path, tmp_path: Path) -> None:
    train(settings("medusa", target, tokens, tmp_path), tmp_path / "run", Silent())
    with pytest.raises(UserError, match=r"holds a run with rate=0.003, not 0.5"):
        train(settings("medusa", target, tokens, tmp_path, rate=0.5), tmp_path / "run", Silent())


def test_a_loss_that_is_not_finite_ends_in_one_line(target: Path, tokens: Path, tmp_path: Path) -> None:
    config = settings("medusa", target, tokens, tmp_path, save_minutes=1e-9)
    train(config.model_copy(update={"steps": 2}), tmp_path / "run", Silent())
    before = (tmp_path / "run" / "state.pt").read_bytes()
    state = torch.load(tmp_path / "run" / "state.pt", weights_only=True)
    state["module"]["outputs.0.weight"][0, 0] = float("nan")
    torch.save(state, tmp_path / "run" / "state.pt")
    spoiled = (tmp_path / "run" / "state.pt").read_bytes()
    with pytest.raises(UserError, match=r"^step 3: the loss is not finite; the checkpoint of step 2 is kept in .*rate=0.0015"):
        train(config, tmp_path / "run", Silent())
    assert (tmp_path / "run" / "state.pt").read_bytes() == spoiled != before


def test_running_out_of_memory_ends_in_one_line(
    target: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lesson = Streamed.lesson
    calls = []

    def small(self: Streamed, picked: np.ndarray) -> Any:
        calls.append(picked)
        if len(calls) > 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
        return lesson(self, picked)

    monkeypatch.setattr(Streamed, "lesson", small)
    config = settings("eagle", target, tokens, tmp_path, save_minutes=1e-9)
    with pytest.raises(UserError, match=r"^step 3: out of memory; the checkpoint of step 2 is kept in .*batch=2 accumulate=2"):
        train(config, tmp_path / "run", Silent())
    assert torch.load(tmp_path / "run" / "state.pt", weights_only=True)["step"] == 2


def test_another_failure_is_not_called_out_of_memory(
    target: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Streamed, picked: np.ndarray) -> Any:
        raise RuntimeError("something else")

    monkeypatch.setattr(Streamed, "lesson", broken)
    with pytest.raises(RuntimeError, match="something else"):
        train(settings("eagle", target, tokens, tmp_path), tmp_path / "run", Silent())


def test_hidden_states_on_disk_are_read_once_and_teach_the_same(
    target: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed, kept = Silent(), Silent()
    train(settings("eagle", target, tokens, tmp_path, teach={"top": 16}), tmp_path / "streamed", streamed)
    config = settings("eagle", target, tokens, tmp_path, teach={"top": 16, "cache": True})
    train(config, tmp_path / "kept", kept)
    assert kept.losses == pytest.approx(streamed.losses, rel=2e-2)  # bfloat16 features, float16 probabilities
    assert kept.losses != streamed.losses
    monkeypatch.setattr(Streamed, "lesson", None)
    train(config.model_copy(update={"steps": 8}), tmp_path / "kept", Silent())


def test_the_target_writes_what_is_learned_once(
    target: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = {"prompt": 4, "new": 8, "sequences": 10, "rows": 4}
    config = settings("medusa", target, tokens, tmp_path, write=write)
    teller = Silent()
    train(config, tmp_path / "run", teller)
    assert teller.words == ["texts written by the target"]
    monkeypatch.setattr("forerun.train.written.write", None)
    train(config.model_copy(update={"steps": 8}), tmp_path / "run", Silent())


def test_recipes_make_the_target_that_teaches(
    target: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORERUN_CACHE", str(tmp_path / "cache"))
    recipe = {"kind": "rtn", "bits": 4, "group_size": 32}
    model = {"path": str(target), "dtype": "float32", "device": "cpu"}
    losses = {}
    for name, over in (
        ("plain", model), ("recipe", model | {"recipes": [recipe]}), ("folder", model | {"path": str(tmp_path / "small")})
    ):  # fmt: skip
        if name == "folder":
            config = parse(Compression, {"model": model, "recipes": [recipe]}, "test")
            compress(config, tmp_path / "small", lambda *_: None)
        teller = Silent()
        train(settings("medusa", target, tokens, tmp_path, model=over), tmp_path / name, teller)
        losses[name] = teller.losses
    assert losses["recipe"] == losses["folder"]
    assert losses["recipe"] != losses["plain"]


def test_a_target_of_other_codes_writes_anew(
    target: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORERUN_CACHE", str(tmp_path / "cache"))
    for bits in (4, 8):
        model = {"path": str(target), "dtype": "float32", "device": "cpu", "pack": False}
        loaded = Models(lambda _: None).target(ModelConfig(**model, recipes=[{"kind": "rtn", "bits": bits, "group_size": 32}]))
        config = settings("medusa", target, tokens, tmp_path, write={"prompt": 4, "new": 8, "sequences": 4})
        source = read(config.data, None, VOCABULARY)
        assert config.write is not None
        continued(loaded.model, source, config.write, tmp_path / "written", frozenset(), lambda *_: None)
    assert len(list((tmp_path / "written").glob("*.npz"))) == 2


def test_autocast_trains_and_leaves_float32_weights(target: Path, tokens: Path, tmp_path: Path) -> None:
    for kind in ("eagle", "draft"):
        plain, half = Silent(), Silent()
        train(settings(kind, target, tokens, tmp_path), tmp_path / f"{kind}-plain", plain)
        train(settings(kind, target, tokens, tmp_path, bf16=True), tmp_path / f"{kind}-half", half)
        assert half.losses == pytest.approx(plain.losses, rel=2e-2)
        assert half.losses != plain.losses
        assert all(t.dtype == torch.float32 for t in weights(tmp_path / f"{kind}-half").values() if t.is_floating_point())


def test_every_pass_draws_its_own_anchors(target: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, drawn = loop.anchors, []
    monkeypatch.setattr(loop, "anchors", lambda *words: drawn.append(draw(*words)) or drawn[-1])
    train(settings("eagle", target, tokens, tmp_path, accumulate=2, steps=3), tmp_path / "run", Silent())
    assert len({tuple(places.tolist()) for places in drawn}) == len(drawn) == 6


def test_version_1_learns_features_too(target: Path, tokens: Path, tmp_path: Path) -> None:
    losses = []
    for weight in (0.0, 10.0):
        teller = Silent()
        config = settings("eagle", target, tokens, tmp_path, version=1, feature_weight=weight)
        report = train(config, tmp_path / f"run-{weight}", teller)
        assert len(report["top1"]) == 3, "validation drafts on, though one guess is learned"
        losses.append(teller.losses[0])
    assert losses[1] > losses[0]


def test_a_smaller_draft_vocabulary_keeps_the_most_frequent_tokens(target: Path, tokens: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "few.npy", np.load(tokens) % 20)
    config = settings("eagle", target, tmp_path / "few.npy", tmp_path, draft_vocab_size=20)
    train(config, tmp_path / "run", Silent())
    head: Any = store.load(tmp_path / "run" / "trained")[0]
    assert head.token_ids.tolist() == list(range(20))
    assert head.output.weight.shape[0] == 20


def test_a_target_in_half_precision_teaches_float32(target: Path, tokens: Path, tmp_path: Path) -> None:
    for kind, over in (("eagle", {"version": 1}), ("eagle", {}), ("medusa", {}), ("mlp", {})):
        model = {"path": str(target), "dtype": "bfloat16", "device": "cpu"}
        folder = tmp_path / f"{kind}{len(over)}"
        train(settings(kind, target, tokens, tmp_path, model=model, **over), folder, Silent())
        assert all(t.dtype == torch.float32 for t in weights(folder).values() if t.is_floating_point())


def test_validation_on_other_data(target: Path, tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.save(tmp_path / "other.npy", np.full((3, 24), 5))
    seen = []
    whole = running.Run.validate
    monkeypatch.setattr(running.Run, "validate", lambda self: seen.append(self.sizes) or whole(self))
    data = {"kind": "tokens", "path": str(tmp_path / "other.npy"), "prompt": 4}
    train(settings("medusa", target, tokens, tmp_path, validation=data), tmp_path / "run", Silent())
    assert set(seen) == {(40, 3)}


def test_the_verb_prints_acceptance(target: Path, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings("medusa", target, tokens, tmp_path)
    words = [str(tmp_path / "settings.yaml"), "steps=2", "model.device=cpu"]
    assert verb.run(words, str(tmp_path / "run"), as_json=True, quiet=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["folder"] == str(tmp_path / "run" / "trained")
    assert verb.run(words, str(tmp_path / "run")) == 0
    shown = capsys.readouterr().out
    assert f"{report['validation']['efficiency']:.2f} tokens a round" in shown
    assert f"{report['validation']['top1'][1]:.1%}" in shown


def test_a_run_needs_one_config(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="one config file, not 0"):
        verb.run(["steps=3"], str(tmp_path / "run"))


def test_mistakes_in_settings_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("kind: medusa\nhedas: 3\n")
    with pytest.raises(UserError, match=r"unknown key 'hedas'; did you mean 'heads'"):
        load(str(path), [])
    path.write_text("steps: 3\n")
    with pytest.raises(UserError, match="say which of draft, medusa, mlp, eagle"):
        load(str(path), [])
    path.write_text("kind: eagle\n")
    with pytest.raises(UserError, match=r"data.length: .*\(got 1\)"):
        load(str(path), ["data.length=1"])
    with pytest.raises(UserError, match="no such config"):
        load(str(tmp_path / "absent.yaml"), [])


def test_what_does_not_fit_the_target_is_refused(target: Path, tokens: Path, tmp_path: Path) -> None:
    wrong: list[tuple[str, dict[str, object], str]] = [
        ("eagle", {"features": [0, 9]}, r"features \[0, 9\]: the target has hidden states 0 to 4"),
        ("eagle", {"draft_vocab_size": 1000}, "draft_vocab_size=1000"),
        ("draft", {"hidden_size": 33}, "hidden_size=33 is no multiple of heads=2"),
        ("draft", {"kv_heads": 5, "heads": 4}, "heads=4 is no multiple of kv_heads=5"),
        ("medusa", {"write": {"prompt": 10, "new": 990}}, "1000 tokens are longer than the target's 256"),
        ("medusa", {"data": {"kind": "text", "path": str(tokens)}}, "the model has no tokenizer"),
    ]  # fmt: skip
    for kind, over, words in wrong:
        with pytest.raises(UserError, match=words):
            train(settings(kind, target, tokens, tmp_path, **over), tmp_path / f"run-{words[:9]}", Silent())


def test_a_head_is_written_in_public_layouts_too(target: Path, tokens: Path, tmp_path: Path) -> None:
    train(settings("eagle", target, tokens, tmp_path, steps=1, layouts=["eagle3", "speculators"]), tmp_path / "run", Silent())
    own = store.load(tmp_path / "run" / "trained")[0].state_dict()
    for layout in ("eagle3", "speculators"):
        public = store.load(tmp_path / "run" / layout, target=AutoConfig.from_pretrained(target))[0].state_dict()
        assert all(torch.equal(tensor, public[name]) for name, tensor in own.items())


def test_a_layout_of_another_kind_is_refused_before_training(target: Path, tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="layouts: medusa does not hold"):
        train(settings("eagle", target, tokens, tmp_path, layouts=["medusa"]), tmp_path / "run", Silent())
