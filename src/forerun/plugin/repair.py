"""Two faults of vLLM's CPU build, found by trying, and their repairs.

Under speculation `expand_batch_to_tokens` leaves its result uninitialised: temperatures, top-p and top-k of drafted tokens pass
through it, so that requests which sample get the wrong law, silently. And every engine of a process registers the CPU's kernels
again, by looking through all loaded modules, which fails once an n-gram drafter has loaded numba.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def expand(x: Tensor, cu_num_tokens: Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0) -> Tensor:
    """What vLLM's function of the same arguments promises: x[i] once for each token of request i, one value replaced."""
    counts_B = cu_num_tokens.diff(prepend=cu_num_tokens.new_zeros(1))
    return torch.where(x == replace_from, replace_to, x).repeat_interleave(counts_B, output_size=num_tokens)


def works(module: ModuleType) -> bool:
    """Whether a module's `expand_batch_to_tokens` expands; two probes, for unwritten memory may hold the first one."""
    ends_B = torch.tensor([2, 5, 6], dtype=torch.int32)
    for probe in ([0.7, 0.0, 1.3], [0.25, 3.0, 0.0]):
        found_T = module.expand_batch_to_tokens(torch.tensor(probe), ends_B, 6, replace_from=0, replace_to=1)
        if not torch.equal(found_T, expand(torch.tensor(probe), ends_B, 6, replace_from=0, replace_to=1)):
            return False
    return True


def mend(module: ModuleType) -> bool:
    """Replace the function in its module where it fails the test; says so in vLLM's log. Returns whether it did."""
    if works(module):
        return False
    module.expand_batch_to_tokens = expand  # type: ignore[attr-defined]
    logging.getLogger("vllm.forerun").warning(
        "This vLLM does not expand the sampling parameters of drafted tokens, which makes sampling under speculation wrong; "
        "forerun has replaced %s.expand_batch_to_tokens.", module.__name__,
    )  # fmt: skip
    return True


def repaired(module: ModuleType) -> str | None:
    """The name of what `mend` replaced in a module; None: nothing."""
    return f"{module.__name__}.expand_batch_to_tokens" if module.expand_batch_to_tokens is expand else None


def once(register: Callable[[Mapping[str, Any]], None], known: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], None]:
    """vLLM's `register_kernels`, for kernels that are not `known` yet."""

    def register_kernels(overrides: Mapping[str, Any]) -> None:
        if fresh := {name: kernel for name, kernel in overrides.items() if name not in known}:
            register(fresh)

    return register_kernels
