"""Layer errors of forerun's GPTQ beside gptqmodel's, from the same texts: the embedded target in 4 bit.

    python benchmarks/gptqmodel_errors.py

In an environment with `gptqmodel` (7.6). Both quantize layer by layer, each on what its own quantized layers before send on.
The error of a layer, ||WX - W'X|| / ||WX||, is taken on what the unquantized model sends: both are judged by the same X.
gptqmodel's own checkpoint is read back by forerun. Nothing is timed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import shlex
import statistics
import sys
import tempfile
from collections import defaultdict
from contextlib import chdir
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from forerun.bench import hardware
from forerun.compress.apply import Task, quantize
from forerun.compress.calibrate import decoder_layers, linears, sequential
from forerun.compress.prune import lost
from forerun.compress.recipes import Units
from forerun.compress.restore import load as load_folder
from forerun.compress.run import calibration
from forerun.config import CalibrationConfig, GPTQConfig, ModelConfig
from forerun.model import ASSETS, load
from forerun.packed.codes import CodedLinear


def seen(model: PreTrainedModel, tokens_ST: Tensor) -> dict[str, Tensor]:
    """X X^T of every linear layer in the model as it is."""
    found: dict[str, Tensor] = {}
    prefix, _ = decoder_layers(model)

    def visit(number: int, observed: dict[str, tuple[nn.Module, Tensor]]) -> dict[str, nn.Module]:
        found.update({f"{prefix}.{number}.{name}": hessian_KK for name, (_, hessian_KK) in observed.items()})
        return {}

    sequential(model, tokens_ST, visit, "hessian")
    return found


def theirs(tokens_ST: Tensor, recipe: GPTQConfig, folder: Path) -> PreTrainedModel:
    """gptqmodel's checkpoint of the embedded target, without its own order of groups by activation, which forerun lacks."""
    os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # it fails at once on a machine of one or two cores
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(
        bits=recipe.bits, group_size=recipe.group_size, sym=recipe.symmetric, desc_act=recipe.act_order,
        damp_percent=recipe.damping, act_group_aware=False,
    )  # fmt: skip
    model = GPTQModel.load(str(ASSETS / "target"), config, device="cpu")
    model.quantize(
        [{"input_ids": row_T[None], "attention_mask": torch.ones_like(row_T)[None]} for row_T in tokens_ST], batch_size=1
    )
    model.save(str(folder))
    return load_folder(folder, dtype=torch.float32)


def errors(model: PreTrainedModel, coded: PreTrainedModel, hessians: dict[str, Tensor]) -> dict[str, float]:
    found = {}
    for name, layer in linears(coded).items():
        assert isinstance(layer, CodedLinear)
        weight_NK = model.get_submodule(name).weight
        found[name] = lost(weight_NK.detach(), layer.codes().dequantize(torch.float32), hessians[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--damping", type=float, default=0.05, help="gptqmodel's own default")
    parser.add_argument("--json", default="benchmarks/results/gptqmodel_errors.json", help="where figures are written")
    options = parser.parse_args()
    loaded = load(ModelConfig(dtype="float32", device="cpu"))
    model = loaded.model
    recipe = GPTQConfig(damping=options.damping)
    texts = CalibrationConfig(samples=options.samples, length=options.length)
    tokens_ST = calibration(texts, loaded, lambda *_: None)
    with torch.no_grad(), tempfile.TemporaryDirectory() as scratch:
        hessians, ours = seen(model, tokens_ST), copy.deepcopy(model)
        quantize(Task(0, ours, tokens_ST, Units(), lambda *_: None), recipe)
        sides = {"forerun": errors(model, ours, hessians)}
        with torch.enable_grad(), chdir(scratch):  # where it leaves its log
            other = theirs(tokens_ST, recipe, Path(scratch) / "model")
        sides["gptqmodel"] = errors(model, other, hessians)
    kinds: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for name, error in sides["forerun"].items():
        for kind in (name.rsplit(".", 1)[1], "all"):
            kinds[kind].append((error, sides["gptqmodel"][name]))
    print("| layers | forerun | gptqmodel | lower or equal in |\n|---|---|---|---|")
    for kind, pairs in kinds.items():
        mine, other_mean = (statistics.mean(each) for each in zip(*pairs, strict=True))
        print(f"| {kind} | {mine:.5f} | {other_mean:.5f} | {sum(one <= two for one, two in pairs)} of {len(pairs)} |")
    found = {"command": shlex.join(["python", *sys.argv]), "environment": hardware.environment(), "errors": sides}
    Path(options.json).write_text(json.dumps(found, indent=1, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
