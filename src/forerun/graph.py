"""A function of static tensors, made a fast callable: a CUDA graph per shape, a compiled CPU function, or a plain call."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

Outputs = TypeVar("Outputs")
Mode = Literal["auto"] | bool
Key = tuple[tuple[torch.Size, torch.dtype], ...]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Captured(Generic[Outputs]):
    """A CUDA graph with the memory it reads from and writes to."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    outputs: Outputs

    def replay(self, tensors: tuple[Tensor, ...]) -> Outputs:
        for static, tensor in zip(self.inputs, tensors, strict=True):
            static.copy_(tensor)
        self.graph.replay()
        return self.outputs


class Graph(Generic[Outputs]):
    """`Graph(function, mode)(*tensors)` is `function(*tensors)`, prepared once per combination of shapes and dtypes.

    `function` takes tensors alone and decides by their shapes alone. What it changes in place (a cache) it must change to the
    same values when it is called twice with the same tensors, for a capture calls it several times.

    mode   CUDA                         CPU
    auto   capture a graph and replay   plain call: compiling is slow
    True   the same                     torch.compile; a plain call with one warning where no C++ compiler is installed
    False  plain call                   plain call

    The outputs of a replayed graph live until the next call with the same shapes, which overwrites them: clone what is kept.
    A shape that cannot be captured or compiled is called plainly from then on, with one warning.
    """

    def __init__(self, function: Callable[..., Outputs], mode: Mode = "auto") -> None:
        self.function, self.mode = function, mode
        self.prepared: dict[Key, Callable[[tuple[Tensor, ...]], Outputs]] = {}
        self.pool: Any = None  # a CUDA memory pool's handle

    def __call__(self, *tensors: Tensor) -> Outputs:
        if self.mode is False or not tensors:
            return self.function(*tensors)
        key = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        if (call := self.prepared.get(key)) is not None:
            return call(tensors)
        try:
            call, outputs = self._prepare(tensors)
        except Exception as error:  # noqa: BLE001 the compilers' errors have no common type; the plain call raises the function's own
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            logger.warning("shape %s runs without a graph: %s", list(tensors[0].shape), reason)
            call, outputs = self._plain, self.function(*tensors)
        self.prepared[key] = call
        return outputs

    def _plain(self, tensors: tuple[Tensor, ...]) -> Outputs:
        return self.function(*tensors)

    def _prepare(self, tensors: tuple[Tensor, ...]) -> tuple[Callable[[tuple[Tensor, ...]], Outputs], Outputs]:
        """A way to call the function for these shapes, and its first outputs."""
        if tensors[0].is_cuda:
            captured = self._capture(tensors)
            return captured.replay, captured.replay(tensors)
        if self.mode is not True:
            return self._plain, self.function(*tensors)
        if not has_compiler():
            logger.warning("no C++ compiler found (install g++ or set CXX): decoding runs uncompiled")
            self.mode = False
            return self._plain, self.function(*tensors)
        # A wrapper in C++ takes longer to compile than one in Python, and calls the kernels faster (docs/log.md).
        options: dict[str, Any] = {"guard_filter_fn": no_guards, "cpp_wrapper": True}
        compiled: Callable[..., Outputs] = torch.compile(alone(self.function), fullgraph=True, dynamic=False, options=options)

        def call(later: tuple[Tensor, ...]) -> Outputs:
            return compiled(*(one.contiguous() for one in later))  # its strides are as fixed as its shapes

        return call, call(tensors)

    def _capture(self, tensors: tuple[Tensor, ...]) -> Captured[Outputs]:
        inputs = tuple(tensor.clone() for tensor in tensors)
        side, current = torch.cuda.Stream(), torch.cuda.current_stream()
        side.wait_stream(current)
        with torch.cuda.stream(side):  # libraries allocate and choose kernels in the first calls, which a capture may not hold
            for _ in range(2):
                self.function(*inputs)
        current.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            outputs = self.function(*inputs)
        self.pool = self.pool or graph.pool()  # shared: only one graph runs at a time
        return Captured(graph, inputs, outputs)


def alone(function: Callable[..., Outputs]) -> Callable[..., Outputs]:
    """The same under a code object of its own, by which torch keeps what it compiled: one program, not several to try."""

    def call(*tensors: Tensor) -> Outputs:
        return function(*tensors)

    call.__code__ = call.__code__.replace()
    return call


def no_guards(entries: Sequence[Any]) -> list[bool]:
    """What torch is to check before each call: nothing, for a Graph has one program for each combination of shapes and dtypes.

    Its own checks go through every module of a transformers model.
    """
    return [False] * len(entries)


def has_compiler() -> bool:
    """Whether torch.compile would find a C++ compiler."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++", "c++") if name)
