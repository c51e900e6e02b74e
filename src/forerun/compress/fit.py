"""What of a model a list of recipes cannot take, found from its sizes alone, before any text is read or weight is changed."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from forerun.compress import coupled, layout
from forerun.compress.calibrate import Linear, decoder_layers, linears
from forerun.compress.prune import count
from forerun.compress.recipes import units_for
from forerun.compress.rounding import group_length
from forerun.config import BnbConfig, PruneConfig, RecipeConfig
from forerun.types import UserError

Sizes = dict[str, tuple[int, int]]
"""Outputs and inputs of each linear layer by its full name."""
SMALL = 0.1
"""Matrices outside linear layers, of all weights of a decoder layer: a router or a short convolution may be, experts not."""


def refuse_unfit(model: PreTrainedModel, recipes: Sequence[RecipeConfig]) -> None:
    """UserError in one sentence for the first layer that a recipe cannot take.

    Sizes after pruning are followed as far as they are known beforehand: not after `scope: global`.
    """
    config: Any = copy.deepcopy(model.config.get_text_config(decoder=True))
    sizes: Sizes = {name: (layer.out_features, layer.in_features) for name, layer in linears(model).items()}
    for index, recipe in enumerate(recipes):
        if isinstance(recipe, BnbConfig):
            return
        if not (isinstance(recipe, PruneConfig) and recipe.what == "heads"):
            refuse_matrices(model)
        if isinstance(recipe, PruneConfig):
            if recipe.scope == "global":
                return
            sizes |= pruned(model, config, sizes, recipe, recipes[index + 1 :])
            continue
        for name, (outputs, inputs) in sizes.items():
            group_length(name, inputs, recipe.group_size)
            layout.refuse_misfit(name, outputs, inputs, recipe.bits)
        return  # codes are pruned as they come


def refuse_matrices(model: PreTrainedModel) -> None:
    """UserError for a model much of whose decoder layers is no linear layer, such as experts in one tensor."""
    prefix, layers = decoder_layers(model)
    for number, layer in enumerate(layers):
        inside = sum(module.out_features * module.in_features for module in layer.modules() if isinstance(module, Linear))
        outside = {
            f"{name}.{leaf}" if name else leaf: parameter
            for name, module in layer.named_modules()
            if not isinstance(module, Linear | nn.Embedding)
            for leaf, parameter in module.named_parameters(recurse=False)
            if parameter.ndim > 1
        }
        held = sum(parameter.numel() for parameter in outside.values())
        if held > SMALL * (inside + held):
            name = max(outside, key=lambda each: outside[each].numel())
            raise UserError(
                f"{prefix}.{number}.{name} {list(outside[name].shape)} of {type(model).__name__} is no linear layer: experts "
                "and the like are not compressed; take a dense model, or prune.what=heads alone"
            )


def pruned(model: PreTrainedModel, config: Any, sizes: Sizes, recipe: PruneConfig, later: Sequence[RecipeConfig]) -> Sizes:
    """The sizes that a pruning recipe will change; tells `config` of heads."""
    units = units_for(later)
    if recipe.what == "input":
        return {name: (outputs, count(inputs, recipe.fraction, units.inputs)) for name, (outputs, inputs) in sizes.items()}
    if recipe.what == "output":
        return {name: (count(outputs, recipe.fraction, units.outputs), inputs) for name, (outputs, inputs) in sizes.items()}
    prefix, layers = decoder_layers(model)
    kept_heads = coupled.heads_kept(config, recipe.fraction) if recipe.what == "heads" else 0
    changed: Sizes = {}
    for number, layer in enumerate(layers):
        where = coupled.site(layer, recipe.what, config)
        reader = f"{prefix}.{number}.{where.reader}"
        channels = sizes[reader][1] // where.width
        unit = max(coupled.channel_unit(channels), units.inputs, units.outputs)
        kept = kept_heads or count(channels, recipe.fraction, unit)
        changed[reader] = sizes[reader][0], kept * where.width
        for rows in where.made:
            name = f"{prefix}.{number}.{rows.layer}"
            width = sum(each.width for each in where.made if each.layer == rows.layer)
            changed[name] = kept * width, sizes[name][1]
    if kept_heads:
        for field, value in coupled.head_counts(config, kept_heads).items():
            setattr(config, field, value)
    return changed
