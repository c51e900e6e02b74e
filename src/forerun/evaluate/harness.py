"""Tasks of lm-evaluation-harness on a backend: generation with its drafter, log-likelihoods by its scorer.

The one file that imports lm_eval; importing it where that is missing is a UserError.
"""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from forerun.config import HarnessConfig
from forerun.evaluate.encoding import encode, encode_pair, prefix_token
from forerun.evaluate.generation import answer
from forerun.evaluate.quality import Quality, Tell, limit_of, scorer_of, tokenizer_of, write_items
from forerun.evaluate.statistics import bits, ratio, wilson
from forerun.types import Backend, Sampling, UserError

try:
    from lm_eval import simple_evaluate
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as missing:
    raise UserError("quality.kind=lm-eval needs lm-evaluation-harness: pip install 'forerun[eval]'") from missing

LIMIT = 2048
"""Tokens of a window where nobody says what the model reads; lm_eval's own default."""
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the limit on new tokens, the first that is given counts."""
LONGEST = 256
"""New tokens where a task sets no limit; lm_eval's own default."""
DRAWN = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
TOGETHER = 512
"""Texts handed to the scorer at a time."""
SHOWN = {"word_perplexity": math.exp, "byte_perplexity": math.exp, "perplexity": math.exp, "bits_per_byte": bits}
"""What lm_eval makes of the mean negative log-likelihood."""


class Adapter(LM):  # type: ignore[misc]  # lm_eval has no types that are worth following
    """A backend as lm_eval sees a model; requests come in the order that lm_eval wants and are batched by the backend."""

    def __init__(self, backend: Backend, sampling: Sampling, tell: Tell) -> None:
        super().__init__()
        self.backend, self.sampling, self.tell = backend, sampling, tell
        self.tokenizer = tokenizer_of(backend, "lm-eval")
        self.clipped_prompts = 0

    def generate_until(self, requests: list[Any]) -> list[str]:
        asked = [(context, mapped(wanted, self.sampling)) for context, wanted in (one.args for one in requests)]
        written, clipped = answer("lm-eval", self.backend, asked, self.tell)
        self.clipped_prompts += clipped
        return written

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        return self.scored([encode_pair(self.tokenizer, *one.args) for one in requests])

    def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
        """Of whole texts, in windows that tell each token once with at least one before it."""
        prefix, length = prefix_token(self.tokenizer), limit_of(self.backend) or LIMIT
        cut = [
            [make_disjoint_window(one) for one in get_rolling_token_windows(encode(self.tokenizer, text), prefix, length, 1)]
            for (text,) in (one.args for one in requests)
        ]
        found = iter(self.scored([window for windows in cut for window in windows]))
        return [sum(next(found)[0] for _ in windows) for windows in cut]

    def scored(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[float, bool]]:
        scorer, scores = scorer_of(self.backend, "lm-eval"), []
        for start in range(0, len(pairs), TOGETHER):
            scores += scorer.score(pairs[start : start + TOGETHER])
            self.tell("lm-eval: log-likelihoods", len(scores), len(pairs))
        return [(score.logprob, score.greedy) for score in scores]


def mapped(wanted: Mapping[str, Any], own: Sampling) -> Sampling:
    """A task's generation arguments as a Sampling: the task's word counts, and `own` where it says nothing.

    Raises UserError for an argument that has no place in a Sampling.
    """
    left = {key: value for key, value in wanted.items() if value is not None}
    until = left.pop("until", [])
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    lengths = [int(left.pop(name)) for name in LENGTHS if name in left]
    drawn = {name: left.pop(name) for name in DRAWN if name in left}
    draws = left.pop("do_sample", drawn.get("temperature", own.temperature) > 0)
    if left:
        raise UserError(f"lm-eval: a task's generation_kwargs want {', '.join(left)}, which cannot be served; take it out")
    if not draws:
        drawn["temperature"] = 0.0
    elif "temperature" not in drawn and own.greedy:
        drawn["temperature"] = 1.0  # as transformers does
    return replace(own, max_new=(*lengths, LONGEST)[0], stop=stop, stop_ids=(), ignore_eos=False, **drawn)


def harness(config: HarnessConfig, backend: Backend, sampling: Sampling, folder: Path, tell: Tell) -> list[Quality]:
    """Every metric of every task and group, by lm_eval's own prompts, filters and aggregation.

    A task is a name that lm_eval knows (or a pattern such as `mmlu_*`), one below the folder `path`, or a YAML file.
    Proportions have Wilson's interval, means and perplexities a bootstrap over the documents, other aggregations none.
    """
    manager, names = found(config)
    adapter = Adapter(backend, sampling, tell)
    with hushed():
        results = simple_evaluate(
            adapter, tasks=names, num_fewshot=config.shots, limit=config.limit, task_manager=manager, bootstrap_iters=0,
            random_seed=None, numpy_random_seed=None, torch_random_seed=None,  # the process's own streams stay as they are
        )  # fmt: skip
    assert results is not None, "only the first of several processes is told"
    for task, samples in results["samples"].items():
        write_items(folder, task, map(item, samples))
    return [figure for task in results["results"] for figure in figures(task, results, adapter.clipped_prompts)]


@contextmanager
def hushed() -> Iterator[None]:
    """Of lm_eval's remarks only errors."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def check(config: HarnessConfig) -> None:
    """UserError where a task is not known, or cannot be loaded with its data."""
    manager, names = found(config)
    try:
        with hushed():
            manager.load(names)
    except Exception as error:  # whatever a task's own code, its file or the Hub raises
        said = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"lm-eval: {', '.join(config.tasks)} cannot be loaded: {type(error).__name__}: {said}") from error


def figures(task: str, results: Mapping[str, Any], clipped: int) -> Iterator[Quality]:
    """The figures of one task or group; lm_eval names them `metric,filter`."""
    samples, better = results["samples"].get(task, []), results["higher_is_better"].get(task, {})
    details = {
        "shots": results["n-shot"].get(task), "version": results["versions"].get(task),
        "clipped_prompts": clipped, "lm_eval": version("lm_eval"),
    }  # fmt: skip
    for key, value in results["results"][task].items():
        metric, _, chosen = key.partition(",")
        if not chosen or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        values = [sample[metric] for sample in samples if sample["filter"] == chosen and metric in sample]
        low, high = interval(metric, values, value)
        yield Quality(
            task, metric if chosen == "none" else key, float(value), low, high, bool(better.get(metric, True)),
            count=len(values) or int(results["results"][task].get("sample_len") or 0),
            items=tuple(map(bool, values)) if values and all(one in (0, 1) for one in values) else None, details=details,
        )  # fmt: skip


def found(config: HarnessConfig) -> tuple[TaskManager, list[str]]:
    """A manager that knows the tasks, and their names; lm_eval's own thousands are read only if one is not below `path`."""
    where = Path(config.path) if config.path else None
    if where is not None and not where.exists():
        raise UserError(f"lm-eval: path={where}: no such file or folder of task files")
    below = None if where is None else str(where if where.is_dir() else where.parent)
    for defaults in (False, True):
        manager = TaskManager(include_path=below, include_defaults=defaults)
        known = {task: [task] if Path(task).is_file() else manager.match_tasks([task]) for task in config.tasks}
        missing = [task for task, names in known.items() if not names]
        if not missing:
            return manager, [name for names in known.values() for name in names]
    near = difflib.get_close_matches(missing[0], manager.all_tasks, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"lm-eval: no task is called {missing[0]!r}{hint} A YAML file can be named by its path")


def item(sample: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of one of lm_eval's samples: the answers as they came and as the filter left them, and what they scored."""
    names = {"id": "doc_id", "target": "target", "answer": "resps", "filter": "filter", "filtered": "filtered_resps"}
    told = {name: sample[own] for name, own in names.items()} | {"target": str(sample["target"])}
    return told | {metric: sample[metric] for metric in sample["metrics"]}


def interval(metric: str, values: Sequence[Any], value: float) -> tuple[float, float] | tuple[None, None]:
    """95 % interval of a figure from its documents' values, where it is a known function of them."""
    pairs = [one if isinstance(one, tuple | list) else (one, 1.0) for one in values]
    if not pairs or not all(len(pair) == 2 and all(isinstance(part, int | float) for part in pair) for pair in pairs):
        return None, None
    sign = -1.0 if metric in SHOWN else 1.0
    tops, bottoms, show = (
        [sign * float(top) for top, _ in pairs],
        [float(bottom) for _, bottom in pairs],
        SHOWN.get(metric, float),
    )
    if not math.isclose(show(sum(tops) / sum(bottoms)), value, rel_tol=1e-6, abs_tol=1e-12):
        return None, None
    if all(one in (0, 1) for one in values):
        return wilson(sum(map(bool, values)), len(values))
    low, high = ratio(tops, bottoms)
    return (None, None) if low is None or high is None else (show(low), show(high))
