"""The sums of a server's /metrics page as a run's counters, and when they are not known."""

import json
import time
from pathlib import Path

import pytest
from rich.console import Console

from endpoint_world import Server, asked, backend, drain
from forerun.bench import measure
from forerun.bench.lanes import Maker
from forerun.config import load
from forerun.types import complete


def test_counters_are_what_the_server_counted_meanwhile() -> None:
    world = Server(rounds=10, born="process_start_time_seconds 1.7e+09\n")
    with world.running() as url:
        server = backend(url)
        complete(server, asked(1, max_new=6))
        assert server.facts["counters"] == {"drafts": 6, "drafted": 9, "accepted": 6, "per_position": (6, 3)}
        world.rounds = 0
        assert server.facts["counters"] is None, "they went back: the server was started again"
    with Server(metrics=False).running() as url:
        assert backend(url).facts["counters"] is None


CREATED = 'vllm:spec_decode_num_drafts_created{engine="0",model_name="tiny"}'


@pytest.mark.parametrize("how", ["process_start_time_seconds", CREATED, "away", "broken"])
def test_counters_of_a_server_that_was_started_again_are_not_known(how: str) -> None:
    """From 0 they never go back: 20 rounds, and after the restart 6, would be 6 in all."""
    first, again = Server(), Server(rounds=6)
    if how not in ("away", "broken"):
        first.born, again.born = f"{how} 1.7000000012e+09\n", f"{how} 1.7000000345e+09\n"
    if how == "broken":
        first.breaks = lambda body: 1 if body["max_tokens"] == 4 else None
    with first.running() as url:
        server = backend(url)
        first.rounds = 20
        assert server.facts["counters"]["drafts"] == 40
        if how == "broken":
            server.submit(asked(1, max_new=4)[0])
            drain(server)
    again.port = first.port
    if how == "away":
        server.submit(asked(1)[0])
        time.sleep(0.1)
    with again.running():
        drain(server)
        assert server.facts["counters"] is None


def test_a_runs_counters_are_without_the_warm_up(tmp_path: Path) -> None:
    settings = {
        "workload.kind": "synthetic", "workload.prompts": 3, "workload.prompt_tokens": 4, "sampling.max_new": 8,
        "repeats": 1, "warmup": 2, "variants.server.backend": "endpoint",
    }  # fmt: skip
    world = Server(rounds=5)
    with world.running() as url:
        maker = Maker(lambda _: backend(url), lambda _: 97, lambda _: None)
        measure.run(load(None, [], settings), maker, tmp_path, Console(quiet=True), measure_memory=False)
    rounds = 3 * 4
    assert world.rounds == 5 + 2 * 4 + rounds
    told = json.loads((tmp_path / "environment.json").read_text())["variants"]["server"]["counters"]
    assert told == {"drafts": 2 * rounds, "drafted": 3 * rounds, "accepted": 2 * rounds, "per_position": [2 * rounds, rounds]}
