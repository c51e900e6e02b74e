"""Training by two processes, on the CPU."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from forerun.train.processes import Processes, join
from forerun.types import UserError
from forerun.verbs import train as verb
from models import BUILDERS, VOCABULARY

RUN = "import sys\nfrom forerun.verbs.train import run\nrun(sys.argv[2:], sys.argv[1], quiet=True)"


def test_alone_nothing_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert join() == Processes()
    tensor = torch.ones(2)
    Processes().average([tensor, None])
    assert tensor.tolist() == [1, 1]


def test_several_processes_need_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(UserError, match="pip install 'forerun\\[multi-gpu\\]'"):
        join()


def test_two_processes_learn_what_one_learns_with_two_passes_a_step(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    torch.manual_seed(0)
    BUILDERS["llama"](num_hidden_layers=4).save_pretrained(tmp_path / "target")
    np.save(tmp_path / "tokens.npy", (np.arange(20)[:, None] * 7 + np.arange(16)) % VOCABULARY)
    config = {
        "kind": "eagle", "steps": 3, "batch": 2, "depth": 2, "held_out": 0.2,
        "model": {"path": str(tmp_path / "target"), "device": "cpu", "dtype": "float64"},
        "data": {"kind": "tokens", "path": str(tmp_path / "tokens.npy")}, "write": {"prompt": 4, "new": 8},
    }  # fmt: skip
    (tmp_path / "a.yaml").write_text(json.dumps(config))
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    verb.run([str(tmp_path / "a.yaml"), "accumulate=2"], str(tmp_path / "one"), quiet=True)
    words = [sys.executable, "-c", RUN, str(tmp_path / "two"), str(tmp_path / "a.yaml")]
    launched = []
    for rank in ("0", "1"):  # what a launcher sets
        place = {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        launched.append(subprocess.Popen(words, env=os.environ | place, stderr=subprocess.PIPE, text=True))
    for process in launched:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True)["module"] for name in ("one", "two")]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=1e-4, atol=1e-5)
    lines = [[json.loads(x) for x in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in ("one", "two")]
    assert [x["step"] for x in lines[1]] == [1, 2, 3]
    for first, second in zip(*lines, strict=True):
        assert first["loss"] == pytest.approx(second["loss"], rel=1e-5)
