"""Layers whose weights are opaque to torch, by number: what a compiled program calls, since it cannot hold an opaque tensor."""

from __future__ import annotations

import itertools
import weakref
from typing import Protocol

import torch
from torch import Tensor


class Layer(Protocol):
    def product(self, states: Tensor) -> Tensor: ...


# The one piece of state outside objects.
_layers: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()
_numbers = itertools.count()


def enroll(layer: Layer) -> int:
    """The number by which `numbered_product` finds a layer, for as long as the layer lives."""
    number = next(_numbers)
    _layers[number] = layer
    return number


def refuse_gradient(states: Tensor) -> None:
    if states.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("a packed layer has no gradient; train the model first and pack it afterwards")


_library = torch.library.Library("forerun", "FRAGMENT")  # not `custom_op`, whose checks take a fifth of a small product
_library.define("numbered_product(Tensor states, int number, int out_features) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


@torch.library.impl(_library, "numbered_product", "CPU")
def _product(states: Tensor, number: int, out_features: int) -> Tensor:
    product = _layers[number].product(states)
    assert product.shape[-1] == out_features
    return product


@torch.library.register_fake("forerun::numbered_product", lib=_library)  # type: ignore[untyped-decorator]
def _shape(states: Tensor, number: int, out_features: int) -> Tensor:  # noqa: ARG001 one signature for both
    return states.new_empty(*states.shape[:-1], out_features)


numbered_product = torch.ops.forerun.numbered_product.default
"""The product of the layer of that number, [..., out], in the dtype of `states`."""
