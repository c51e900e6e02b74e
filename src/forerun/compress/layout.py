"""The tensors of one layer in the standard GPTQ layout, and back. Pure functions.

qweight int32 [K * bits / 32, N], qzeros int32 [G, N * bits / 32], scales [G, N], g_idx int32 [K]; a word's first code is in its
lowest bits. Version 1 (`gptq`) stores zero points less one, version 2 (`gptq_v2`) as they are.
Shape suffixes: N outputs, K inputs, G groups, W words.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from forerun.packed.codes import Codes
from forerun.types import UserError

ONES = {4: 0x11111111, 8: 0x01010101}
"""One in each code of a word. Added to whole words, since that undoes what writers do even where a zero point is 0."""
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def write(name: str, codes: Codes, version: int) -> dict[str, Tensor]:
    """A layer's tensors by their names in a checkpoint."""
    refuse_misfit(name, codes.out_features, codes.in_features, codes.bits)
    stored = codes.scales_NG.dtype in (torch.float16, torch.bfloat16)
    words_GW = pack(codes.zeros_NG, codes.bits).T
    parts = {
        "qweight": pack(codes.codes_NK.T, codes.bits),
        "qzeros": words_GW - ONES[codes.bits] if version == 1 else words_GW,
        "scales": (codes.scales_NG if stored else codes.scales_NG.half()).T,
        "g_idx": codes.groups_K().int(),
    }
    return {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}


def refuse_misfit(name: str, outputs: int, inputs: int, bits: int) -> None:
    """UserError for a shape that does not fill whole words."""
    if (outputs * bits) % 32 or (inputs * bits) % 32:
        raise UserError(f"{name}: [{outputs}, {inputs}] does not fit the GPTQ layout, which wants multiples of {32 // bits}")


def read(name: str, parts: Mapping[str, Tensor], shape: tuple[int, int], bits: int, group_size: int, version: int) -> Codes:
    """Codes of a layer of `shape` [out, in]; g_idx may be missing. ValueError says what does not fit."""
    outputs, inputs = shape
    qweight, qzeros, scales_GN = (parts[part] for part in PARTS[:3])
    groups = len(scales_GN)
    demand(name, "qweight", qweight, (inputs * bits // 32, outputs), torch.int32)
    demand(name, "qzeros", qzeros, (groups, outputs * bits // 32), torch.int32)
    demand(name, "scales", scales_GN, (groups, outputs))
    if not (scales_GN.is_floating_point() and scales_GN.isfinite().all()):
        raise ValueError(f"{name}.scales has values that are no finite numbers")
    size = run_length(inputs, groups, group_size)
    group_K = parts.get("g_idx")
    if group_K is not None:
        demand(name, "g_idx", group_K, (inputs,))
        if group_K.min() < 0 or group_K.max() >= groups:
            raise ValueError(f"{name}.g_idx names groups beyond the {groups} that there are")
        runs_K = None if size is None else torch.arange(inputs) // (inputs if size == -1 else size)
        group_K = None if runs_K is not None and torch.equal(group_K.long().cpu(), runs_K) else group_K.int()
    elif size is None:
        raise ValueError(f"{name}: {groups} groups do not divide {inputs} inputs, and g_idx is missing")
    words_GW = qzeros + ONES[bits] if version == 1 else qzeros
    return Codes(
        unpack(qweight, bits).T.contiguous(), scales_GN.T.contiguous(), unpack(words_GW.T, bits).contiguous(), bits,
        group_size if size is None else size, group_K,
    )  # fmt: skip


def run_length(inputs: int, groups: int, group_size: int) -> int | None:
    """Inputs of a group as the checkpoint says, else as the number of groups says; -1: all inputs; None: no runs."""
    if group_size > 0 and groups == -(-inputs // group_size):
        return group_size
    if groups == 1:
        return -1
    return None if inputs % groups else inputs // groups


def demand(name: str, part: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    if tuple(tensor.shape) != shape or (dtype is not None and tensor.dtype != dtype):
        raise ValueError(
            f"{name}.{part} is {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, not "
            f"{'' if dtype is None else str(dtype).removeprefix('torch.') + ' '}{list(shape)}"
        )


def pack(codes_RC: Tensor, bits: int) -> Tensor:
    """Codes [R, C] as int32 words [R * bits / 32, C]; a word holds codes of successive rows."""
    bytes_RC = codes_RC[::2] | codes_RC[1::2] << 4 if bits == 4 else codes_RC
    bytes_WC4 = bytes_RC.unflatten(0, (-1, 4)).transpose(1, 2)
    words: Tensor = bytes_WC4.flatten().clone().view(torch.int32)  # a view as words needs an aligned start
    return words.view(bytes_WC4.shape[:2])


def unpack(words_WC: Tensor, bits: int) -> Tensor:
    """What `pack` packed, uint8 [R, C]."""
    bytes_RC = words_WC.flatten().view(torch.uint8).view(*words_WC.shape, 4).transpose(1, 2).flatten(0, 1)
    return torch.stack((bytes_RC & 15, bytes_RC >> 4), 1).flatten(0, 1) if bits == 4 else bytes_RC
