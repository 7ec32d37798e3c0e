"""Choose the INT8 weights and biases of an observed program: round, correct biases, fine-tune."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx

from edgedyn.graph.nodes import bias_of, by_output, convolution_arguments, weight_of
from edgedyn.quantize.calibrated import Calibrated, qparams_of, restore
from edgedyn.quantize.fake_quantize import Constants, quantize_weight
from edgedyn.quantize.observe.program import Observed
from edgedyn.quantize.plan import Plan, QParams, QuantizableLayer
from edgedyn.quantize.progress import Progress, silent
from edgedyn.quantize.rounding.finetune import choose_examples, finetune
from edgedyn.quantize.rounding.norms import reestimate
from edgedyn.quantize.rounding.paired_run import PairedRun
from edgedyn.quantize.rounding.reconstruct import measure_moments, reconstruct
from edgedyn.targets import Int8Scheme

if TYPE_CHECKING:
    from edgedyn.recipe.keys import QuantizeSection


_NEAREST = (
    "rounded to the nearest INT8 values, not reconstructed: the second moments of its inputs are not finite, "
    "or not positive definite (a feature map whose mean is far above its spread)"
)


def round_program(
    module: fx.GraphModule,
    plan: Plan,
    observed: Observed,
    *,
    scheme: Int8Scheme,
    section: QuantizeSection,
    samples: Sequence[tuple[Tensor, ...]],
    finetuning: Sequence[tuple[Tensor, ...]] = (),
    progress: Progress = silent,
) -> Calibrated:
    """Choose the INT8 weights and the biases of an observed program, and store them in it.

    Args:
        module: the program; changed in place.
        plan: its INT8 layers on one target.
        observed: its ranges, for every scheme.
        scheme: how that target annotates INT8.
        section: the recipe's ``quantize`` section.
        samples: inputs that weights are rounded on.
        finetuning: inputs for fine-tuning and for scoring it; the samples where there are none.
        progress: called with (phase, steps done, steps of the phase).
    """
    qparams = qparams_of(observed.entries, scheme)
    entries, constants = {entry.name: entry for entry in observed.entries}, dict(observed.constants)
    examples = choose_examples(module, finetuning or samples) if section.finetune else ([], [])
    unrounded = copy.deepcopy(module) if section.bias_correction != "none" else module
    if section.rounding == "reconstruct" or section.bn_reestimation:
        rounded, scales, notes = _round_weights(module, plan, qparams, scheme, section, samples, progress)
        entries |= {
            name: replace(entries[name], channels=channels, note=notes.get(name, ""))
            for name, channels in scales.items()
        }
        qparams = qparams_of(tuple(entries.values()), scheme)
        restore(module, Calibrated(tuple(entries.values()), rounded))
        constants |= rounded
    if section.bias_correction != "none":
        from edgedyn.quantize.rounding.bias_correction import correct_biases

        corrected = correct_biases(
            module,
            unrounded,
            plan,
            qparams,
            scheme,
            samples,
            section.bias_correction,
            lambda done, total: progress("correct biases", done, total),
        )
        restore(module, Calibrated((), corrected))
        constants |= corrected
    if section.finetune:
        trained = finetune(
            module,
            plan,
            qparams=qparams,
            scheme=scheme,
            training=examples[0],
            held_out=examples[1],
            count=section.finetune,
            progress=lambda done, total: progress("fine-tune", done, total),
        )
        if not trained:
            progress("fine-tuning was dropped: no better on samples held out", 1, 1)
        restore(module, Calibrated(tuple(entries.values()), trained))
        constants |= trained
    return Calibrated(tuple(entries.values()), constants)


def _round_weights(
    module: fx.GraphModule,
    plan: Plan,
    qparams: QParams,
    scheme: Int8Scheme,
    section: QuantizeSection,
    samples: Sequence[tuple[Tensor, ...]],
    progress: Progress,
) -> tuple[dict[str, np.ndarray], dict[str, tuple[float, ...]], dict[str, str]]:
    """Round the weights of every INT8 layer, first to last; return weights and biases, scales, and notes."""
    constants: dict[str, np.ndarray] = {}
    channels: dict[str, tuple[float, ...]] = {}
    notes: dict[str, str] = {}

    def choose(layer: QuantizableLayer, inputs: list[Tensor], outputs: list[Tensor]) -> Constants:
        weight, scales = weight_of(module, layer.node), qparams.weights[layer.weight]
        if section.rounding == "reconstruct":
            is_linear = layer.node.target is torch.ops.aten.linear.default
            groups = 1 if is_linear else convolution_arguments(layer.node)[3]
            moments = measure_moments(layer.node, inputs, outputs, groups)
            fitted = reconstruct(weight, scales, moments)
            if fitted is None:
                notes[layer.weight] = _NEAREST
            quantized, bias = fitted or _nearest(module, layer, scales)
        else:  # re-estimation sets the bias
            quantized = quantize_weight(weight, scales)
        if section.bn_reestimation:
            rounded = quantized.float() * by_output(scales, weight)
            gain, bias = reestimate(layer.node, inputs, outputs, rounded)
            scales = (scales * gain).float()
        constants[layer.weight] = quantized.to(torch.int8).numpy()
        constants[layer.bias] = bias.float().numpy()
        channels[layer.weight] = tuple(float(scale) for scale in scales)
        return quantized.float() * by_output(scales, weight), bias.float()

    paired = PairedRun(module, plan, qparams, scheme)
    paired.run(samples, choose, lambda done, total: progress("round weights", done, total))
    return constants, channels, notes


def _nearest(module: fx.GraphModule, layer: QuantizableLayer, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight of a layer, each value rounded alone, and its float bias."""
    weight, bias = weight_of(module, layer.node), bias_of(module, layer.node)
    return quantize_weight(weight, scales), torch.zeros(len(weight)) if bias is None else bias
