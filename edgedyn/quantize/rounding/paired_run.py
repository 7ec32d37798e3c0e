"""Run a program twice side by side, in float and with the INT8 steps up to here, a node at a time.

What is changed at a layer, its rounded weights, is seen by every later layer: each one is fitted to the
errors that reach it. Both decide as float does: a position that only one of them takes for active would shift
every row behind it in a list of active ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from edgedyn.graph.nodes import by_output
from edgedyn.graph.rewrites import attribute
from edgedyn.quantize.deciding import find_deciding
from edgedyn.quantize.plan import Plan, QParams, QuantizableLayer
from edgedyn.targets import Int8Scheme

SCALE_EPSILON = torch.finfo(torch.float32).eps  # least scale of a range taken at run time

Step = tuple[float, int] | None  # scale and zero point; None: by the tensor's own range


def quantize_dequantize(x: Tensor, step: Step) -> Tensor:
    """Round a tensor to its INT8 steps, as the Q/DQ pair of a program does."""
    pair = torch.ops.quantized_decomposed
    if step is None:
        scale, zero_point = pair.choose_qparams.tensor(x, -128, 127, SCALE_EPSILON, torch.int8)
        step = (float(scale), int(zero_point))
    arguments = (*step, -128, 127, torch.int8)
    return pair.dequantize_per_tensor(pair.quantize_per_tensor(x, *arguments), *arguments)  # type: ignore


def quantize_weight(weight: Tensor, scales: Tensor) -> Tensor:
    """Return the INT8 codes nearest to a weight (O, ...), one scale an output channel; float."""
    return torch.clamp(torch.round(weight / by_output(scales, weight)), -127, 127)


def round_weight(weight: Tensor, scales: Tensor) -> Tensor:
    """Round a weight (O, ...) to its INT8 steps, one scale an output channel; float."""
    return quantize_weight(weight, scales) * by_output(scales, weight)


def qparams_by_call(
    plan: Plan, steps: QParams, scheme: Int8Scheme
) -> tuple[dict[fx.Node, Step], dict[fx.Node, tuple[float, int]]]:
    """Return the steps of what calls read first, and of what calls write."""
    read: dict[fx.Node, Step] = {
        site.node: None if site.node in plan.dynamic else steps.of(site.input) for site in plan.layers
    }
    read |= {call: steps.of(x) for call, x in plan.kernels.items()}
    return read, {site.output_node: steps.of(site.output) for site in plan.quantized_outputs(scheme)}


Change = Callable[[QuantizableLayer, list[Tensor], list[Tensor]], tuple[Tensor, Tensor | None]]


class PairedRun:
    """A folded program and its INT8 steps.

    Args:
        module: left as it is.
        plan: its INT8 layers.
        steps: of the tensors that they read and, where the scheme wants it, write.
        scheme: how the target annotates INT8.
    """

    def __init__(self, module: fx.GraphModule, plan: Plan, steps: QParams, scheme: Int8Scheme) -> None:
        self.module = module
        self.sites = {site.node: site for site in plan.layers}
        self.read, self.written = qparams_by_call(plan, steps, scheme)
        self.deciding = set(find_deciding(module))
        self.last_reader = {x: node for node in module.graph.nodes for x in node.all_input_nodes}

    @torch.no_grad()
    def run(
        self,
        samples: Sequence[tuple[Tensor, ...]],
        change: Change,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[tuple[Tensor, Tensor]]:
        """Walk through the graph with all samples at once; their values are held as long as they are needed.

        Args:
            samples: inputs of the program.
            change: ``change(site, inputs, outputs)`` returns the weight and bias that the layer has in INT8:
                inputs as INT8 brings them, outputs as float wants them, before the activation; one a sample.
            progress: called with (layers done, layers).

        Returns:
            The first output of the program, (float, INT8), for each sample.
        """
        values: dict[fx.Node, list[tuple[Any, Any]]] = {}
        given, done = iter(zip(*samples, strict=True)), 0
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                values[node] = [(x, x) for x in next(given)]
            elif node.op == "get_attr":
                constant = attribute(self.module, node)
                values[node] = [(constant, constant)] * len(samples)
            elif node.op == "output":
                first = pytree.tree_leaves(node.args[0])[0]
                return values[first]
            else:
                values[node] = self._call(node, values, len(samples), change)
                if node in self.sites:
                    done += 1
                    progress(done, len(self.sites))
            for source in node.all_input_nodes:
                if self.last_reader[source] is node:
                    del values[source]
        raise AssertionError("a graph ends with its output")

    def _call(
        self, node: fx.Node, values: Mapping[fx.Node, list[tuple[Any, Any]]], count: int, change: Change
    ) -> list[tuple[Any, Any]]:
        """Run a node on all samples; what it is the last to read is dropped a sample at a time."""
        wanted, given, found = [], [], []
        done = [x for x in node.all_input_nodes if self.last_reader[x] is node]
        for k in range(count):
            float_, int8 = (_arguments(node, values, k, world) for world in (0, 1))
            for source in done:
                values[source][k] = (None, None)
            if node in self.read:
                int8[0][0] = quantize_dequantize(int8[0][0], self.read[node])
            wanted.append(_run(node, *float_))
            if node in self.sites:
                given.append(int8)
            elif node in self.deciding:
                found.append(wanted[-1])
            else:
                found.append(self._write(node, *int8))
        if node in self.sites:
            weight, bias = change(self.sites[node], [a[0] for a, _ in given], wanted)
            for a, named in given:
                found.append(self._write(node, [a.pop(0), weight, bias, *a[2:]], named))
        return list(zip(wanted, found, strict=True))

    def _write(self, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
        y = _run(node, args, kwargs)
        return quantize_dequantize(y, self.written[node]) if node in self.written else y


def _run(node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _arguments(
    node: fx.Node, values: Mapping[fx.Node, list[tuple[Any, Any]]], sample: int, world: int
) -> tuple[list[Any], dict[str, Any]]:
    """Return what a node is called with for a sample, in float (0) or in INT8 (1)."""

    def find(argument: fx.Node) -> Any:
        return values[argument][sample][world]

    return list(fx.node.map_arg(node.args, find)), dict(fx.node.map_arg(node.kwargs, find))
