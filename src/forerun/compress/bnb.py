"""bitsandbytes: LLM.int8 (Dettmers et al. 2022, arXiv 2208.07339), NF4 and FP4 (Dettmers et al. 2023, arXiv 2305.14314).

A model must be saved before its first forward pass: on a CPU with AVX-512 bfloat16 that pass repacks 4-bit weights, and what is
saved then is another model.
"""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from forerun.config import BnbConfig
from forerun.model import first_line, refuse_incomplete
from forerun.types import UserError

NOISE = logging.getLogger("bitsandbytes.autograd._functions")


def bnb(config: BnbConfig, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` must be told; `dtype` is the model's own, in which 4-bit layers compute by default."""
    if importlib.util.find_spec("bitsandbytes") is None or importlib.util.find_spec("accelerate") is None:
        raise UserError("recipe bnb needs bitsandbytes and accelerate: pip install 'forerun[bnb]'")
    if config.bits == 8:
        return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=config.threshold)}
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=config.quant_type,
            bnb_4bit_use_double_quant=config.double_quant,
            bnb_4bit_compute_dtype=dtype if config.compute_dtype == "auto" else getattr(torch, config.compute_dtype),
        )
    }


def load(
    folder: Path | str, config: BnbConfig, dtype: torch.dtype, device: str = "cpu", attention: str | None = None
) -> PreTrainedModel:
    """A model quantized while it is read, so that memory never holds all of it dense; save it before its first forward pass."""
    kwargs: dict[str, Any] = bnb(config, dtype) | ({} if attention is None else {"attn_implementation": attention})
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, device_map={"": device}, output_loading_info=True, **kwargs
        )
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # a cut-off file, a device without a kernel: no common base class
        raise UserError(
            f"model {str(folder)!r} cannot be quantized by bitsandbytes on {device!r}: {first_line(error)}"
        ) from error
    model: PreTrainedModel = found[0]
    refuse_incomplete(str(folder), found[1])
    hush()
    model.eval().requires_grad_(False)
    return model


def refuse_misfit(model: nn.Module, config: BnbConfig) -> None:
    """UserError for the first layer whose shape the 4-bit kernels refuse; LLM.int8 takes any. A model on meta will do."""
    if config.bits == 8:
        return
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    for name, module in model.named_modules():
        if module is head or not isinstance(module, nn.Linear | Conv1D):
            continue
        outputs, inputs = module.weight.T.shape if isinstance(module, Conv1D) else module.weight.shape
        if outputs % 32 or inputs % 64:
            raise UserError(
                f"{name} [{outputs}, {inputs}] has no {config.quant_type} kernel: it wants outputs in "
                "multiples of 32 and inputs in multiples of 64; take bits: 8, or gptq"
            )


def hush() -> None:
    """Drop the one warning that LLM.int8 logs for each layer in each forward pass; what else it logs stays."""
    if not any(isinstance(one, NoCasts) for one in NOISE.filters):
        NOISE.addFilter(NoCasts())


class NoCasts(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "inputs will be cast" not in str(record.msg)
