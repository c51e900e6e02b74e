"""Which layer is replaced by which."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor, nn

from forerun.packed.codes import CodedLinear, Codes
from forerun.packed.int4 import CpuKernel, CudaKernel, Int4Linear, Kernel, Runs
from forerun.packed.int8 import CudaInt8Linear, Int8Linear
from forerun.packed.prepacked import Prepacked, can_prepack, frozen
from forerun.packed.pruned import L1PrunedInputLinear, L1PrunedOutputLinear
from forerun.packed.siblings import SIBLINGS, Part, Shared


@dataclass(frozen=True)
class Kernels:
    """The kernels of each device; tried where a layer asks for one, and once."""

    four: dict[torch.device, Kernel | None] = field(default_factory=dict)
    eight: dict[torch.device, bool] = field(default_factory=dict)

    def layer(self, layer: CodedLinear) -> nn.Module | None:
        """A layer of the same codes with a kernel; None where no kernel takes them."""
        device = layer.packed.device
        if device.type not in ("cpu", "cuda"):
            return None
        on_cpu = device.type == "cpu"
        if layer.bits == 8:
            if device not in self.eight:
                self.eight[device] = Int8Linear.works() if on_cpu else CudaInt8Linear.works(device)
            kind = Int8Linear if on_cpu else CudaInt8Linear
            return kind(layer.codes(), layer.bias) if self.eight[device] else None
        if device not in self.four:
            self.four[device] = CpuKernel.found() if on_cpu else CudaKernel.found(device)
        codes, kernel = layer.codes(), self.four[device]
        runs = Runs.of(codes)
        return None if runs is None or kernel is None else Int4Linear(codes, runs, layer.bias, kernel)


def pack(model: nn.Module) -> int:
    """Replace the linear layers of a model, in place, by equal and faster ones; returns how many it replaced.

    Siblings such as q/k/v become one product everywhere. On the CPU, weights in bfloat16 and float32 are laid out for oneDNN,
    and layers of codes (`CodedLinear`) get a kernel for 4 or 8 bits, inside pruned layers too; other dtypes, other devices,
    codes that no kernel takes, subclasses of nn.Linear and layers with hooks keep their plain products. Results differ from
    plain ones by rounding, and 8-bit layers also round their inputs (`Int8Linear`). Packing twice changes nothing. Memory:
    weights move into their new layout, float32 weights are kept in both layouts (see `Prepacked`), and an output head that is
    tied to the embedding gets a copy of its own, since the embedding table must stay as it is.
    """
    return pack_children(model, Kernels())


def pack_children(parent: nn.Module, kernels: Kernels) -> int:
    """Depth first, one layer at a time, so that no more than one plain weight lives beside its packed form."""
    replaced = sum(share(parent, names, kernels) for names in SIBLINGS)
    for name in [name for name, _ in parent.named_children()]:
        faster = faster_layer(getattr(parent, name), kernels)
        if faster is not None:
            setattr(parent, name, faster)
            replaced += 1
        else:
            replaced += pack_children(getattr(parent, name), kernels)
    return replaced


def share(parent: nn.Module, names: tuple[str, ...], kernels: Kernels) -> int:
    """Let one product serve the siblings of these names, where they are siblings."""
    layers = [getattr(parent, name, None) for name in names]
    joined = join(layers)
    if joined is None:
        return 0
    shared = Shared(joined, [int(layer.out_features) for layer in layers if isinstance(layer, nn.Module)])  # type: ignore[arg-type]
    for index, name in enumerate(names):
        setattr(parent, name, Part(shared, index))
    del layers, joined
    pack_children(shared, kernels)
    return len(names)


def faster_layer(layer: nn.Module, kernels: Kernels) -> nn.Module | None:
    """The layer that computes the same faster, if there is one."""
    if not is_plain(layer):
        return None
    if isinstance(layer, nn.Linear):
        return Prepacked(layer) if can_prepack(layer.weight) else None
    return kernels.layer(layer) if isinstance(layer, CodedLinear) else None


def is_plain(layer: object) -> bool:
    """One of our kinds and nothing more: a subclass, a hook or a parametrization means more than a product."""
    kinds = (nn.Linear, CodedLinear, L1PrunedInputLinear, L1PrunedOutputLinear)
    if not isinstance(layer, kinds) or type(layer) not in kinds or layer._forward_hooks or layer._forward_pre_hooks:
        return False
    return not any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers()))


def join(layers: Sequence[object]) -> nn.Module | None:
    """One layer whose output is the outputs of all, side by side; None if they are not all of one kind and shape."""
    if not all(is_plain(layer) for layer in layers) or len({type(layer) for layer in layers}) > 1:
        return None
    linears = [layer for layer in layers if isinstance(layer, nn.Linear)]
    if linears:
        return join_linears(linears)
    coded = [layer for layer in layers if isinstance(layer, CodedLinear)]
    if coded:
        return join_coded(coded)
    pruned = [layer for layer in layers if isinstance(layer, L1PrunedInputLinear)]
    if not pruned or any(layer.in_features != pruned[0].in_features for layer in pruned):
        return None  # layers of fewer outputs stay apart: their products are small, and each fills in its own zeros
    if not all(torch.equal(layer.keep, pruned[0].keep) for layer in pruned):
        return None
    inner = join([layer.inner for layer in pruned])
    return None if inner is None else L1PrunedInputLinear(inner, pruned[0].keep, pruned[0].in_features)


def join_linears(layers: list[nn.Linear]) -> nn.Linear | None:
    if len({(layer.in_features, layer.weight.dtype, layer.weight.device) for layer in layers}) > 1:
        return None
    with torch.device("meta"):
        joined = nn.Linear(layers[0].in_features, sum(layer.out_features for layer in layers), bias=False)
    joined.weight = frozen(torch.cat([layer.weight.detach() for layer in layers]))
    if (bias := join_biases(layers, joined.weight)) is not None:
        joined.bias = frozen(bias)
    return joined


def join_coded(layers: list[CodedLinear]) -> CodedLinear | None:
    kinds = {(c.in_features, c.bits, c.group_size, c.scales.shape[1], c.scales.dtype, c.packed.device) for c in layers}
    indexes = [layer.group for layer in layers]
    if len(kinds) > 1 or len({index is None for index in indexes}) > 1:
        return None
    if not all(torch.equal(index, other) for index, other in pairwise(indexes) if index is not None and other is not None):
        return None
    all_codes = [layer.codes() for layer in layers]
    codes = Codes(
        torch.cat([codes.codes_NK for codes in all_codes]),
        torch.cat([codes.scales_NG for codes in all_codes]),
        torch.cat([codes.zeros_NG for codes in all_codes]),
        layers[0].bits,
        layers[0].group_size,
        indexes[0],
    )
    return CodedLinear.of(codes, join_biases(layers, codes.scales_NG))


def join_biases(layers: Sequence[nn.Linear | CodedLinear], like: Tensor) -> Tensor | None:
    """Zeros stand for the bias of a layer that has none."""
    if all(layer.bias is None for layer in layers):
        return None
    zeros = (like.new_zeros(layer.out_features) for layer in layers)
    return torch.cat([zero if layer.bias is None else layer.bias.detach() for layer, zero in zip(layers, zeros, strict=True)])


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all distinct weights with their scales and indices, packed ones included (`parameters()` does not see those).

    bitsandbytes turns 4-bit scales into larger ones in a model's first forward pass on some CPUs: count them after it.
    """
    held = {tensor.data_ptr(): tensor.nbytes for tensor in (*model.parameters(), *scales_beside(model))}
    opaque = 0
    for module in model.modules():
        if isinstance(module, CodedLinear | Int4Linear | CudaInt8Linear | L1PrunedInputLinear | L1PrunedOutputLinear):
            held |= {buffer.data_ptr(): buffer.nbytes for buffer in module.buffers(recurse=False)}
        if isinstance(module, Prepacked | Int8Linear):
            opaque += module.packed_bytes
    return sum(held.values()) + opaque


def scales_beside(model: nn.Module) -> Iterator[Tensor]:
    """What bitsandbytes keeps beside its weights, neither parameters nor buffers: scales and tables of values."""
    for module in model.modules():
        holders: list[object] = [getattr(module, "state", None)]
        for weight in module.parameters(recurse=False):
            state = getattr(weight, "quant_state", None)
            holders += [weight, state, getattr(state, "state2", None)]
        found = (getattr(holder, name, None) for holder in holders for name in ("SCB", "absmax", "code", "offset"))
        yield from (tensor for tensor in found if isinstance(tensor, Tensor))
