"""Where prompts, calibration texts and questions come from, and how quality is measured on them. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from forerun.config.part import Part
from forerun.types import UserError

WorkloadKind = Literal[
    "demo", "synthetic", "text", "jsonl", "hub",
    "spec-bench", "mt-bench", "wikitext2", "c4", "humaneval", "mbpp", "gsm8k", "race-high", "race-middle",
]  # fmt: skip


class Source(Part):
    """What reads a data set."""

    path: str | None = None  # file or folder; None: the named data set is fetched from the Hub

    def located(self, data: str | None) -> Self:
        """The same with the path of its named data set, where it has none and the folder `data` holds the set."""
        kind = str(getattr(self, "text", None) or getattr(self, "kind", ""))  # a perplexity names the text that it is of
        return self if self.path else self.model_copy(update={"path": find_data(kind, data)})


class WorkloadConfig(Source):
    """Prompts: shipped (demo), made (synthetic), one's own (text, jsonl), a data set by its name, or any of the Hub (hub)."""

    kind: WorkloadKind = "demo"
    path: str | None = None  # file or folder; hub: the data set's id. None: the named data set is fetched from the Hub
    name: str | None = None  # hub: the data set's configuration
    split: str | None = None  # None: the split that the kind is known for; hub: `test`
    field: str = "prompt"  # jsonl, hub: where the prompt is
    categories: tuple[str, ...] = ()  # empty: all
    limit: int | None = Field(default=None, ge=1)
    # Prompts are clipped to it. wikitext2 takes entries of at least so many only (default 128).
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    chat: Literal["auto"] | bool = "auto"  # conversations through the tokenizer's chat template; auto: where it has one
    turns: Literal["first", "all"] = "first"  # of a conversation; all: each answer is part of the next prompt
    prompts: int = Field(default=8, ge=1)  # synthetic
    prompt_tokens: int = Field(default=64, ge=1)  # synthetic
    repetition: float = Field(default=0.0, ge=0.0, le=1.0)  # synthetic: share of the tokens that repeat an earlier stretch
    concurrency: int | None = Field(default=None, ge=1)  # closed loop: requests in flight; None: engine.rows
    rate: float | None = Field(default=None, gt=0.0)  # open loop: requests a second, arriving as a Poisson process


class Measure(Source):
    """What all measures of quality share."""

    limit: int | None = Field(default=None, ge=1)  # of questions, from the start


class PerplexityConfig(Measure):
    """Sliding window: windows of `max_length` tokens begin every `stride` tokens, and only new tokens count."""

    kind: Literal["perplexity"] = "perplexity"
    text: Literal["wikitext2", "c4", "text", "jsonl", "demo"] = "wikitext2"  # text, jsonl: of `path`; demo: the shipped prompts
    field: str = "text"  # jsonl: where the text is
    stride: int = Field(default=512, ge=1)
    max_length: int = Field(default=2048, ge=2)
    batch: int = Field(default=4, ge=1)  # windows a forward pass
    limit: int | None = Field(default=None, ge=1)  # tokens, from the start

    @model_validator(mode="after")
    def without_gaps(self) -> Self:
        if self.stride > self.max_length:
            raise ValueError(f"stride={self.stride} leaves gaps between windows of max_length={self.max_length}; lower stride")
        return self


class CodeConfig(Measure):
    """pass@k of programs that are run against their tests, in a sandbox."""

    kind: Literal["humaneval", "mbpp"]
    samples: int = Field(default=1, ge=1)  # completions a task
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1,), min_length=1)
    temperature: float = Field(default=0.0, ge=0.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    max_new: int = Field(default=512, ge=1)
    timeout_s: float = Field(default=3.0, gt=0.0)  # a program
    memory_mb: int = Field(default=512, ge=32)  # a program
    workers: int = Field(default=2, ge=1)  # programs at a time

    @model_validator(mode="after")
    def enough_samples(self) -> Self:
        if self.samples < max(self.k):
            raise ValueError(f"k={max(self.k)} needs samples={max(self.k)} or more, not {self.samples}")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"samples={self.samples} at temperature=0 are all the same; give a temperature")
        return self


class ChoiceConfig(Measure):
    """Accuracy by log-likelihood: which answer the model finds most probable. `choice` reads a JSONL file of one's own."""

    kind: Literal["race-high", "race-middle", "choice"]
    normalize: bool = False  # divide each log-likelihood by the bytes of its continuation (lm-eval's acc_norm)


class GSM8KConfig(Measure):
    """Grade-school mathematics by generation: exact match of the number after `####`."""

    kind: Literal["gsm8k"] = "gsm8k"
    shots: int = Field(default=5, ge=0)
    max_new: int = Field(default=256, ge=1)


class HarnessConfig(Measure):
    """Tasks of lm-evaluation-harness."""

    kind: Literal["lm-eval"] = "lm-eval"
    tasks: tuple[str, ...] = Field(min_length=1)
    shots: int | None = Field(default=None, ge=0)  # None: the task's own number


QualityConfig = Annotated[
    PerplexityConfig | CodeConfig | ChoiceConfig | GSM8KConfig | HarnessConfig, Field(discriminator="kind")
]


def named(measures: Any) -> Any:
    """`quality: [perplexity]` says `quality: [{kind: perplexity}]`."""
    if not isinstance(measures, list | tuple):
        return measures
    return [{"kind": one} if isinstance(one, str) else one for one in measures]


def find_data(kind: str, folder: str | None) -> str | None:
    """The path of a named data set below a folder of data sets: `race` for race-high, `mt_bench` for mt-bench, `c4_sample`."""
    if folder is None:
        return None
    if not Path(folder).is_dir():
        raise UserError(f"data={folder}: no such folder")
    names = (kind, kind.replace("-", "_"), kind.split("-", maxsplit=1)[0], f"{kind}_sample")
    return next((str(Path(folder, name)) for name in names if Path(folder, name).exists()), None)
