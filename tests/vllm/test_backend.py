"""vLLM behind our Backend: the texts of transformers' generate, the rounds of our own engine, and what cannot be is refused."""

import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from forerun.backends.vllm import Vllm
from forerun.build import Models, build
from forerun.config import Variant, parse
from forerun.model import ASSETS
from forerun.types import Completion, Request, Sampling, UserError, complete
from forerun.verbs.vllm_args import serve

pytestmark = pytest.mark.filterwarnings("ignore")  # of vLLM's own
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before anything imports vLLM

TEXTS = (
    "Once upon a time, a small robot",
    "The cat sat on the mat. The dog sat on the mat. The cat sat",
    "1. Wash the apples.\n2. Cut the apples.\n3.",
)
DRAFTERS: dict[str, dict[str, Any]] = {
    "none": {"kind": "none"},
    "ngram": {"kind": "ngram", "k": 3, "lookup_min": 2, "lookup_max": 3},
    "model": {"kind": "model", "k": 3},
    "eagle": {"kind": "eagle", "k": 3, "tree": "chain"},
    "medusa": {"kind": "medusa", "k": 3, "choices": [[0], [0, 0], [0, 0, 0]]},
}
NEW = 40


def variant(drafter: str | dict[str, Any], backend: str = "vllm", **settings: Any) -> Variant:
    base: dict[str, Any] = {
        "model": {"dtype": "float32"},
        "drafter": DRAFTERS[drafter] if isinstance(drafter, str) else drafter,
        "engine": {"rows": 3, "capacity": 256},
        "backend": backend,
        "vllm": {"enforce_eager": True, "kv_cache_memory_bytes": 64 << 20},
    }
    return parse(Variant, base | settings, "test")


def requests(models: Models, **sampling: Any) -> list[Request]:
    tokenizer = models.words(variant("none").model).tokenizer
    assert tokenizer is not None
    settings = Sampling(**{"max_new": NEW} | sampling)
    return [Request(str(i), tuple(tokenizer(text)["input_ids"]), settings) for i, text in enumerate(TEXTS)]


def generated(models: Models, request: Request) -> tuple[int, ...]:
    model = models.target(variant("none").model, "reference").model
    ids = torch.tensor([request.prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.sampling.max_new, do_sample=False)
    return tuple(out[0, len(request.prompt) :].tolist())


def accepted(completion: Completion) -> list[int]:
    """Of each round but the last, which vLLM drafts in full where our engine stops at the limit."""
    return [one.accepted for one in completion.rounds[:-1]]


@pytest.mark.parametrize("drafter", DRAFTERS)
def test_greedy_texts_are_generates_and_rounds_are_ours(drafter: str, models: Models) -> None:
    """Three requests at once. A head that were exported wrongly, or read other layers, would be accepted less."""
    backend = build(variant(drafter), models)
    asked = requests(models)
    found = complete(backend, asked)
    assert [one.tokens for one in found] == [generated(models, request) for request in asked]
    assert torch.get_num_threads() == 1, "vLLM, or numba by way of its ngram drafter, gave torch other threads"
    facts = backend.facts
    assert (facts["dtype"], facts["rows"], facts["capacity"]) == ("float32", 3, 256)
    assert facts["repaired"] == (None if drafter == "none" else "vllm.v1.sample.rejection_sampler.expand_batch_to_tokens")
    told = [one for completion in found for one in completion.rounds]
    assert all(one.accepted <= one.drafted <= DRAFTERS[drafter].get("k", 0) for one in told)
    emitted = [sum(one.accepted + 1 for one in completion.rounds) for completion in found]
    assert all(NEW - 1 <= count <= NEW - 1 + 3 or one.finish == "stop" for count, one in zip(emitted, found, strict=True))
    if drafter == "none":
        assert facts["counters"] is None
        return
    assert sum(one.accepted for one in told) > 10
    drafts = [one for one in told if one.drafted]
    counters = {
        "drafts": len(drafts),
        "drafted": sum(one.drafted for one in drafts),
        "accepted": sum(one.accepted for one in drafts),
    }
    per_position = [sum(one.accepted > place for one in drafts) for place in range(3)]
    assert facts["counters"] == counters | {"per_position": tuple(per_position)}
    if drafter != "ngram":  # whose lookup may take another of several matches
        ours = complete(build(variant(drafter, backend="forerun"), models), asked)
        assert [accepted(one) for one in found] == [accepted(one) for one in ours]


def test_suffix_drafting_asks_for_its_library(models: Models) -> None:
    """vLLM takes it from arctic-inference, of which there is a source distribution alone: with it texts are generate's too."""
    options = {"speculative_config": {"method": "suffix", "num_speculative_tokens": 3}}
    asked = variant("none", vllm=variant("none").vllm.model_dump() | {"options": options})
    if importlib.util.find_spec("arctic_inference") is None:
        with pytest.raises(UserError, match=r"Arctic Inference is required for suffix decoding.*pip install arctic-inference"):
            build(asked, models)
        return
    backend = build(asked, models)
    wanted = [generated(models, request) for request in requests(models)]
    assert [one.tokens for one in complete(backend, requests(models))] == wanted
    assert backend.facts["counters"]["accepted"] > 10


def test_how_many_tokens_are_drafted_may_be_left_to_vllm(models: Models, tmp_path: Path) -> None:
    """It reads the number from the draft's own config here, from its defaults for others."""
    folder = shutil.copytree(ASSETS / "draft", tmp_path / "draft")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"n_predict": 3}))
    options = {"speculative_config": {"method": "draft_model", "model": str(folder)}}
    backend = build(variant("none", vllm=variant("none").vllm.model_dump() | {"options": options}), models)
    known = build(variant("model"), models)
    found, wanted = complete(backend, requests(models)), complete(known, requests(models))
    assert [one.rounds for one in found] == [one.rounds for one in wanted]
    assert backend.facts["drafter"] == "draft_model, a chain of 3"
    assert backend.facts["counters"] == known.facts["counters"]


def test_medusa_drafts_no_more_than_its_heads(models: Models) -> None:
    """As in our engine, of which more are asked here than there are."""
    many = {"kind": "medusa", "k": 6, "choices": [[0] * length for length in range(1, 5)]}
    backend = build(variant(many), models)
    found, ours = (complete(one, requests(models)) for one in (backend, build(variant(many, backend="forerun"), models)))
    assert [one.tokens for one in found] == [one.tokens for one in ours]
    assert [accepted(one) for one in found] == [accepted(one) for one in ours]
    assert backend.facts["drafter"] == "medusa, a chain of 4"


@pytest.fixture(scope="module")
def pair(models: Models) -> Vllm:
    """One engine with a draft model for all that is left."""
    backend = build(variant("model"), models)
    assert isinstance(backend, Vllm)
    return backend


def test_stop_strings_and_ids_end_texts_as_in_our_engine(pair: Vllm, models: Models) -> None:
    ours = build(variant("model", backend="forerun"), models)
    plain = complete(pair, requests(models))[0]
    middle = plain.text[len(plain.text) // 2 :][:5]
    for sampling in ({"stop": (middle,)}, {"stop_ids": (plain.tokens[17],)}, {"max_new": 1}, {"ignore_eos": True}):
        asked = requests(models, **sampling)
        found, wanted = complete(pair, asked), complete(ours, asked)
        assert [(one.tokens, one.text, one.finish) for one in found] == [(one.tokens, one.text, one.finish) for one in wanted]
    assert not pair.engine.has_unfinished_requests(), "what was stopped here runs on in vLLM"


def test_completions_of_one_request_and_a_cancel(pair: Vllm, models: Models) -> None:
    asked = requests(models, n=2)[:1]
    found = complete(pair, asked)
    assert [one.index for one in found] == [0, 1]
    assert found[0].tokens == found[1].tokens, "greedy"
    for request in requests(models):
        pair.submit(request)
    with pytest.raises(UserError, match="in flight"):
        pair.submit(requests(models)[1])
    pair.step()
    pair.cancel("1")
    deltas = pair.step()
    assert [delta.finish for delta in deltas if delta.id == "1"] == ["cancelled"]
    while pair.busy:
        deltas += pair.step()
    assert sorted(delta.id for delta in deltas if delta.finish == "length") == ["0", "2"]


def test_sampling_settings_reach_vllm(pair: Vllm, models: Models) -> None:
    """Each penalty alone changes a greedy text as it changes ours, and each cut at its narrowest makes drawing greedy."""
    ours, alone = build(variant("model", backend="forerun"), models), build(variant("none"), models)
    plain = [one.tokens for one in complete(pair, requests(models))]
    favourite = plain[0][3]
    for backend, sampling in (
        (pair, {"repetition_penalty": 1.8}), (pair, {"presence_penalty": 1.5}), (pair, {"frequency_penalty": 1.5}),
        (alone, {"logit_bias": {favourite: -100.0}}),
    ):  # fmt: skip
        asked = requests(models, **sampling)
        found = [one.tokens for one in complete(backend, asked)]
        assert found == [one.tokens for one in complete(ours, asked)], sampling
        assert found != plain, sampling
    for cut in ({"top_k": 1}, {"top_p": 1e-4}, {"min_p": 1.0}):
        asked = requests(models, temperature=1.0, seed=3, **cut)
        assert [one.tokens for one in complete(alone, asked)] == plain, cut
    drawn = [[one.tokens for one in complete(alone, requests(models, temperature=1.0, seed=seed))] for seed in (3, 3, 4)]
    assert drawn[0] == drawn[1] != drawn[2]
    two = complete(alone, requests(models, temperature=1.0, seed=3, n=2)[:1])
    assert two[0].tokens == drawn[0][0] != two[1].tokens


def test_scores_are_the_models_own(pair: Vllm, models: Models) -> None:
    reference = build(variant("none", backend="reference"), models).scorer
    assert reference is not None
    texts = [request.prompt for request in requests(models)]
    pairs = [(text[:cut], text[cut:]) for text in texts for cut in (1, 4)]
    for found, wanted in zip(pair.scorer.score(pairs), reference.score(pairs), strict=True):
        assert found.logprob == pytest.approx(wanted.logprob, abs=1e-3)
        assert found.greedy == wanted.greedy
    best = complete(pair, requests(models))[0].tokens[:3]
    assert pair.scorer.score([(texts[0], best)])[0].greedy


def test_requests_that_cannot_be_served_are_refused(pair: Vllm, models: Models) -> None:
    [first, *_] = requests(models)
    for request, told in (
        (Request("a", (), Sampling()), "empty"),
        (Request("a", first.prompt, Sampling(max_new=400)), "max_model_len of 256"),
        (Request("a", (5000,), Sampling()), "not in the vocabulary"),
        (Request("a", first.prompt, Sampling(temperature=3.0, max_new=4)), "vLLM refuses it: temperature"),
        (Request("a", first.prompt, Sampling(logit_bias={3: 1.0}, max_new=4)), "vLLM refuses it: .*logit_bias"),
        (Request("a", first.prompt, Sampling(temperature=1.0, min_p=0.1, max_new=4)), "one for all"),
    ):
        with pytest.raises(UserError, match=told):
            pair.submit(request)
        assert not pair.busy


def test_a_fault_amid_a_step_is_one_line(pair: Vllm, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise ValueError("no such kernel\nin two lines")

    [request, *_] = requests(models)
    pair.submit(request)
    with monkeypatch.context() as patch:
        patch.setattr(pair.engine, "step", broken)
        with pytest.raises(UserError, match=r"^vLLM failed with 1 in flight: .*no such kernel[^\n]*$"):
            pair.step()
    pair.cancel(request.id)
    assert [delta.finish for delta in pair.step()] == ["cancelled"]


def test_without_told_rounds_the_counters_are_vllms(models: Models) -> None:
    """As with a vLLM that has no such metrics: texts are the same, rounds are unknown, the sums come from its logger."""
    asked = requests(models)
    known = build(variant("model"), models)
    wanted = complete(known, asked)
    options = {"per_request_spec_decode_metrics": "none"}
    settings = variant("model").vllm.model_dump() | {"options": options}
    backend = build(variant("model", vllm=settings), models)
    found = complete(backend, asked)
    assert [one.tokens for one in found] == [one.tokens for one in wanted]
    assert all(one.rounds == () for one in found)
    assert backend.facts["counters"] == known.facts["counters"]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"model": {"dtype": "float64"}}, "dtype: Input should be"),
        ({"drafter": {"kind": "mlp", "path": "nowhere/at-all"}}, "vLLM refuses this: "),
        ({"vllm": {"options": {"no_such_thing": 1}}}, "no such engine argument"),
        ({"vllm": {"multiprocess": True}}, "the other way"),
        ({"vllm": {"data_parallel_size": 2}}, "only a server"),
        ({"model": {"device": "tpu"}}, "runs on cpu"),
    ],
)
def test_what_this_vllm_cannot_do_is_said_in_one_line(
    settings: dict[str, Any], told: str, models: Models, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=told) as caught:
        build(variant(**{"drafter": "none"} | settings), models)
    assert "\n" not in str(caught.value)
    assert "Traceback" not in "".join(capfd.readouterr())


SCRIPT = """
import json, sys
from dataclasses import replace
sys.path.insert(0, {tests!r})
from forerun.build import Models, build
from forerun.config import Variant, parse
from forerun.types import Request, Sampling, UserError, complete

if __name__ == "__main__":
    job = json.load(sys.stdin)
    try:
        backend = build(parse(Variant, job["variant"], "test"), Models())
    except UserError as error:
        print(json.dumps(str(error)))
        raise SystemExit
    asked = [Request(str(i), tuple(prompt), Sampling(max_new={new})) for i, prompt in enumerate(job["prompts"])]
    found, before = complete(backend, asked), backend.facts
    told = [[(one.drafted, one.accepted) for one in completion.rounds] for completion in found]
    stopped = complete(backend, [replace(one, sampling=replace(one.sampling, stop=(job["stop"],))) for one in asked[:1]])
    after = backend.facts["counters"]
    print(json.dumps([[one.tokens for one in found], told, before, stopped[0].finish, stopped[0].rounds, after]))
"""


def elsewhere(job: dict[str, Any], folder: Path) -> Any:
    """The same in a process of its own."""
    script = folder / "job.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), new=NEW))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    done = subprocess.run(
        [sys.executable, str(script)], input=json.dumps(job), capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_an_engine_core_in_a_process_of_its_own_tells_the_same(pair: Vllm, models: Models, tmp_path: Path) -> None:
    before = pair.facts["counters"]
    asked = requests(models)
    wanted = complete(pair, asked)
    settings = variant("model").vllm.model_dump() | {"multiprocess": True}
    job = {"variant": variant("model", vllm=settings).model_dump(mode="json"), "prompts": [one.prompt for one in asked]}
    middle = wanted[0].text[len(wanted[0].text) // 2 :][:5]
    tokens, told, facts, finish, rounds, counters = elsewhere(job | {"stop": middle}, tmp_path)
    assert tokens == [list(one.tokens) for one in wanted]
    assert told == [[[one.drafted, one.accepted] for one in completion.rounds] for completion in wanted]
    after = pair.facts["counters"]
    assert facts["counters"]["accepted"] == after["accepted"] - before["accepted"]
    assert facts["counters"]["drafts"] == after["drafts"] - before["drafts"]
    assert facts["repaired"].startswith("unknown: ")
    [stopped] = complete(pair, requests(models, stop=(middle,))[:1])
    assert (finish, rounds) == ("stop", []), "nothing tells what was drafted for it"
    assert counters["drafts"] >= facts["counters"]["drafts"] + len(stopped.rounds), "which is counted"
    assert counters["accepted"] >= facts["counters"]["accepted"] + sum(one.accepted for one in stopped.rounds)


def test_what_goes_wrong_in_that_process_is_told_here(tmp_path: Path) -> None:
    settings = variant("none").vllm.model_dump() | {"multiprocess": True, "kv_cache_memory_bytes": 1024}
    told = elsewhere({"variant": variant("none", vllm=settings).model_dump(mode="json"), "prompts": [], "stop": ""}, tmp_path)
    assert isinstance(told, str)
    assert told.startswith("vLLM refuses this: ")
    assert "No available memory for the cache" in told


def test_the_command_line_is_read_by_vllm_as_it_was_meant(models: Models) -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    options = {"cudagraph_capture_sizes": [1, 2], "served_model_name": ["a", "b"], "disable_log_stats": True}
    settings = {"enforce_eager": True, "enable_prefix_caching": False, "kv_cache_memory_bytes": 64 << 20, "options": options}
    rule = {"kind": "typical", "epsilon": 0.2}
    asked = variant("model", vllm=settings, rule=rule, sampling={"temperature": 0.7, "min_p": 0.1})
    _, _, model, *rest = shlex.split(serve(asked))
    read = EngineArgs.from_cli_args(make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", model, *rest]))
    draft = {"method": "draft_model", "num_speculative_tokens": 3, "draft_sample_method": "probabilistic"}
    assert read.speculative_config is not None
    assert {name: read.speculative_config[name] for name in draft} == draft
    assert read.additional_config == {"forerun": {"rule": rule, "min_p": 0.1}}
    assert (read.max_model_len, read.max_num_seqs, read.dtype) == (256, 3, "float32")
    assert {name: getattr(read, name) for name in options} == options
    config = read.create_model_config()
    assert config.get_diff_sampling_param() == {}, "what a request does not say is filled from the model's folder"
    assert "eos_token_id" in config.try_get_generation_config(), "its ends are lost"
    assert (read.enforce_eager, read.enable_prefix_caching, read.kv_cache_memory_bytes) == (True, False, 64 << 20)
