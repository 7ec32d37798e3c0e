"""Quantization-aware fine-tuning: train INT8 weights until the program computes as it did in float.

    min over quantized weights q and biases b   mean over samples   |f_int8(x; s q, b) - f(x)|^2 / e(x)

e(x) is that error before the first step. The teacher is the float program itself (distillation), so that no
task needs a truth. Weights are trained in units of their scale s and rounded in every pass; the gradient goes
straight through the rounding and is zero where it clips (Bengio et al. 2013, "Estimating or propagating
gradients through stochastic neurons"; Jacob et al. 2018, "Quantization and training of neural networks").
All quantization parameters stay as calibration chose them: a range that clips costs more than the smaller
scale gains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from edgedyn.graph.nodes import bias_of, by_output, weight_of
from edgedyn.ops import load_all
from edgedyn.quantize.fake_quantize import (
    ActivationQParams,
    Constants,
    FakeQuantizer,
    quantize_dequantize,
    quantize_weight,
)
from edgedyn.quantize.plan import Plan, QParams
from edgedyn.targets import Int8Scheme

_RATE = 0.01  # of Adam, in units of the weight's and the output's scale; 0.1 would undo reconstruction
_HELD_OUT = 4  # every fourth sample is held out to score the result, the others train
_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Example:
    """Inputs of a program, and the floating-point ones of its float outputs."""

    inputs: tuple[Tensor, ...]
    outputs: list[Tensor]


def choose_examples(
    module: fx.GraphModule, samples: Sequence[tuple[Tensor, ...]]
) -> tuple[list[Example], list[Example]]:
    """Return the training and the held-out examples, with the outputs of the float program.

    A single sample is both.

    Args:
        module: a folded program with float weights.
        samples: inputs, preferably others than those that weights were rounded on: on these, the held-out
            error is too optimistic.
    """
    program = fx.Interpreter(module)  # runs the graph; the module's code is older
    with torch.no_grad():
        examples = [Example(x, _outputs(program.run(*x))) for x in samples]
    training = [example for index, example in enumerate(examples) if index % _HELD_OUT]
    return training or examples, examples[::_HELD_OUT]


@torch.enable_grad()
def finetune(
    module: fx.GraphModule,
    plan: Plan,
    *,
    qparams: QParams,
    scheme: Int8Scheme,
    training: Sequence[Example],
    held_out: Sequence[Example],
    count: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """Train quantized weights (int8) and biases; return them by ``layer.weight`` and ``layer.bias``.

    The result is empty where the error of the held-out examples did not fall, or where no gradient of an
    output reaches an INT8 layer (a router that decides).

    Args:
        module: a folded program with rounded weights; left as it is.
        plan: its INT8 layers.
        qparams: scales and zero points of their tensors; they stay.
        scheme: how the target annotates INT8.
        training: one example per step, in random order.
        held_out: examples that score the program before and after.
        count: steps of Adam.
        progress: called with (steps done, steps).
    """
    program = _TrainableProgram(module, plan, qparams, scheme)
    if not program.error(training[0]).requires_grad:
        return {}
    before, weights = program.errors(held_out), 1 / program.errors(training)
    generator = torch.Generator().manual_seed(0)
    program.spread(generator)
    optimizer = torch.optim.Adam([*program.quantized.values(), *program.biases.values()], lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, count)
    order: list[int] = []
    for done in range(count):
        order = order or torch.randperm(len(training), generator=generator).tolist()
        index = order.pop()
        optimizer.zero_grad()
        (program.error(training[index]) * weights[index]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        progress(done + 1, count)
    is_better = (program.errors(held_out) / before).mean() < 1
    return program.constants() if is_better else {}


class _StraightThrough(torch.autograd.Function):
    """Return ``rounded``, with the gradient of x: the straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rounded: Tensor) -> Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _round_weight_values(values: Tensor) -> Tensor:
    inside = values.clamp(-127, 127)
    return _StraightThrough.apply(inside, inside.detach().round())  # type: ignore[no-any-return, no-untyped-call]


def _round_activation(x: Tensor, qparams: ActivationQParams) -> Tensor:
    inside = x
    if qparams is not None:
        scale, zero_point = qparams
        inside = x.clamp((-128 - zero_point) * scale, (127 - zero_point) * scale)
    rounded = quantize_dequantize(x.detach(), qparams)
    return _StraightThrough.apply(inside, rounded)  # type: ignore[no-any-return, no-untyped-call]


class _TrainableProgram(FakeQuantizer):
    """A program in fake-quantized INT8, differentiable by the weights and biases of its INT8 layers.

    Attributes:
        quantized: weight of each call in units of its scale, (O, ...).
        biases: bias of each call in units of its output's scale, (O,).
        scales: of the weights, shaped (O, 1, ...).
        units: scales of the outputs.
    """

    def __init__(self, module: fx.GraphModule, plan: Plan, qparams: QParams, scheme: Int8Scheme) -> None:
        super().__init__(
            module, plan, qparams, scheme, self._trained_constants, round_activation=_round_activation
        )
        # our ops have no gradient of their own; the last form of each is ordinary operators that run anywhere
        self._forms: dict[Any, Any] = {op.overload: op.forms[-1].fn for op in load_all().values()}
        self.scales, self.units = {}, {}
        self.quantized, self.biases = {}, {}
        for node, layer in self.layers.items():
            weight, bias = weight_of(module, node), bias_of(module, node)
            scales = qparams.weights[layer.weight]
            self.scales[node] = by_output(scales, weight)
            self.units[node] = qparams.of(layer.output)[0]
            bias = torch.zeros(len(weight)) if bias is None else bias
            self.quantized[node] = quantize_weight(weight, scales).requires_grad_()
            self.biases[node] = (bias / self.units[node]).requires_grad_()

    @torch.no_grad()
    def spread(self, generator: torch.Generator) -> None:
        """Move every weight to a random place in its rounding interval.

        Without this all weights would start at the centres and cross to the next values at the same step.
        """
        for quantized in self.quantized.values():
            quantized += 0.9 * (torch.rand(quantized.shape, generator=generator) - 0.5)
            quantized.clamp_(-127, 127)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Return a constant of the program without its gradient."""
        value = super().get_attr(target, args, kwargs)
        return value.detach() if isinstance(value, Tensor) else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Call an operator, an op of ours by its last form."""
        return super().call_function(self._forms.get(target, target), args, kwargs)

    def _trained_constants(self, node: fx.Node) -> Constants | None:
        if node not in self.layers:
            return None
        weight = _round_weight_values(self.quantized[node]) * self.scales[node]
        return weight, self.biases[node] * self.units[node]

    def error(self, example: Example) -> Tensor:
        """Return |INT8 - float|^2 / |float|^2, summed over the outputs."""
        total = torch.zeros(())
        for y, target in zip(_outputs(self.run(*example.inputs)), example.outputs, strict=True):
            total = total + ((y - target) ** 2).mean() / (target**2).mean().clamp(min=_TINY)
        return total

    @torch.no_grad()
    def errors(self, examples: Sequence[Example]) -> Tensor:
        """Return the error of every example, (examples,), at least ``_TINY``."""
        return torch.stack([self.error(example) for example in examples]).clamp(min=_TINY)

    @torch.no_grad()
    def constants(self) -> dict[str, np.ndarray]:
        """Return the quantized weights (int8) and biases of all layers by name."""
        trained = {}
        for node, layer in self.layers.items():
            trained[layer.weight] = _round_weight_values(self.quantized[node]).to(torch.int8).numpy()
            trained[layer.bias] = (self.biases[node] * self.units[node]).numpy()
        return trained


def _outputs(values: Any) -> list[Tensor]:
    return [y for y in pytree.tree_leaves(values) if y.is_floating_point()]
