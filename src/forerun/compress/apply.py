"""Carries out one recipe on a loaded model, in place, and says what it did to each layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from forerun.compress import coupled, gptq, partial, prune, rounding
from forerun.compress.calibrate import Observed, decoder_layers, linears, sequential
from forerun.compress.fit import refuse_unfit
from forerun.compress.recipes import Row, Units, bytes_of, named
from forerun.config import GPTQConfig, PruneConfig, RoundConfig
from forerun.packed.codes import CodedLinear
from forerun.packed.pruned import L1PrunedInputLinear, L1PrunedOutputLinear
from forerun.types import UserError

Tell = Callable[[str, int, int], None]
"""Progress: what is being done, how much of it is done, of how much."""
Layer = nn.Linear | CodedLinear
Of = Literal["outputs", "weights"]
Pruned = L1PrunedInputLinear | L1PrunedOutputLinear


@dataclass(frozen=True)
class Task:
    """One recipe of a list, and what it works on."""

    index: int
    model: PreTrainedModel
    tokens_ST: Tensor | None  # calibration; None where the recipe needs none
    units: Units
    tell: Tell
    partial: Path | None = None  # folder of finished layers

    def progress(self, what: str) -> Callable[[int, int], None]:
        return lambda done, total: self.tell(f"recipe {self.index + 1}: {what}", done, total)


def round_to_nearest(task: Task, recipe: RoundConfig) -> list[Row]:
    refuse_unfit(task.model, [recipe])
    rows = []
    all_layers = linears(task.model)
    for number, (name, layer) in enumerate(all_layers.items()):
        assert isinstance(layer, nn.Linear)
        coded, row = rounded(task, recipe, name, layer)
        rows.append(row)
        task.model.set_submodule(name, coded)
        task.progress(named(recipe))(number + 1, len(all_layers))
    return rows


def rounded(task: Task, recipe: RoundConfig, name: str, layer: nn.Linear) -> tuple[CodedLinear, Row]:
    codes = rounding.quantize(layer.weight, recipe.bits, recipe.group_size, recipe.symmetric, name)
    coded = CodedLinear.of(codes, layer.bias)
    return coded, coded_row(task, recipe, name, layer, coded, None)


def coded_row(
    task: Task, recipe: RoundConfig | GPTQConfig, name: str, layer: nn.Linear, coded: CodedLinear, hessian_KK: Tensor | None
) -> Row:
    weight_NK = prune.dense(layer)
    error = prune.lost(weight_NK, coded.codes().dequantize(weight_NK.dtype), hessian_KK)
    of: Of = "weights" if hessian_KK is None else "outputs"
    size = layer.in_features
    return Row(task.index, name, named(recipe), size, size, bytes_of(layer), bytes_of(coded), error, of)


def quantize(task: Task, recipe: GPTQConfig) -> list[Row]:
    """GPTQ layer by layer; finished layers are kept in `partial` and are not done twice.

    A layer that no text reaches, such as an expert that is never routed to, is rounded to nearest, and its row says so.
    """
    assert task.tokens_ST is not None
    refuse_unfit(task.model, [recipe])
    prefix, layers = decoder_layers(task.model)
    unseen = RoundConfig(bits=recipe.bits, group_size=recipe.group_size, symmetric=recipe.symmetric)
    rows: list[Row] = []

    def path(number: int) -> Path | None:
        return None if task.partial is None else task.partial / f"recipe-{task.index}-layer-{number}.safetensors"

    def done(number: int) -> dict[str, CodedLinear] | None:
        place = path(number)
        kept = None if place is None else partial.read(place, task.model.device)
        if kept is None:
            return None
        rows.extend(kept[1])
        return kept[0]

    def visit(number: int, observed: Observed) -> dict[str, CodedLinear]:
        new: dict[str, CodedLinear] = {}
        found: list[Row] = []
        for names, hessian_KK in by_statistic(observed):
            whole = {f"{prefix}.{number}.{name}": observed[name][0] for name in names}
            codes = gptq.quantize_together(
                {name: layer.weight for name, layer in whole.items()}, hessian_KK, recipe.bits, recipe.group_size,
                recipe.symmetric, recipe.act_order, recipe.damping,
            )  # fmt: skip
            for short, (name, layer) in zip(names, whole.items(), strict=True):
                assert isinstance(layer, nn.Linear)
                new[short] = CodedLinear.of(codes[name], layer.bias)
                found.append(coded_row(task, recipe, name, layer, new[short], hessian_KK))
        for short, layer in layers[number].named_modules():
            if isinstance(layer, nn.Linear) and short not in observed:
                new[short], row = rounded(task, unseen, f"{prefix}.{number}.{short}", layer)
                found.append(row)
        place = path(number)
        if place is not None:
            partial.keep(place, new, found)
        rows.extend(found)
        return new

    sequential(task.model, task.tokens_ST, visit, "hessian", done, task.progress(named(recipe)))
    return rows


def by_statistic(observed: Observed) -> Iterable[tuple[list[str], Tensor]]:
    """Names of the layers that read the same tensor, with its statistic."""
    groups: dict[int, tuple[list[str], Tensor]] = {}
    for name, (_, statistic) in observed.items():
        groups.setdefault(id(statistic), ([], statistic))[0].append(name)
    return groups.values()


def prune_model(task: Task, recipe: PruneConfig) -> list[Row]:
    refuse_unfit(task.model, [recipe])
    if recipe.what in ("mlp", "heads"):
        return prune_coupled(task, recipe)
    return prune_single(task, recipe)


def prune_single(task: Task, recipe: PruneConfig) -> list[Row]:
    """Inputs or outputs of each linear layer, by scores from the model as it is before any layer is pruned."""
    layers = linears(task.model)
    of_inputs = recipe.what == "input"
    magnitudes = mean_magnitudes(task)
    score = prune.input_scores if of_inputs else prune.output_scores
    scores = {name: score(prune.dense(layer), magnitudes.get(name)) for name, layer in layers.items()}
    fractions = [recipe.fraction] * len(layers)
    if recipe.scope == "global":
        costs = [layer.out_features if of_inputs else layer.in_features for layer in layers.values()]
        fractions = prune.shares([each.cpu() for each in scores.values()], costs, recipe.fraction)
    keep: dict[str, Tensor] = {}
    for (name, layer), fraction in zip(layers.items(), fractions, strict=True):
        choose, unit = (prune.kept_inputs, task.units.inputs) if of_inputs else (prune.kept_outputs, task.units.outputs)
        keep[name] = choose(layer, scores[name], fraction, unit)
    errors = measured_errors(task, keep, 1 if of_inputs else 0)
    rows = []
    for name, layer in layers.items():
        total, before = layer.in_features if of_inputs else layer.out_features, bytes_of(layer)
        after = put_pruned(task.model, name, layer, keep[name], of_inputs=of_inputs) if len(keep[name]) < total else before
        plain, _ = unwrapped(task.model, name)
        rows.append(Row(task.index, plain, named(recipe), len(keep[name]), total, before, after, *errors[name]))
    return rows


def unwrapped(model: nn.Module, name: str) -> tuple[str, list[Pruned]]:
    """A linear layer's name without the `inner` of the pruned layers around it, and these, innermost first."""
    around: list[Pruned] = []
    while isinstance(parent := model.get_submodule(name.rpartition(".")[0]), Pruned):
        around.append(parent)
        name = name.rpartition(".")[0]
    return name, around


def put_pruned(model: PreTrainedModel, name: str, layer: Layer, keep: Tensor, *, of_inputs: bool) -> int:
    """Put the smaller layer in its place, and return its bytes; one that was pruned so before gets one index for both times."""
    kind = L1PrunedInputLinear if of_inputs else L1PrunedOutputLinear
    before = next((one for one in unwrapped(model, name)[1] if isinstance(one, kind)), None)
    small = prune.with_inputs(layer, keep) if of_inputs else prune.with_outputs(layer, keep)
    if before is not None:
        before.keep = before.keep[keep]
        model.set_submodule(name, small)
        return bytes_of(small)
    around = kind(small, keep, layer.in_features if of_inputs else layer.out_features)
    model.set_submodule(name, around)
    return bytes_of(around)


def prune_coupled(task: Task, recipe: PruneConfig) -> list[Row]:
    """MLP channels or KV heads, as many in every layer; the model's config says so afterwards."""
    assert recipe.what in ("mlp", "heads")
    what: coupled.What = "mlp" if recipe.what == "mlp" else "heads"
    prefix, layers = decoder_layers(task.model)
    config: Any = task.model.config.get_text_config(decoder=True)
    sites = [coupled.site(layer, what, config) for layer in layers]
    where, field = sites[0], "ffn_dim" if hasattr(config, "ffn_dim") else "intermediate_size"
    if any(other != where for other in sites) or (what == "mlp" and getattr(config, field, None) != where.units):
        raise UserError(
            f"prune.what={what}: the layers of {type(task.model).__name__} differ; prune.what=input takes any layers"
        )
    kept_heads = coupled.heads_kept(config, recipe.fraction) if what == "heads" else 0
    magnitudes = mean_magnitudes(task)
    keep: list[Tensor] = []
    for number, layer in enumerate(layers):
        seen = {name.removeprefix(f"{prefix}.{number}."): magnitude for name, magnitude in magnitudes.items()}
        scores_U = coupled.scores(layer, where, seen)
        unit = max(coupled.channel_unit(where.units), task.units.inputs, task.units.outputs)
        chosen_U = (
            prune.best(scores_U, kept_heads)
            if what == "heads"
            else coupled.kept_channels(layer, where, scores_U, recipe.fraction, unit)
        )
        keep.append(chosen_U)
    readers = {f"{prefix}.{number}.{where.reader}": coupled.indices(each, where.width) for number, each in enumerate(keep)}
    errors = list(measured_errors(task, readers, 1).values())  # in the order of the layers
    smaller = [coupled.smaller(layer, where, each) for layer, each in zip(layers, keep, strict=True)]
    rows = []
    for number, (layer, new) in enumerate(zip(layers, smaller, strict=True)):
        before = sum(bytes_of(layer.get_submodule(name)) for name in new)
        for name, module in new.items():
            layer.set_submodule(name, module)
        after, name = sum(map(bytes_of, new.values())), f"{prefix}.{number}" + (".mlp" if what == "mlp" else ".self_attn")
        rows.append(Row(task.index, name, named(recipe), len(keep[number]), where.units, before, after, *errors[number]))
    changes = {field: len(keep[0])}
    if what == "heads":
        changes = coupled.head_counts(config, kept_heads)
    describe(layers, config, changes)
    return rows


def describe(layers: nn.ModuleList, config: Any, changes: dict[str, int]) -> None:
    """Tell the config, and the modules that keep a copy of it, what the sizes are now."""
    for name, value in changes.items():
        setattr(config, name, value)
        for module in layers.modules():
            for own in (name, "num_heads" if name == "num_attention_heads" else name):
                if isinstance(getattr(module, own, None), int):
                    setattr(module, own, value)


def mean_magnitudes(task: Task) -> dict[str, Tensor]:
    """The mean magnitude of each linear layer's inputs, by the layer's full name; nothing where there is no calibration."""
    found: dict[str, Tensor] = {}
    if task.tokens_ST is None:
        return found
    prefix, _ = decoder_layers(task.model)

    def visit(number: int, observed: Observed) -> dict[str, nn.Module]:
        found.update({f"{prefix}.{number}.{name}": statistic for name, (_, statistic) in observed.items()})
        return {}

    sequential(task.model, task.tokens_ST, visit, "magnitude", tell=task.progress("what the layers see"))
    return found


def measured_errors(task: Task, keep: dict[str, Tensor], dim: Literal[0, 1]) -> dict[str, tuple[float, Of]]:
    """The relative error of each named layer where only the given inputs (dim 1) or outputs (dim 0) stay, others zero.

    Of its outputs; of its weights where there are no texts, or none reaches the layer.
    """

    def error(layer: Layer, kept: Tensor, hessian_KK: Tensor | None) -> float:
        weight_NK = prune.dense(layer)
        masked_NK = torch.zeros_like(weight_NK).index_copy(dim, kept, weight_NK.index_select(dim, kept))
        return prune.lost(weight_NK, masked_NK, hessian_KK)

    prefix, _ = decoder_layers(task.model)
    found: dict[str, float] = {}

    def visit(number: int, observed: Observed) -> dict[str, nn.Module]:
        for short, (layer, hessian_KK) in observed.items():
            name = f"{prefix}.{number}.{short}"
            if name in keep:
                found[name] = error(layer, keep[name], hessian_KK)
        return {}

    if task.tokens_ST is not None:
        sequential(task.model, task.tokens_ST, visit, "hessian", tell=task.progress("what pruning loses"))
    return {
        name: (found[name], "outputs") if name in found else (error(get_linear(task.model, name), kept, None), "weights")
        for name, kept in keep.items()
    }


def get_linear(model: PreTrainedModel, name: str) -> Layer:
    layer = model.get_submodule(name)
    assert isinstance(layer, Layer)
    return layer
