"""The adapter to vLLM's second model runner, as far as a CPU goes: its layout on made-up batches, without the runner itself."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from forerun.audit.statistics import goodness
from forerun.config import Variant, parse
from forerun.plugin.rounds import rules
from forerun.plugin.settings import is_ours
from forerun.sampling import build_warp, law
from forerun.types import Sampling

pytestmark = pytest.mark.filterwarnings("ignore")  # of vLLM's own
VOCABULARY, DRAFTS, REQUESTS, TEMPERATURE = 5, 3, 20_000, 0.7


@dataclass
class Sampler:
    """vLLM's sampler of the second runner: temperatures by slot, and logits that it divides by them."""

    temperatures: Tensor
    logits_processors: list[Any] = field(default_factory=list)

    @property
    def sampling_states(self) -> Any:
        return SimpleNamespace(temperature=SimpleNamespace(gpu=self.temperatures, np=self.temperatures.numpy()))

    def apply_sampling_params(self, logits: Tensor, slots: Tensor, *_: Any) -> Tensor:
        scale = self.temperatures[slots]
        return logits / torch.where(scale == 0, 1.0, scale)[:, None]


def model_state(forerun: dict[str, Any] | None, speculation: Any) -> Any:
    """What the runner asks for a sampler of the model's own."""
    from forerun.plugin import v2

    v2.install()
    from vllm.v1.worker.gpu.model_states.interface import ModelState

    assert is_ours(ModelState.custom_sampler)
    config = SimpleNamespace(
        additional_config={} if forerun is None else {"forerun": forerun}, speculative_config=speculation,
        model_config=SimpleNamespace(seed=0),
    )  # fmt: skip
    own = SimpleNamespace(vllm_config=config, device=torch.device("cpu"))
    return lambda sampler: ModelState.custom_sampler(own, sampler)


def speculation() -> Any:
    return SimpleNamespace(
        num_speculative_tokens=DRAFTS, enable_adaptive_verification=False, rejection_sample_method="standard"
    )


def verify(
    ours: Any, target_V: Tensor, draft_V: Tensor, slots_B: Tensor, lengths_B: Tensor, tokens: Tensor
) -> tuple[Tensor, Tensor]:
    """Every request's drafts come from one law and are judged by another; pending tokens and drafts stand in one row."""
    ends = torch.cat([torch.zeros(1, dtype=torch.long), (lengths_B + 1).cumsum(0)])
    slots_T = slots_B.repeat_interleave(lengths_B + 1)
    places_T = torch.arange(int(ends[-1])) - ends[:-1].repeat_interleave(lengths_B + 1)
    draft_logits = draft_V.expand(int(slots_B.max()) + 1, DRAFTS, -1)
    logits = target_V.expand(len(slots_T), -1)
    upper, numbers = np.zeros(len(slots_B)), slots_B.numpy()
    _, sampled_BN, count_B = ours._verify(
        logits, draft_logits, tokens, places_T, ends.int(), slots_B, numbers, slots_T, places_T, upper, tokens
    )
    return sampled_BN, count_B


def test_the_second_runner_is_left_alone_where_nothing_is_asked() -> None:
    assert model_state(None, speculation())(Sampler(torch.ones(1))) is None
    assert model_state({"min_p": 0.1}, None)(sampler := Sampler(torch.ones(1))) is None
    assert len(sampler.logits_processors) == 1


def test_rounds_of_the_second_runner_have_the_target_s_law() -> None:
    """Ragged drafts in shuffled slots, greedy requests among them, and a draft that the runner marks as none."""
    draw = torch.Generator().manual_seed(0)
    target_V, noise_V = (torch.randn(VOCABULARY, generator=draw) for _ in range(2))
    draft_V = target_V + 0.5 * noise_V
    slots_B = torch.randperm(REQUESTS, generator=draw)
    temperatures = torch.full((REQUESTS,), TEMPERATURE)
    temperatures[slots_B[::5]] = 0.0
    lengths_B = torch.randint(0, DRAFTS + 1, (REQUESTS,), generator=draw)
    law_V = (draft_V / TEMPERATURE).softmax(-1)
    tokens = torch.multinomial(law_V, int((lengths_B + 1).sum()), replacement=True, generator=draw)
    starts_B = (lengths_B + 1).cumsum(0) - lengths_B - 1
    none_B = (torch.arange(REQUESTS) % 7 == 0) & (lengths_B > 0)
    tokens[starts_B[none_B] + 1] = -1
    _, ours = model_state({"rule": {"kind": "block"}}, speculation())(Sampler(temperatures))
    sampled_BN, count_B = verify(ours, target_V, draft_V, slots_B, lengths_B, tokens)
    assert sampled_BN.shape == (REQUESTS, DRAFTS + 1)
    assert bool((count_B <= lengths_B + 1).all())
    assert bool((count_B[none_B] == 1).all())
    greedy_B = temperatures[slots_B] == 0
    said_BN = torch.arange(DRAFTS + 1) < count_B[:, None]
    assert bool((sampled_BN[greedy_B][said_BN[greedy_B]] == target_V.argmax()).all())
    right_V = (target_V / TEMPERATURE).softmax(-1)
    for place in range(DRAFTS + 1):
        came = sampled_BN[~greedy_B & said_BN[:, place], place]
        assert goodness(torch.bincount(came, minlength=VOCABULARY), right_V * len(came)).passed
    mean = float(count_B[~greedy_B & ~none_B & (lengths_B == DRAFTS)].float().mean())
    assert 2.0 < mean < DRAFTS + 1  # drafts are kept, not all of them


def test_a_rule_that_keeps_every_draft_tells_the_drafts() -> None:
    kept = rules(parse(Variant, {"rule": {"kind": "synthetic", "rates": [1.0]}}, "rule").rule)
    _, ours = model_state({"rule": {"kind": "synthetic", "rates": [1.0]}}, speculation())(Sampler(torch.ones(2)))
    assert ours.rules == kept
    tokens = torch.tensor([4, 1, 2, 4, 3])  # two requests: a pending token with two drafts, and one with one
    flat_V = torch.zeros(VOCABULARY)
    sampled_BN, count_B = verify(ours, flat_V, flat_V, torch.tensor([1, 0]), torch.tensor([2, 1]), tokens)
    assert count_B.tolist() == [3, 2]
    assert sampled_BN[0, :2].tolist() == [1, 2]
    assert sampled_BN[1, 0].tolist() == 3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_min_p_before_the_temperature_is_min_p_after_it(temperature: float) -> None:
    from forerun.plugin.v2 import MinP

    logits_TV = torch.randn(50, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 3
    sampler = Sampler(torch.tensor([temperature]))
    ours = MinP(0.1, sampler.sampling_states)
    assert ours.add_request(0, SimpleNamespace(temperature=temperature))
    cut_TV = ours.apply(logits_TV, SimpleNamespace(expanded_idx_mapping=torch.zeros(50, dtype=torch.long)))
    warp = build_warp([Sampling(temperature=temperature, min_p=0.1)], 20, torch.device("cpu"))
    right_TV = law(logits_TV[None], warp)[0]
    assert torch.allclose((cut_TV / temperature).softmax(-1), right_TV, atol=1e-12)
    assert 0 < int((right_TV == 0).sum()) < right_TV.numel()
