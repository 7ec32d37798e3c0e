"""Run a program in float and in fake-quantized INT8 side by side, one node at a time.

Weights are chosen layer by layer, first to last, and each layer is fitted to the INT8 activations that the
layers before it produce, their chosen weights included. Both runs use the decisions of the float run: one
position active in only one of them would shift every row behind it in a list of active positions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from edgedyn.graph.nodes import attribute
from edgedyn.quantize.deciding import find_deciding
from edgedyn.quantize.fake_quantize import Constants, FakeQuantizer
from edgedyn.quantize.plan import Plan, QParams, QuantizableLayer
from edgedyn.targets import Int8Scheme

ChooseConstants = Callable[[QuantizableLayer, list[Tensor], list[Tensor]], Constants]


class PairedRun:
    """A folded program that runs in float and in INT8.

    Args:
        module: the program; left as it is.
        plan: its INT8 layers.
        qparams: scales and zero points of their activations.
        scheme: how the target annotates INT8.
    """

    def __init__(self, module: fx.GraphModule, plan: Plan, qparams: QParams, scheme: Int8Scheme) -> None:
        self.module = module
        self.chosen: dict[fx.Node, Constants] = {}
        self.int8 = FakeQuantizer(module, plan, qparams, scheme, self.chosen.get)
        self.deciding = set(find_deciding(module))
        self.last_reader = {x: node for node in module.graph.nodes for x in node.all_input_nodes}

    @torch.no_grad()
    def run(
        self,
        samples: Sequence[tuple[Tensor, ...]],
        choose: ChooseConstants,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Run every node on all samples before the next; each value is freed after its last reader.

        Args:
            samples: inputs of the program.
            choose: ``choose(layer, inputs, outputs)`` returns the weight and bias of a layer in INT8, from
                its INT8 inputs and its float outputs before the activation, one tensor per sample each.
            progress: called with (layers done, layers).

        Returns:
            The first output of the program, (float, INT8), for each sample.
        """
        values: dict[fx.Node, list[tuple[Any, Any]]] = {}
        inputs, done = iter(zip(*samples, strict=True)), 0
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                values[node] = [(x, x) for x in next(inputs)]
            elif node.op == "get_attr":
                constant = attribute(self.module, node)
                values[node] = [(constant, constant)] * len(samples)
            elif node.op == "output":
                first = pytree.tree_leaves(node.args[0])[0]
                return values[first]
            else:
                values[node] = self._call(node, values, len(samples), choose)
                if node in self.int8.layers:
                    done += 1
                    progress(done, len(self.int8.layers))
            for source in node.all_input_nodes:
                if self.last_reader[source] is node:
                    del values[source]
        raise AssertionError("a graph ends with its output")

    def _call(
        self,
        node: fx.Node,
        values: Mapping[fx.Node, list[tuple[Any, Any]]],
        count: int,
        choose: ChooseConstants,
    ) -> list[tuple[Any, Any]]:
        """Run a node on all samples; after each sample, free those of its inputs that no later node reads."""
        float_values, int8_values = [], []
        waiting: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        unread = [x for x in node.all_input_nodes if self.last_reader[x] is node]
        for k in range(count):
            (args, kwargs), (int8_args, int8_kwargs) = (_arguments(node, values, k, run) for run in (0, 1))
            for source in unread:
                values[source][k] = (None, None)
            int8_args = self.int8.round_input(node, int8_args)
            float_values.append(node.target(*args, **kwargs))  # type: ignore[operator]
            if node in self.int8.layers:
                waiting.append((int8_args, int8_kwargs))
            elif node in self.deciding:
                int8_values.append(float_values[-1])
            else:
                int8_values.append(self.int8.compute(node, int8_args, int8_kwargs))
        if node in self.int8.layers:
            inputs = [args[0] for args, _ in waiting]
            self.chosen[node] = choose(self.int8.layers[node], inputs, float_values)
            del inputs
            while waiting:
                int8_values.append(self.int8.compute(node, *waiting.pop(0)))
        return list(zip(float_values, int8_values, strict=True))


def _arguments(
    node: fx.Node, values: Mapping[fx.Node, list[tuple[Any, Any]]], sample: int, run: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call for one sample, in the float run (0) or in the INT8 run (1)."""

    def find(argument: fx.Node) -> Any:
        return values[argument][sample][run]

    return fx.node.map_arg(node.args, find), fx.node.map_arg(node.kwargs, find)
