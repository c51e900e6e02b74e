"""A Graph computes what its function computes, once prepared per shape, and falls back to the plain call."""

import functools
import logging

import pytest
import torch

from forerun import graph
from forerun.graph import Graph


def step(cache_S: torch.Tensor, *wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    at, values = wanted
    cache_S.index_copy_(0, at, values)
    return cache_S * 2, values.sum()


@pytest.mark.parametrize("mode", ["auto", False])
def test_plain_calls(mode):
    cache_S = torch.zeros(6)
    run = Graph(lambda at, values: step(cache_S, at, values), mode)
    for count in (1, 2, 1):
        doubled, total = run(torch.arange(count), torch.full((count,), 3.0))
        assert total == 3 * count
    assert torch.equal(doubled, torch.tensor([6.0, 6, 0, 0, 0, 0]))


def test_compiled_once_a_shape(monkeypatch):
    compiled: list[dict] = []

    def fake_compile(function, **options):
        compiled.append(options)
        return torch.compiler.disable(function)

    monkeypatch.setattr(torch, "compile", fake_compile)
    monkeypatch.setattr(graph, "has_compiler", lambda: True)
    run = Graph(lambda x: x + 1, True)
    for count in (1, 2, 1, 2):
        assert torch.equal(run(torch.zeros(count)), torch.ones(count))
    assert len(compiled) == 2
    assert all(options["fullgraph"] and options["dynamic"] is False for options in compiled)


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
def test_programs_of_one_function_are_told_apart_without_checks(monkeypatch):
    """Traced for real, though not compiled: of one code with other settings, other shapes and other strides."""

    def scaled(factor, x):
        return factor * x.reshape(-1) + x.shape[0]

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", lambda program, inputs, **_: program.forward)
    monkeypatch.setattr(graph, "has_compiler", lambda: True)
    graphs = {factor: Graph(functools.partial(scaled, factor), True) for factor in (2, 3)}
    for shape in ((1, 2), (2, 1), (2, 2), (1, 2), (2, 2)):
        x = torch.arange(float(shape[0] * shape[1])).reshape(shape)
        for factor, run in graphs.items():
            for given in (x, x.T.contiguous().T):
                assert torch.equal(run(given), scaled(factor, x))


def test_no_compiler_is_one_warning(monkeypatch, caplog):
    monkeypatch.setattr(graph, "has_compiler", lambda: False)
    run = Graph(lambda x: x + 1, True)
    with caplog.at_level(logging.WARNING):
        for count in (1, 2, 3):
            assert torch.equal(run(torch.zeros(count)), torch.ones(count))
    assert [record.message.split(":")[0] for record in caplog.records] == ["no C++ compiler found (install g++ or set CXX)"]


def test_a_shape_that_cannot_be_compiled_is_called_plainly(monkeypatch, caplog):
    def refuse(function, **options):
        raise RuntimeError("no such backend\nand a long story")

    monkeypatch.setattr(torch, "compile", refuse)
    monkeypatch.setattr(graph, "has_compiler", lambda: True)
    run = Graph(lambda x: x + 1, True)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(run(torch.zeros(2)), torch.ones(2))
        assert torch.equal(run(torch.zeros(2)), torch.ones(2))
    assert [record.message for record in caplog.records] == ["shape [2] runs without a graph: no such backend"]


def test_the_functions_own_error_is_raised():
    def broken(x):
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        Graph(broken)(torch.zeros(1))


def test_a_graph_captures_once_a_shape_and_shares_one_pool(monkeypatch):
    """The CUDA path's bookkeeping, with capture replaced: static inputs are overwritten, not replaced."""
    captures: list[graph.Captured] = []

    class Replayed:
        def __init__(self, inputs, outputs):
            self.inputs, self.outputs = inputs, outputs

        def replay(self):
            self.outputs.copy_(self.inputs[0] + 1)

    def capture(self, tensors):
        inputs = tuple(tensor.clone() for tensor in tensors)
        outputs = self.function(*inputs)
        captures.append(graph.Captured(Replayed(inputs, outputs), inputs, outputs))
        return captures[-1]

    class OnCuda(torch.Tensor):
        is_cuda = True

    monkeypatch.setattr(Graph, "_capture", capture)
    run = Graph(lambda x: x + 1)
    for value in (1.0, 5.0):
        for count in (2, 3):
            inputs = torch.full((count,), value).as_subclass(OnCuda)
            assert run(inputs).tolist() == [value + 1] * count
    assert len(captures) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graph_replays():
    cache_S = torch.zeros(6, device="cuda")
    run = Graph(lambda at, values: step(cache_S, at, values))
    for count in (1, 2, 1):
        doubled, total = run(torch.arange(count, device="cuda"), torch.full((count,), 3.0 + count, device="cuda"))
        assert total.item() == (3 + count) * count
    assert doubled.tolist() == [8.0, 10, 0, 0, 0, 0]
