"""Quality in the run: every measure on every variant that ran; those that only score, once for each model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from forerun.bench.lanes import Lane, explain
from forerun.bench.quality import Finding, Scored, digest, scored
from forerun.bench.turns import COLUMNS
from forerun.config import CodeConfig, Experiment, GSM8KConfig, QualityConfig
from forerun.evaluate.measure import measure
from forerun.types import Sampling


def known(lanes: Iterable[Lane], experiment: Experiment) -> dict[Scored, Finding]:
    """Scores that finished variants have already."""
    found: dict[Scored, Finding] = {}
    for lane in lanes:
        for config, finding in zip(experiment.quality, lane.finished.quality if lane.finished else (), strict=False):
            key = scored(lane.variant.model, lane.variant.backend, config)
            if key is not None and finding.error is None:
                found[key] = finding
    return found


def assess(lane: Lane, experiment: Experiment, shared: dict[Scored, Finding], console: Console) -> None:
    """Measure what `experiment.quality` asks for; a measure that fails is an error in its own place."""
    findings = []
    for number, config in enumerate(experiment.quality, 1):
        key = scored(lane.variant.model, lane.variant.backend, config)
        finding = shared.get(key) if key is not None else None
        if finding is None:
            finding = one(lane, config, lane.folder / "quality" / f"{number}-{config.kind}", console)
        if key is not None:
            finding = shared[key] = replace(finding, scored=digest(key))
        findings.append(finding)
    lane.quality = tuple(findings)


def one(lane: Lane, config: QualityConfig, folder: Path, console: Console) -> Finding:
    assert lane.backend is not None
    sampling = lane.variant.sampling.build()
    with Progress(*COLUMNS, console=console, transient=True) as progress:
        bar = progress.add_task(f"{lane.name}: {config.kind}", total=None)

        def tell(what: str, done: int, total: int) -> None:
            progress.update(bar, description=f"{lane.name}: {what}", completed=done, total=total)

        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = measure(config, lane.backend, sampling, folder, tell)
        except Exception as error:  # noqa: BLE001, whatever a model, a data set or a library raises
            return Finding(config.kind, error=explain(error, lane.variant))
        return Finding(config.kind, tuple(found), texts=texts(config, sampling, folder))


def texts(config: QualityConfig, sampling: Sampling, folder: Path) -> str | None:
    """A digest of the completions that a measure wrote down, where they were decoded greedily."""
    if isinstance(config, CodeConfig):
        greedy, name = config.temperature == 0, f"{config.kind}-completions"
    else:
        greedy, name = isinstance(config, GSM8KConfig) and sampling.greedy, config.kind
    path = folder / f"{name}.jsonl"
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16] if greedy and path.is_file() else None
