"""A variant in vLLM's own words: the arguments of its engine, and the `vllm serve` line that starts a server with them.

Names and meanings: vllm/engine/arg_utils.py (EngineArgs) and vllm/config/speculative.py (SpeculativeConfig). Neither torch nor
vllm is imported here.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from forerun.config import (
    DraftModelConfig,
    EagleConfig,
    MedusaConfig,
    NGramConfig,
    NoDraftConfig,
    Variant,
    VllmConfig,
)
from forerun.types import UserError

OWN_RULES = ("auto", "standard")
"""What vLLM does by itself; forerun's plugin computes every other rule inside it."""
NOT_ARGUMENTS = ("multiprocess", "options", "draft_tensor_parallel_size", "max_model_len")
"""Fields of VllmConfig that are not engine arguments, or are not handed on as they are."""
ROUNDS = "per_request_spec_decode_metrics"
"""The argument by which vLLM tells what each round of a request drafted and accepted."""
SWITCHES = ("disable_log_stats", "aggregate_engine_logging", "data_parallel_multi_port_external_lb", "headless", "grpc")
"""What a server's command line can say yes to alone; every other truth has a `--no-`."""
JSON_LISTS = ("allowed_origins", "allowed_methods", "allowed_headers")
"""Lists that it reads as JSON; of every other one each item is a word."""


@dataclass(frozen=True)
class Draft:
    """What drafts beside the target: a folder or hub id, and vLLM's name for what is in it."""

    path: str
    method: str
    most: int | None = None  # tokens that it can draft at once; None: any number


def engine_arguments(variant: Variant, target: str, draft: Draft | None, longest: int | None = None) -> dict[str, Any]:
    """EngineArgs of a variant: `target` is a folder or hub id, `longest` the most positions that target and draft know.

    UserError where vLLM has no word for what the variant asks.
    """
    refuse_unsayable(variant)
    config = variant.vllm
    capacity = config.max_model_len or min(variant.engine.capacity, longest or variant.engine.capacity)
    given = {key: value for key, value in config.model_dump(exclude=set(NOT_ARGUMENTS)).items() if value is not None}
    defaults = VllmConfig().model_dump()
    said: dict[str, Any] = {
        "model": target,
        "dtype": variant.model.dtype,
        "max_model_len": capacity,
        "max_num_seqs": variant.engine.rows,
        "generation_config": "vllm",  # what a request does not say is not filled from the model's folder; its ends are read
    } | {key: value for key, value in given.items() if value != defaults[key]}
    if variant.model.weights == "random":
        said["load_format"] = "dummy"
    drafts = speculative(variant, draft) | dict(config.options.get("speculative_config") or {})
    rest = {key: value for key, value in config.options.items() if key not in ("speculative_config", "additional_config")}
    extra = plugin_settings(variant, bool(drafts)) | dict(config.options.get("additional_config") or {})
    return said | ({"speculative_config": drafts} if drafts else {}) | ({"additional_config": extra} if extra else {}) | rest


def plugin_settings(variant: Variant, drafts: bool) -> dict[str, Any]:
    """What forerun's plugin is told, as `additional_config`: a rule, and min-p, which vLLM refuses in requests that draft."""
    said: dict[str, Any] = {}
    if drafts and variant.rule.kind not in OWN_RULES:
        said["rule"] = {"kind": variant.rule.kind} | variant.rule.model_dump(exclude_defaults=True)
    if drafts and variant.sampling.min_p:
        said["min_p"] = variant.sampling.min_p
    return {"forerun": said} if said else {}


def speculative(variant: Variant, draft: Draft | None) -> dict[str, Any]:
    """vLLM's SpeculativeConfig; empty where nothing is drafted. Trees become the chain of their first children."""
    drafter = variant.drafter
    if isinstance(drafter, NoDraftConfig) or not drafter.k:
        return {}
    if isinstance(drafter, NGramConfig):
        lookup = {"prompt_lookup_min": drafter.lookup_min, "prompt_lookup_max": drafter.lookup_max}
        return {"method": "ngram", "num_speculative_tokens": drafter.k} | lookup
    assert draft is not None
    k = min(drafter.k, draft.most or drafter.k)
    said: dict[str, Any] = {"method": draft.method, "model": draft.path, "num_speculative_tokens": k}
    if variant.vllm.draft_tensor_parallel_size is not None:
        said["draft_tensor_parallel_size"] = variant.vllm.draft_tensor_parallel_size
    # vLLM drafts greedily unless told otherwise; at temperature 0 both are the same, and greedy drafting is the cheaper.
    wanted = variant.sampling.temperature > 0 or variant.rule.kind not in OWN_RULES
    if wanted and (isinstance(drafter, EagleConfig) or (isinstance(drafter, DraftModelConfig) and not drafter.greedy)):
        said["draft_sample_method"] = "probabilistic"
    return said


def refuse_unsayable(variant: Variant) -> None:
    """UserError for settings that vLLM does not have: a figure under their name would be another thing's."""
    model, drafter = variant.model, variant.drafter
    if model.attention != "auto":
        raise UserError(f"model.attention={model.attention} is transformers' name; vLLM's is vllm.attention_backend")
    if model.device == "balanced" or ":" in model.device:
        raise UserError(
            f"model.device={model.device} with vLLM: set vllm.tensor_parallel_size and CUDA_VISIBLE_DEVICES, and "
            "model.device=auto"
        )
    if isinstance(drafter, NoDraftConfig):
        return
    if drafter.policy != "constant":
        raise UserError(f"drafter.policy={drafter.policy} with vLLM: it drafts a constant k; set drafter.policy=constant")
    if isinstance(drafter, DraftModelConfig):
        if drafter.confidence:
            raise UserError(f"drafter.confidence={drafter.confidence:g} with vLLM: it always drafts k tokens; set it to 0")
        if drafter.dtype not in ("auto", model.dtype):
            raise UserError(f"drafter.dtype={drafter.dtype} with vLLM: the draft has the target's; set drafter.dtype=auto")
        if drafter.weights != model.weights:
            raise UserError("drafter.weights with vLLM: pretrained or random, as model.weights says for both")
    if isinstance(drafter, MedusaConfig | EagleConfig) and any(set(path) != {0} for path in drafter.choices):
        raise UserError(f"drafter.choices with vLLM: it drafts chains, no trees; leave them out, for a chain of {drafter.k}")


def drafts(arguments: Mapping[str, Any]) -> bool:
    """Whether anything is to be drafted; how many tokens, vLLM may fill in."""
    return bool(arguments.get("speculative_config"))


def here(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The same for an engine that is measured from this process: prompts are token ids, texts and ends are ours to tell."""
    own: dict[str, Any] = {"skip_tokenizer_init": True, "disable_log_stats": True}
    return own | ({ROUNDS: "detailed"} if drafts(arguments) else {}) | dict(arguments)


def command(arguments: Mapping[str, Any]) -> list[str]:
    """The words of `vllm serve` for these arguments, as its parser reads each kind."""
    words = ["vllm", "serve", str(arguments["model"])]
    for name, value in arguments.items():
        if name == "model" or value is None or (value is False and name in SWITCHES):
            continue
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
            continue
        items = value if isinstance(value, list) and name not in JSON_LISTS else [value]
        words += [f"--{flag}", *(json.dumps(item) if isinstance(item, dict | list) else str(item) for item in items)]
    return words


def line(words: list[str]) -> str:
    """As a shell reads it."""
    return shlex.join(words)
