"""INT8 weights and biases of an observed program: round, correct biases, fine-tune."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, fx

from edgedyn.graph.nodes import by_output, convolution_arguments, weight_of
from edgedyn.quantize.calibrated import Calibrated, qparams_of, restore
from edgedyn.quantize.fake_quantize import quantize_weight
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
    """Choose the INT8 weights and the biases of an observed program, which keeps them.

    Args:
        module: changed in place.
        plan: what is INT8 on the target that the weights are rounded for.
        observed: of the same program. It has ranges for every scheme.
        scheme: of that target.
        section: the recipe's ``quantize`` section.
        samples: inputs of the program.
        finetuning: inputs for training and judging weights; without any, the samples.
        progress: called with (phase, steps done, steps of the phase).
    """
    qparams = qparams_of(observed.entries, scheme)
    entries, constants = {entry.name: entry for entry in observed.entries}, dict(observed.constants)
    examples = choose_examples(module, finetuning or samples) if section.finetune else ([], [])
    unrounded = copy.deepcopy(module) if section.bias_correction != "none" else module
    if section.rounding == "reconstruct" or section.bn_reestimation:
        rounded, scales = _round_weights(module, plan, qparams, scheme, section, samples, progress)
        entries |= {name: replace(entries[name], channels=channels) for name, channels in scales.items()}
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
) -> tuple[dict[str, np.ndarray], dict[str, tuple[float, ...]]]:
    """Round the weights of every INT8 layer, first to last; return codes and biases, and the scales."""
    constants: dict[str, np.ndarray] = {}
    channels: dict[str, tuple[float, ...]] = {}

    def choose(site: QuantizableLayer, inputs: list[Tensor], outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        weight, scales = weight_of(module, site.node), qparams.weights[site.weight]
        if section.rounding == "reconstruct":
            is_linear = site.node.target is torch.ops.aten.linear.default
            groups = 1 if is_linear else convolution_arguments(site.node)[3]
            codes, bias = reconstruct(weight, scales, measure_moments(site.node, inputs, outputs, groups))
        else:  # re-estimation sets the bias
            codes = quantize_weight(weight, scales)
        if section.bn_reestimation:
            gain, bias = reestimate(site.node, inputs, outputs, codes.float() * by_output(scales, weight))
            scales = (scales * gain).float()
        constants[site.weight] = codes.to(torch.int8).numpy()
        constants[site.bias] = bias.float().numpy()
        channels[site.weight] = tuple(float(scale) for scale in scales)
        return codes.float() * by_output(scales, weight), bias.float()

    paired = PairedRun(module, plan, qparams, scheme)
    paired.run(samples, choose, lambda done, total: progress("round weights", done, total))
    return constants, channels
