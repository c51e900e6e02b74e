"""The reference backend is transformers' generate: the same tokens, told as they come, with rounds counted from outside."""

import time

import pytest
import torch
from transformers import PreTrainedModel

from forerun.backends.reference import Reference
from forerun.config import NGramConfig
from forerun.types import Completion, Request, Sampling, UserError, complete
from models import near_copy, tiny

PROMPTS = [(1, 2, 3), (5, 6, 7, 8, 5, 6), (40, 41, 42, 43, 44, 45, 46, 47), (9, 9, 9, 9)]


def sharp() -> PreTrainedModel:
    """A model whose greedy texts do not fall into repeating one token."""
    return tiny("llama", scale=6.0)


def plain(model: PreTrainedModel, prompt: tuple[int, ...], count: int) -> tuple[int, ...]:
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=count, do_sample=False, pad_token_id=0)
    return tuple(ids[0, len(prompt) :].tolist())


def references() -> dict[str, Reference]:
    model = sharp()
    return {
        "plain": Reference(model, None),
        "batch": Reference(model, None, rows=3),
        "assisted": Reference(model, None, near_copy(model), k=3),
        "lookup": Reference(model, None, k=4, lookup=NGramConfig()),
    }


def ask(backend: Reference, prompt: tuple[int, ...] = PROMPTS[0], **sampling: object) -> Completion:
    return complete(backend, [Request("a", prompt, Sampling(**sampling))])[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["plain", "batch", "assisted", "lookup"])
def test_greedy_tokens_are_generates(name: str) -> None:
    """Prompts and lengths differ, so that the batch is padded on the left and its rows end apart."""
    backend, model = references()[name], sharp()
    requests = [Request(str(i), prompt, Sampling(max_new=6 + 3 * i)) for i, prompt in enumerate(PROMPTS)]
    for request, found in zip(requests, complete(backend, requests), strict=True):
        assert found.tokens == plain(model, request.prompt, request.sampling.max_new)
        assert found.finish == "length"
    assert not backend.busy


def test_rounds_are_counted_where_transformers_drafts() -> None:
    backends = references()
    assert ask(backends["plain"], max_new=8).rounds == ()
    target = sharp()
    itself = ask(Reference(target, None, target, k=3), max_new=12).rounds
    assert [(one.drafted, one.accepted, one.nodes) for one in itself] == [(3, 3, 4)] * 3
    for name in ("assisted", "lookup"):
        found = ask(backends[name], PROMPTS[1], max_new=20)
        assert sum(one.accepted + 1 for one in found.rounds) == len(found.tokens) == 20
        assert all(0 <= one.accepted <= one.drafted == one.nodes - 1 for one in found.rounds)
        assert any(one.drafted for one in found.rounds)


def test_the_assistant_keeps_its_own_settings() -> None:
    target = sharp()
    before = target.generation_config.to_dict()
    backends = [Reference(target, None, target, k=k) for k in (2, 5)]
    assert [ask(backend, max_new=12).rounds[0].drafted for backend in backends] == [2, 5]
    assert target.generation_config.to_dict() == before
    assert not target._forward_pre_hooks


def test_each_delta_says_when_it_was_made() -> None:
    for name, least in (("plain", 6), ("assisted", 2)):
        backend = references()[name]
        backend.submit(Request("a", PROMPTS[0], Sampling(max_new=6)))
        began, deltas, ended = time.perf_counter(), backend.step(), time.perf_counter()
        assert len(deltas) >= least
        times = [began, *[delta.at for delta in deltas if delta.at is not None], ended]
        assert len(times) == len(deltas) + 2
        assert times == sorted(times)
        assert deltas[-1].finish == "length"
        assert not backend.busy


def test_stop_ids_and_the_end_of_text() -> None:
    for backend in references().values():
        tokens = plain(sharp(), PROMPTS[0], 12)
        end = next(token for i, token in enumerate(tokens) if token not in tokens[:i] and i >= 2)
        wanted = tokens[: tokens.index(end) + 1]
        found = ask(backend, max_new=12, stop_ids=(end,))
        assert (found.tokens, found.finish) == (wanted, "stop")
        backend.eos = frozenset([end])
        assert ask(backend, max_new=12).tokens == wanted
        assert ask(backend, max_new=12, ignore_eos=True).tokens == tokens


def test_the_checkpoints_own_sampling_does_not_leak_in() -> None:
    import copy

    model = copy.copy(sharp())
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.update(do_sample=True, temperature=3.0, top_k=3, top_p=0.1, repetition_penalty=2.0, eos_token_id=0)
    assert ask(Reference(model, None), max_new=12).tokens == plain(sharp(), PROMPTS[0], 12)


def test_seeded_sampling_repeats_itself_and_leaves_the_global_stream_alone() -> None:
    for backend in references().values():
        torch.manual_seed(5)
        first = ask(backend, max_new=12, temperature=1.0, seed=3)
        after = torch.rand(1)
        torch.manual_seed(5)
        assert torch.equal(torch.rand(1), after)
        assert ask(backend, max_new=12, temperature=1.0, seed=3).tokens == first.tokens
        assert ask(backend, max_new=12, temperature=1.0, seed=4).tokens != first.tokens


def test_several_completions_differ() -> None:
    backend = Reference(sharp(), None)
    found = complete(backend, [Request("a", PROMPTS[0], Sampling(max_new=8, temperature=1.0, seed=1, n=2))])
    assert [one.index for one in found] == [0, 1]
    assert found[0].tokens != found[1].tokens


def test_a_bias_forces_a_token() -> None:
    assert ask(Reference(sharp(), None), max_new=3, logit_bias={7: 1e6}).tokens == (7, 7, 7)


def test_cancel_ends_a_request_and_frees_the_backend() -> None:
    for backend in references().values():
        backend.submit(Request("a", PROMPTS[0], Sampling(max_new=100)))
        backend.submit(Request("b", PROMPTS[1], Sampling(max_new=4)))
        backend.cancel("a")
        deltas = []
        while backend.busy:
            deltas += backend.step()
        assert [delta.finish for delta in deltas if delta.id == "a"] == ["cancelled"]
        assert sum(len(delta.tokens) for delta in deltas if delta.id == "b") == 4


def test_what_it_cannot_do_is_said() -> None:
    backend = Reference(sharp(), None)
    with pytest.raises(UserError, match="the prompt is empty"):
        ask(backend, ())
    with pytest.raises(UserError, match="no presence or frequency penalty"):
        ask(backend, presence_penalty=1.0)


def test_what_generate_raises_reaches_the_caller() -> None:
    backend = Reference(sharp(), None)
    backend.submit(Request("a", (10**6,), Sampling()))
    with pytest.raises(IndexError):
        backend.step()
    assert not backend.busy
    assert ask(backend, max_new=3).tokens == plain(sharp(), PROMPTS[0], 3)
