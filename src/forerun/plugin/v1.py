"""The adapter to vLLM's first model runner (CPU builds, and GPUs where it is in use).

Shape suffixes: B requests, T drafted tokens of all requests in a row, N = most drafts of a request + 1, V vocabulary.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.triton_utils import dispatcher
from vllm.v1.outputs import SamplerOutput
from vllm.v1.sample import logits_processor, rejection_sampler
from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

from forerun.plugin.repair import expand, mend, once
from forerun.plugin.rounds import Dice, emitted, judge, rules
from forerun.plugin.settings import is_ours, settings
from forerun.sampling import min_p

RUNNER = "vllm.v1.worker.gpu_model_runner"  # takes the names below from their modules when it is imported


def install() -> None:
    """Put our sampler and our warp in the place of vLLM's own, whether or not the runner is imported yet."""
    if is_ours(rejection_sampler.RejectionSampler):
        return
    dispatcher.register_kernels = once(dispatcher.register_kernels, dispatcher._registry)
    builder = warping(logits_processor.build_logitsprocs)
    for module in (rejection_sampler, logits_processor, sys.modules.get(RUNNER)):
        for name, ours in (("RejectionSampler", RuledSampler), ("build_logitsprocs", builder)):
            if hasattr(module, name):
                setattr(module, name, ours)


class RuledSampler(rejection_sampler.RejectionSampler):  # type: ignore[misc]
    """vLLM's rejection sampler, with a rule of ours where the engine's configuration asks for one."""

    def __init__(self, sampler: Any, spec_config: Any = None, device: torch.device | None = None) -> None:
        super().__init__(sampler, spec_config, device)
        if device is None or device.type == "cpu":
            mend(rejection_sampler)
        config = settings(get_current_vllm_config_or_none())
        self.rules = None if config is None else rules(config.rule)
        if self.rules is not None:
            logging.getLogger("vllm.forerun").info("Drafts are judged by forerun's rule %s.", self.rules)

    def forward(self, metadata: Any, draft_probs: Tensor | None, logits: Tensor, sampling_metadata: Any) -> Any:
        """As vLLM's: draft_probs [T, V] or None, logits [T + B, V]; returns tokens [B, N], int32, -1 where there is none."""
        if metadata.max_spec_len == 0:  # nothing was drafted for any request, which vLLM's own warpers do not bear
            return self.sampler(logits[metadata.bonus_logits_indices], sampling_metadata, predict_bonus_token=True)
        if self.rules is None:
            return super().forward(metadata, draft_probs, logits, sampling_metadata)
        processed = self.is_processed_logprobs_mode
        last = self.sampler(  # after a whole draft: as vLLM draws it
            logits=logits[metadata.bonus_logits_indices],
            sampling_metadata=replace(sampling_metadata, max_num_logprobs=-1),
            predict_bonus_token=True,
            logprobs_mode_override="processed_logits" if processed else "raw_logits",
        )
        raw_TV = logits[metadata.target_logits_indices].float()
        warped_TV = self.warp(raw_TV.clone(), metadata, sampling_metadata)
        tokens_BN = self.round(metadata, draft_probs, warped_TV, last.sampled_token_ids[:, 0], sampling_metadata)
        logprobs = None
        if sampling_metadata.max_num_logprobs is not None:
            shown_TV = warped_TV if processed else raw_TV
            most = sampling_metadata.max_num_logprobs
            logprobs = self._get_logprobs_tensors(
                most, metadata, logits, shown_TV, last.logprobs_tensors.logprobs, tokens_BN
            )  # fmt: skip
        return SamplerOutput(sampled_token_ids=tokens_BN, logprobs_tensors=logprobs)

    def warp(self, logits_TV: Tensor, metadata: Any, sampling: Any) -> Tensor:
        """The requests' sampling on drafted tokens, in the order of vLLM's `Sampler`; greedy requests keep their best."""
        logits_TV = self.apply_logits_processors(logits_TV, sampling, metadata)
        if sampling.all_greedy:
            return logits_TV

        def spread(x_B: Tensor | None, instead_of_0: int = 0) -> Tensor | None:
            return None if x_B is None else expand(x_B, metadata.cu_num_draft_tokens, len(logits_TV), 0, instead_of_0)

        temperature_T = spread(sampling.temperature, instead_of_0=1)
        assert temperature_T is not None, "requests that sample have a temperature"
        logits_TV = logits_TV.div_(temperature_T[:, None])
        for processor in sampling.logitsprocs.argmax_invariant:
            logits_TV = processor.apply(logits_TV)
        warped_TV: Tensor = apply_top_k_top_p(logits_TV, spread(sampling.top_k), spread(sampling.top_p))
        return warped_TV

    def round(self, metadata: Any, probs_TV: Tensor | None, logits_TV: Tensor, last_B: Tensor, sampling: Any) -> Tensor:
        """[B, N]: pad the requests' drafts to chains of one length, judge them, and tell what comes out."""
        assert self.rules is not None, "no rule is configured"
        device, most = logits_TV.device, metadata.max_spec_len
        lengths_B = torch.tensor(metadata.num_draft_tokens, device=device)
        start_B1 = (metadata.cu_num_draft_tokens - lengths_B)[:, None]
        place_BN = start_B1 + torch.arange(most + 1, device=device)  # of what the target says after each node
        own_BN, after_BN = (place_BN - 1).clamp(0, len(logits_TV) - 1), place_BN.clamp_max(len(logits_TV) - 1)
        tokens_BN = metadata.draft_token_ids[own_BN].long()
        all_greedy = sampling.all_greedy
        greedy_B = None if sampling.all_random else torch.ones_like(lengths_B) > 0 if all_greedy else sampling.temperature == 0
        if probs_TV is not None:
            probs_TV = torch.nn.functional.pad(probs_TV, (0, logits_TV.shape[1] - probs_TV.shape[1]))  # paddings may differ
        kept_B, next_B = judge(
            self.rules, tokens_BN, lengths_B, logits_TV[after_BN], None if probs_TV is None else probs_TV[own_BN],
            greedy_B, all_greedy, Dice(shared_stream(device), sampling.generators),
        )  # fmt: skip
        return emitted(tokens_BN, kept_B, torch.where(kept_B == lengths_B, last_B, next_B)).int()


class MinP(logits_processor.LogitsProcessor):  # type: ignore[misc]
    """Min-p for every request that samples; `Sampler` applies it between temperature and top-k, to first tokens too."""

    def __init__(self, at_least: float) -> None:
        self.at_least = at_least

    def apply(self, logits: Tensor) -> Tensor:
        return min_p(logits[None], torch.tensor([self.at_least], device=logits.device))[0]

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        """Nothing depends on the batch."""


def warping(own: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM's `build_logitsprocs`, with our min-p among its results where the engine asks for it."""

    def build_logitsprocs(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
        found, config = own(vllm_config, *args, **kwargs), settings(vllm_config)
        if config is not None and config.min_p > 0:
            found.argmax_invariant.append(MinP(config.min_p))
        return found

    return build_logitsprocs


def shared_stream(device: torch.device) -> torch.Generator:
    """The stream that vLLM seeds alike in every process of a tensor-parallel group, which must draw the same tokens."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device()]
    return torch.default_generator
