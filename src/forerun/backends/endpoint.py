"""A running OpenAI-compatible server as a Backend: each completion is a streamed request in a thread of its own.

What the protocol has no field for is not guessed: a server that sends no token ids has its tokens counted by its `usage`, and
rounds are known only as the sums on its /metrics page, where it has one (vLLM: vllm:spec_decode_*).
"""

from __future__ import annotations

import http.client
import json
import os
import queue
import re
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from forerun.backends import web
from forerun.backends.vllm_rounds import Counters
from forerun.config import EndpointConfig
from forerun.types import Delta, Finish, Request, Sampling, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STEP_S = 0.002
"""Longest that a step waits, so that a request that is due meanwhile is not late."""
AGAIN_S = 0.25
"""Between two attempts to reach a server that refuses connections or says that it is not ready."""
METRICS_S = 5.0
STRANGE = -1
"""A token whose id nobody told."""
# Request fields beyond OpenAI's that a server reads, by what it says owns its models; another one would ignore them silently.
ALL = frozenset({"top_k", "min_p", "repetition_penalty", "ignore_eos", "stop_token_ids"})
EXTRAS = {"vllm": ALL, "sglang": ALL, "llamacpp": frozenset({"top_k", "min_p", "ignore_eos"})}
# Sent at their defaults too: servers fill what a request leaves out from the model's generation_config.json or their own taste.
LAW = frozenset({"top_p", "presence_penalty", "frequency_penalty", "top_k", "min_p", "repetition_penalty"})


@dataclass(frozen=True, slots=True)
class Lost:
    """A completion that the server did not finish, and why; `tokens` had come by then."""

    id: str
    index: int
    reason: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Part:
    """One message of a stream: when it came and what it holds; `ids` is None where the server tells none."""

    at: float
    text: str
    ids: tuple[int, ...] | None
    finish: str | None


@dataclass
class Job:
    """One completion on its way; `parts` wait for the number of tokens, which a server without ids tells at the end."""

    request: Request
    index: int
    body: dict[str, Any]
    parts: list[Part] = field(default_factory=list)
    count: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)
    connection: http.client.HTTPConnection | None = None


Event = tuple[Job, "Part | int | Exception | None"]
"""A part; at the end the number of tokens where the server tells it, None where not; or what went wrong."""


class Endpoint:
    """A Backend around a server. The clock includes the network and a connection for each request.

    A request whose connection breaks, or whose stream ends early, gets a last delta with finish `cancelled` and an entry in
    `facts["lost"]`; it is not sent again, so that nothing is counted twice. While a server cannot be reached (it may be
    starting again) requests wait for it: nothing was sent by then. Once it has been away for `timeout_s`, those that wait are
    lost, and later ones are after one attempt.
    """

    def __init__(self, config: EndpointConfig, tokenizer: PreTrainedTokenizerBase | None, rows: int, capacity: int) -> None:
        """UserError where the server cannot be reached or names no model."""
        base = web.base_of(config.url)
        if base is None:
            raise UserError(f"endpoint.url={config.url}: not a URL; give one such as http://localhost:8000/v1")
        self.config, self.tokenizer, self.rows, self.base = config, tokenizer, rows, base
        key = os.environ.get(config.key_variable)
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        served = web.fetch(f"{base}/models", None, config.timeout_s, self.headers)
        try:
            models = {str(one["id"]): one for one in served["data"]}
            self.model = config.model or next(iter(models))
        except (KeyError, StopIteration, TypeError) as error:
            raise UserError(f"{base}/models names no model; say which with endpoint.model") from error
        card = models.get(self.model, {})
        self.names = [str(card[key]) for key in ("id", "root") if card.get(key)]
        self.software = str(card.get("owned_by") or "unknown")
        self.capacity = int(card.get("max_model_len") or capacity)
        self.jobs: dict[tuple[str, int], Job] = {}
        self.events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.cancelled: list[Delta] = []
        self.lost: list[Lost] = []
        self.told_ids: bool | None = None  # unknown before the first token
        self.away_since: float | None = None  # when the server could not be reached, and not since
        self.interrupted = False  # it was out of reach, or a stream broke: it may have been started again
        self.before = self._metrics()

    @property
    def busy(self) -> bool:
        return bool(self.jobs or self.cancelled)

    @property
    def phases(self) -> None:
        return None

    @property
    def scorer(self) -> None:
        return None

    @property
    def facts(self) -> dict[str, Any]:
        """`counters` are of all that the server did since this was built; None where a restart may have cleared them."""
        ids = {True: "ids from the server", False: "counted by the server, placed and named by the local tokenizer", None: None}
        return {
            "rule": f"the server's own ({self.software})",
            "lossless": None,
            "drafter": None,
            "policy": None,
            "rows": self.rows,
            "capacity": self.capacity,
            "weight_bytes": None,
            "kv_bytes": None,
            "compile": None,
            "dtype": None,
            "device": "server",
            "server": {"url": self.base, "model": self.model, "software": self.software},
            "tokens": ids[self.told_ids],
            "counters": None if self.interrupted else grown(self.before, self._metrics()),
            "lost": [asdict(one) for one in self.lost],
        }

    def _metrics(self) -> str:
        request = urllib.request.Request(self.base.removesuffix("/v1") + "/metrics", headers=self.headers)
        try:
            return web.read(request, METRICS_S).decode(errors="replace")
        except UserError:  # a server without such a page, or one that is down
            return ""

    def submit(self, request: Request) -> None:
        if not request.prompt:
            raise UserError(f"request {request.id}: the prompt is empty; give at least one token")
        if any(id == request.id for id, _ in self.jobs):
            raise UserError(f"request {request.id}: a request of this id is in flight; ids must be unique")
        for index in range(request.sampling.n):
            job = Job(request, index, self._body(request, index))
            self.jobs[request.id, index] = job
            threading.Thread(target=self._run, args=(job,), daemon=True).start()

    def _body(self, request: Request, index: int) -> dict[str, Any]:
        prompt: str | list[int] = list(request.prompt)
        if self.config.prompts == "text":
            if self.tokenizer is None:
                raise UserError("endpoint.prompts=text needs the model's tokenizer: name its folder or hub id as model.path")
            prompt = str(self.tokenizer.decode(list(request.prompt), skip_special_tokens=True))
        body = {"model": self.model, "prompt": prompt, "stream": True, "stream_options": {"include_usage": True}}
        return body | self._settings(request.sampling, index) | ({"return_token_ids": True} if self.software == "vllm" else {})

    def _settings(self, sampling: Sampling, index: int) -> dict[str, Any]:
        """The sampled law in full, else only what is not the default; UserError where the server may not know a field."""
        known = EXTRAS.get(self.software, frozenset())
        said: dict[str, Any] = {"max_tokens": sampling.max_new, "temperature": sampling.temperature}
        others = {
            "top_p": (sampling.top_p, 1.0), "presence_penalty": (sampling.presence_penalty, 0.0),
            "frequency_penalty": (sampling.frequency_penalty, 0.0), "stop": (list(sampling.stop), []),
            "logit_bias": ({str(token): bias for token, bias in sampling.logit_bias.items()}, {}),
            "top_k": (sampling.top_k or -1, -1),  # off: SGLang refuses 0, vLLM and llama.cpp take both
            "min_p": (sampling.min_p, 0.0),  # vLLM with drafts refuses it above 0 alone
            "repetition_penalty": (sampling.repetition_penalty, 1.0), "ignore_eos": (sampling.ignore_eos, False),
            "stop_token_ids": (list(sampling.stop_ids), []),
        }  # fmt: skip
        always = LAW - (ALL - known)
        said |= {name: value for name, (value, default) in others.items() if value != default or name in always}
        if sampling.seed is not None:
            said["seed"] = sampling.seed + index
        unknown = said.keys() & ALL - known
        if unknown:
            raise UserError(
                f"{sorted(unknown)[0]}: {self.base} ({self.software}) is not known to read it and might ignore it silently; "
                "leave it at its default"
            )
        return said

    def cancel(self, id: str) -> None:
        for place in [place for place in self.jobs if place[0] == id]:
            job = self.jobs.pop(place)
            hang_up(job)
            self.cancelled.append(Delta(id, job.index, (), "", "cancelled"))

    def step(self) -> list[Delta]:
        """What arrived since the last step, each delta with the time at which it did; waits STEP_S at most."""
        deltas, self.cancelled = self.cancelled, []
        if not self.jobs:
            return deltas
        events: list[Event] = []
        with suppress(queue.Empty):
            events.append(self.events.get(timeout=STEP_S))
            while True:
                events.append(self.events.get_nowait())
        for job, what in events:
            if self.jobs.get((job.request.id, job.index)) is job:
                deltas += self._take(job, what)
        return deltas

    def _take(self, job: Job, what: Part | int | Exception | None) -> list[Delta]:
        if isinstance(what, UserError):
            self.jobs.pop((job.request.id, job.index))
            raise what
        if isinstance(what, Part):
            job.parts.append(what)
            if what.text or what.ids:
                self.told_ids = what.ids is not None
            return self._tell(job, None) if self.told_ids and what.finish is None else []
        broken = what if isinstance(what, Exception) else None
        self.interrupted |= broken is not None
        finish = job.parts[-1].finish if job.parts else None
        if finish not in ("stop", "length"):
            error = broken or ConnectionError(f"the text ended without a reason ({finish})")
            return [*self._tell(job, None), self._lose(job, error)]
        del self.jobs[job.request.id, job.index]  # what broke after its end has lost nothing of it
        return self._tell(job, what if isinstance(what, int) else None)

    def _tell(self, job: Job, total: int | None) -> list[Delta]:
        """The parts that wait, as deltas; `total` is the number of tokens of the whole completion, where it is known."""
        parts, job.parts = job.parts, []
        ids = spread(parts, total, self.tokenizer) if self.told_ids is False else [part.ids or () for part in parts]
        job.count += sum(map(len, ids))
        finishes: list[Finish | None] = [
            "stop" if part.finish == "stop" else "length" if part.finish == "length" else None for part in parts
        ]
        return [
            Delta(job.request.id, job.index, tokens, part.text, finish, None, part.at)
            for part, tokens, finish in zip(parts, ids, finishes, strict=True)
            if tokens or part.text or finish
        ]

    def _lose(self, job: Job, error: Exception) -> Delta:
        del self.jobs[job.request.id, job.index]
        own = "" if type(error) is ConnectionError else type(error).__name__  # our own say all in their sentence
        reason = ": ".join(filter(None, (own, " ".join(str(error).split()))))
        self.lost.append(Lost(job.request.id, job.index, reason, job.count))
        return Delta(job.request.id, job.index, (), "", "cancelled")

    # In the threads.

    def _run(self, job: Job) -> None:
        try:
            response = self._post(job)
            total = None
            for message in messages(response):
                at = time.perf_counter()
                if "error" in message:
                    raise ConnectionError(f"the server says {json.dumps(message['error'])[:300]}")
                total = (message.get("usage") or {}).get("completion_tokens", total)
                for choice in message.get("choices") or ():
                    ids = choice.get("token_ids")
                    part = Part(at, choice.get("text") or "", None if ids is None else tuple(ids), choice.get("finish_reason"))
                    self.events.put((job, part))
            self.events.put((job, total))
        except Exception as error:  # noqa: BLE001 whatever ends this request must be told where the others go on
            self.events.put((job, error))
        finally:
            hang_up(job)

    def _post(self, job: Job) -> http.client.HTTPResponse:
        """The answer's beginning. Tried again only where the server has not taken the request."""
        deadline = time.perf_counter() + self.config.timeout_s
        url = urlsplit(self.base)
        secure = url.scheme == "https"
        data, headers = json.dumps(job.body).encode(), {"Content-Type": "application/json"} | self.headers
        while True:
            connect = http.client.HTTPSConnection if secure else http.client.HTTPConnection
            connection = connect(url.hostname or "", url.port, timeout=self.config.timeout_s)
            job.connection = connection
            began = time.perf_counter()
            try:
                connection.connect()
            except OSError as error:
                self._wait(job, began, error)
                continue
            self.away_since = None
            connection.auto_open = 0  # else a request on a connection that was hung up meanwhile would open it again
            if job.stopped.is_set():
                connection.close()  # who stopped it may have come before there was anything to close
                raise ConnectionError("cancelled before it was sent")
            try:
                connection.request("POST", f"{url.path}/completions", data, headers)
                response = connection.getresponse()
            except (ConnectionResetError, BrokenPipeError) as error:
                raise ConnectionError("the connection ended before the answer began") from error
            if response.status == 200:
                return response
            told = " ".join(response.read(300).decode(errors="replace").split())
            problem = f"{self.base}/completions answers with status {response.status}: {told}"
            connection.close()
            if response.status not in (429, 503):
                raise UserError(problem) if response.status < 500 else ConnectionError(problem)
            if job.stopped.wait(AGAIN_S) or time.perf_counter() > deadline:
                raise ConnectionError(problem)

    def _wait(self, job: Job, began: float, error: OSError) -> None:
        """Until the next attempt at a server out of reach at `began`; ConnectionError once that has lasted too long."""
        self.interrupted = True
        since = self.away_since = self.away_since or began
        limit = self.config.timeout_s
        if job.stopped.wait(AGAIN_S) or time.perf_counter() - since > limit:
            why = f"{self.base} has been out of reach for longer than endpoint.timeout_s={limit:g}"
            raise ConnectionError(f"{why} ({error.strerror or error})") from error


def hang_up(job: Job) -> None:
    """Ends the request on the server too; a thread that reads from it wakes up."""
    job.stopped.set()
    connection, job.connection = job.connection, None
    if connection is not None:
        sock = connection.sock
        if sock is not None:
            with suppress(OSError):  # closed already
                sock.shutdown(socket.SHUT_RDWR)
        connection.close()


def messages(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON of server-sent events up to `[DONE]`; a stream that ends before it is a ConnectionError."""
    with suppress(http.client.IncompleteRead, ConnectionResetError):
        for line in response:
            if line.startswith(b"data:"):
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                yield json.loads(data)
    raise ConnectionError("the connection ended before the text did")


def spread(parts: Sequence[Part], total: int | None, tokenizer: PreTrainedTokenizerBase | None) -> list[tuple[int, ...]]:
    """Tokens for parts of which only the text is known: `total` in all, each part as many as its share of the characters'.

    Their ids are the local tokenizer's for the whole text where it finds as many, else STRANGE. Without `total` there are as
    many as the tokenizer finds, or one a part.
    """
    text = "".join(part.text for part in parts)
    found = list(tokenizer(text, add_special_tokens=False)["input_ids"]) if tokenizer is not None else []
    count = total if total is not None else len(found) or sum(bool(part.text) for part in parts)
    ids = found if len(found) == count else [STRANGE] * count
    shares, seen = [], 0
    for part in parts:
        seen += len(part.text)
        shares.append(count * seen // len(text) if text else 0)
    shares[-1:] = [count] if shares else []
    return [tuple(ids[start:end]) for start, end in zip([0, *shares], shares, strict=False)]


COUNTER = re.compile(r"^vllm:spec_decode_num_(\w+?)(?:_total)?(?:\{(.*)\})? ([\d.eE+-]+)$", re.MULTILINE)
BORN = re.compile(r"^(process_start_time_seconds|[\w:]+_created(?:\{.*\})?) (\S+)$", re.MULTILINE)


def counters(text: str) -> dict[str, float]:
    """vLLM's counters of speculation in Prometheus text, summed over its engines; empty where it has none."""
    found: dict[str, float] = {}
    for name, labels, value in COUNTER.findall(text):
        place = re.search(r'position="(\d+)"', labels)
        key = f"{name}/{place[1]}" if place else name
        found[key] = found.get(key, 0.0) + float(value)
    return found


def grown(earlier: str, later: str) -> dict[str, Any] | None:
    """By how much between two readings of a metrics page; None where either has none, or the server was started again."""
    before, after, born = counters(earlier), counters(later), dict(BORN.findall(earlier))
    again = any(born.get(name, since) != since for name, since in BORN.findall(later))
    if not before or not after or again or any(after.get(name, -1.0) < value for name, value in before.items()):
        return None
    sums = {name: int(value - before.get(name, 0.0)) for name, value in after.items()}
    prefix = "accepted_tokens_per_pos/"
    places = sorted((int(name.removeprefix(prefix)), value) for name, value in sums.items() if name.startswith(prefix))
    return Counters(
        sums.get("drafts", 0), sums.get("draft_tokens", 0), sums.get("accepted_tokens", 0), tuple(value for _, value in places)
    ).to_json()
