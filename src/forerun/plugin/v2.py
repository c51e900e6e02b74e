"""The adapter to vLLM's second model runner (the default on CUDA). Written from its source and not yet run there.

Shape suffixes: B requests, T drafted tokens and pending ones of all requests in a row, N = most drafts + 1, V vocabulary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu.model_states.interface import ModelState
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from forerun.plugin.rounds import Dice, Rules, emitted, judge, rules
from forerun.plugin.settings import is_ours, settings


def install() -> None:
    """Answer the runner's question for a sampler of the model's own; models that bring one keep it."""
    if not is_ours(ModelState.custom_sampler):
        ModelState.custom_sampler = asking(ModelState.custom_sampler)


def asking(own: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def custom_sampler(self: Any, sampler: Any) -> Any:
        config, speculation = settings(self.vllm_config), self.vllm_config.speculative_config
        if config is None:
            return own(self, sampler)
        if config.min_p > 0:
            sampler.logits_processors.append(MinP(config.min_p, sampler.sampling_states))
        if speculation is None:
            return own(self, sampler)
        seed = self.vllm_config.model_config.seed or 0
        return sampler, RuledSampler(sampler, speculation, self.device, rules(config.rule), seed)

    return custom_sampler


class RuledSampler(RejectionSampler):  # type: ignore[misc]
    """vLLM's rejection sampler with a rule of ours; requests' own seeds hold for their first tokens only."""

    def __init__(self, sampler: Any, spec_config: Any, device: torch.device, rules: Rules, seed: int) -> None:
        super().__init__(sampler, spec_config, device)
        self.rules = rules
        # One stream, alike in every process of a tensor-parallel group, which must draw the same tokens.
        self.stream = torch.Generator(device).manual_seed(seed)
        logging.getLogger("vllm.forerun").info("Drafts are judged by forerun's rule %s.", rules)

    def _verify(
        self, logits: Tensor, draft_logits: Tensor | None, draft_sampled: Tensor, pos: Tensor, cu_num_logits: Tensor,
        idx_mapping: Tensor, idx_mapping_np: Any, expanded_idx_mapping: Tensor, expanded_local_pos: Tensor,
        seq_lens_upper_bound_np: Any, verify_draft_sampled: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """As vLLM's: logits [T, V], draft_logits [slots, N - 1, V] before temperature; gives logits, tokens [B, N], counts."""
        warped_TV = self.sampler.apply_sampling_params(
            logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, draft_sampled, expanded_local_pos,
            seq_lens_upper_bound_np,
        )  # fmt: skip
        most, states = self.num_speculative_steps, self.sampler.sampling_states
        start_B1, lengths_B = cu_num_logits[:-1, None], cu_num_logits.diff() - 1
        place_BN = (start_B1 + torch.arange(most + 1, device=logits.device)).clamp_max(len(logits) - 1)
        tokens_BN = verify_draft_sampled[place_BN].long()
        temperature_B = states.temperature.gpu[idx_mapping]
        probs_BNV = None
        if draft_logits is not None:
            scale_B = torch.where(temperature_B == 0, 1.0, temperature_B)
            probs_BKV = (draft_logits[idx_mapping].float() / scale_B[:, None, None]).softmax(-1)
            wider = logits.shape[1] - probs_BKV.shape[2]  # the vocabularies may be padded differently
            probs_BNV = torch.nn.functional.pad(probs_BKV, (0, wider, 1, 0))
        kept_B, next_B = judge(
            self.rules, tokens_BN, lengths_B, warped_TV[place_BN].float(), probs_BNV, temperature_B == 0,
            all_greedy=not states.temperature.np[idx_mapping_np].any(), dice=Dice(self.stream, {}),
        )  # fmt: skip
        return warped_TV, emitted(tokens_BN, kept_B, next_B), (kept_B + 1).int()


class MinP:
    """Min-p for every request that samples, after the penalties; logits come before their temperature."""

    def __init__(self, at_least: float, states: Any) -> None:
        self.gap, self.states = math.log(at_least), states

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        return bool(sampling_params.temperature != 0)

    def apply(self, logits: Tensor, ctx: Any) -> Tensor:
        """Where p < m * max p at temperature t, the logit lies more than t * -log m below the largest."""
        temperature_T = self.states.temperature.gpu[ctx.expanded_idx_mapping]
        floor_T = logits.amax(-1) + temperature_T * self.gap
        return logits.masked_fill(logits < floor_T[:, None], -torch.inf)

    def apply_staged_writes(self) -> None:
        """Nothing is staged."""
