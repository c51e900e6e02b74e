"""8-bit weights: on the CPU through oneDNN's product of 8-bit integers, on CUDA through torch's with 16-bit inputs.

Shape suffixes: M rows (tokens), N outputs, K inputs, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from forerun.packed.codes import Codes
from forerun.packed.opaque import enroll, numbered_product, refuse_gradient
from forerun.packed.prepacked import frozen

CENTRE = 128  # of unsigned activations: the kernel that takes signed ones is a slow reference loop


class Int8Linear(nn.Module):
    """A linear layer of 8-bit codes whose inputs are rounded to 8 bits at each call, each token with its own scale.

    Codes with one group an output are kept bit for bit. Codes in several groups get one scale an output, that of the largest
    weight: a second rounding by at most 1/254 of the largest weight, where the kernel knows no groups. Each row's result is
    the same whatever rows stand beside it. Without 8-bit dot products (VNNI) oneDNN adds pairs of products in 16 bits, which
    overflow in silence; `works` therefore tries the kernel before it is used.
    """

    def __init__(self, codes: Codes, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = codes.in_features, codes.out_features
        if codes.scales_NG.shape[1] > 1:
            codes = regroup(codes)
        signed_NK = (codes.codes_NK ^ CENTRE).view(torch.int8)
        scales_N = codes.scales_NG[:, 0].float()
        shifts_N = (codes.zeros_NG[:, 0].float() - CENTRE) * scales_N
        self.dtype = codes.scales_NG.dtype
        self.scales = frozen(scales_N)
        self.shifts = frozen(shifts_N) if shifts_N.any() else None
        self.bias = None if bias is None else frozen(bias.detach().float())
        self.packed_bytes = signed_NK.nbytes
        # An opaque tensor: neither a parameter nor a buffer, since it cannot be moved, cast, copied or saved.
        self._packed: Tensor = torch.ops.onednn.qlinear_prepack(signed_NK.contiguous(), None)
        self._no_zeros = torch.zeros(1, dtype=torch.int32)
        self.number = enroll(self)

    @classmethod
    def works(cls) -> bool:
        """Whether the largest codes and inputs are summed without overflow, for one row and for many."""
        if not torch.backends.mkldnn.is_available():
            return False
        signs_N1 = torch.tensor([1.0, -1.0]).repeat(32)[:, None]
        ones_N1 = torch.ones_like(signs_N1)
        codes_NK = (CENTRE + 127 * signs_N1).to(torch.uint8).repeat(1, 256)
        layer = cls(Codes(codes_NK, ones_N1, (CENTRE * ones_N1).to(torch.uint8), 8), None)
        rows_MK = 127 * torch.tensor([1.0, -1.0, 1.0, 1.0, -1.0] * 7)[:, None].repeat(1, 256)
        expected_MN = rows_MK @ (127 * signs_N1 * torch.ones(256)).T  # whole numbers below 2^24
        return torch.equal(layer(rows_MK), expected_MN) and torch.equal(layer(rows_MK[:1]), expected_MN[:1])

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] in the dtype of the codes' scales; a fresh tensor."""
        weight_NK = self._packed.to_dense().t() * self.scales[:, None]
        return (weight_NK if self.shifts is None else weight_NK - self.shifts[:, None]).to(self.dtype)

    def forward(self, states: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            named: Tensor = numbered_product(states, self.number, self.out_features)
            return named
        return self.product(states)

    def product(self, states: Tensor) -> Tensor:
        refuse_gradient(states)
        scales_M1 = torch.linalg.vector_norm(states, torch.inf, -1, True, dtype=torch.float32).clamp_min_(1e-30).div_(127)
        codes_MK = states.div(scales_M1).add_(CENTRE + 0.5).to(torch.uint8)  # cut off: rounds to nearest
        product: Tensor = torch.ops.onednn.qlinear_pointwise(
            codes_MK, 1.0, CENTRE, self._packed, self.scales, self._no_zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        if self.shifts is not None:
            sums_M1 = codes_MK.sum(-1, keepdim=True, dtype=torch.int32) - CENTRE * self.in_features
            product.addcmul_(sums_M1.float(), self.shifts, value=-1)
        if self.bias is None:
            return product.mul_(scales_M1).to(states.dtype)
        return torch.addcmul(self.bias, product, scales_M1).to(states.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class CudaInt8Linear(nn.Module):
    """A linear layer of symmetric 8-bit codes on CUDA, one scale an output; inputs stay as they are.

    Written from torch's signatures and not proved on a card; `works` therefore tries the kernel before it is used.
    """

    packed: Tensor
    scales: Tensor
    FEW = 16  # more rows than these are multiplied as 16-bit floats

    def __init__(self, codes: Codes, bias: Tensor | None) -> None:
        super().__init__()
        self.in_features, self.out_features = codes.in_features, codes.out_features
        if codes.scales_NG.shape[1] > 1 or codes.zeros_NG.ne(CENTRE).any():
            codes = regroup(codes)
        self.register_buffer("packed", (codes.codes_NK ^ CENTRE).view(torch.int8).contiguous(), persistent=False)
        self.register_buffer("scales", codes.scales_NG[:, 0].contiguous(), persistent=False)
        self.bias = None if bias is None else frozen(bias.detach())

    @classmethod
    def works(cls, device: torch.device) -> bool:
        codes_NK = torch.randint(256, (64, 64), device=device, dtype=torch.uint8)
        ones_N1 = torch.ones(64, 1, device=device, dtype=torch.bfloat16)
        layer = cls(Codes(codes_NK, ones_N1, torch.full_like(ones_N1, CENTRE, dtype=torch.uint8), 8), None)
        identity_KK = torch.eye(64, device=device, dtype=torch.bfloat16)
        try:
            columns_KN = torch.cat([layer(rows) for rows in identity_KK.split(cls.FEW)])
        except (AttributeError, NotImplementedError, RuntimeError):
            return False
        return torch.equal(columns_KN.T, layer.weight)

    @property
    def weight(self) -> Tensor:
        """The weight [out, in] in the dtype of the codes' scales; a fresh tensor."""
        return self.packed * self.scales[:, None]

    def forward(self, states: Tensor) -> Tensor:
        refuse_gradient(states)
        inputs_MK = states.reshape(-1, self.in_features).bfloat16()
        if len(inputs_MK) <= self.FEW:
            product_MN = torch.ops.aten._weight_int8pack_mm(inputs_MK.contiguous(), self.packed, self.scales.bfloat16())
        else:
            product_MN = functional.linear(inputs_MK, self.packed.bfloat16()) * self.scales.bfloat16()
        product_MN = product_MN.to(states.dtype)
        if self.bias is not None:
            product_MN = product_MN + self.bias.to(states.dtype)
        product: Tensor = product_MN.view(*states.shape[:-1], self.out_features)
        return product


def regroup(codes: Codes) -> Codes:
    """8-bit codes with one symmetric scale an output, rounded to nearest from the weight that codes in groups stand for."""
    weight_NK = codes.dequantize(torch.float32)
    scales_N1 = weight_NK.abs().amax(1, keepdim=True).clamp_min_(1e-30).div_(127)
    codes_NK = weight_NK.div_(scales_N1).add_(CENTRE + 0.5).to(torch.uint8)
    zeros_N1 = torch.full_like(scales_N1, CENTRE, dtype=torch.uint8)
    return Codes(codes_NK, scales_N1.to(codes.scales_NG.dtype), zeros_N1, 8)
