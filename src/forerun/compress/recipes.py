"""Which recipes go together, what one asks of those before it, and what a recipe says it did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from forerun.config import BnbConfig, GPTQConfig, PruneConfig, RecipeConfig, RoundConfig
from forerun.types import UserError


@dataclass(frozen=True)
class Row:
    """What one recipe did to one layer, or to one group of coupled layers."""

    recipe: int  # place in the list, from 0
    layer: str
    did: str  # such as `prune input`, `gptq 4 bit g128`
    kept: int  # inputs, outputs, channels or heads
    total: int
    bytes_before: int
    bytes_after: int
    error: float | None  # relative; None: not measured
    of: Literal["outputs", "weights"] | None  # ||WX - W'X|| / ||WX|| on the calibration texts, or ||W - W'|| / ||W||


@dataclass(frozen=True)
class Units:
    """Multiples in which pruning must leave inputs and outputs, for the sake of the recipes that follow."""

    inputs: int = 1
    outputs: int = 1


def check(recipes: Sequence[RecipeConfig]) -> None:
    """UserError in one sentence for a list that cannot be carried out; before anything is loaded."""
    quantized: str | None = None
    single: str | None = None
    for index, recipe in enumerate(recipes):
        place = f"recipes.{index}"
        if isinstance(recipe, PruneConfig):
            if quantized == "bnb":
                raise UserError(f"{place}: bitsandbytes' layers cannot be pruned; put prune before bnb")
            if recipe.what in ("mlp", "heads"):
                if recipe.scope == "global":
                    raise UserError(f"{place}.scope=global: {recipe.what} are pruned alike in every layer; take scope=layer")
                if single is not None:
                    raise UserError(
                        f"{place}: {recipe.what} take the same channels from several layers; put it before {single}"
                    )
            else:
                single = single or place
        elif recipe.kind == "bnb" and single is not None:
            raise UserError(f"{place}: bitsandbytes reads plain checkpoints; prune mlp or heads before it, or take gptq")
        elif quantized is not None:
            raise UserError(f"{place}: {recipe.kind} after {quantized} would quantize twice; keep one of them")
        else:
            quantized = recipe.kind


def units_for(later: Sequence[RecipeConfig]) -> Units:
    """What the quantization that follows asks: whole groups of inputs, and the shapes that its kernels take."""
    units = Units()
    for recipe in later:
        if isinstance(recipe, GPTQConfig | RoundConfig):
            group = 16 if recipe.group_size == -1 else recipe.group_size
            units = Units(math.lcm(units.inputs, group), math.lcm(units.outputs, 32))
        elif isinstance(recipe, BnbConfig) and recipe.bits == 4:
            units = Units(math.lcm(units.inputs, 64), math.lcm(units.outputs, 32))
    return units


def apart(recipes: Sequence[RecipeConfig]) -> int:
    """How many recipes, up to the quantization, can be carried out by themselves, so that what follows need not repeat them.

    0 where nothing follows, or where pruning learns from texts that the model writes: a quantized one would write others.
    """
    first = next((i + 1 for i, one in enumerate(recipes) if isinstance(one, GPTQConfig | RoundConfig)), 0)
    later = [one for one in recipes[first:] if isinstance(one, PruneConfig)]
    taught = all(one.score == "l1" or one.calibration.workload is not None for one in later)
    return first if later and taught else 0


def named(recipe: RecipeConfig) -> str:
    """What a report calls a recipe."""
    if isinstance(recipe, PruneConfig):
        return f"prune {recipe.what}"
    if isinstance(recipe, BnbConfig):
        return "bnb LLM.int8" if recipe.bits == 8 else f"bnb {recipe.quant_type}"
    return f"{recipe.kind} {recipe.bits} bit " + ("a channel" if recipe.group_size == -1 else f"g{recipe.group_size}")


def bytes_of(module: nn.Module) -> int:
    """Bytes of what a module stores."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
