"""What forerun says to vLLM, and how it reads what vLLM tells; none of it needs vLLM."""

import itertools
import json
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from forerun.backends.vllm_args import Draft, command, engine_arguments, here
from forerun.backends.vllm_files import find_draft, longest, target_folder
from forerun.backends.vllm_rounds import Counters, StepStats, match
from forerun.backends.vllm_score import read
from forerun.backends.words import words
from forerun.config import ModelConfig, Variant, parse
from forerun.heads import Eagle, EagleShape, formats
from forerun.heads.store import load, save
from forerun.model import ASSETS
from forerun.types import Delta, Round, Score, UserError
from forerun.verbs import vllm_args


def variant(**settings: Any) -> Variant:
    return parse(Variant, {"drafter": {"kind": "none"}} | settings, "test")


def said(draft: Draft | None = None, **settings: Any) -> dict[str, Any]:
    return engine_arguments(variant(**settings), "target", draft, longest=512)


def test_only_what_differs_from_vllms_defaults_is_said() -> None:
    assert said() == {
        "model": "target", "dtype": "auto", "max_model_len": 512, "max_num_seqs": 1, "generation_config": "vllm",
    }  # fmt: skip
    assert said(engine={"rows": 8, "capacity": 100})["max_model_len"] == 100
    found = said(
        model={"dtype": "bfloat16", "weights": "random"},
        vllm={"tensor_parallel_size": 2, "max_model_len": 64, "enable_prefix_caching": False, "quantization": "gptq",
              "gpu_memory_utilization": 0.5, "options": {"max_num_batched_tokens": 99, "additional_config": {"x": 1}}},
    )  # fmt: skip
    assert found == {
        "model": "target", "dtype": "bfloat16", "max_model_len": 64, "max_num_seqs": 1, "generation_config": "vllm",
        "tensor_parallel_size": 2,
        "enable_prefix_caching": False, "quantization": "gptq", "gpu_memory_utilization": 0.5, "load_format": "dummy",
        "additional_config": {"x": 1}, "max_num_batched_tokens": 99,
    }  # fmt: skip


def test_each_drafter_in_vllms_words() -> None:
    draft = Draft("folder", "eagle3")
    assert said(drafter={"kind": "ngram", "k": 4})["speculative_config"] == {
        "method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3,
    }  # fmt: skip
    eagle = said(draft, drafter={"kind": "eagle", "k": 5}, vllm={"draft_tensor_parallel_size": 1})["speculative_config"]
    assert eagle == {"method": "eagle3", "model": "folder", "num_speculative_tokens": 5, "draft_tensor_parallel_size": 1}
    assert "speculative_config" not in said(drafter={"kind": "ngram", "k": 0})
    other = {"speculative_config": {"method": "suffix", "num_speculative_tokens": 8}}
    assert said(vllm={"options": other})["speculative_config"] == other["speculative_config"]


def test_drafts_are_drawn_where_ours_are() -> None:
    model, drawn = Draft("folder", "draft_model"), {"temperature": 1.0}
    for drafter, sampling, rule, wanted in (
        ({"kind": "model"}, {}, "auto", None),
        ({"kind": "model"}, drawn, "auto", "probabilistic"),
        ({"kind": "model", "greedy": True}, drawn, "auto", None),
        ({"kind": "medusa"}, drawn, "auto", None),
        ({"kind": "eagle"}, drawn, "auto", "probabilistic"),
        ({"kind": "model"}, {}, "temperature-relaxed", "probabilistic"),  # its law is compared with the draft's
    ):
        found = said(model, drafter=drafter, sampling=sampling, rule={"kind": rule})["speculative_config"]
        assert found.get("draft_sample_method") == wanted, (drafter, sampling, rule)


def test_rules_and_min_p_go_to_the_plugin() -> None:
    draft, drafter = Draft("folder", "draft_model"), {"kind": "model"}
    typical = {"rule": {"kind": "typical", "epsilon": 0.2}, "sampling": {"temperature": 0.7, "min_p": 0.05}}
    assert said(draft, drafter=drafter, **typical)["additional_config"] == {
        "forerun": {"rule": {"kind": "typical", "epsilon": 0.2}, "min_p": 0.05}
    }
    assert "additional_config" not in said(draft, drafter=drafter, rule={"kind": "standard"})
    assert "additional_config" not in said(**typical), "no drafts, no rule: vLLM has min-p itself"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model": {"attention": "eager"}}, r"vllm\.attention_backend"),
        ({"model": {"device": "cuda:1"}}, "CUDA_VISIBLE_DEVICES"),
        ({"model": {"device": "balanced"}}, "tensor_parallel_size"),
        ({"drafter": {"kind": "ngram", "policy": "adaptive"}}, "constant k"),
        ({"drafter": {"kind": "model", "confidence": 0.4}}, "always drafts k"),
        ({"drafter": {"kind": "model", "dtype": "float32"}}, "has the target's"),
        ({"drafter": {"kind": "model", "weights": "random"}}, r"drafter\.weights"),
        ({"drafter": {"kind": "medusa", "choices": [[0], [1]]}}, "no trees"),
        ({"drafter": {"kind": "eagle", "tree": "static", "choices": [[0], [0, 1]]}}, "no trees"),
    ],
)
def test_what_vllm_has_no_word_for_is_refused(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        said(Draft("folder", "x"), **settings)


def test_the_command_line_says_the_same() -> None:
    arguments = said(
        Draft("a folder", "draft_model"),
        drafter={"kind": "model", "k": 3}, rule={"kind": "typical"},
        vllm={"enforce_eager": True, "enable_prefix_caching": False, "data_parallel_size": 2},
    )  # fmt: skip
    found = command(arguments)
    assert found[:3] == ["vllm", "serve", "target"]
    assert "--enforce-eager" in found
    assert "--no-enable-prefix-caching" in found
    values = dict(itertools.pairwise(found))
    assert json.loads(values["--speculative-config"])["model"] == "a folder"
    assert json.loads(values["--additional-config"]) == {"forerun": {"rule": {"kind": "typical"}}}
    assert values["--data-parallel-size"] == "2"
    assert values["--generation-config"] == "vllm", "a served model would fill gaps from its own"
    assert "--skip-tokenizer-init" not in found, "a server needs its tokenizer"


def test_what_the_user_sets_is_on_the_line_as_vllms_parser_reads_it() -> None:
    options = {
        "generation_config": "auto", "disable_log_stats": True, "headless": False, "cudagraph_capture_sizes": [1, 2],
        "allowed_origins": ["a", "b"], "hf_overrides": {"x": [1]},
    }  # fmt: skip
    arguments = said(vllm={"options": options})
    assert command(arguments)[-10:] == [
        "--generation-config", "auto", "--disable-log-stats", "--cudagraph-capture-sizes", "1", "2",
        "--allowed-origins", '["a", "b"]', "--hf-overrides", '{"x": [1]}',
    ]  # fmt: skip
    assert here(arguments)["generation_config"] == "auto"


def test_rounds_are_asked_for_where_vllm_fills_in_how_many_tokens_are_drafted() -> None:
    method = {"speculative_config": {"method": "suffix"}}
    assert here(said(vllm={"options": method}))["per_request_spec_decode_metrics"] == "detailed"
    assert "per_request_spec_decode_metrics" not in here(said())


def test_medusa_drafts_as_many_tokens_as_it_has_heads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORERUN_CACHE", str(tmp_path / "cache"))
    for k, drafted in ((3, 3), (9, 4)):
        draft = find_draft(variant(drafter={"kind": "medusa", "k": k}), print)
        assert said(draft, drafter={"kind": "medusa", "k": k})["speculative_config"]["num_speculative_tokens"] == drafted


@pytest.mark.parametrize("what", ["input", "output", "mlp"])
def test_folders_with_layers_of_our_own_are_refused(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORERUN_CACHE", str(tmp_path / "cache"))
    config = LlamaConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    recipes = [{"kind": "prune", "what": what, "fraction": 0.25}]
    asked = parse(ModelConfig, {"path": str(tmp_path / "model"), "recipes": recipes}, "test")
    if what == "mlp":
        assert Path(target_folder(asked, "target", print)).is_dir()
        return
    with pytest.raises(UserError, match=r"^model folder .* what=input or what=output; prune with [^\n]*$") as caught:
        target_folder(asked, "target", print)
    saved = str(caught.value).split()[2].rstrip(":")
    with pytest.raises(UserError, match="vLLM does not read layers"):
        target_folder(ModelConfig(path=saved), "target", print)


def test_the_verb_prints_a_line_for_each_variant(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORERUN_CACHE", str(tmp_path / "cache"))
    config = tmp_path / "config.yaml"
    config.write_text("variants:\n  plain: {}\n  eagle: {drafter.kind: eagle, drafter.k: 3}\n")
    assert vllm_args.run([str(config), "engine.rows=4"]) == 0
    assert capsys.readouterr().out.splitlines()[::2] == ["# plain", "# eagle"]
    assert vllm_args.run([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert (Path(shlex.split(lines[0])[2]) / "config.json").is_file()
    with pytest.raises(UserError, match="runs already"):
        vllm_args.run(["backend=endpoint"])
    with pytest.raises(UserError, match="one config"):
        vllm_args.run(["a", "b"])


def test_heads_of_ours_are_written_in_a_layout_that_vllm_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EAGLE-3 names the layers that it reads outside `eagle_config`, where vLLM means by them what we do."""
    monkeypatch.setenv("FORERUN_CACHE", str(tmp_path / "cache"))
    for kind, method in (("eagle", "eagle3"), ("medusa", "medusa")):
        asked = variant(drafter={"kind": kind})
        draft = find_draft(asked, print)
        assert draft is not None
        assert draft.method == method
        settings = json.loads((Path(draft.path) / "config.json").read_text())
        assert "kind" not in settings
        ours, _ = load(Path(draft.path))
        theirs, _ = load(ASSETS / kind)
        for name, tensor in theirs.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=0, atol=0)
        assert find_draft(asked, print) == draft, "it is found again"
    eagle = json.loads((next((tmp_path / "cache").glob("vllm-eagle-*")) / "config.json").read_text())
    assert eagle["eagle_aux_hidden_state_layer_ids"] == [2, 5, 8]
    assert "eagle_config" not in eagle


@pytest.mark.parametrize(
    ("version", "layout", "method"), [(1, "eagle", "eagle"), (3, "eagle3", "eagle3"), (3, "speculators", "eagle3")]
)
def test_folders_that_forerun_reads_are_written_for_vllm_and_others_go_as_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: int, layout: str, method: str
) -> None:
    features = (-1,) if version == 1 else (1, 2, 3)
    head = Eagle(EagleShape(16, 11, 24, 4, 2, 4, version=version, features=features))  # type: ignore[arg-type]
    formats.write(head, tmp_path / "head", layout)
    asked = variant(drafter={"kind": "eagle", "path": str(tmp_path / "head")})
    assert find_draft(asked, print) == Draft(str(tmp_path / "head"), method)
    save(head, tmp_path / "own")
    with pytest.raises(UserError, match="hidden size 16, the target has 384"):
        find_draft(variant(drafter={"kind": "eagle", "path": str(tmp_path / "own")}), print)
    wide = Eagle(EagleShape(384, 4096, 24, 6, 2, 64, version=version, features=features))  # type: ignore[arg-type]
    save(wide, tmp_path / "wide")
    monkeypatch.setenv("FORERUN_CACHE", str(tmp_path / "cache"))
    found = find_draft(variant(drafter={"kind": "eagle", "path": str(tmp_path / "wide")}), print)
    assert found is not None
    assert found.method == method
    formats.write(wide, tmp_path / "public", layout)
    public = find_draft(variant(drafter={"kind": "eagle", "path": str(tmp_path / "public")}), print)
    assert public is not None
    assert public.method == method
    settings = json.loads((Path(public.path) / "config.json").read_text())
    assert settings == json.loads((Path(found.path) / "config.json").read_text()), "both are the same head"
    if version == 1:
        assert not settings["bias"], "vLLM has none in the joining layer"
    else:
        assert settings["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
        assert "eagle_config" not in settings
    assert find_draft(variant(drafter={"kind": "eagle", "path": "them/EAGLE3-x"}), print) == Draft("them/EAGLE3-x", "eagle3")


def test_a_models_words_without_its_weights() -> None:
    found = words(ModelConfig())
    assert (found.vocabulary, found.ends) == (4096, frozenset({0}))
    assert found.tokenizer is not None
    assert longest(variant(drafter={"kind": "model"})) == 1024


# Rounds.


def deltas(*counts: int) -> list[Delta]:
    return [Delta("a", 0, tuple(range(count)), "") for count in counts]


def test_rounds_find_their_deltas() -> None:
    """Prefill's token has none; a step without drafts is a round of nothing drafted; the last one may be cut short."""
    found = [delta.round for delta in match(deltas(1, 3, 1, 1, 2), [(3, 2), (3, 0), (3, 3)], first=True)]
    assert found == [None, Round(3, 2, 4), Round(3, 0, 4), Round(0, 0, 1), Round(3, 3, 4)]
    assert [delta.round for delta in match(deltas(2), [(2, 1)], first=False)] == [Round(2, 1, 3)]
    assert [delta.round for delta in match(deltas(1, 2), None, first=True)] == [None, None]
    assert [delta.round for delta in match(deltas(1, 1), [], first=True)] == [None, Round(0, 0, 1)]


def test_counters_add_up() -> None:
    found = Counters.none(3).plus([(3, 2), (3, 0)]).plus([(2, 2)])
    assert found == Counters(3, 8, 4, (2, 2, 0))
    parts: list[StepStats] = []
    logger = StepStats.maker(parts)(None, 0)
    step = SimpleNamespace(num_drafts=2, num_draft_tokens=6, num_accepted_tokens=3, num_accepted_tokens_per_pos=[2, 1, 0])
    for stats in (step, None, step):
        logger.record(scheduler_stats=SimpleNamespace(spec_decoding_stats=stats), iteration_stats=None)
    assert [one.sums for one in parts] == [Counters(4, 12, 6, (4, 2, 0))]
    assert found.joined(parts[0].sums) == Counters(7, 20, 10, (6, 4, 0))


def test_scores_come_from_the_last_positions() -> None:
    def place(token: int, logprob: float, rank: int) -> dict[int, Any]:
        return {token: SimpleNamespace(logprob=logprob, rank=rank)}

    told = [None, place(4, -9.0, 7), place(5, -0.5, 1), place(6, -0.25, 1)]
    assert read(told, (5, 6)) == Score(-0.75, True)
    assert read(told, (4, 5, 6)) == Score(-9.75, False)
