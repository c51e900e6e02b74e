"""A server that speaks OpenAI's protocol of completions, for tests of the backend that measures one."""

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from fakes import Letters
from forerun.backends.endpoint import Endpoint
from forerun.config import EndpointConfig
from forerun.types import Delta, Request, Sampling

METRICS = """# HELP vllm:spec_decode_num_drafts_total Number of drafts.
# TYPE vllm:spec_decode_num_drafts_total counter
vllm:spec_decode_num_drafts_total{engine="0",model_name="tiny"} {0}.0
vllm:spec_decode_num_drafts_total{engine="1",model_name="tiny"} {0}.0
vllm:spec_decode_num_draft_tokens_total{engine="0",model_name="tiny"} {1}.0
vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="tiny"} {2}.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="tiny",position="0"} {2}.0
vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="tiny",position="1"} {0}.0
vllm:num_requests_running{engine="0",model_name="tiny"} 3.0
"""


WHOLE = -1
"""After the whole text, and before the end of the stream."""


@dataclass
class Server:
    """Counts upwards from the last prompt token, `width` tokens a message; ids are told only by a `vllm`."""

    software: str = "vllm"
    width: int = 2
    pause_s: float = 0.0
    breaks: Callable[[dict[str, Any]], int | None] = lambda _: None  # after how many messages of this request
    done: bool = False  # whether it says [DONE] before it breaks
    status: int = 200
    card: dict[str, str] = field(default_factory=dict)  # what else it says of its model
    metrics: bool = True
    got: list[dict[str, Any]] = field(default_factory=list)
    rounds: int = 0
    born: str = ""  # a line of /metrics
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
                card = {"id": "tiny", "owned_by": world.software, "max_model_len": 99} | world.card
                text = json.dumps({"data": [card]})
                if self.path == "/metrics":
                    counts = (world.rounds, 3 * world.rounds, 2 * world.rounds)
                    text = METRICS + world.born
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
        if broken == WHOLE:
            connection.shutdown(socket.SHUT_RDWR)
            return
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
