"""The command line: what it prints, what it writes, and that every mistake is one line and exit status 2."""

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fakes import Fake, Fakes
from forerun import __version__
from forerun.bench import memory, methods
from forerun.cli import run
from forerun.config import load

SYNTHETIC = ["workload.kind=synthetic", "workload.prompts=3", "workload.prompt_tokens=6", "--max-tokens", "8", "--repeats", "1"]
Tell = Callable[..., tuple[int, str, str]]


@pytest.fixture
def tell(capfd: pytest.CaptureFixture[str]) -> Tell:
    """Runs a command line; gives its status and what it wrote to stdout and stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        capfd.readouterr()
        return run(words), *capfd.readouterr()

    return call


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    """No models: every variant is a fake backend."""
    found = Fakes()
    monkeypatch.setattr(methods, "maker", found.maker)
    return found


@pytest.fixture(scope="module")
def geometry(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A config.json without weights or tokenizer."""
    folder = tmp_path_factory.mktemp("geometry")
    settings = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    settings.save_pretrained(folder)
    return str(folder / "config.json")


# Help and mistakes.


def test_help_and_version(tell: Tell) -> None:
    status, out, _ = tell("--help")
    assert status == 0
    assert "generate" in out
    assert "bench" in out
    assert tell("--version")[:2] == (0, f"forerun {__version__}\n")
    for verb in ("generate", "bench"):
        status, out, _ = tell(verb, "--help")
        assert status == 0
        for flag in ("--model", "--draft", "--method", "-k", "--temperature", "--max-tokens", "--json", "--quiet"):
            assert flag in out, (verb, flag)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["serve"], "No such command 'serve'"),
        (["bench", "--wrong"], "--wrong"),
        (["bench", "--repeats", "often"], "--repeats"),
        (["bench", "nowhere.yaml"], "nowhere.yaml: no such config file"),
        (["bench", "a.yaml", "b.yaml"], "one config file, not 2"),
        (["bench", "modle.path=x"], "unknown key 'modle'; did you mean 'model'?"),
        (["bench", "-k", "-1"], "drafter.k: Input should be greater than or equal to 0 (got -1)"),
        (["bench", "--method", "magic"], "--method magic: there are naive, ngram, draft, medusa and eagle"),
        (["bench", "--method", "draft", "--model", "x/y"], "needs --draft"),
        (["generate"], "the prompt is empty"),
        (["generate", ""], "the prompt is empty"),
        (["generate", "two", "words"], "'words' is a second one"),
        (["generate", "hi", "-k", "-1"], "drafter.k: Input should be greater than or equal to 0 (got -1)"),
        (["generate", "hi", "sampling.temprature=1"], "did you mean 'sampling.temperature'?"),
        (["generate", "hi", "--temperature", "-1"], "sampling.temperature: Input should be greater than or equal to 0"),
        (["generate", "hi", "--method", "ngram", "--draft", "x"], "--draft goes with --method draft"),
        (["generate", "hi", "--model", "./nowhere"], "model './nowhere'"),
        (["generate", "hi", "--model", "nobody/nothing"], "model 'nobody/nothing'"),  # the hub is out of reach here
        (["generate", "word " * 900, "engine.capacity=64"], "engine.capacity"),
    ],
)
def test_mistakes_are_one_line_and_status_2(tell: Tell, words: list[str], message: str) -> None:
    status, out, err = tell(*words)
    assert status == 2
    assert message in err
    assert err.startswith("forerun: ")
    assert err.count("\n") == 1
    assert out == ""


def test_a_fault_of_ours_is_no_user_error(fakes: Fakes) -> None:
    fakes.settings = {"fail_at": 1}
    with pytest.raises(RuntimeError, match="broke"):
        run(["generate", "hi"])


# generate.


def test_generate_streams_text(tell: Tell, fakes: Fakes) -> None:
    status, out, err = tell("generate", "abc", "--max-tokens", "5")
    assert (status, out) == (0, "defgh\n")
    assert "5 tokens in" in err
    assert tell("generate", "--prompt", "abc", "--max-tokens", "5", "-q")[1:] == ("defgh\n", "")


def test_the_prompt_comes_from_stdin(tell: Tell, fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("abc"))
    assert tell("generate", "-", "--max-tokens", "3")[1] == "def\n"
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    assert tell("generate", "-")[0] == 2


def test_generate_as_json(tell: Tell, fakes: Fakes) -> None:
    status, out, err = tell("generate", "abc", "--max-tokens", "7", "-k", "2", "--json")
    found = json.loads(out)
    assert (status, err) == (0, "")
    assert (found["text"], len(found["tokens"]), found["finish"], found["prompt_tokens"]) == ("defghij", 7, "length", 3)
    assert (found["rounds"], found["drafted"], found["accepted"], found["acceptance_rate"]) == (2, 4, 4, 1.0)
    assert found["block_efficiency"] == 3.0
    assert found["tokens_per_second"] > 0
    assert found["lossless"] is True


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ([], "model"), (["--method", "naive"], "none"), (["--method", "ngram"], "ngram"), (["--method", "draft"], "model"),
        (["--model", "x"], "none"), (["--model", "x", "--draft", "y"], "model"), (["drafter.kind=ngram"], "ngram"),
    ],
)  # fmt: skip
def test_which_drafter_generates(fakes: Fakes, words: list[str], kind: str) -> None:
    fakes.broken = kind  # the fake of this kind refuses to be built
    assert run(["generate", "abc", *words]) == 2
    fakes.broken = "another"
    assert run(["generate", "abc", *words]) == 0


def test_sampling_flags_reach_the_request(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(Fake, "submit", lambda self, request: (seen.append(request), self.waiting.append(request)))
    words = ["--temperature", "0.5", "--top-p", "0.9", "--top-k", "7", "--min-p", "0.1", "--max-tokens", "3", "--seed", "9"]
    assert run(["generate", "abc", *words, "--stop", "x", "--stop", "y z", "sampling.repetition_penalty=1.5"]) == 0
    sampling = seen[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 7, 0.1)
    assert (sampling.max_new, sampling.seed, sampling.stop, sampling.repetition_penalty) == (3, 9, ("x", "y z"), 1.5)


def test_the_cache_is_as_long_as_the_text_needs(fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    capacities: list[int] = []
    build = fakes.build
    monkeypatch.setattr(fakes, "build", lambda variant: (capacities.append(variant.engine.capacity), build(variant))[1])
    assert run(["generate", "abc", "--max-tokens", "3000"]) == 0
    assert run(["generate", "abc", "--max-tokens", "3000", "engine.capacity=50"]) == 0
    assert capacities[0] >= 3003
    assert capacities[1] == 50


def test_out_of_memory_is_one_line(tell: Tell, fakes: Fakes, tmp_path: Path) -> None:
    fakes.settings = {"fail_at": 1, "error": torch.OutOfMemoryError("CUDA out of memory. Tried\nto allocate")}
    status, _, err = tell("generate", "abc", "engine.rows=4", "engine.capacity=100")
    assert status == 2
    assert "out of memory: engine.rows 4 x engine.capacity 100 is" in err
    assert "bytes of KV cache" in err
    assert err.count("\n") == 1
    status, _, err = tell("bench", *SYNTHETIC, "--no-memory", "--out", str(tmp_path))
    assert status == 2
    assert err.startswith("forerun: baseline 'plain': out of memory")


def test_an_interrupt_is_130(tell: Tell, fakes: Fakes, tmp_path: Path) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    fakes.settings = {"on_step": interrupt}
    assert tell("generate", "abc")[0] == 130
    status, out, _ = tell("bench", *SYNTHETIC, "--no-memory", "--out", str(tmp_path / "run"))
    assert status == 130
    assert "interrupted" in out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["status"] == "interrupted"


def test_the_embedded_pair_generates_the_same_with_every_method(tell: Tell) -> None:
    texts = set()
    for method in ("naive", "ngram", "draft"):
        words = ["generate", "The history of the", "--method", method, "--max-tokens", "24", "--json", "model.dtype=float32"]
        status, out, _ = tell(*words, *(["drafter.dtype=float32"] if method == "draft" else []))
        assert status == 0
        found = json.loads(out)
        assert len(found["tokens"]) == 24 or found["finish"] == "stop"
        assert found["lossless"] is True
        texts.add(found["text"])
    assert len(texts) == 1


# bench.


def variants(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())["variants"]
    return found


def test_bench_compares_what_ships(tell: Tell, fakes: Fakes, tmp_path: Path) -> None:
    status, out, err = tell("bench", *SYNTHETIC, "--no-memory", "-k", "3", "--out", str(tmp_path / "run"), "-q")
    assert (status, err) == (0, "")
    assert list(variants(tmp_path / "run")) == ["plain", "ngram", "model", "medusa", "eagle"]
    assert [fake.width for fake in fakes.made] == [1, 4, 4, 4, 4]
    for word in ("plain", "ngram", "model", "speed-up", "lossless", "100%", "report.html"):
        assert word in out
    assert max(len(line) for line in out.splitlines() if "report.html" not in line) <= 80


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["--method", "ngram"], ["plain", "ngram"]),
        (["--method", "draft"], ["plain", "draft"]),
        (["--method", "naive"], ["plain"]),
        (["--method", "medusa"], ["plain", "medusa"]),
        (["--method", "eagle"], ["plain", "eagle"]),
        (["--model", "x"], ["plain", "ngram"]),  # no draft is known to fit it
        (["model.path=x"], ["plain", "ngram"]),
        (["backend=endpoint"], ["server"]),
        (["--model", "x", "--draft", "y"], ["plain", "ngram", "model"]),
    ],
)
def test_methods_of_bench(fakes: Fakes, tmp_path: Path, words: list[str], names: list[str]) -> None:
    assert run(["bench", *SYNTHETIC, *words, "--no-memory", "--out", str(tmp_path)]) == 0
    assert list(variants(tmp_path)) == names
    saved = load(str(tmp_path / "config.yaml"), [])
    if "--draft" in words:
        assert getattr(saved.expand()["model"].drafter, "path", None) == "y"


def test_a_config_with_flags_and_overrides(fakes: Fakes, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("workload: {kind: synthetic, prompts: 2}\nrepeats: 1\ndrafter: {kind: ngram, k: 2}\n"
                    "variants: {plain: {drafter: {kind: none}}, fast: {}}\n")  # fmt: skip
    out = tmp_path / "run"
    words = ["--no-memory", "--out", str(out), "--max-tokens", "6", "workload.prompts=3"]
    assert run(["bench", str(path), *words, "-k", "4"]) == 0
    assert list(variants(out)) == ["plain", "fast"]
    assert variants(out)["plain"]["requests"] == 3
    assert fakes.made[1].width == 5
    assert run(["bench", str(path), *words, "--overwrite", "--method", "draft"]) == 0
    assert list(variants(out)) == ["plain", "draft"]
    assert not (out / "fast").exists(), "the old run is gone"


def test_a_folder_that_holds_a_run_is_refused(tell: Tell, fakes: Fakes, tmp_path: Path) -> None:
    words = ["bench", *SYNTHETIC, "--no-memory", "--out", str(tmp_path)]
    (tmp_path / "notes.txt").write_text("mine")
    assert tell(*words)[0] == 0
    status, _, err = tell(*words)
    assert status == 2
    assert "already holds a run; name another folder, or give --overwrite" in err
    assert tell(*words, "--overwrite")[0] == 0
    assert (tmp_path / "notes.txt").read_text() == "mine"
    file = tmp_path / "notes.txt"
    assert "is a file" in tell("bench", *SYNTHETIC, "--out", str(file))[2]


@pytest.mark.usefixtures("fakes")
def test_a_place_that_cannot_be_written_is_one_line(tell: Tell, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, _, err = tell("bench", *SYNTHETIC, "--out", str(tmp_path / "file" / "run"))
    assert (status, err.splitlines()[-1]) == (2, f"forerun: {tmp_path}/file/run: Not a directory")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["floor=race>=0.5", "quality=[race-high]"], "floor race>=0.5: race is not measured; quality has race-high"),
        (["floor=perplexity<=9"], "floor perplexity<=9: perplexity is not measured; quality has nothing"),
        (["--data", "/nowhere"], "data=/nowhere: no such folder"),
        (["quality=[{kind: choice, path: /nowhere}]"], "/nowhere: no such file or folder; give its path=FILE"),
    ],
)
def test_what_bench_refuses_before_it_begins(tell: Tell, fakes: Fakes, tmp_path: Path, words: list[str], message: str) -> None:
    status, _, err = tell("bench", *SYNTHETIC, *words, "--out", str(tmp_path / "run"))
    assert (status, err) == (2, f"forerun: {message}\n") and not (tmp_path / "run").exists()


def test_bench_as_json(tell: Tell, fakes: Fakes, tmp_path: Path) -> None:
    status, out, _ = tell("bench", *SYNTHETIC, "--no-memory", "--out", str(tmp_path), "--json")
    assert status == 0
    assert json.loads(out) == json.loads((tmp_path / "summary.json").read_text())


def test_real_backends_on_a_random_geometry(tell: Tell, geometry: str, tmp_path: Path) -> None:
    """Our engine and transformers, on one set of random weights: timed, equal, and without an acceptance."""
    words = ["bench", *SYNTHETIC, f"model.path={geometry}", "model.weights=random", "model.dtype=float32", "--no-memory"]
    words += ["variants.reference.backend=reference", "variants.assisted.backend=reference"]
    words += ["variants.assisted.drafter.kind=ngram"]
    status, _, _ = tell(*words, "--out", str(tmp_path))
    assert status == 0
    found = variants(tmp_path)
    assert list(found) == ["plain", "ngram", "reference", "assisted"]
    for name, figures in found.items():
        assert figures["error"] is None, (name, figures["error"])
        assert figures["tokens"] == 24
        assert figures["exact_share"] == 1.0
        assert figures["acceptance_rate"] is None
        assert figures["speedup"]["value"] > 0
        assert figures["weight_bytes"] > 0
    assert found["plain"]["rounds"] == 21
    assert found["plain"]["seconds"]["verify"] > 0
    assert found["reference"]["rounds"] is None
    assert found["reference"]["seconds"]["verify"] is None


def test_weights_that_are_not_numbers(tell: Tell, geometry: str, tmp_path: Path) -> None:
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(geometry))
    model.lm_head.weight.data.fill_(float("nan"))
    model.save_pretrained(tmp_path / "model")
    words = ["bench", *SYNTHETIC, "--model", str(tmp_path / "model"), "--no-memory", "--out", str(tmp_path / "run")]
    status, _, err = tell(*words)
    assert status == 2
    assert err.startswith("forerun: baseline 'plain': ")
    assert err.count("\n") == 1


def test_peak_memory_is_of_a_process_of_its_own(geometry: str, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load(None, [f"model.path={geometry}", "model.weights=random", *[w for w in SYNTHETIC if "=" in w]])
    variant = experiment.expand()["base"]
    found = memory.measure(variant, experiment)
    assert found is not None
    assert 2**26 < found.process < 2**34, "torch alone takes more than 64 MiB"
    monkeypatch.setattr(sys, "executable", "false")
    assert memory.measure(variant, experiment) is None, "a pass that fails is a figure that is missing"


def test_the_console_script_writes_no_traceback() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from forerun.cli import main; main()", "bench", "sampling.temprature=1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("forerun: command line: unknown key")
    assert done.stderr.count("\n") == 1
