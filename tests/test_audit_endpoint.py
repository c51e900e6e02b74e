"""Two servers of known laws: one law passes, a moved one does not, and what cannot be asked or decided says why."""

import json
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from forerun.audit.endpoint import coarsen, compare, endpoint
from forerun.audit.verdict import Audit
from forerun.types import UserError

Say = Callable[[dict[str, Any]], str]
PROMPTS = ["one", "two"]
LAW = {"a": 0.4, "b": 0.3, "cat": 0.2, "dog": 0.1}
MOVED = {"a": 0.55, "b": 0.3, "cat": 0.1, "dog": 0.05}  # total variation 0.15


def drawn(law: dict[str, float], later: dict[str, float] | None = None) -> Say:
    """A server that draws each token from a law, those after the first from another."""

    def say(body: dict[str, Any]) -> str:
        if body["temperature"] == 0:
            return "a" * body["max_tokens"]
        draw = random.Random(body["seed"])
        laws = [law, *[later or law] * (body["max_tokens"] - 1)]
        return "".join(draw.choices(list(each), list(each.values()))[0] for each in laws)

    return say


@contextmanager
def serving(say: Say, status: int = 200, raw: bytes | None = None) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server on a free port: its URL and the requests that it got."""
    got: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def send(self, answer: object) -> None:
            data = json.dumps(answer).encode() if raw is None else raw
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self) -> None:
            self.send({"data": [{"id": "tiny"}]} if self.path == "/v1/models" else {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.append(body | {"path": self.path})
            self.send({"choices": [{"text": say(body)}]} if self.path == "/v1/completions" else {})

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = False  # so that closing waits for what is under way
        request_queue_size = 64  # with fewer places, connections that come at once wait a second

    server = Server(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", got
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def audited(ours: Say, theirs: Say, **more: Any) -> Audit:
    with serving(ours) as (url, _), serving(theirs) as (against, _):
        return endpoint(url, against, **{"prompts": PROMPTS, "samples": 600, "tokens": 2} | more)


def outcomes(audit: Audit) -> dict[str, bool | None]:
    return {check.name: check.passed for check in audit.checks}


def test_one_law_passes_and_says_what_it_would_have_found() -> None:
    audit = audited(drawn(LAW), drawn(LAW))
    assert audit.verdict == "lossless"
    assert list(outcomes(audit)) == [
        "law of the first token",
        "law of the first 2 tokens, by beginning",
        "law of the first 2 tokens, by end",
        "greedy texts",
    ]
    for check in audit.checks[:3]:
        assert 0.1 < check.figures["detectable_tv"] < 0.3
        assert f"a total variation of {check.figures['detectable_tv']:.2g}" in check.evidence
    assert "2 of 2 texts" in audit.checks[3].evidence


def test_another_law_is_not_lossless() -> None:
    audit = audited(drawn(MOVED), drawn(LAW), samples=700)
    assert audit.verdict == "not lossless"
    assert outcomes(audit)["law of the first token"] is False


def test_a_law_that_moves_after_the_first_token_shows_at_the_end() -> None:
    many = {chr(200 + i): 1 / 80 for i in range(80)}  # so many first tokens that nothing behind them can be counted with them
    audit = audited(drawn(many, MOVED), drawn(many, LAW), samples=800, prompts=["one"])
    found = outcomes(audit)
    assert audit.verdict == "not lossless"
    assert found["law of the first token"] is True
    assert found["law of the first 2 tokens, by beginning"] is True
    assert found["law of the first 2 tokens, by end"] is False


def test_greedy_texts_that_differ_are_left_open() -> None:
    def other(body: dict[str, Any]) -> str:
        return drawn(LAW)(body) + ("!" if body["temperature"] == 0 and body["prompt"] == "two" else "")

    audit = audited(other, drawn(LAW), samples=20)
    check = audit.checks[-1]
    assert check.passed is None
    assert check.figures == {"prompts": 2, "equal": 1, "repeated": 2, "different": [1]}
    assert "1 of 2 texts of 64 tokens are equal" in check.evidence
    assert "forerun audit divergence" in check.evidence


@pytest.mark.parametrize("swapped", [False, True])
def test_a_server_that_does_not_draw_decides_nothing(swapped: bool) -> None:
    sides: list[Say] = [lambda body: "a" * body["max_tokens"], drawn(LAW)]
    audit = audited(*(sides[::-1] if swapped else sides), samples=40)
    assert audit.verdict == "undecided"
    assert "the same text for every seed" in audit.checks[0].evidence


def test_too_few_samples_decide_nothing() -> None:
    audit = audited(drawn(LAW), drawn(LAW), samples=40)
    assert audit.verdict == "undecided"
    assert "give more --samples" in audit.checks[0].evidence


def test_what_is_asked_for() -> None:
    with serving(drawn(LAW)) as (url, ours), serving(drawn(LAW)) as (against, theirs):
        audit = endpoint(f"{url}/v1/", against, prompts=PROMPTS, samples=30, tokens=3, seed=5, temperature=0.7)
    assert audit.subject == f"{url}/v1 (tiny) against {against}/v1 (tiny)"
    sampled = [body for body in ours + theirs if body["temperature"] == 0.7]
    assert Counter((body["max_tokens"], body["prompt"]) for body in sampled) == {(n, p): 30 for n in (1, 3) for p in PROMPTS}
    assert len({body["seed"] for body in sampled}) == len(sampled), "no two draws share a seed"
    assert {body["path"] for body in ours + theirs} == {"/v1/completions"}
    assert {body["model"] for body in ours + theirs} == {"tiny"}
    assert Counter(body["temperature"] for body in ours)[0.0] == 2
    assert Counter(body["temperature"] for body in theirs)[0.0] == 4, "asked twice, to see whether it repeats itself"


def test_a_model_that_is_named_is_not_asked_for() -> None:
    with serving(drawn(LAW)) as (url, got):
        endpoint(url, url, prompts=PROMPTS, samples=4, model="large")
    assert {body["model"] for body in got} == {"large"}


@pytest.mark.parametrize(
    ("status", "raw", "message"),
    [
        (
            404,
            b'{"error": "no\\nsuch model"}',
            r"completions answers with status 404: .*no.*such model.*; check the URL, and the model",
        ),
        (400, b"too long", "status 400: too long; check --model, --tokens"),
        (500, b"", "status 500: Internal Server Error; look into the server's log"),
        (429, b"", "too busy"),
        (401, b"", "without a key"),
        (200, b"<html>", "not JSON; is it OpenAI-compatible"),
        (200, b"[]", r"without choices\[0\].text"),
    ],
)
def test_what_a_server_answers_wrongly_is_one_line(status: int, raw: bytes, message: str) -> None:
    with serving(drawn(LAW), status, raw) as (url, _), pytest.raises(UserError, match=message) as caught:
        endpoint(url, url, prompts=PROMPTS, model="tiny")
    assert url in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_server_without_models_wants_a_name() -> None:
    with serving(drawn(LAW), raw=b'{"data": []}') as (url, _), pytest.raises(UserError, match="say which with --model"):
        endpoint(url, url, prompts=PROMPTS)


def test_a_server_that_is_not_there_or_silent_is_one_line() -> None:
    with serving(drawn(LAW)) as (url, _):
        pass
    with pytest.raises(UserError, match="cannot be reached"):
        endpoint(url, url, prompts=PROMPTS)
    wake = threading.Event()

    def silent(body: dict[str, Any]) -> str:
        wake.wait(10)
        return ""

    with serving(silent) as (url, _):
        try:
            with pytest.raises(UserError, match=r"no answer within 0.2 s"):
                endpoint(url, url, prompts=PROMPTS, timeout_s=0.2, concurrency=1)
        finally:
            wake.set()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "no prompts"),
        ({"temperature": 0.0}, "above 0"),
        ({"samples": 0}, "--samples 0"),
        ({"tokens": 0}, "--tokens 0"),
        ({"against": "localhost:8000"}, "not a URL"),
    ],
)
def test_what_a_user_can_get_wrong(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        endpoint(**{"url": "http://localhost:1", "against": "http://localhost:1", "prompts": PROMPTS, "model": "m"} | change)


def test_rare_texts_share_a_beginning() -> None:
    counts = Counter({"the end": 12, "the sun": 4, "the sea": 3, "the sky": 5, "a": 15, "x": 2})
    cell = coarsen(counts)
    assert cell["the end"] == "the end"
    assert cell["a"] == "a"
    assert cell["the sun"] == cell["the sea"] == cell["the sky"] == "the s"
    assert cell["x"] == ""


def test_prompts_add_up() -> None:
    draw = random.Random(0)

    def texts(law: dict[str, float]) -> list[list[str]]:
        return [draw.choices(list(law), list(law.values()), k=400) for _ in range(4)]

    same, moved, alone = (
        compare(texts(LAW), texts(LAW)),
        compare(texts(MOVED), texts(LAW)),
        compare(texts(MOVED)[:1], texts(LAW)[:1]),
    )
    assert same is not None
    assert moved is not None
    assert alone is not None
    assert same[0].freedom == moved[0].freedom == 4 * 3
    assert same[0].passed
    assert not moved[0].passed
    assert moved[0].detectable_tv < alone[0].detectable_tv
    assert compare([["a"] * 9], [["a"] * 9]) is None
