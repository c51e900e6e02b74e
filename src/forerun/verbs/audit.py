"""`forerun audit`: a verdict on losslessness, its evidence, and an exit status (0 yes, 1 no, 3 undecided)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from forerun.audit import Audit
from forerun.config import Experiment, Variant, load, parse
from forerun.types import UserError
from forerun.verbs.common import hush_libraries

MARKS = {True: "ok", False: "FAILS", None: "open"}


def rule(name: str, overrides: Sequence[str], *, as_json: bool) -> int:
    """One rule by its name; overrides are of the form rule.epsilon=0.1."""
    from forerun.accept import choose
    from forerun.audit.rule import rule as audit

    experiment = load(None, list(overrides), {"rule.kind": name})
    return tell(audit(choose(experiment.rule, drawn=True)), as_json)


def engine(words: Sequence[str], tokens: int | None, *, as_json: bool, quiet: bool) -> int:
    """The pipeline of a config, on a model small enough to know its law."""
    from forerun.audit.engine import engine as audit

    hush_libraries()
    return tell(audit(base(experiment(words, "engine")), tokens=tokens, quiet=quiet), as_json)


def divergence(words: Sequence[str], *, as_json: bool, quiet: bool) -> int:
    """Where a config's greedy texts leave plain decoding's, and why."""
    from forerun.audit.divergence import divergence as audit

    hush_libraries()
    return tell(audit(experiment(words, "divergence"), quiet=quiet), as_json)


def endpoint(url: str, against: str, prompts: str | None, options: dict[str, Any], *, as_json: bool, quiet: bool) -> int:
    """Two servers, the same prompts."""
    from forerun.audit.endpoint import endpoint as audit
    from forerun.config import WorkloadConfig
    from forerun.workload import read

    config = WorkloadConfig() if prompts is None else WorkloadConfig(kind="text", path=prompts)
    texts = [line.text for line in read(config)]
    if not texts:
        raise UserError(f"--prompts {prompts}: no prompt in the file; it takes one a line")
    given = {key: value for key, value in options.items() if value is not None}
    return tell(audit(url, against, prompts=texts, quiet=quiet, **given), as_json)


def experiment(words: Sequence[str], verb: str) -> Experiment:
    """The config and overrides of a command line; without a config, the embedded pair with its draft model."""
    configs = [word for word in words if "=" not in word]
    overrides = [word for word in words if "=" in word]
    if len(configs) > 1:
        raise UserError(f"audit {verb} takes one config file, not {len(configs)}: {', '.join(configs)}")
    if configs and not Path(configs[0]).suffix:
        raise UserError(f"audit {verb} {configs[0]}: not a config file; rules are audited with `forerun audit rule NAME`")
    drafting = {} if configs or any(word.startswith("drafter.kind=") for word in overrides) else {"drafter.kind": "model"}
    return load(configs[0] if configs else None, overrides, drafting)


def base(found: Experiment) -> Variant:
    return parse(Variant, found.model_dump(include=set(Variant.model_fields)), "config")


def tell(audit: Audit, as_json: bool) -> int:
    """Print an audit; returns its exit status."""
    if as_json:
        print(json.dumps(audit.to_json(), indent=2))
        return audit.status
    print(f"{audit.subject}: {audit.verdict}")
    for check in audit.checks:
        print(f"  {MARKS[check.passed]:5} {check.name}: {check.evidence}")
    return audit.status
