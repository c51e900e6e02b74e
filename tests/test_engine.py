"""The engine as a backend: admission, stops, cancel, seeds, invariance, errors."""

from dataclasses import replace

import pytest
import torch

from forerun.accept import choose
from forerun.draft import Batch, Constant, Drafter, DraftModel, NGram, NoDraft, Outcome
from forerun.engine import Engine
from forerun.model import Target
from forerun.types import Request, Sampling, UserError, complete
from models import VOCABULARY, near_copy, plain_greedy, prompts, tiny


def engine(
    drafter: Drafter | None = None, rows: int = 2, capacity: int = 96, dtype: torch.dtype = torch.float64, **kw: object
) -> Engine:
    drafter = drafter or NoDraft()
    return Engine(
        Target(tiny("llama", dtype=dtype)),
        drafter,
        choose("auto", drafter.drawn),
        rows=rows,
        capacity=capacity,
        debug=True,
        **kw,
    )


def drafters(rows: int, dtype: torch.dtype = torch.float64) -> dict[str, Drafter]:
    noisy = Target(near_copy(tiny("llama", dtype=dtype)))
    return {
        "none": NoDraft(),
        "ngram": NGram(Constant(4), rows),
        "model": DraftModel(noisy, Constant(3), rows, 96),
    }


PROMPT = prompts()[0]


@pytest.mark.parametrize("kind", ["none", "ngram", "model"])
def test_a_stop_token_ends_the_completion_with_itself(kind: str) -> None:
    plain = plain_greedy(tiny("llama"), PROMPT, 30)
    end = plain[7]
    [done] = complete(engine(drafters(2)[kind]), [Request("a", PROMPT, Sampling(max_new=30, stop_ids=(end,)))])
    assert list(done.tokens) == plain[: plain.index(end) + 1]
    assert done.finish == "stop"


def test_end_of_sequence_is_a_stop_unless_ignored() -> None:
    plain = plain_greedy(tiny("llama"), PROMPT, 20)
    eos = frozenset([plain[4]])
    [done] = complete(engine(eos=eos), [Request("a", PROMPT, Sampling(max_new=20))])
    assert list(done.tokens) == plain[: plain.index(plain[4]) + 1]
    [done] = complete(engine(eos=eos), [Request("a", PROMPT, Sampling(max_new=20, ignore_eos=True))])
    assert (list(done.tokens), done.finish) == (plain, "length")


@pytest.mark.parametrize("kind", ["none", "ngram", "model"])
@pytest.mark.parametrize("new", [1, 2])
def test_the_shortest_outputs(kind: str, new: int) -> None:
    requests = [Request(str(i), prompt, Sampling(max_new=new)) for i, prompt in enumerate(prompts())]
    done = complete(engine(drafters(2)[kind]), requests)
    assert [list(c.tokens) for c in done] == [plain_greedy(tiny("llama"), p, new) for p in prompts()]


@pytest.mark.parametrize("kind", ["none", "ngram", "model"])
def test_a_seeded_request_draws_the_same_alone_and_in_any_batch(kind: str) -> None:
    """Float32, constant length policy; greedy and unseeded neighbours join and leave."""
    sampling = Sampling(temperature=0.9, top_p=0.95, seed=11, max_new=14)
    own = Request("own", PROMPT, sampling)
    alone = complete(engine(drafters(1, torch.float32)[kind], rows=1, dtype=torch.float32), [own])[0]
    others = [
        Request(
            str(i),
            p,
            Sampling(max_new=5 + i) if i % 2 else Sampling(temperature=1.5, repetition_penalty=1.2, max_new=4 + 2 * i),
        )
        for i, p in enumerate(prompts()[1:])
    ]
    together = complete(engine(drafters(3, torch.float32)[kind], rows=3, dtype=torch.float32), [*others[:3], own, *others[3:]])
    assert next(c for c in together if c.id == "own").tokens == alone.tokens
    again = complete(
        engine(drafters(1, torch.float32)[kind], rows=1, dtype=torch.float32),
        [replace(own, sampling=replace(sampling, seed=12))],
    )
    assert again[0].tokens != alone.tokens, "another seed draws other tokens"


def test_n_completions_of_one_request_differ_and_repeat() -> None:
    request = Request("a", PROMPT, Sampling(temperature=1.0, seed=3, n=4, max_new=10))
    first, second = (complete(engine(rows=3), [request]) for _ in range(2))
    assert [c.index for c in first] == [0, 1, 2, 3]
    assert len({c.tokens for c in first}) == 4
    assert [c.tokens for c in first] == [c.tokens for c in second]


def test_batch_rows_equal_the_same_prompt_alone_in_float32() -> None:
    requests = [Request(str(i), p, Sampling(max_new=20)) for i, p in enumerate(prompts())]
    together = complete(engine(rows=7, dtype=torch.float32), requests)
    alone = [complete(engine(rows=1, dtype=torch.float32), [r])[0] for r in requests]
    assert [c.tokens for c in together] == [c.tokens for c in alone]


def test_cancel_ends_running_and_waiting_completions() -> None:
    backend = engine(rows=1)
    for id in ("a", "b", "c"):
        backend.submit(Request(id, PROMPT, Sampling(max_new=10)))
    backend.step()
    backend.cancel("a")
    backend.cancel("c")
    deltas = []
    while backend.busy:
        deltas += backend.step()
    assert {(d.id, d.finish) for d in deltas if d.finish} == {("a", "cancelled"), ("c", "cancelled"), ("b", "length")}
    assert [t for d in deltas if d.id == "b" for t in d.tokens] == plain_greedy(tiny("llama"), PROMPT, 10)


def test_a_steps_deltas_stream() -> None:
    backend = engine(rows=1)
    backend.submit(Request("a", PROMPT, Sampling(max_new=5)))
    counts = []
    while backend.busy:
        counts += [len(d.tokens) for d in backend.step()]
    assert counts == [1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (Request("r", ()), "empty"),
        (Request("r", PROMPT, Sampling(max_new=1000)), "capacity"),
        (Request("r", (VOCABULARY,), Sampling(max_new=4)), "vocabulary"),
    ],
)
def test_what_can_never_be_served_is_refused_at_submit(request_: Request, says: str) -> None:
    backend = engine()
    with pytest.raises(UserError, match=says):
        backend.submit(request_)
    assert not backend.busy


def test_an_id_in_flight_is_refused() -> None:
    backend = engine()
    backend.submit(Request("a", PROMPT, Sampling(max_new=4)))
    with pytest.raises(UserError, match="in flight"):
        backend.submit(Request("a", PROMPT, Sampling(max_new=4)))


@pytest.mark.parametrize(
    "setting", [{"temperature": -1.0}, {"top_p": 0.0}, {"min_p": 2.0}, {"max_new": 0}, {"n": 0}, {"top_k": -1}]
)
def test_sampling_out_of_range_is_refused(setting: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(setting))):
        Sampling(**setting)


def test_scores_that_are_not_numbers_are_an_error_of_one_line() -> None:
    import copy

    broken = copy.deepcopy(tiny("llama"))
    broken.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    backend = Engine(Target(broken), NoDraft(), choose("auto", False), capacity=64)
    backend.submit(Request("a", PROMPT, Sampling(max_new=4)))
    assert [delta.finish for delta in backend.step()] == ["cancelled"]
    with pytest.raises(UserError, match="not finite") as caught:
        backend.step()
    assert "\n" not in str(caught.value)
    assert not backend.busy


def test_a_fault_in_mid_flight_ends_its_rows_and_keeps_what_was_told() -> None:
    import copy

    model = copy.deepcopy(tiny("llama"))
    backend = Engine(Target(model), NoDraft(), choose("auto", False), rows=2, capacity=64, debug=True)
    for id in ("a", "b"):
        backend.submit(Request(id, PROMPT, Sampling(max_new=9)))
    backend.step()
    weight = model.model.layers[0].self_attn.k_proj.weight.data  # keys that are not numbers reach the cache
    healthy = weight.clone()
    weight[0, 0] = float("nan")
    assert {d.finish for d in backend.step()} == {"cancelled"}
    assert backend.busy
    with pytest.raises(UserError, match="not finite"):
        backend.step()
    weight.copy_(healthy)
    [done] = complete(backend, [Request("c", PROMPT, Sampling(max_new=9))])
    assert list(done.tokens) == plain_greedy(tiny("llama"), PROMPT, 9)


def test_the_drafter_is_told_the_accepted_paths() -> None:
    """Of trees too: the tokens along a told path are those that the row got."""
    told: list[tuple[list[int], list[int]]] = []

    class Watched(DraftModel):
        def observe(self, batch: Batch, outcome: Outcome) -> None:
            row = batch.rows[0]
            assert row is not None
            told.append((list(outcome.paths[0]), [outcome.accepted[0], len(row.tokens)]))
            super().observe(batch, outcome)

    backend = engine(Watched(Target(near_copy(tiny("llama"))), Constant(3), 2, 128))
    complete(backend, [Request("a", PROMPT, Sampling(max_new=20))])
    assert {tuple(path) for path, _ in told} > {(0,)}
    assert all(path == list(range(accepted + 1)) for path, (accepted, _) in told)


def test_phases_add_up_and_facts_are_told() -> None:
    backend = engine(drafters(2)["model"])
    complete(backend, [Request("a", PROMPT, Sampling(max_new=10))])
    phases = backend.phases
    assert min(phases.draft, phases.verify, phases.accept, phases.other) > 0
    assert backend.facts["lossless"] is True
    assert backend.facts["rule"] == "block"
    assert backend.facts["weight_bytes"] == sum(p.nbytes for p in tiny("llama").parameters())
