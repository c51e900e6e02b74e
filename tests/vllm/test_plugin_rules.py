"""forerun's rules inside a real vLLM: what comes out has the law that the rule states, computed from the models themselves."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from forerun.accept import Standard, choose
from forerun.accept.exact import Process, distance, drawn_chains, first_tokens, score
from forerun.audit.statistics import goodness
from forerun.config import Variant, parse
from forerun.plugin import settings, versions
from forerun.sampling import build_warp, law
from forerun.types import Sampling, UserError
from models import redraw, wide_headed

pytestmark = pytest.mark.filterwarnings("ignore")  # of vLLM's own
VOCABULARY, DRAFTS, REQUESTS = 8, 2, 4000
PROMPT = (1, 2, 3)
SAMPLING = Sampling(temperature=0.7)
RULES: list[dict[str, Any]] = [
    {"kind": "temperature-relaxed", "temperature": 3.0},
    {"kind": "top-p-residual", "top_p": 0.15},
    {"kind": "min-p-ratio", "min_p": 0.5},
    {"kind": "typical", "epsilon": 0.1, "delta": 0.3},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random target and a draft that is the target with noise."""
    place = tmp_path_factory.mktemp("models")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = wide_headed(vocab_size=VOCABULARY)
        for name, kept, noise in (("target", 0.0, 1.5), ("draft", 1.0, 0.6)):
            redraw(model, noise, kept)
            model.save_pretrained(place / name)
    return place


@pytest.fixture(autouse=True)
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@contextmanager
def engine(folder: Path, forerun: dict[str, Any] | None, **speculation: Any) -> Iterator[Any]:
    """An `LLM` whose draft model draws."""
    from vllm import LLM

    drafts = {
        "method": "draft_model",
        "model": str(folder / "draft"),
        "num_speculative_tokens": DRAFTS,
        "draft_sample_method": "probabilistic",
    }
    llm = LLM(
        str(folder / "target"), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=64 << 20,
        max_model_len=128, max_num_seqs=256, disable_log_stats=False, speculative_config=drafts | speculation,
        additional_config={} if forerun is None else {"forerun": forerun},
    )  # fmt: skip
    yield llm
    llm.llm_engine.engine_core.shutdown()


def texts(llm: Any, samplings: list[Sampling], new: int, prompt: tuple[int, ...] = PROMPT) -> list[list[int]]:
    from vllm import SamplingParams

    params = [
        SamplingParams(
            temperature=s.temperature, top_k=s.top_k, top_p=s.top_p, seed=s.seed,
            max_tokens=new, ignore_eos=True, detokenize=False,
        )
        for s in samplings
    ]  # fmt: skip
    outputs = llm.generate([{"prompt_token_ids": list(prompt)}] * len(params), params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def counted(texts: list[list[int]]) -> Tensor:
    """[V, V]: how often each pair of first and second token came."""
    pairs_T = torch.tensor([first * VOCABULARY + second for first, second, *_ in texts])
    return torch.bincount(pairs_T, minlength=VOCABULARY**2).view(VOCABULARY, VOCABULARY)


def process(path: Path, sampling: Sampling, length: int) -> Process:
    """What a model, run by transformers, says after the prompt and every beginning of a text."""
    model = AutoModelForCausalLM.from_pretrained(path).double()
    warp = build_warp([sampling], VOCABULARY, torch.device("cpu"))
    laws = []
    for depth in range(length):
        beginnings = itertools.product(range(VOCABULARY), repeat=depth)
        ids = torch.tensor([(*PROMPT, *beginning) for beginning in beginnings])
        with torch.inference_mode():
            scores_BV = model(ids).logits[:, -1]
        laws.append(law(scores_BV[None], warp)[0].view((VOCABULARY,) * (depth + 1)))
    return Process(tuple(laws))


def expected(folder: Path, rule: Any, sampling: Sampling, draft_sampling: Sampling = SAMPLING) -> Tensor:
    """[V, V]: the law of the first two tokens, where a rule judges a draft that was drawn for the second one."""
    target, draft = process(folder / "target", sampling, 3), process(folder / "draft", draft_sampling, 2)
    joint = []
    for first in range(VOCABULARY):
        after = Process((target.laws[1][first], target.laws[2][first]))
        tree, weights_B = drawn_chains(Process((draft.laws[1][first],)), 1)
        second = first_tokens(tree, rule.law(tree, score(tree, after)), after, weights_B).sum(1)
        joint.append(target.laws[0][first] * second)
    return torch.stack(joint)


def follows(found: Tensor, right: Tensor) -> bool:
    return goodness(found, right * found.sum()).passed


def accepted(llm: Any) -> tuple[int, int]:
    """Drafted and accepted tokens by vLLM's counters."""
    metrics = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    return metrics["vllm:spec_decode_num_draft_tokens"], metrics["vllm:spec_decode_num_accepted_tokens"]


@pytest.mark.parametrize("rate", [1.0, 0.0])
def test_the_counters_show_what_was_accepted(folder: Path, rate: float) -> None:
    with engine(folder, {"rule": {"kind": "synthetic", "rates": [rate]}}) as llm:
        for temperature in (0.7, 0.0):
            before = accepted(llm)  # counters are the process's
            texts(llm, [Sampling(temperature=temperature)] * 50, 10)
            drafted, kept = (now - then for now, then in zip(accepted(llm), before, strict=True))
            assert drafted >= 50 * 3 * DRAFTS  # 9 tokens after the first: three rounds where all is accepted, else more
            assert kept == rate * drafted


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["kind"])
def test_second_tokens_have_the_rule_s_own_law(folder: Path, rule: dict[str, Any]) -> None:
    with engine(folder, {"rule": rule}) as llm:
        found = counted(texts(llm, [SAMPLING] * REQUESTS, 2))
    ours = choose(parse(Variant, {"rule": rule}, "rule").rule, drawn=True)
    assert follows(found, expected(folder, ours, SAMPLING))
    assert not follows(found, expected(folder, Standard(), SAMPLING)), "the rule bends the law too little to be seen"


def test_min_p_is_a_lossless_warp(folder: Path) -> None:
    warped = Sampling(temperature=0.7, min_p=0.3)
    with engine(folder, {"min_p": 0.3}) as llm:
        found = counted(texts(llm, [SAMPLING] * REQUESTS, 2))
    assert follows(found, expected(folder, Standard(), warped))
    unwarped = process(folder / "target", SAMPLING, 1).laws[0]
    assert not goodness(found.sum(1), unwarped * found.sum()).passed, "first tokens are warped too"


def test_requests_of_any_mixture_share_a_batch(folder: Path) -> None:
    """Greedy texts are transformers' own, and beside them top-k, top-p and temperature with seeds have their own law."""
    sampled = [Sampling(temperature=1.3, top_k=6, top_p=0.9, seed=seed) for seed in range(REQUESTS)]
    mixed = [one for pair in zip(sampled, [Sampling()] * len(sampled), strict=True) for one in pair]
    with engine(folder, {"rule": {"kind": "block"}}) as llm:
        out = texts(llm, mixed, 2)
        again = texts(llm, sampled[:50], 2)
        alone = texts(llm, [Sampling()], 30)
    model = AutoModelForCausalLM.from_pretrained(folder / "target")
    greedy = model.generate(torch.tensor([PROMPT]), do_sample=False, max_new_tokens=30)[0, len(PROMPT) :].tolist()
    assert alone == [greedy]
    assert all(text == greedy[:2] for text in out[1::2])
    found = counted(out[::2])
    assert follows(found, expected(folder, Standard(), sampled[0]))
    assert not follows(found, expected(folder, Standard(), Sampling(temperature=1.3)))
    assert [text[0] for text in again] == [text[0] for text in out[:100:2]], "first tokens come of the request's own stream"


def unrepaired(x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> Tensor:
    """`expand_batch_to_tokens` as vLLM has it, around vLLM's own kernel: an engine before may have had it repaired."""
    from vllm.v1.sample import rejection_sampler

    expanded = x.new_empty(num_tokens)
    rejection_sampler._expand(expanded, x, cu_num_tokens, replace_from, replace_to)
    return expanded


@pytest.mark.parametrize("repaired", [True, False])
def test_sampling_is_lossless_after_the_repair_alone(folder: Path, monkeypatch: pytest.MonkeyPatch, repaired: bool) -> None:
    from vllm.v1.sample import rejection_sampler

    import forerun.plugin.v1
    from forerun.plugin.repair import expand

    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", unrepaired)
    if not repaired:
        monkeypatch.setattr(forerun.plugin.v1, "mend", lambda module: False)
    with engine(folder, None) as llm:
        assert (rejection_sampler.expand_batch_to_tokens is expand) == repaired
        found = counted(texts(llm, [SAMPLING] * REQUESTS, 2))
    assert follows(found, expected(folder, Standard(), SAMPLING)) == repaired


@pytest.mark.parametrize(
    ("forerun", "speculation", "named"),
    [
        ({"rule": RULES[0]}, {"draft_sample_method": "greedy"}, "draft_sample_method"),
        ({}, {"rejection_sample_method": "block"}, "rejection_sample_method"),
        ({"rules": RULES[0]}, {}, "did you mean 'rule'"),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(folder: Path, forerun: Any, speculation: dict[str, str], named: str) -> None:
    with pytest.raises(UserError, match=named), engine(folder, forerun, **speculation):
        pass


def test_an_engine_that_asks_for_nothing_keeps_vllm_s_own_rule(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from forerun.plugin import v1

    seen, judge = [], v1.judge
    monkeypatch.setattr(v1, "judge", lambda *given, **named: seen.append(given) or judge(*given, **named))
    for asked in (None, {}):
        with engine(folder, asked) as llm:
            texts(llm, [SAMPLING] * 5, 10)
        assert bool(seen) == (asked is not None)


def test_a_vllm_of_another_release_is_refused_where_forerun_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import VllmConfig

    from forerun.plugin import register

    register()
    trouble = versions.trouble("0.33.0")
    monkeypatch.setattr(VllmConfig, "__post_init__", settings.judging(VllmConfig.__post_init__, trouble))
    with pytest.raises(UserError, match=r"this is 0\.33\.0"), engine(folder, {}):
        pass
    with engine(folder, None) as llm:
        assert texts(llm, [Sampling()], 3)


def test_the_rules_of_the_grid_are_far_from_lossless(folder: Path) -> None:
    """What the chi-square tests above have to see."""
    right = expected(folder, Standard(), SAMPLING)
    for rule in RULES:
        ours = choose(parse(Variant, {"rule": rule}, "rule").rule, drawn=True)
        assert distance(expected(folder, ours, SAMPLING), right) > 0.08, rule["kind"]


ALONE = """
import sys
from vllm import LLM, SamplingParams
folder, processes = sys.argv[1], int(sys.argv[2])
if __name__ == "__main__":
    llm = LLM(
        folder + "/target", skip_tokenizer_init=True, dtype="float32", enforce_eager=True, kv_cache_memory_bytes=64 << 20,
        max_model_len=128, disable_log_stats=False, tensor_parallel_size=processes,
        speculative_config={"method": "draft_model", "model": folder + "/draft", "num_speculative_tokens": 2},
        additional_config={"forerun": {"rule": {"kind": "synthetic", "rates": [1.0]}}},
    )
    params = SamplingParams(temperature=0.7, max_tokens=10, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": [1, 2, 3]}] * 50, params, use_tqdm=False)
    counters = {metric.name: getattr(metric, "value", 0) for metric in llm.get_metrics()}
    print("\\ncounters", counters["vllm:spec_decode_num_draft_tokens"], counters["vllm:spec_decode_num_accepted_tokens"])
"""


def test_the_rule_reaches_an_engine_in_a_process_of_its_own(folder: Path, tmp_path: Path) -> None:
    script, own = tmp_path / "alone.py", os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    script.write_text(ALONE, encoding="utf-8")
    command = [sys.executable, script, folder, "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=own)
    assert done.returncode == 0, done.stderr[-2000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("counters ")]  # vLLM's log comes out there too
    _, drafted, kept = line.split()
    assert drafted == kept != "0"
