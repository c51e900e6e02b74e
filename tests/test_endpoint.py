"""A server as a Backend: what its streams say, what they leave open, and what happens when it dies."""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fakes import Letters
from forerun.backends.endpoint import STRANGE, Endpoint, counters
from forerun.bench import measure
from forerun.bench.lanes import Maker
from forerun.config import EndpointConfig, load
from forerun.types import Delta, Request, Sampling, UserError, complete

METRICS = """# HELP vllm:spec_decode_num_drafts_total Number of drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="tiny"} {0}.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="tiny"} {0}.0
vllm:spec_decode_num_drafts_created{engine="0",model_name="tiny"} 1.7e+09
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="tiny"} {1}.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="tiny"} {2}.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="tiny",position="0"} {2}.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="tiny",position="1"} {0}.0
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
"""


@dataclass
class Server:
    """Counts upwards from the last prompt token, `width` tokens a message; ids are told only by a `vllm`."""

    software: str = "vllm"
    width: int = 2
    pause_s: float = 0.0
    breaks: Callable[[dict[str, Any]], int | None] = lambda _: None  # after how many messages of this request
    done: bool = False  # whether it says [DONE] before it breaks
    status: int = 200
    metrics: bool = True
    got: list[dict[str, Any]] = field(default_factory=list)
    rounds: int = 0
    port: int = 0

    @contextmanager
    def running(self) -> Iterator[str]:
        server = ThreadingHTTPServer(("127.0.0.1", self.port), self.handler())
        self.port = server.server_address[1]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{self.port}"
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    def handler(self) -> type[BaseHTTPRequestHandler]:
        world = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                card = {"id": "tiny", "owned_by": world.software, "max_model_len": 99}
                text = json.dumps({"data": [card]})
                if self.path == "/metrics":
                    counts = (world.rounds, 3 * world.rounds, 2 * world.rounds)
                    text = METRICS
                    for place, count in enumerate(counts):
                        text = text.replace("{" + str(place) + "}", str(count))
                self.send_response(404 if self.path == "/metrics" and not world.metrics else 200)
                self.end_headers()
                self.wfile.write(text.encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                world.got.append(body | {"key": self.headers["Authorization"]})
                self.send_response(world.status)
                self.end_headers()
                if world.status == 200:
                    world.stream(body, self.wfile.write, self.connection)

            def log_message(self, *_: object) -> None:
                pass

        return Handler

    def stream(self, body: dict[str, Any], write: Callable[[bytes], Any], connection: socket.socket) -> None:
        last = body["prompt"][-1] if isinstance(body["prompt"], list) else len(body["prompt"])
        tokens = [(last + i + 1) % 97 for i in range(body["max_tokens"])]
        broken = self.breaks(body)
        for sent, start in enumerate(range(0, len(tokens), self.width)):
            if sent == broken:
                write(b"data: [DONE]\n\n" if self.done else b"")
                connection.shutdown(socket.SHUT_RDWR)
                return
            part = tokens[start : start + self.width]
            ended = start + self.width >= len(tokens)
            choice: dict[str, Any] = {"index": 0, "text": Letters().decode(part), "finish_reason": "length" if ended else None}
            if body.get("return_token_ids"):
                choice["token_ids"] = part
            write(b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n")
            self.rounds += 1
            time.sleep(self.pause_s)
        write(b"data: " + json.dumps({"choices": [], "usage": {"completion_tokens": len(tokens)}}).encode() + b"\n\n")
        write(b"data: [DONE]\n\n")


def backend(url: str, rows: int = 2, tokenizer: Any = None, **config: Any) -> Endpoint:
    return Endpoint(EndpointConfig(url=url, **{"timeout_s": 5.0} | config), tokenizer or Letters(), rows, 64)


def asked(count: int = 2, **sampling: Any) -> list[Request]:
    return [Request(f"r{i}", (7, 10 * i), Sampling(**{"max_new": 5} | sampling)) for i in range(count)]


def drain(server: Endpoint) -> list[Delta]:
    deltas = []
    while server.busy:
        deltas += server.step()
    return deltas


def test_a_server_that_tells_ids() -> None:
    """Two tokens a message as they come, each with its own time."""
    with Server(pause_s=0.02).running() as url:
        server = backend(url)
        began = time.perf_counter()
        for request in asked():
            server.submit(request)
        deltas = drain(server)
    own = [delta for delta in deltas if delta.id == "r1"]
    assert [delta.tokens for delta in own] == [(11, 12), (13, 14), (15,)]
    assert "".join(delta.text for delta in own) == Letters().decode([11, 12, 13, 14, 15])
    assert [delta.finish for delta in own] == [None, None, "length"]
    times = [delta.at - began for delta in own if delta.at is not None]
    assert times == sorted(times)
    assert times[2] - times[0] > 0.03, "the times are those of the arrivals, not of the end"
    assert server.facts["tokens"] == "ids from the server"
    assert server.facts["capacity"] == 99
    assert server.facts["lost"] == []


@pytest.mark.parametrize("usage", [True, False])
def test_a_server_that_tells_text_alone(usage: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its tokens are counted by its usage, or else by the local tokenizer; here both find a token in a letter."""
    world = Server(software="other", width=2)
    if not usage:
        own = world.stream
        monkeypatch.setattr(
            world, "stream", lambda body, write, sock: own(body, lambda data: None if b"usage" in data else write(data), sock)
        )
    with world.running() as url:
        server = backend(url)
        [found] = complete(server, asked(1))
    assert (len(found.tokens), found.finish) == (5, "length")
    assert found.tokens == tuple(Letters()(found.text)["input_ids"])
    assert "local tokenizer" in server.facts["tokens"]


def test_where_the_tokenizers_differ_the_count_is_the_servers_and_ids_are_unknown() -> None:
    class Pairs(Letters):
        def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
            return {"input_ids": [1] * (len(text) // 2)}

    with Server(software="other", width=2).running() as url:
        server = backend(url, tokenizer=Pairs())
        for request in asked(1):
            server.submit(request)
        deltas = drain(server)
    assert [delta.tokens for delta in deltas] == [(STRANGE,) * 2, (STRANGE,) * 2, (STRANGE,)]


def test_settings_as_the_protocol_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "abc")
    sampling = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.2,
        "frequency_penalty": 0.3, "logit_bias": {3: 1.0}, "stop": ("x",), "stop_ids": (5,), "ignore_eos": True,
        "seed": 4, "n": 2,
    }  # fmt: skip
    world = Server()
    with world.running() as url:
        server = backend(url, key_variable="SECRET")
        assert [one.index for one in complete(server, asked(1, **sampling))] == [0, 1]
        complete(server, asked(1))
    first, second, plain = world.got
    assert {first["seed"], second["seed"]} == {4, 5}
    wanted = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1, "presence_penalty": 0.2,
        "frequency_penalty": 0.3, "logit_bias": {"3": 1.0}, "stop": ["x"], "stop_token_ids": [5], "ignore_eos": True,
        "max_tokens": 5, "model": "tiny", "prompt": [7, 0], "stream": True, "stream_options": {"include_usage": True},
        "return_token_ids": True, "key": "Bearer abc",
    }  # fmt: skip
    assert {name: value for name, value in first.items() if name != "seed"} == wanted
    assert not plain.keys() & {"top_p", "top_k", "min_p", "stop", "logit_bias", "ignore_eos", "seed"}, "defaults are left out"


def test_prompts_as_text() -> None:
    world = Server()
    with world.running() as url:
        complete(backend(url, prompts="text"), asked(1))
    assert world.got[0]["prompt"] == Letters().decode([7, 0])


def test_a_server_of_unknown_make_is_not_sent_what_it_might_ignore() -> None:
    world = Server(software="other")
    with world.running() as url:
        server = backend(url)
        with pytest.raises(UserError, match=r"min_p: .* not known to read it"):
            server.submit(asked(1, min_p=0.1)[0])
        assert not server.busy
        assert "return_token_ids" not in complete(server, asked(1)) and "return_token_ids" not in world.got[0]


def test_a_cancel_hangs_up() -> None:
    with Server(pause_s=0.05).running() as url:
        server = backend(url)
        for request in asked(max_new=50):
            server.submit(request)
        while not server.step():
            pass
        server.cancel("r0")
        began = time.perf_counter()
        deltas = drain(server)
        assert [delta.finish for delta in deltas if delta.id == "r0"] == ["cancelled"]
        assert [delta.finish for delta in deltas if delta.id == "r1"][-1] == "length"
        assert time.perf_counter() - began > 0.5, "the other one went on"
    assert server.facts["lost"] == []


def test_a_server_that_dies_amid_a_text_and_comes_back() -> None:
    """What it had begun is lost and said so, once; what is asked while it is away waits for it."""
    dying = Server(breaks=lambda body: 2 if body["prompt"][-1] == 10 else None)
    with dying.running() as url:
        server = backend(url)
        for request in asked(max_new=8):
            server.submit(request)
        deltas = drain(server)
    by_id = {id: [delta for delta in deltas if delta.id == id] for id in ("r0", "r1")}
    assert by_id["r0"][-1].finish == "length"
    assert [delta.finish for delta in by_id["r1"]] == [None, None, "cancelled"]
    [lost] = server.facts["lost"]
    assert (lost["id"], lost["index"], lost["tokens"]) == ("r1", 0, 4)
    assert "connection ended" in lost["reason"] or "IncompleteRead" in lost["reason"]

    server.submit(Request("later", (7, 3), Sampling(max_new=3)))
    until = time.perf_counter() + 0.4
    while time.perf_counter() < until:
        assert server.step() == []
    again = Server(port=dying.port)
    with again.running():
        [*_, last] = drain(server)
    assert (last.id, last.finish) == ("later", "length")
    assert len(again.got) == 1
    assert len(server.facts["lost"]) == 1
    assert server.facts["counters"] is None, "a server that is down has none"


@pytest.mark.parametrize("after", [0, 2])
def test_a_text_that_ends_without_a_reason_is_lost(after: int) -> None:
    with Server(breaks=lambda _: after, done=True).running() as url:
        server = backend(url)
        server.submit(asked(1, max_new=8)[0])
        assert drain(server)[-1].finish == "cancelled"
    assert "without a reason" in server.facts["lost"][0]["reason"]
    assert server.facts["lost"][0]["tokens"] == 2 * after


def test_a_server_that_stays_away_loses_what_waits_and_nothing_waits_again() -> None:
    """The wait is bounded for all requests together, until the server is back."""
    with (gone := Server()).running() as url:
        server = backend(url, timeout_s=0.6)
    for request in asked(2):
        server.submit(request)
    assert [delta.finish for delta in drain(server)] == ["cancelled"] * 2
    told = f"{url}/v1 has been out of reach for longer than endpoint.timeout_s=0.6 (Connection refused)"
    assert [one["reason"] for one in server.facts["lost"]] == [told] * 2
    began = time.perf_counter()
    for name in "abcdef":
        server.submit(Request(name, (7,), Sampling(max_new=3)))
        assert [delta.finish for delta in drain(server)] == ["cancelled"]
    assert time.perf_counter() - began < 6 * 0.6, "each waited anew"
    with Server(port=gone.port).running():
        assert complete(server, asked(1))[0].finish == "length"
    server.submit(Request("later", (7,), Sampling(max_new=3)))
    until = time.perf_counter() + 0.4
    while time.perf_counter() < until:
        assert server.step() == [], "it has been back meanwhile: the wait begins anew"
    server.cancel("later")


def test_a_benchmark_goes_on_when_the_server_dies(tmp_path: Path) -> None:
    """It dies with a request amid its text, and is started again while others wait: each is recorded once or lost once."""
    settings = {
        "workload.kind": "synthetic", "workload.prompts": 6, "workload.concurrency": 2, "workload.prompt_tokens": 4,
        "sampling.max_new": 8, "repeats": 2, "warmup": 0, "variants.server.backend": "endpoint",
    }  # fmt: skip
    died, again = threading.Event(), Server()

    def breaks(_: dict[str, Any]) -> int | None:
        if len(dying.got) < 8 or died.is_set():
            return None
        died.set()
        return 1

    dying = Server(breaks=breaks)
    with ExitStack() as later:
        first = later.enter_context(ExitStack())
        url = first.enter_context(dying.running())
        again.port = dying.port

        def restart() -> None:
            assert died.wait(20)
            first.close()
            time.sleep(0.5)
            later.enter_context(again.running())

        watcher = threading.Thread(target=restart)
        watcher.start()
        maker = Maker(lambda variant: backend(url, timeout_s=20.0), lambda _: 97, lambda _: None)
        summary = measure.run(load(None, [], settings), maker, tmp_path, Console(quiet=True), measure_memory=False)
        watcher.join()
    figures, folder = summary["variants"]["server"], tmp_path / "server"
    rows = {name: (folder / f"{name}.jsonl").read_text().splitlines() for name in ("records", "lost")}
    found = {name: [(row["id"], row["repeat"]) for row in map(json.loads, of)] for name, of in rows.items()}
    assert sorted(found["records"] + found["lost"]) == sorted(
        (f"synthetic-{i}", repeat) for i in range(6) for repeat in range(2)
    )
    assert figures["error"] is None
    assert len(found["lost"]) >= 1
    assert (figures["requests"], figures["lost"]["requests"]) == (len(found["records"]), len(found["lost"]))
    assert len(again.got) > 0
    assert max(Counter(str(body["prompt"]) for body in dying.got + again.got).values()) <= 2, "none was sent twice a repeat"
    assert f"server lost {len(found['lost'])} of 12 requests: " in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(("status", "lost"), [(500, True), (400, False)])
def test_what_a_server_refuses(status: int, lost: bool) -> None:
    """A fault of its own loses the request; a fault in what was asked would come with each, so that it ends the run."""
    with Server(status=status).running() as url:
        server = backend(url)
        server.submit(asked(1)[0])
        if lost:
            assert [delta.finish for delta in drain(server)] == ["cancelled"]
            assert "status 500" in server.facts["lost"][0]["reason"]
        else:
            with pytest.raises(UserError, match="status 400"):
                drain(server)


def test_counters_are_what_the_server_counted_meanwhile() -> None:
    world = Server(rounds=10)
    with world.running() as url:
        server = backend(url)
        complete(server, asked(1, max_new=6))
        assert server.facts["counters"] == {"drafts": 6, "drafted": 9, "accepted": 6, "per_position": (6, 3)}
        world.rounds = 0
        assert server.facts["counters"] is None, "they went back: the server was started again"
    with Server(metrics=False).running() as url:
        assert backend(url).facts["counters"] is None
    assert counters("# nothing here\n") is None


@pytest.mark.parametrize(("url", "message"), [("localhost:8000", "not a URL"), ("http://127.0.0.1:9", "cannot be reached")])
def test_addresses_that_lead_nowhere(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        backend(url)


def test_a_step_returns_soon_while_nothing_comes() -> None:
    """So that an open loop submits what is due."""
    with Server(pause_s=0.3).running() as url:
        server = backend(url)
        server.submit(asked(1)[0])
        began = time.perf_counter()
        steps = 0
        while time.perf_counter() - began < 0.2:
            server.step()
            steps += 1
        assert steps > 5
        server.cancel("r0")
