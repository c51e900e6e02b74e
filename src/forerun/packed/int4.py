"""4-bit weights through torch's products of bfloat16 and 4-bit integers.

Shape suffixes: M rows (tokens), N outputs, K inputs, G groups, B blocks of outputs, C columns of a tile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from forerun.packed.codes import Codes
from forerun.packed.opaque import refuse_gradient
from forerun.packed.prepacked import frozen

GROUPS = (256, 128, 64, 32)  # inputs of a group that the kernel takes
MULTIPLE = 64  # of outputs; in a smaller last block the kernel lays codes out in another way
MANY = 32  # more rows than these are multiplied by the dequantized weight: the kernel's time grows with every four rows
BLOCK = 4  # rows for which the kernel unpacks a weight once
TILE = 1 << 20  # weights that are dequantized at a time: 4 MB
FEW = 16  # on CUDA, more rows than these are multiplied by the dequantized weight; not measured
CUDA_TILE = (8, 32)  # outputs and inputs whose codes CUDA's layout stores together, in an order of its own


class Kernel(Protocol):
    """A device's kernel; it computes (code - 8) * scale + offset."""

    def lay_out(self, codes_NK: Tensor) -> Tensor: ...

    def product(self, inputs_MK: Tensor, packed: Tensor, size: int, scales_GN2: Tensor) -> Tensor:
        """[M, N]; groups of `size` inputs, their scales and offsets side by side in bfloat16."""
        ...


@dataclass(frozen=True)
class CpuKernel:
    """What this machine's kernel does: how it lays codes out, and which dtype is the fast one beside it."""

    block: int  # outputs of a block; a byte holds output i in its low half and i + block / 2 in its high half
    wide: torch.dtype  # of the product with many rows

    @classmethod
    def found(cls) -> CpuKernel | None:
        """By trial; None where codes lie in no known way (then the kernel is torch's slow reference loop)."""
        codes_NK = torch.randint(16, (2 * MULTIPLE, MULTIPLE), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        packed = lay_out(codes_NK)
        for block in (64, 32):
            if torch.equal(unlay(packed, block), codes_NK):
                return cls(block, faster_dtype())
        return None

    def lay_out(self, codes_NK: Tensor) -> Tensor:
        return lay_out(codes_NK)

    def product(self, inputs_MK: Tensor, packed: Tensor, size: int, scales_GN2: Tensor) -> Tensor:
        if len(inputs_MK) > MANY:
            many: Tensor = wide_product(inputs_MK, packed, scales_GN2, self.block, self.wide)
            return many
        few_MK = inputs_MK.bfloat16().contiguous()  # with other dtypes the kernel is a slow reference loop
        # The kernel shares blocks of BLOCK rows out among threads as if the last one were no smaller: some would wait.
        rest = len(few_MK) % BLOCK
        parts = few_MK.split([len(few_MK) - rest, rest]) if rest and len(few_MK) > BLOCK else (few_MK,)
        products = [torch.ops.aten._weight_int4pack_mm_for_cpu(rows_MK, packed, size, scales_GN2) for rows_MK in parts]
        return torch.cat(products) if len(products) > 1 else products[0]


@dataclass(frozen=True, eq=False)
class CudaKernel:
    """The kernel for NVIDIA cards of compute capability 8.0 and later; many rows take the dequantized weight.

    Written from torch's signatures and not proved on a card; `found` therefore tries both ways before they are used.
    """

    order_T: Tensor  # where in a stored tile each of its codes lies

    @classmethod
    def found(cls, device: torch.device) -> CudaKernel | None:
        """None where the kernel is missing or disagrees with the codes that it was given."""
        codes_NK = torch.randint(16, (MULTIPLE, 128), device=device, dtype=torch.uint8)
        ones_NG = torch.ones(MULTIPLE, 4, device=device)
        codes = Codes(codes_NK, ones_NG, (8 * ones_NG).to(torch.uint8), 4, 32)
        identity_KK = torch.eye(128, device=device)
        try:
            kernel = cls(tile_order(cuda_lay_out, device))
            layer = Int4Linear(codes, Runs(32, None), None, kernel)
            by_few, by_many = torch.cat([layer(rows) for rows in identity_KK.split(FEW)]).T, layer(identity_KK).T
        except (AttributeError, NotImplementedError, RuntimeError):
            return None
        exact_NK = codes.dequantize(by_few.dtype)
        return kernel if torch.equal(by_few, exact_NK) and torch.equal(by_many, exact_NK) else None

    def lay_out(self, codes_NK: Tensor) -> Tensor:
        return cuda_lay_out(codes_NK)

    def product(self, inputs_MK: Tensor, packed: Tensor, size: int, scales_GN2: Tensor) -> Tensor:
        inputs_MK = inputs_MK.bfloat16().contiguous()
        if len(inputs_MK) <= FEW:
            few: Tensor = torch.ops.aten._weight_int4pack_mm(inputs_MK, packed, size, scales_GN2)
            return few
        codes_NK = cuda_unlay(packed, self.order_T)
        scales_NG1, offsets_NG1 = scales_GN2.transpose(0, 1).unsqueeze(-2).unbind(-1)
        weight = torch.addcmul(offsets_NG1, codes_NK.unflatten(1, (-1, size)).bfloat16().sub_(8), scales_NG1)
        return functional.linear(inputs_MK, weight.flatten(1))


def cuda_lay_out(codes_NK: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(codes_NK[:, ::2] << 4 | codes_NK[:, 1::2], 2)
    return packed


def stored_tiles(packed: Tensor) -> Tensor:
    """The codes [blocks of outputs, blocks of inputs, codes of a tile] of CUDA's layout as they are stored."""
    bytes_XYB = packed.view(torch.uint8).flatten(2)
    return torch.stack((bytes_XYB & 15, bytes_XYB >> 4), -1).flatten(2)


def tile_order(lay_out: Callable[[Tensor], Tensor], device: torch.device) -> Tensor:
    """Where a stored tile holds the code of each output and input, found by laying out each place's own number."""
    outputs, inputs = CUDA_TILE
    numbers_NK = torch.arange(outputs * inputs, device=device, dtype=torch.uint8).view(CUDA_TILE).repeat(MULTIPLE // outputs, 1)
    low_T, high_T = (stored_tiles(lay_out(half_NK))[0, 0] for half_NK in (numbers_NK & 15, numbers_NK >> 4))
    order_T: Tensor = (low_T | high_T << 4).argsort()
    return order_T


def cuda_unlay(packed: Tensor, order_T: Tensor) -> Tensor:
    """The codes [out, in] that `cuda_lay_out` laid out."""
    tiles_XYNK: Tensor = stored_tiles(packed)[..., order_T].unflatten(-1, CUDA_TILE)
    return tiles_XYNK.transpose(1, 2).flatten(2).flatten(0, 1)


def lay_out(codes_NK: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK.int(), 1)
    return packed


def unlay(packed: Tensor, block: int) -> Tensor:
    """The codes [out, in] that `lay_out` laid out."""
    outputs, inputs = packed.shape[0], packed.shape[1] * 2
    bytes_BKC = packed.view(outputs // block, inputs, block // 2)
    return torch.cat((bytes_BKC & 15, bytes_BKC >> 4), -1).transpose(1, 2).reshape(outputs, inputs)


def faster_dtype() -> torch.dtype:
    """bfloat16 where its products are faster by half than float32's; elsewhere converting to it would be time wasted."""

    def best(dtype: torch.dtype) -> float:
        rows, weight = torch.ones(64, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        times = []
        for _ in range(6):
            began = time.perf_counter()
            rows @ weight
            times.append(time.perf_counter() - began)
        return min(times)

    return torch.bfloat16 if best(torch.float32) > 1.5 * best(torch.bfloat16) else torch.float32


@dataclass(frozen=True)
class Runs:
    """Groups as the kernel wants them: runs of `size` inputs, after the inputs were put in `order_K`."""

    size: int
    order_K: Tensor | None

    @classmethod
    def of(cls, codes: Codes) -> Runs | None:
        if codes.group_K is not None:
            counts_G = codes.group_K.bincount(minlength=codes.scales_NG.shape[1])
            if counts_G.ne(counts_G[0]).any():
                return None
            wanted, order_K = int(counts_G[0]), codes.group_K.argsort(stable=True)
        elif codes.group_size == -1:
            wanted, order_K = -(-codes.in_features // 32) * 32, None
        else:
            wanted, order_K = codes.group_size, None
        sizes = [size for size in GROUPS if wanted % size == 0]
        return cls(sizes[0], order_K) if sizes else None


class Int4Linear(nn.Module):
    """A linear layer of 4-bit codes in the layout of torch's kernel for them, two a byte; it computes in bfloat16.

    Codes are kept bit for bit; scales and offsets are rounded to bfloat16. Any number of inputs and outputs is taken: the
    weight is padded to what the kernel takes. Groups that are not runs of inputs cost a gather at each call.
    """

    packed: Tensor
    scales: Tensor
    order: Tensor | None

    def __init__(self, codes: Codes, runs: Runs, bias: Tensor | None, kernel: Kernel) -> None:
        super().__init__()
        self.in_features, self.out_features = codes.in_features, codes.out_features
        self.size, self.kernel, self.dtype = runs.size, kernel, codes.scales_NG.dtype
        self.missing = -codes.in_features % runs.size  # inputs that are padded
        codes_NK = codes.codes_NK if runs.order_K is None else codes.codes_NK.index_select(1, runs.order_K)
        below = -codes.out_features % MULTIPLE
        self.register_buffer("packed", kernel.lay_out(functional.pad(codes_NK, (0, self.missing, 0, below))), persistent=False)
        scales_NG, offsets_NG = codes.scales_NG.bfloat16(), codes.zeros_NG.float()
        offsets_NG = ((8 - offsets_NG) * scales_NG).bfloat16()
        both_GN2 = functional.pad(torch.stack((scales_NG, offsets_NG), -1).transpose(0, 1), (0, 0, 0, below))
        groups = (codes.in_features + self.missing) // runs.size
        repeats = -(-groups // both_GN2.shape[0])
        both_GN2 = both_GN2.repeat_interleave(repeats, 0)[:groups].contiguous()
        self.register_buffer("scales", both_GN2, persistent=False)
        self.register_buffer("order", runs.order_K, persistent=False)
        self.bias = None if bias is None else frozen(bias.detach())

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] in the dtype of the codes' scales, read out by the kernel; a fresh tensor."""
        identity_KK = torch.eye(self.in_features, device=self.packed.device)
        return (self.product(identity_KK).T).to(self.dtype)

    def forward(self, states: Tensor) -> Tensor:
        refuse_gradient(states)
        product_MN = self.product(states.reshape(-1, self.in_features)).to(states.dtype)
        if self.bias is not None:
            product_MN = product_MN + self.bias.to(states.dtype)
        return product_MN.view(*states.shape[:-1], self.out_features)

    def product(self, inputs_MK: Tensor) -> Tensor:
        if self.order is not None:
            inputs_MK = inputs_MK.gather(1, self.order.expand_as(inputs_MK))
        if self.missing:
            inputs_MK = functional.pad(inputs_MK, (0, self.missing))
        return self.kernel.product(inputs_MK, self.packed, self.size, self.scales)[:, : self.out_features]

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group={self.size}"


@torch.library.custom_op("forerun::wide_product", mutates_args=())
def wide_product(inputs_MK: Tensor, packed: Tensor, scales_GN2: Tensor, block: int, wide: torch.dtype) -> Tensor:
    """The product of many rows with the weight dequantized tile by tile, so that a tile stays in the cache; in `wide`."""
    (rows, inputs), outputs, half = inputs_MK.shape, packed.shape[0], block // 2
    groups, blocks = len(scales_GN2), outputs // block
    bytes_BKC = packed.view(blocks, inputs, half)
    scales, offsets = scales_GN2.float().view(groups, blocks, 2, half, 2).permute(4, 2, 0, 1, 3).reshape(2, 2, groups, 1, -1)
    offsets = offsets - 8 * scales
    inputs_MK = inputs_MK.to(wide)
    halves_M = inputs_MK.new_empty(2, rows, blocks * half)
    step = max(1, TILE // (inputs * block))
    for first in range(0, blocks, step):
        columns = slice(first * half, min(first + step, blocks) * half)
        bytes_KC = bytes_BKC[first : first + step].transpose(0, 1).reshape(inputs, -1)
        for part, codes_KC in enumerate((bytes_KC & 15, bytes_KC >> 4)):
            tile = codes_KC.float().view(groups, -1, codes_KC.shape[1])
            torch.addcmul(offsets[part, ..., columns], tile, scales[part, ..., columns], out=tile)
            torch.mm(inputs_MK, tile.view(inputs, -1).to(wide), out=halves_M[part, :, columns])
    return halves_M.view(2, rows, blocks, half).permute(1, 2, 0, 3).reshape(rows, outputs)


@wide_product.register_fake
def _(inputs_MK: Tensor, packed: Tensor, scales_GN2: Tensor, block: int, wide: torch.dtype) -> Tensor:  # noqa: ARG001
    return inputs_MK.new_empty(inputs_MK.shape[0], packed.shape[0], dtype=wide)
