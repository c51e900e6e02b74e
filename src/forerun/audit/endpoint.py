"""Two OpenAI-compatible servers, with and without speculation: do they draw from one law, and say the same when greedy?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace

import torch
from rich.console import Console
from rich.progress import track

from forerun.audit.statistics import LEAST_EXPECTED, POWER, ChiSquare, homogeneity, judged
from forerun.audit.verdict import Audit, Check
from forerun.backends.web import base_of, fetch
from forerun.types import UserError

SAMPLED_PROMPTS = 4  # of the prompts given, evenly spaced: few prompts with many samples each see more than the reverse
LEAST_SHARE = 0.01  # of a prompt's texts; rarer ones are told apart by their first characters only
WEAK = 0.3  # a test that finds no smaller total variation than this proves nothing by passing


@dataclass(frozen=True, slots=True)
class Server:
    """One endpoint; `base` ends in /v1."""

    base: str
    model: str
    timeout_s: float

    @classmethod
    def at(cls, url: str, model: str | None, timeout_s: float) -> Server:
        """The server of a URL, with or without /v1; it is asked for its model's name where none is given."""
        base = base_of(url)
        if base is None:
            raise UserError(f"audit endpoint {url}: not a URL; give one such as http://localhost:8000/v1")
        if model is None:
            served = fetch(f"{base}/models", None, timeout_s)
            try:
                model = str(served["data"][0]["id"])
            except (KeyError, IndexError, TypeError) as error:
                raise UserError(f"{base}/models names no model; say which with --model") from error
        return cls(base, model, timeout_s)

    def complete(self, prompt: str, tokens: int, temperature: float, seed: int) -> str:
        """The text of one completion. Nothing but standard fields, for more could change the server's path through its code."""
        body = {
            "model": self.model, "prompt": prompt, "max_tokens": tokens, "temperature": temperature, "top_p": 1.0, "seed": seed,
        }  # fmt: skip
        answer = fetch(f"{self.base}/completions", body, self.timeout_s)
        try:
            text = answer["choices"][0]["text"]
        except (KeyError, IndexError, TypeError) as error:
            raise UserError(f"{self.base}/completions answers without choices[0].text; is it OpenAI-compatible?") from error
        return str(text or "")


@dataclass(frozen=True, slots=True)
class Ask:
    """One completion to be asked for."""

    server: Server
    prompt: str
    tokens: int
    temperature: float
    seed: int


def endpoint(
    url: str,
    against: str,
    *,
    prompts: Sequence[str],
    model: str | None = None,
    tokens: int = 4,
    samples: int = 4000,
    temperature: float = 1.0,
    greedy_tokens: int = 64,
    seed: int = 0,
    timeout_s: float = 120.0,
    concurrency: int = 8,
    quiet: bool = True,
) -> Audit:
    """Compare the servers at `url` and `against`: the law of the first token, that of the first `tokens`, and greedy texts.

    Each law is tested with `samples` completions a server, drawn for SAMPLED_PROMPTS of the prompts, every one with a seed of
    its own. A first token alone is drawn without speculation: where its law differs, so do weights or sampling settings. Of
    longer texts both the beginnings and the ends are compared, for a text as a whole is mostly too rare to be counted. Texts
    stand for tokens, since asking for more may turn speculation off. A law test that fails: not lossless. Greedy texts that
    differ are undecided, because rounding may part them. UserError for a server that cannot be asked.
    """
    checked(prompts, samples, tokens, temperature)
    servers = [Server.at(each, model, timeout_s) for each in (url, against)]
    console = Console(stderr=True, quiet=quiet)
    chosen = prompts[:: -(-len(prompts) // SAMPLED_PROMPTS)]
    each = -(-samples // len(chosen))
    drawn: dict[int, list[list[list[str]]]] = {}  # by length, server and prompt
    for length in sorted({1, tokens}):
        start = seed + 2 * each * len(chosen) * len(drawn)
        asks = [
            Ask(server, prompt, length, temperature, start + 2 * (place * each + i) + side)
            for side, server in enumerate(servers)
            for place, prompt in enumerate(chosen)
            for i in range(each)
        ]
        in_turn = sorted(asks, key=lambda one: one.seed)  # a server at a time in turn: what drifts hits both alike
        texts = ask(in_turn, concurrency, console, f"first {length}")
        runs = [[texts[one] for one in asks[at : at + each]] for at in range(0, len(asks), each)]
        drawn[length] = [runs[: len(chosen)], runs[len(chosen) :]]
    checks = laws(drawn, [server.base for server in servers])
    checks.append(same_greedy(servers, prompts, greedy_tokens, concurrency, console))
    return Audit(f"{servers[0].base} ({servers[0].model}) against {servers[1].base} ({servers[1].model})", tuple(checks))


def checked(prompts: Sequence[str], samples: int, tokens: int, temperature: float) -> None:
    if not prompts:
        raise UserError("audit endpoint: no prompts; give a file that has one a line with --prompts")
    if temperature <= 0:
        raise UserError(f"--temperature {temperature:g}: laws are compared by sampling; give one above 0, such as 1")
    for name, value in (("samples", samples), ("tokens", tokens)):
        if value < 1:
            raise UserError(f"--{name} {value}: give at least 1")


def ask(asks: Sequence[Ask], concurrency: int, console: Console, what: str) -> dict[Ask, str]:
    """The text of each ask; after an error nothing more is sent."""
    with ThreadPoolExecutor(concurrency) as pool:
        futures = [pool.submit(one.server.complete, one.prompt, one.tokens, one.temperature, one.seed) for one in asks]
        try:
            texts = [future.result() for future in track(futures, what, console=console, transient=True)]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return dict(zip(asks, texts, strict=True))


def laws(drawn: dict[int, list[list[list[str]]]], names: Sequence[str]) -> list[Check]:
    """The tests of the laws; none where a server does not draw."""
    longest = max(drawn)
    for runs, server in zip(drawn[longest], names, strict=True):
        if all(len(set(texts)) == 1 for texts in runs):
            told = f"{server} gives the same text for every seed; does it ignore seed or temperature?"
            return [Check("laws", None, told)]
    checks = [same_law("law of the first token", *drawn[1])]
    if longest > 1:
        reverse = [[[text[::-1] for text in texts] for texts in runs] for runs in drawn[longest]]
        checks.append(same_law(f"law of the first {longest} tokens, by beginning", *drawn[longest]))
        checks.append(same_law(f"law of the first {longest} tokens, by end", *reverse))
    return [check for check in checks if check is not None]


def same_law(name: str, ours: list[list[str]], theirs: list[list[str]]) -> Check | None:
    """Whether two servers' texts, prompt by prompt, come from the same laws; None where no prompt has two different texts."""
    if (found := compare(ours, theirs)) is None:
        return None
    test, varied = found
    size = sum(map(len, ours))
    figures = {"samples": size, "prompts": len(ours), "varied": varied} | asdict(test)
    evidence = (
        f"chi-square {test.statistic:.1f} with {test.freedom} degrees of freedom, limit {test.limit:.1f}; "
        f"{size} texts a server, {varied} of {len(ours)} prompts vary; "
        f"a total variation of {test.detectable_tv:.2g} would be found in {POWER:.0%} of runs"
    )
    if test.passed and test.detectable_tv > WEAK:
        return Check(name, None, f"{evidence}, which proves little; give more --samples", figures)
    return Check(name, test.passed, evidence, figures)


def compare(ours: list[list[str]], theirs: list[list[str]]) -> tuple[ChiSquare, int] | None:
    """The tests of all prompts added up, and how many prompts have two cells or more; None where none has.

    Independent chi-squares add, and so do their non-centralities, which are at least 4 n t^2 for a total variation t and an
    effective size n: `detectable_tv` is a root mean square over those prompts, of the laws of cells (`coarsen`).
    """
    tests, size = [], 0.0
    for one, other in zip(ours, theirs, strict=True):
        cell = coarsen(Counter(one + other))
        counts = [Counter(map(cell.__getitem__, texts)) for texts in (one, other)]
        names = sorted(set(cell.values()))
        if len(names) > 1:
            tests.append(homogeneity(*(torch.tensor([count[name] for name in names]) for count in counts)))
            size += len(one) * len(other) / (len(one) + len(other))
    if not tests:
        return None
    return judged(sum(test.statistic for test in tests), sum(test.freedom for test in tests), size), len(tests)


def coarsen(counts: Counter[str]) -> dict[str, str]:
    """A cell for each text: the text itself where it comes often enough, else the longest beginning that does.

    Often enough is LEAST_SHARE of all, and what the chi-square law needs. `counts` are of both samples together: cells that do
    not know which is which leave the rate of false alarms as it is.
    """
    least = max(2 * LEAST_EXPECTED, LEAST_SHARE * counts.total())
    cell = {text: text for text in counts}
    groups: dict[str, list[str]] = {text: [text] for text in counts}
    for length in range(max(map(len, counts)), 0, -1):
        for start in [start for start in groups if len(start) == length]:
            if sum(counts[text] for text in groups[start]) < least:
                groups.setdefault(start[:-1], []).extend(groups.pop(start))
    for start, texts in groups.items():
        cell |= dict.fromkeys(texts, start)
    return cell


def same_greedy(servers: Sequence[Server], prompts: Sequence[str], tokens: int, concurrency: int, console: Console) -> Check:
    """How often greedy texts are equal, beside how often the second server repeats its own."""
    ours, theirs = ([Ask(server, prompt, tokens, 0.0, side) for prompt in prompts] for side, server in enumerate(servers))
    again = [replace(one, seed=2) for one in theirs]  # greedy texts have no use for a seed: it keeps the asks apart
    texts = ask([*ours, *theirs, *again], concurrency, console, "greedy")
    different = [at for at, (one, other) in enumerate(zip(ours, theirs, strict=True)) if texts[one] != texts[other]]
    repeated = sum(texts[one] == texts[other] for one, other in zip(theirs, again, strict=True))
    equal = len(prompts) - len(different)
    evidence = f"{equal} of {len(prompts)} texts of {tokens} tokens are equal; {servers[1].base} repeats {repeated} of its own"
    figures = {"prompts": len(prompts), "equal": equal, "repeated": repeated, "different": different}
    if not different:
        return Check("greedy texts", True, evidence, figures)
    advice = "rounding in half precision may part them, and `forerun audit divergence` tells it from a fault"
    return Check("greedy texts", None, f"{evidence}; {advice}", figures)
