"""From configuration to a backend: parts that fit, parts that do not, and what a user can get wrong about a model."""

import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from forerun.bench.serve import serve
from forerun.build import Models, build, refuse_other_vocabulary
from forerun.compress.identity import identity
from forerun.compress.run import compress
from forerun.config import Compression, DraftModelConfig, Variant, load, parse
from forerun.draft import NoDraft
from forerun.engine import Engine
from forerun.model import Loaded
from forerun.types import Completion, Request, Sampling, UserError, complete
from forerun.verbs.bench import plan
from models import near_copy, prompts, tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A target, and a draft of fewer positions, on disk."""
    tiny("gpt2", dtype=torch.float32).save_pretrained(tmp_path / "target")
    tiny("gpt2", seed=1, dtype=torch.float32, n_positions=64).save_pretrained(tmp_path / "draft")
    return tmp_path


def variant(folder: Path, **more: object) -> Variant:
    model = {"path": str(folder / "target"), "dtype": "float32"}
    drafter = {"kind": "model", "path": str(folder / "draft"), "dtype": "float32", "k": 3}
    return parse(Variant, {"model": model, "drafter": drafter, **more}, "test")


def test_the_capacity_is_what_the_shorter_model_takes(folder: Path) -> None:
    backend = build(variant(folder), Models())
    assert backend.facts["capacity"] == 64
    with pytest.raises(UserError, match="capacity of 64; shorten"):
        backend.submit(Request("long", prompts()[0], Sampling(max_new=80)))
    [done] = complete(backend, [Request("fits", prompts()[0], Sampling(max_new=50))])
    assert len(done.tokens) == 50


def test_the_reference_has_weights_of_its_own(folder: Path) -> None:
    models = Models()
    ours, theirs = (build(variant(folder, backend=name), models) for name in ("forerun", "reference"))
    assert isinstance(ours, Engine)
    assert ours.target.model.config._attn_implementation != "sdpa"
    assert models.target(variant(folder).model, "reference").model.config._attn_implementation == "sdpa"
    requests = [Request("a", prompts()[1], Sampling(max_new=20))]
    assert complete(ours, requests)[0].tokens == complete(theirs, requests)[0].tokens


def test_packed_and_plain_say_the_same(folder: Path) -> None:
    request = [Request("a", prompts()[1], Sampling(max_new=30))]
    texts = []
    for pack in (True, False):
        own = variant(folder)
        own = own.model_copy(update={"model": own.model.model_copy(update={"pack": pack})})
        texts.append(complete(build(own, Models()), request)[0].tokens)
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention": "flash_attention_2"}, "needs flash-attn"),
        ({"attention": "fast"}, "give auto, sdpa, eager"),
        ({"device": "cuda:7"}, "cannot be loaded on 'cuda:7'"),
        ({"path": "./nowhere"}, "no such file or folder"),
    ],
)
def test_what_a_model_cannot_be_is_one_line(folder: Path, change: dict[str, object], message: str) -> None:
    own = variant(folder)
    wrong = own.model_copy(update={"model": own.model.model_copy(update=change)})
    if change.get("device") and torch.cuda.is_available():
        pytest.skip("this machine may have that device")
    with pytest.raises(UserError, match=message) as caught:
        build(wrong, Models())
    assert "\n" not in str(caught.value)


def test_a_checkpoint_cut_short_is_one_line(folder: Path) -> None:
    weights = folder / "target" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        build(variant(folder), Models())
    assert "\n" not in str(caught.value)


def test_a_config_of_wrong_types_is_one_line(folder: Path) -> None:
    path = folder / "target" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_layer": "two"}))
    with pytest.raises(UserError, match="cannot be") as caught:
        build(variant(folder), Models())
    assert "\n" not in str(caught.value)


def test_a_fault_in_mid_flight_reaches_whoever_serves(folder: Path) -> None:
    backend = build(variant(folder, drafter={"kind": "none"}), Models())
    assert isinstance(backend, Engine)
    assert isinstance(backend.drafter, NoDraft)
    break_at_the_third_pass(backend.target.model)
    with pytest.raises(UserError, match="not finite"):
        serve(backend, [Request("a", prompts()[0], Sampling(max_new=20))], 1)
    [done] = serve(backend, [Request("b", prompts()[0], Sampling(max_new=20))], 1).values()
    assert done[-1][1].finish == "length"


def break_at_the_third_pass(model: PreTrainedModel) -> None:
    passes = []

    def spoil(module: torch.nn.Module, inputs: object, output: torch.Tensor) -> torch.Tensor:
        passes.append(1)
        return output * float("nan") if len(passes) == 3 else output

    model.transformer.wte.register_forward_hook(spoil)


def test_axes_of_a_drafter_leave_plain_decoding_one_variant() -> None:
    overrides = ["variants.plain.drafter.kind=none", "variants.ngram.drafter.kind=ngram", "axes.drafter.k=[1,2]"]
    assert list(load(None, overrides).expand()) == ["plain", "ngram,drafter.k=1", "ngram,drafter.k=2"]


def test_a_draft_named_by_an_override_is_compared() -> None:
    words = ["model.path=/models/target", "drafter.kind=model", "drafter.path=/models/draft"]
    variants = plan(words, {}, {}, None).expand()
    assert list(variants) == ["plain", "ngram", "model"]
    assert isinstance(variants["model"].drafter, DraftModelConfig)
    assert variants["model"].drafter.path == "/models/draft"


def words(*tokens: str) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token=tokens[0])))


def test_another_vocabulary_is_refused_with_sizes_and_the_first_difference() -> None:
    target = Loaded(tiny("llama"), words("[?]", "sun", "moon"))
    with pytest.raises(UserError, match=r"\(97 tokens\) is not .* \(97 tokens\); first difference: token 1 is 'sun' .* 'rain'"):
        refuse_other_vocabulary(target, Loaded(tiny("llama"), words("[?]", "rain", "moon")))
    with pytest.raises(UserError, match=r"\(50 tokens\) is not the target's \(97 tokens\)"):
        refuse_other_vocabulary(target, Loaded(tiny("llama", vocab_size=50), None))
    refuse_other_vocabulary(target, Loaded(tiny("llama", seed=3), words("[?]", "sun", "moon")))


@pytest.mark.parametrize(
    ("drafter", "rule", "trees"),
    [
        ({"kind": "medusa"}, "match", True),
        ({"kind": "eagle"}, "match", True),
        ({"kind": "eagle", "tree": "chain"}, "block", False),
        ({"kind": "eagle", "tree": "static", "choices": [[0], [1], [0, 0]], "drawn": True}, "multi-round", True),
        ({"kind": "eagle", "policy": "adaptive"}, "match", True),
    ],
)
def test_the_shipped_heads_draft_for_the_shipped_target(drafter: dict[str, object], rule: str, trees: bool) -> None:
    """Greedy texts are plain decoding's in float32, and most first guesses are right."""
    texts, requests = [], [Request("a", (5, 6, 7, 8) * 4, Sampling(max_new=24, ignore_eos=True))]
    models = Models()
    for kind in ({"kind": "none"}, drafter):
        settings = {"model": {"dtype": "float32"}, "drafter": kind, "engine": {"capacity": 128, "debug": True}}
        backend = build(parse(Variant, settings, "test"), models)
        texts.append(complete(backend, requests)[0])
    assert texts[0].tokens == texts[1].tokens
    assert sum(round.accepted for round in texts[1].rounds) > 4
    assert isinstance(backend, Engine)
    assert backend.facts["rule"] == rule
    assert backend.drafter.trees is trees


def test_a_rule_for_chains_is_refused_for_a_tree_when_the_parts_are_put_together() -> None:
    with pytest.raises(UserError, match=r"rule\.kind=block admits chains only"):
        build(parse(Variant, {"drafter": {"kind": "eagle"}, "rule": {"kind": "block"}}, "test"), Models())


def test_a_head_for_another_target_is_refused_by_its_sizes(folder: Path) -> None:
    model = {"path": str(folder / "target")}
    variant = parse(Variant, {"model": model, "drafter": {"kind": "medusa"}}, "test")
    with pytest.raises(UserError, match="hidden size 384"):
        build(variant, Models())


@pytest.mark.parametrize(
    ("drafter", "message"),
    [
        ({"kind": "eagle", "tree": "static"}, r"drafter\.choices"),
        ({"kind": "eagle", "policy": "heuristic"}, r"take adaptive"),
        ({"kind": "medusa", "choices": [[0, 0]]}, "lacks its parent"),
    ],
)
def test_a_tree_that_cannot_be_is_one_line(drafter: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(parse(Variant, {"drafter": drafter}, "test"), Models())


def test_the_reference_refuses_heads() -> None:
    with pytest.raises(UserError, match="transformers has no drafter of kind eagle"):
        build(parse(Variant, {"drafter": {"kind": "eagle"}, "backend": "reference"}, "test"), Models())


RTN = {"kind": "rtn", "bits": 4, "group_size": 32}
INPUT = {"kind": "prune", "what": "input", "fraction": 0.25}


@pytest.fixture
def llama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A target and a draft that agrees often, on disk, and an empty cache of compressed models."""
    monkeypatch.setenv("FORERUN_CACHE", str(tmp_path / "cache"))
    target = tiny("llama", dtype=torch.float32, hidden_size=64, intermediate_size=128)
    target.save_pretrained(tmp_path / "target")
    near_copy(target).save_pretrained(tmp_path / "draft")
    return tmp_path


def texts(models: Models, folder: Path, **more: object) -> list[Completion]:
    backend = build(variant(folder, **more), models)
    return complete(backend, [Request(str(i), prompts()[i], Sampling(max_new=24)) for i in range(2)])


def target_of(folder: Path, *recipes: dict[str, object], **more: object) -> dict[str, object]:
    return {"path": str(folder / "target"), "dtype": "float32", "recipes": recipes, **more}


@pytest.mark.parametrize(
    "recipes", [[RTN], [INPUT], [RTN, INPUT | {"fraction": 0.5}], [INPUT | {"what": "mlp"}, RTN], [INPUT | {"what": "output"}]]
)
def test_speculation_with_compressed_models_is_their_plain_decoding(llama: Path, recipes: list[dict[str, object]]) -> None:
    """Compressed target, draft, or both: greedy texts are the target's own, which are not those of the whole model."""
    models = Models(lambda _: None)
    draft = {"kind": "model", "path": str(llama / "draft"), "dtype": "float32", "k": 3}
    whole = texts(models, llama, drafter={"kind": "none"})
    small = {"model": target_of(llama, *recipes)}
    plain = texts(models, llama, drafter={"kind": "none"}, **small)
    assert [one.tokens for one in plain] != [one.tokens for one in whole]
    compressed_draft = draft | {"recipes": recipes}
    assert [c.tokens for c in texts(models, llama, drafter=draft, **small)] == [c.tokens for c in plain]
    assert [c.tokens for c in texts(models, llama, drafter=compressed_draft)] == [c.tokens for c in whole]
    both = texts(models, llama, drafter=compressed_draft, **small)
    assert [c.tokens for c in both] == [c.tokens for c in plain]
    assert sum(round.accepted for c in both for round in c.rounds) > 0


def test_the_reference_runs_compressed_models(llama: Path) -> None:
    """Unpacked, with transformers' own generate: the same texts."""
    models = Models(lambda _: None)
    for recipes in ([RTN], [INPUT]):
        ours, theirs = (
            texts(models, llama, drafter={"kind": "none"}, backend=backend, model=target_of(llama, *recipes))
            for backend in ("forerun", "reference")
        )
        assert [c.tokens for c in ours] == [c.tokens for c in theirs]


def test_what_was_compressed_once_is_not_compressed_again(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache knows the model's files by name, size and time of change; other files make another entry."""
    said: list[str] = []
    config = variant(llama, model=target_of(llama, RTN)).model
    first = Models(said.append).target(config).model
    assert "compressing" in said[-1]
    entries = {path.name for path in (llama / "cache").iterdir() if path.is_dir()}
    with monkeypatch.context() as broken:
        broken.setattr("forerun.compress.cache.compress", None)
        second = Models(said.append).target(config).model
    assert "compressed before" in said[-1]
    ids = torch.tensor([prompts()[0]], device=first.device)
    assert torch.equal(first(input_ids=ids).logits, second(input_ids=ids).logits)
    Models(said.append).target(variant(llama, model=target_of(llama, RTN | {"symmetric": False})).model)
    assert "compressing" in said[-1]
    tiny("llama", seed=5, dtype=torch.float32, hidden_size=64, intermediate_size=128).save_pretrained(llama / "target")
    other = Models(said.append).target(config).model
    assert "compressing" in said[-1]
    assert not torch.equal(first(input_ids=ids).logits, other(input_ids=ids).logits)
    assert len({path.name for path in (llama / "cache").iterdir() if path.is_dir()} - entries) == 2


def test_one_quantized_model_serves_all_that_prune_it(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = Models(lambda _: None)
    models.target(variant(llama, model=target_of(llama, RTN)).model)
    monkeypatch.setattr("forerun.compress.run.round_to_nearest", None)
    found = models.target(variant(llama, model=target_of(llama, RTN, INPUT | {"fraction": 0.5}, pack=False)).model)
    monkeypatch.undo()
    compress(
        parse(Compression, {"model": target_of(llama), "recipes": [RTN, INPUT | {"fraction": 0.5}]}, "test"),
        llama / "direct",
        lambda *_: None,
    )
    direct = models.target(variant(llama, model={"path": str(llama / "direct"), "dtype": "float32", "pack": False}).model)
    ids = torch.tensor([prompts()[0]], device=found.model.device)
    assert torch.equal(found.model(input_ids=ids).logits, direct.model(input_ids=ids).logits)


def test_a_cache_that_cannot_be_written_is_one_line(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (llama / "file").touch()
    monkeypatch.setenv("FORERUN_CACHE", str(llama / "file" / "cache"))
    with pytest.raises(UserError, match="set FORERUN_CACHE"):
        Models(lambda _: None).target(variant(llama, model=target_of(llama, RTN)).model)


@pytest.mark.parametrize("name", ["medusa", "eagle"])
def test_heads_of_the_whole_target_draft_for_its_compressed_version(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORERUN_CACHE", str(tmp_path))
    models = Models(lambda _: None)
    model = {"dtype": "float32", "recipes": [{"kind": "rtn", "bits": 4}]}
    found = []
    for drafter in ({"kind": "none"}, {"kind": name}):
        settings = {"model": model, "drafter": drafter, "engine": {"capacity": 128}}
        backend = build(parse(Variant, settings, "test"), models)
        found.append(complete(backend, [Request("a", (5, 6, 7, 8) * 4, Sampling(max_new=16, ignore_eos=True))])[0])
    assert found[0].tokens == found[1].tokens
    assert sum(round.accepted for round in found[1].rounds) > 4


def test_calibration_texts_are_the_same_however_their_place_is_written(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("The canal was built.\n")
    monkeypatch.chdir(tmp_path)

    def name(path: str) -> str:
        gptq = {"kind": "gptq", "calibration": {"workload": {"kind": "text", "path": path}}}
        model = variant(llama, model=target_of(llama, gptq)).model
        return identity(model, "target", model.recipes)

    first = name("texts.txt")
    assert first == name(str(texts)) == name("./texts.txt") != name("others.txt")
    texts.write_text("The canal was built later.\n")
    assert name("texts.txt") != first


class Hub:
    """A repository on the Hub and its cache: what is fetched is a link to a file named by its hash."""

    def __init__(self, cache: Path, *names: str) -> None:
        self.cache, self.files, self.fetched = cache, {name: f"hash of {name}" for name in names}, set[str]()

    def download(self, _: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        for name in filter_repo_objects(self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            self.fetch(name)
        return str(self.cache / "snapshots" / "main")

    def fetch(self, name: str) -> None:
        blob, link = self.cache / "blobs" / self.files[name], self.cache / "snapshots" / "main" / name
        for path in (blob, link):
            path.parent.mkdir(parents=True, exist_ok=True)
        blob.write_text("{}")
        link.unlink(missing_ok=True)
        link.symlink_to(blob)
        self.fetched.add(name)


def test_a_model_of_the_hub_is_known_by_its_files_hashes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that belongs to it is fetched before: its name is the same when it lies in the cache, whatever else does."""
    small, whole = {"config.json", "tokenizer.json"}, {"config.json", "tokenizer.json", "model.safetensors"}
    hub = Hub(tmp_path, *whole, "README.md", "pytorch_model.bin", "consolidated.safetensors", "original/params.json")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)

    def name(weights: str = "pretrained") -> str:
        return identity(parse(Variant, {"model": {"path": "someone/model", "weights": weights}}, "test").model, "target", ())

    unweighted = name("random")
    assert hub.fetched == small
    first = name()
    assert hub.fetched == whole
    for other in ("README.md", "pytorch_model.bin", "consolidated.safetensors"):
        hub.fetch(other)
    os.utime(tmp_path / "blobs" / "hash of model.safetensors", (1, 1))
    assert name() == first
    assert name("random") == unweighted
    hub.files["model.safetensors"] = "hash of others"
    assert name() != first
    assert name("random") == unweighted


def test_older_weights_are_fetched_where_there_are_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(tmp_path, "config.json", "pytorch_model.bin", "training_args.bin")
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub.download)
    model = parse(Variant, {"model": {"path": "someone/model"}}, "test").model
    first = identity(model, "target", ())
    assert hub.fetched == {"config.json", "pytorch_model.bin"}
    hub.files["pytorch_model.bin"] = "hash of others"
    assert identity(model, "target", ()) != first
