"""Reading one node: its layer, its name among repeated calls, its cost, its arguments."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from edgedyn.graph.nodes import (
    convolution_arguments,
    is_quantizable,
    module_path,
    multiply_adds,
    number_repeats,
)


def trace(model: nn.Module, x: torch.Tensor, *, decompose: bool = False) -> list[fx.Node]:
    program = torch.export.export(model.eval(), (x,))
    program = program.run_decompositions() if decompose else program
    return [node for node in program.graph.nodes if node.op == "call_function"]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 4, 1))

    def forward(self, x):
        return 2 * self.inner(x)


def test_path_is_that_of_the_innermost_module():
    convolution, mul = trace(Scaled(), torch.zeros(1, 3, 5, 7))
    assert (module_path(convolution), module_path(mul)) == ("inner.0", "")


def test_entries_without_a_path_are_passed_over():
    node = fx.Graph().placeholder("x")
    assert module_path(node) == ""
    node.meta["nn_module_stack"] = {"a": ("", "Net"), "b": ("body.0", "Conv2d"), "c": ("", "GraphModule")}
    assert module_path(node) == "body.0"


def test_repeated_names_are_numbered_from_the_second():
    assert number_repeats(["a", "b", "a", "a", "b"]) == ["a", "b", "a#2", "a#3", "b#2"]
    assert number_repeats([]) == []


X = torch.zeros(2, 6, 8, 10)
COSTS = [
    (nn.Conv2d(6, 4, 3, padding=1, stride=2), X, 2 * 4 * 4 * 5 * 6 * 9),
    (nn.Conv2d(6, 12, 3, groups=3, padding=1, dilation=(1, 2)), X, 2 * 12 * 8 * 8 * 2 * 9),
    (nn.ConvTranspose2d(6, 4, 2, stride=2), X, 2 * 6 * 8 * 10 * 4 * 4),
    (nn.Linear(10, 7), X, 2 * 6 * 8 * 10 * 7),
    (nn.Linear(10, 7, bias=False), X[:, 0, 0], 2 * 10 * 7),
]


@pytest.mark.parametrize("decompose", [False, True], ids=["captured", "decomposed"])
@pytest.mark.parametrize(("layer", "x", "count"), COSTS, ids=lambda value: type(value).__name__)
def test_multiply_adds_are_the_same_before_and_after_decomposition(layer, x, count, decompose):
    """Decomposed, layers are ``convolution``, ``mm`` and ``addmm``."""
    costs = [
        multiply_adds(node)
        for node in trace(layer, x, decompose=decompose)
        if any(name in str(node.target) for name in ("conv", "linear", "mm"))
    ]
    assert costs == [count]


@pytest.mark.parametrize("decompose", [False, True], ids=["captured", "decomposed"])
def test_arguments_that_a_call_leaves_out_have_their_defaults(decompose):
    def arguments(layer: nn.Module):
        (node,) = trace(layer, X, decompose=decompose)
        return [list(x) if isinstance(x, tuple | list) else x for x in convolution_arguments(node)]

    assert arguments(nn.Conv2d(6, 4, 1)) == [[1, 1], [0, 0], [1, 1], 1]
    full = nn.Conv2d(6, 12, 3, stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=3)
    assert arguments(full) == [[2, 1], [1, 0], [1, 2], 3]


class TakesKernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def forward(self, x, kernel):
        return torch.conv2d(self.layer(x), kernel)


def test_a_kernel_that_is_an_input_is_not_stored():
    program = torch.export.export(TakesKernel(), (torch.zeros(1, 3, 5, 5), torch.zeros(3, 3, 3, 3)))
    nodes = program.module(check_guards=False).graph.nodes
    layers = [node for node in nodes if node.target is torch.ops.aten.conv2d.default]
    assert [is_quantizable(layer) for layer in layers] == [True, False]
