"""A made-up run folder for the tests of reports: drafting by chance with known acceptance, known times, known quality."""

import html.parser
import json
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from forerun.bench import report
from forerun.bench.folder import folders
from forerun.bench.metrics import Record, RoundRecord, Run, summarize
from forerun.bench.quality import Finding
from forerun.config import Experiment, load, save
from forerun.evaluate.quality import Quality
from forerun.evaluate.statistics import passes
from forerun.types import Phases

CATEGORIES = ("story", "code", "qa")
LOSSLESS = {"rule": "block", "label": "lossless for p", "lossless": True, "meaningless": False, "rule_evidence": {"tv": 0.0}}
LOSSY = {
    "rule": "typical(epsilon=0.09, delta=0.3)",
    "label": "LOSSY: TV up to 0.41 a token, 0.2 on average; accepts 1.9 times what standard does",
    "lossless": False, "meaningless": False, "rule_evidence": {"tv": 0.41},
}  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """What a made-up variant is like: seconds of a round's parts, acceptance of each token, figures of quality."""

    k: int = 0
    alpha: float = 0.8
    draft: float = 0.0
    verify: float = 0.010
    rest: float = 0.001
    facts: dict[str, Any] = field(default_factory=lambda: LOSSLESS)
    perplexity: float | None = None
    race: float | None = None
    gsm8k: float | None = None
    memory: int = 400 * 2**20
    error: str | None = None


def run(truth: Truth, prompts: int = 12, tokens: int = 40, seed: int = 0) -> Run:
    """Records as such a variant would leave them; the prompts' own difficulty is the same for all variants."""
    if truth.error is not None:
        return Run(error=truth.error)
    records, spent = [], [0.0, 0.0, 0.0]
    for prompt in range(prompts):
        chance = random.Random(seed + prompt)
        slow = chance.uniform(0.9, 1.1)
        at, got, rounds = 0.05 * slow, 1, []
        arrivals = [(at, 1)]
        while got < tokens:
            accepted = next((i for i in range(truth.k) if chance.random() >= truth.alpha), truth.k)
            emitted = min(accepted + 1, tokens - got)
            parts = [slow * seconds for seconds in (truth.draft * truth.k, truth.verify, truth.rest)]
            spent = [total + part for total, part in zip(spent, parts, strict=True)]
            at, got = at + sum(parts), got + emitted
            rounds.append(RoundRecord(truth.k, accepted, truth.k + 1, emitted))
            arrivals.append((at, emitted))
        records.append(
            Record(
                id=f"p{prompt}", category=CATEGORIES[prompt % 3], repeat=0, index=0, prompt_tokens=20 + prompt,
                tokens=tuple(range(tokens)), text="text", finish="length", first_s=arrivals[0][0], total_s=at,
                arrivals=tuple(arrivals), drafted=sum(r.drafted for r in rounds), accepted=sum(r.accepted for r in rounds),
                rounds=tuple(rounds),
            )
        )  # fmt: skip
    phases = Phases(draft=spent[0], verify=spent[1], accept=spent[2] / 2, other=spent[2] / 2, prefill=0.05 * prompts)
    return Run(
        records, wall_seconds=sum(one.total_s for one in records), phases=phases,
        facts=truth.facts | {"weight_bytes": truth.memory // 2}, drafts=truth.k > 0,
        peak_memory_bytes=truth.memory, quality=findings(truth),
    )  # fmt: skip


def findings(truth: Truth) -> tuple[Finding, ...]:
    found = []
    if truth.perplexity is not None:
        low, high = 0.97 * truth.perplexity, 1.03 * truth.perplexity
        found.append(Quality("perplexity", "perplexity", truth.perplexity, low, high, higher_is_better=False, count=4096))
    if truth.race is not None:
        items = tuple(i < 200 * truth.race for i in range(200))
        value = sum(items) / 200
        found.append(
            Quality("race-high", "acc", value, value - 0.06, value + 0.06, higher_is_better=True, count=200, items=items)
        )
    if truth.gsm8k is not None:
        found.append(passes("gsm8k", "exact_match", [i < 200 * truth.gsm8k for i in range(200)], {"shots": 5}))
    return tuple(Finding(one.name, (one,), scored=None if one.name == "gsm8k" else str(one.value)) for one in found)


GPTQ = {"model.recipes": [{"kind": "gptq", "bits": 4}]}
RICH: dict[str, tuple[dict[str, Any], Truth]] = {
    "plain": ({"drafter": {"kind": "none"}}, Truth(perplexity=9.1, race=0.62, gsm8k=0.5)),
    "ngram": ({"drafter": {"kind": "ngram"}}, Truth(5, 0.45, 0.00005, 0.0125, perplexity=9.1, race=0.62)),
    "model, k=2": ({"drafter": {"kind": "model", "k": 2}}, Truth(2, 0.8, 0.002, 0.0112, perplexity=9.1, race=0.62)),
    "model, k=4": ({"drafter": {"kind": "model", "k": 4}}, Truth(4, 0.8, 0.002, 0.0122, perplexity=9.1, race=0.62)),
    "model, k=8": ({"drafter": {"kind": "model", "k": 8}}, Truth(8, 0.8, 0.002, 0.0142, perplexity=9.1, race=0.62)),
    "slow draft": ({"drafter": {"kind": "model", "k": 5, "path": "some/other"}}, Truth(5, 0.5, 0.009, 0.013, perplexity=9.1)),
    "typical": (
        {"drafter": {"kind": "model", "k": 4}, "rule": {"kind": "typical"}},
        Truth(4, 0.95, 0.002, 0.0122, facts=LOSSY, perplexity=9.1, race=0.62, gsm8k=0.3),
    ),
    "4-bit plain": ({"drafter": {"kind": "none"}, **GPTQ}, Truth(verify=0.006, perplexity=9.9, race=0.58, memory=180 * 2**20)),
    "4-bit, model k=4": (
        {"drafter": {"kind": "model", "k": 4}, **GPTQ},
        Truth(4, 0.7, 0.002, 0.009, perplexity=9.9, race=0.58, memory=190 * 2**20)
    ),
    "a variant with a very long name that says everything, drafter.k=6,engine.rows=1": (
        {"drafter": {"kind": "model", "k": 6}}, Truth(6, 0.8, 0.002, 0.0132, memory=410 * 2**20)
    ),
    "broken": ({"drafter": {"kind": "eagle"}}, Truth(error="eagle: no head at 'x' | <b>missing</b>")),
}  # fmt: skip
MACHINE: dict[str, Any] = {
    "forerun": "0.1.0", "commit": "abc", "python": "3.11.7", "packages": {"torch": "2.13.0"}, "platform": "Linux-6",
    "cpu": "Some Processor", "cpu_count": 2, "cpu_allowed": 2, "threads": 2, "load_average": [0.5, 0.4, 0.3],
    "memory_bytes": 2**34, "gpus": [], "started": "2026-11-21T07:11:34+00:00", "variants": {},
}  # fmt: skip


def experiment(world: dict[str, tuple[dict[str, Any], Truth]], **settings: Any) -> Experiment:
    made = load(None, [], {"variants": {name: overrides for name, (overrides, _) in world.items()}, "repeats": 1})
    return made.model_copy(update=settings)


def summary_of(world: dict[str, tuple[dict[str, Any], Truth]], baseline: str = "plain", prompts: int = 12) -> dict[str, Any]:
    runs = {name: run(truth, prompts) for name, (_, truth) in world.items()}
    return {"status": "complete"} | summarize(runs, baseline)


def make(
    out: Path,
    world: dict[str, tuple[dict[str, Any], Truth]] = RICH,
    prompts: int = 12,
    machine: dict[str, Any] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """A whole run folder in `out`; returns its summary."""
    made = experiment(world, **settings)
    out.mkdir(parents=True, exist_ok=True)
    save(made, out / "config.yaml")
    (out / "environment.json").write_text(json.dumps(MACHINE | (machine or {})))
    runs = {name: run(truth, prompts) for name, (_, truth) in world.items()}
    for name, plain in folders(list(runs)).items():
        (out / plain).mkdir(exist_ok=True)
        lines = [json.dumps(record.to_json()) for record in runs[name].records]
        (out / plain / "records.jsonl").write_text("".join(line + "\n" for line in lines))
    summary = {"status": "complete"} | summarize(runs, "plain")
    report.write(summary, made, out)
    return summary


VOID = {"meta"}


class Page(html.parser.HTMLParser):
    """Checks that every element is closed in its turn, and keeps the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in {"script", "link", "img", "iframe", "object"}, f"<{tag}> has no place here"
        found = dict(attrs)
        assert len(found) == len(attrs), f"<{tag}> has an attribute twice: {attrs}"
        self.ids += [found["id"] or ""] if "id" in found else []
        self.links += [found["href"] or ""] if "href" in found else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> in the wrong place"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page(out: Path) -> Page:
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "nan" not in re.findall(r'"(-?nan|-?inf)[ ,"]', text)
    assert "http" not in text, "nothing is fetched from elsewhere"
    found = Page(text)
    assert len(set(found.ids)) == len(found.ids)
    assert {link.removeprefix("#") for link in found.links} == set(found.ids), (
        "every heading can be linked to, every link leads"
    )
    return found
