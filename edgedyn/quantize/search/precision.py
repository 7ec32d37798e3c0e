"""Mixed-precision search: keep the fewest layers float that hold the PSNR drop of INT8 within a limit.

    gain(l) = drop(every layer INT8) - drop(every layer INT8 but l)       drop: PSNR against the truth, dB
    kept    = the first k layers by gain(l) / multiply-adds(l), with the least k that meets the limit

The rounding errors of layers are small and nearly independent, so that their squared errors nearly add up,
and the order by gain per multiply-add is the greedy solution of that knapsack. The search measures the drop
of every choice on images and predicts none. It chooses between INT8 and float only: neither XNNPACK
(executorch 1.5) nor TensorRT 10 has convolutions with INT8 weights and 16-bit activations.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from edgedyn.errors import CheckFailedError
from edgedyn.graph.nodes import all_multiply_adds, bias_of, weight_of
from edgedyn.images import metrics
from edgedyn.quantize.calibrated import Calibrated, qparams_of
from edgedyn.quantize.fake_quantize import Constants, FakeQuantizer, round_weight
from edgedyn.quantize.observe.statistics import look
from edgedyn.quantize.plan import Plan, QParams
from edgedyn.quantize.progress import Progress, silent
from edgedyn.quantize.table.entries import LayerCost, Point, Precision
from edgedyn.targets import Int8Scheme

_POINTS = 12  # of a curve, spread about evenly over the layers
_TINY = 1e-30
Measured = dict[str, float]


@dataclass(frozen=True)
class EvaluationSet:
    """Calibration images with fresh crops and noise that score the mixed-precision search and the ablation.

    No image of it is a validation image.

    Attributes:
        inputs: per sample, the inputs of the program.
        truths: per sample, the true output, (1, C, H, W).
        levels: per sample, the name of its noise level.
        limit_db: limit of the PSNR drop; None to measure the drop only.
        least_share: share of the multiply-adds that must stay INT8.
        by_layer: whether to measure the cost of each layer; otherwise no layer becomes float for a limit.
        ablates: whether to run the ablation of the method.
        remember: ``remember(name, measure)`` returns a measurement from before an interruption, or measures.
        decode: returns the pixels of an output, 0 black, 1 white.
    """

    inputs: Sequence[tuple[Tensor, ...]]
    truths: Sequence[np.ndarray]
    levels: Sequence[str]
    limit_db: float | None = None
    least_share: float = 0.0
    by_layer: bool = True
    ablates: bool = False
    remember: Callable[[str, Callable[[], Measured]], Measured] = lambda name, measure: measure()
    decode: Callable[[np.ndarray], np.ndarray] = lambda values: values

    def psnr_db(self, outputs: Sequence[Tensor]) -> Measured:
        """Return the mean PSNR of outputs at each noise level, dB."""
        by_level: dict[str, list[float]] = {}
        for level, y, truth in zip(self.levels, outputs, self.truths, strict=True):
            by_level.setdefault(level, []).append(metrics.psnr_db(self.decode(y.numpy()), truth))
        return {level: float(np.mean(values)) for level, values in by_level.items()}

    @torch.no_grad()
    def float_psnr_db(self, module: fx.GraphModule) -> Measured:
        """Return the mean PSNR of a float program's outputs at each noise level, dB."""
        return self.psnr_db([pytree.tree_leaves(module(*x))[0] for x in self.inputs])

    @torch.no_grad()
    def drop_db(self, before: Measured, rounded: Rounded) -> float:
        """Return the PSNR drop of INT8 at the noise level with the largest drop, dB.

        Args:
            before: PSNR of the float program by noise level.
            rounded: the same program in INT8.
        """
        after = self.psnr_db([rounded.run(x) for x in self.inputs])
        return max(before[level] - after[level] for level in before)


@dataclass(frozen=True)
class Rounded:
    """A folded program with rounded weights, and the quantization parameters that make it INT8.

    Attributes:
        module: the program.
        plan: its INT8 layers.
        scheme: how the target annotates INT8.
        calibrated: origin of its weights and quantization parameters.
    """

    module: fx.GraphModule
    plan: Plan
    scheme: Int8Scheme
    calibrated: Calibrated

    @functools.cached_property
    def qparams(self) -> QParams:
        """Scales and zero points of its tensors."""
        return qparams_of(self.calibrated.entries, self.scheme)

    @functools.cached_property
    def constants(self) -> dict[fx.Node, Constants]:
        """Weights, on the INT8 grid, and biases of its INT8 layers."""
        constants: dict[fx.Node, Constants] = {}
        for layer in self.plan.layers:
            weight, bias = weight_of(self.module, layer.node), bias_of(self.module, layer.node)
            constants[layer.node] = round_weight(weight, self.qparams.weights[layer.weight]), bias
        return constants

    def run(
        self,
        sample: tuple[Tensor, ...],
        float_layers: Mapping[str, Constants] = MappingProxyType({}),
        observe: Callable[[fx.Node, Tensor], None] = lambda node, y: None,
    ) -> Tensor:
        """Return the first output for a sample, in fake-quantized INT8.

        Args:
            sample: inputs of the program.
            float_layers: weights and biases of layers that are computed in float instead, by name.
            observe: called with the call of every INT8 layer and its output, before the activation.
        """
        layers = tuple(layer for layer in self.plan.layers if layer.name not in float_layers)
        in_float = {x.node: float_layers[x.name] for x in self.plan.layers if x.name in float_layers}
        program = FakeQuantizer(
            self.module,
            replace(self.plan, layers=layers),
            self.qparams,
            self.scheme,
            (self.constants | in_float).get,
            observe=observe,
        )
        y: Tensor = pytree.tree_leaves(program.run(*sample))[0]
        return y


@torch.no_grad()
def choose_precision(
    module: fx.GraphModule,
    attempt: Callable[[Sequence[str]], Rounded],
    evaluation: EvaluationSet,
    before: Measured,
    progress: Progress = silent,
) -> Rounded:
    """Measure the PSNR drop of INT8, and keep the fewest layers float that hold it within the limit.

    Args:
        module: the folded program with float weights.
        attempt: ``attempt(kept)`` rounds the weights for a program with the named layers in float.
        evaluation: images with truths; without a limit every layer stays INT8.
        before: PSNR of the float program by noise level, dB, from ``EvaluationSet.float_psnr_db``.
        progress: called with (phase, steps done, steps of the phase).

    Returns:
        The attempt that meets the limit, with the measurements in its ``calibrated.precision``.

    Raises:
        CheckFailedError: when no choice meets both limits, with the drop of each choice.
    """
    rounded = attempt(())
    measured = measure(
        module, rounded, evaluation, before, lambda done, total: progress("measure layers", done, total)
    )
    limit = evaluation.limit_db
    first = (
        0
        if limit is None
        else next(p.layers for p in measured.curve if p.drop_db <= limit or p.int8_share == 0)
    )
    attempts = []
    for count in range(first, len(measured.layers) + 1):
        kept = tuple(layer.layer for layer in measured.layers[:count])
        share = sum(layer.share for layer in measured.layers[count:])
        if limit is not None and share < evaluation.least_share:
            break
        rounded = attempt(kept) if kept else rounded
        drop = evaluation.drop_db(before, rounded)
        if limit is None or drop <= limit:
            chosen = replace(measured, kept=kept, drop_db=drop)
            return replace(rounded, calibrated=replace(rounded.calibrated, precision=chosen))
        attempts.append(Point(count, share, drop))
    raise CheckFailedError(_refusal(measured.curve, attempts, evaluation))


def measure(
    module: fx.GraphModule,
    rounded: Rounded,
    evaluation: EvaluationSet,
    before: Measured,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Precision:
    """Measure the cost of each layer, and the curve of PSNR drop against INT8 share.

    Args:
        module: the folded program with float weights.
        rounded: the same with every possible layer in INT8.
        evaluation: images with truths; with a limit, the curve has the two points on either side of it.
        before: PSNR of the float program by noise level.
        progress: called with (programs measured, programs).
    """
    nodes = {node.name: node for node in module.graph.nodes}
    calls = {layer.name: nodes[layer.node.name] for layer in rounded.plan.layers}
    weights = {name: (weight_of(module, node), bias_of(module, node)) for name, node in calls.items()}
    costs = all_multiply_adds(module.graph)
    units = {unit[0]: unit for unit in rounded.plan.units}
    total = sum(costs.values())
    shares = {first: sum(costs[calls[name]] for name in unit) / total for first, unit in units.items()}
    counted = itertools.count(1)

    def drops(*kept: str) -> Measured:
        def run() -> Measured:
            float_layers = {name: weights[name] for first in kept for name in units[first]}
            after = evaluation.psnr_db([rounded.run(x, float_layers) for x in evaluation.inputs])
            return {level: before[level] - after[level] for level in before}

        by_level = evaluation.remember("drop " + " ".join(kept), run)
        progress(min(next(counted), len(shares) + _POINTS), len(shares) + _POINTS + 1)
        return by_level

    whole = drops()
    sqnr = evaluation.remember("sqnr", lambda: _sqnr_db(module, rounded, calls, evaluation.inputs))
    worst = max(whole, key=lambda level: whole[level])
    layers = [
        LayerCost(first, share, sqnr[units[first][-1]], whole[worst] - drops(first)[worst])
        for first, share in shares.items()
    ]
    layers.sort(key=lambda layer: layer.gain_db / layer.share, reverse=True)

    def point(count: int) -> Point:
        left = sum(layer.share for layer in layers[count:])
        return Point(count, left, max(drops(*(layer.layer for layer in layers[:count])).values()))

    curve = _curve(point, len(layers), evaluation.limit_db)
    progress(1, 1)
    return Precision(tuple(layers), curve)


def _curve(point: Callable[[int], Point], layers: int, limit_db: float | None) -> tuple[Point, ...]:
    """Measure points evenly over the layers, and bisect around a limit."""
    points = {count: point(count) for count in sorted({round(x) for x in np.linspace(0, layers, _POINTS)})}
    if limit_db is not None:
        high = min(count for count, p in points.items() if p.drop_db <= limit_db or count == layers)
        low = max((count for count in points if count < high), default=high)
        while high - low > 1:
            middle = (low + high) // 2
            points[middle] = point(middle)
            low, high = (low, middle) if points[middle].drop_db <= limit_db else (middle, high)
    return tuple(points[count] for count in sorted(points))


def _sqnr_db(
    module: fx.GraphModule,
    rounded: Rounded,
    calls: Mapping[str, fx.Node],
    inputs: Sequence[tuple[Tensor, ...]],
) -> Measured:
    """Return the SQNR of every INT8 layer's output over all samples, dB."""
    names = {node: name for name, node in calls.items()}
    int8_names = {layer.node: layer.name for layer in rounded.plan.layers}
    power, errors = dict.fromkeys(calls, 0.0), dict.fromkeys(calls, 0.0)
    float_outputs: dict[str, Tensor] = {}

    def keep(node: fx.Node, y: Tensor) -> None:
        float_outputs[names[node]] = y

    def compare(node: fx.Node, y: Tensor) -> None:
        name = int8_names[node]
        power[name] += float((float_outputs[name].double() ** 2).sum())
        errors[name] += float(((y - float_outputs[name]).double() ** 2).sum())

    for sample in inputs:
        look(module, names, sample, keep)
        rounded.run(sample, observe=compare)
    return {name: 10 * math.log10((power[name] + _TINY) / (errors[name] + _TINY)) for name in calls}


def _refusal(curve: Sequence[Point], attempts: Sequence[Point], evaluation: EvaluationSet) -> str:
    """Return the error message: the drop of each choice, and the choice nearest to the limit.

    Args:
        curve: choices measured with the weights that were rounded for all layers in INT8.
        attempts: choices measured with weights rounded for them.
        evaluation: the limits.
    """
    allowed = attempts or [p for p in curve if p.int8_share >= evaluation.least_share] or curve
    best = min(allowed, key=lambda p: p.drop_db)
    tried = f"With weights rounded for that choice: {_points(attempts)}. " if attempts else ""
    return (
        f"no choice of float layers keeps the drop within quantize.max_drop_db {evaluation.limit_db:g} dB "
        f"and {evaluation.least_share:.0%} of the multiply-adds in INT8 (limits.int8_share). Found, as float "
        f"layers: INT8 share, drop: {_points(curve)}. {tried}The best is {best.layers} float layers, "
        f"{best.drop_db:.4f} dB at {best.int8_share:.1%}. Raise one of the limits, or train on: "
        "quantize.finetune."
    )


def _points(points: Sequence[Point]) -> str:
    return "; ".join(f"{p.layers}: {p.int8_share:.1%}, {p.drop_db:.4f} dB" for p in points)
