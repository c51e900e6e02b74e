"""`forerun vllm-args`: the `vllm serve` line of a config, so that what was measured is what is served."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from forerun.backends.vllm_args import command, engine_arguments, line
from forerun.config import Variant, load
from forerun.types import UserError
from forerun.verbs.common import hush_libraries


def run(words: Sequence[str]) -> int:
    """Prints a line for each variant, under its name where there are several; returns the exit status.

    Sampling belongs to the requests and is not on the line, but for min-p under speculation, which only the engine can apply.
    """
    configs = [word for word in words if "=" not in word]
    if len(configs) > 1:
        raise UserError(f"vllm-args takes one config file, not {len(configs)}: {', '.join(configs)}")
    hush_libraries()
    variants = load(configs[0] if configs else None, [word for word in words if "=" in word]).expand()
    lines = {name: serve(variant) for name, variant in variants.items()}
    for name, found in lines.items():
        print(f"# {name}\n{found}" if len(lines) > 1 else found)
    return 0


def serve(variant: Variant) -> str:
    """Heads of forerun's own layout are written into the cache in one that vLLM reads, and models of recipes made there."""
    from forerun.backends.vllm_files import find_draft, longest, target_folder

    if variant.backend == "endpoint":
        raise UserError("backend=endpoint: the server runs already; give the config of what it should serve")

    def say(words: str) -> None:
        print(words, file=sys.stderr)

    target = target_folder(variant.model, "target", say)
    return line(command(engine_arguments(variant, target, find_draft(variant, say), longest(variant))))
