"""Drop-in linear layers that decode faster: siblings in one product, weights laid out for the machine's kernels.

`pack` is the one entry. A packed model is for inference: it cannot be trained, saved, moved or deep-copied.
"""

from __future__ import annotations

from forerun.packed.codes import CodedLinear, Codes
from forerun.packed.int4 import Int4Linear
from forerun.packed.int8 import Int8Linear
from forerun.packed.packing import pack, scales_beside, weight_bytes
from forerun.packed.prepacked import Prepacked
from forerun.packed.pruned import L1PrunedInputLinear, L1PrunedOutputLinear
from forerun.packed.siblings import Part, Shared

__all__ = [
    "CodedLinear",
    "Codes",
    "Int4Linear",
    "Int8Linear",
    "L1PrunedInputLinear",
    "L1PrunedOutputLinear",
    "Part",
    "Prepacked",
    "Shared",
    "pack",
    "scales_beside",
    "weight_bytes",
]
