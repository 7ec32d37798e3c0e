"""INT8 rounding in float32: of one tensor, and of a whole program while it runs.

    activation    x ~ s (q - z)    q in [-128, 127]    one scale s and one zero point z per tensor
    weight        w ~ s_o q        q in [-127, 127]    one scale per output channel o

``FakeQuantizer`` runs a folded program as the Q/DQ program of ``convert.insert_qdq`` computes it, without
building that program. The precision search, the reconstruction of weights and fine-tuning all run on it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from torch import Tensor, fx

from edgedyn.graph.nodes import by_output
from edgedyn.quantize.plan import Plan, QParams
from edgedyn.targets import Int8Scheme

SCALE_EPSILON = torch.finfo(torch.float32).eps  # smallest scale of a range taken at run time

# scale and zero point; None where they come from the tensor's own range at run time
ActivationQParams = tuple[float, int] | None
Constants = tuple[Tensor, Tensor | None]  # weight (O, ...) and bias (O,)


def quantize_dequantize(x: Tensor, qparams: ActivationQParams) -> Tensor:
    """Round an activation to the INT8 grid, as a Q/DQ pair does."""
    pair = torch.ops.quantized_decomposed
    if qparams is None:
        scale, zero_point = pair.choose_qparams.tensor(x, -128, 127, SCALE_EPSILON, torch.int8)
        qparams = (float(scale), int(zero_point))
    arguments = (*qparams, -128, 127, torch.int8)
    return pair.dequantize_per_tensor(pair.quantize_per_tensor(x, *arguments), *arguments)  # type: ignore


def quantize_weight(weight: Tensor, scales: Tensor) -> Tensor:
    """Return the quantized values of a weight (O, ...) as float, integers in [-127, 127].

    Args:
        weight: (O, ...).
        scales: one per output channel, (O,).
    """
    return torch.clamp(torch.round(weight / by_output(scales, weight)), -127, 127)


def round_weight(weight: Tensor, scales: Tensor) -> Tensor:
    """Round a weight (O, ...) to the INT8 grid of one scale per output channel."""
    return quantize_weight(weight, scales) * by_output(scales, weight)


class FakeQuantizer(fx.Interpreter):
    """Run a folded program in float32 with the rounding of INT8.

        x -> Q/DQ -> layer(rounded weight, float bias) -> activation -> Q/DQ, where outputs are quantized

    Args:
        module: a folded program; left as it is.
        plan: its INT8 layers and kernels.
        qparams: scales and zero points of their tensors.
        scheme: how the target annotates INT8.
        constants: returns the weight and bias of a call, for every INT8 layer and any other call that does
            not compute with the constants of ``module``; None for calls that do.
        round_activation: rounds an activation by its scale and zero point.
        observe: called with the call of every INT8 layer and its output, before the activation.

    Attributes:
        layers: INT8 layers by call.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        plan: Plan,
        qparams: QParams,
        scheme: Int8Scheme,
        constants: Callable[[fx.Node], Constants | None],
        *,
        round_activation: Callable[[Tensor, ActivationQParams], Tensor] = quantize_dequantize,
        observe: Callable[[fx.Node, Tensor], None] = lambda node, y: None,
    ) -> None:
        super().__init__(module)
        self.layers = {layer.node: layer for layer in plan.layers}
        self._inputs: dict[fx.Node, ActivationQParams] = {
            node: None if node in plan.dynamic else qparams.of(layer.input)
            for node, layer in self.layers.items()
        }
        self._inputs |= {call: qparams.of(x) for call, x in plan.kernels.items()}
        self._outputs = {
            layer.output_node: qparams.of(layer.output) for layer in plan.quantized_outputs(scheme)
        }
        self._constants, self._round, self._observe = constants, round_activation, observe

    def run_node(self, n: fx.Node) -> Any:
        """Run one node; layers and kernels of the plan in INT8."""
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        return self.compute(n, self.round_input(n, args), dict(kwargs))

    def round_input(self, node: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the arguments of a call; the first is rounded where the call computes in INT8."""
        if node not in self._inputs:
            return args
        return (self._round(args[0], self._inputs[node]), *args[1:])

    def compute(self, node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute a call from arguments of ``round_input``; round the result where it is stored in INT8."""
        constants = self._constants(node)
        if constants is not None:
            args = (args[0], *constants, *args[3:])
        y = self.call_function(node.target, args, kwargs)
        if node in self.layers:
            self._observe(node, y)
        return self._round(y, self._outputs[node]) if node in self._outputs else y
