"""A server as a Backend: what its streams say, what they leave open, and what happens when it dies."""

import http.client
import json
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from endpoint_world import WHOLE, Server, asked, backend, drain
from fakes import Letters
from forerun.backends.endpoint import STRANGE
from forerun.bench import measure
from forerun.bench.lanes import Maker
from forerun.build import Models, build
from forerun.config import Variant, load, parse
from forerun.model import ASSETS
from forerun.types import Request, Sampling, UserError, complete


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
    assert not plain.keys() & {"stop", "logit_bias", "ignore_eos", "stop_token_ids", "seed"}, "defaults are left out"


LAW = {"temperature": 1.0, "top_p": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


@pytest.mark.parametrize(
    ("software", "more"),
    [
        ("vllm", {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}),
        ("sglang", {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}),
        ("llamacpp", {"top_k": -1, "min_p": 0.0}),
        ("other", {}),
    ],
)
def test_the_law_is_said_at_its_defaults_too(software: str, more: dict[str, float]) -> None:
    """What a request leaves out a server takes from the model's generation_config.json, which is another law."""
    world = Server(software=software)
    with world.running() as url:
        complete(backend(url), asked(1, temperature=1.0))
    [body] = world.got
    names = {*LAW, "top_k", "min_p", "repetition_penalty"}
    assert {name: value for name, value in body.items() if name in names} == LAW | more


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


def test_what_is_cancelled_while_it_connects_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    connect, go, threads = http.client.HTTPConnection.connect, threading.Event(), []

    def slow(connection: http.client.HTTPConnection) -> None:
        threads.append(threading.current_thread())
        assert go.wait(10)
        connect(connection)

    world = Server()
    with world.running() as url:
        server = backend(url)
        monkeypatch.setattr(http.client.HTTPConnection, "connect", slow)
        server.submit(asked(1)[0])
        while not threads:
            time.sleep(0.001)
        server.cancel("r0")
        go.set()
        threads[0].join(10)
        assert [delta.finish for delta in drain(server)] == ["cancelled"]
    assert world.got == []


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


@pytest.mark.parametrize("software", ["vllm", "other"])
def test_a_stream_that_breaks_after_its_text_has_lost_nothing(software: str) -> None:
    with Server(software=software, breaks=lambda _: WHOLE).running() as url:
        server = backend(url)
        server.submit(asked(1)[0])
        deltas = drain(server)
        assert [delta.finish for delta in deltas] == [None, None, "length"]
        assert sum(len(delta.tokens) for delta in deltas) == 5
        assert server.facts["lost"] == []
        assert server.facts["counters"] is None, "but the server may have died with it"


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


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({"variant": {}, "card": {"root": "acme/other"}}, True),
        ({"variant": {}, "card": {"root": str(ASSETS / "target")}}, False),
        ({"variant": {}, "card": {"id": "/elsewhere/forerun/assets/target"}}, False),
        ({"variant": {"endpoint": {"prompts": "text"}}, "card": {}}, False),
        ({"variant": {"model": {"path": str(ASSETS / "target")}}, "card": {}}, False),
    ],
)
def test_ids_of_the_embedded_tokenizer_do_not_go_silently_to_another_model(said: dict[str, Any], told: bool) -> None:
    heard: list[str] = []
    with Server(card=said["card"]).running() as url:
        settings = {"backend": "endpoint"} | said["variant"]
        settings["endpoint"] = {"url": url} | settings.get("endpoint", {})
        build(parse(Variant, settings, "test"), Models(heard.append))
    assert len(heard) == told
    assert all("set model.path" in words and "endpoint.prompts=text" in words for words in heard)


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
