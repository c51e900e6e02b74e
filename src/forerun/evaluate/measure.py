"""One measure of quality on one backend: the place where a configuration's kind chooses the code."""

from __future__ import annotations

from pathlib import Path

from forerun.config import ChoiceConfig, CodeConfig, GSM8KConfig, PerplexityConfig, QualityConfig
from forerun.evaluate import choice as choices
from forerun.evaluate import mathematics
from forerun.evaluate import perplexity as windowed
from forerun.evaluate.quality import Quality, Tell
from forerun.types import Backend, Sampling


def measure(config: QualityConfig, backend: Backend, sampling: Sampling, folder: Path, tell: Tell) -> list[Quality]:
    """What a backend's model is worth by one measure; the first figure is the measure's main one.

    `sampling` is the variant's own; generation uses it with the measure's own limit and stops. What each question came to is
    written to `folder/<name>.jsonl`. Raises UserError for data that is missing or of another form, for a likelihood where the
    backend has no scorer, and for a package that is not installed.
    """
    if isinstance(config, PerplexityConfig):
        return windowed.perplexity(config, backend, folder, tell)
    if isinstance(config, ChoiceConfig):
        return choices.choice(config, backend, folder, tell)
    if isinstance(config, GSM8KConfig):
        return mathematics.gsm8k(config, backend, sampling, folder, tell)
    if isinstance(config, CodeConfig):
        from forerun.evaluate.code import code

        return code(config, backend, sampling, folder, tell)
    from forerun.evaluate.harness import harness  # the one file that imports lm_eval

    return harness(config, backend, sampling, folder, tell)


def check(config: QualityConfig) -> None:
    """Open what a measure needs beside a backend, so that what is missing shows before any work is done.

    Reads its data once more than measuring does. Raises UserError for data that are missing or of another form, a task that is
    not known, a package that is not installed, and where no program can be run.
    """
    if isinstance(config, PerplexityConfig):
        windowed.material(config)
    elif isinstance(config, ChoiceConfig):
        choices.material(config)
    elif isinstance(config, GSM8KConfig):
        mathematics.material(config)
    elif isinstance(config, CodeConfig):
        from forerun.evaluate import code

        code.material(config)
    else:
        from forerun.evaluate import harness

        harness.check(config)
