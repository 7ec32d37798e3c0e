"""Bias correction by NNCF: the mean error that rounding adds to a layer's output is taken out of its bias.

NNCF's algorithms run with the quantization parameters of our calibration, not with ranges of their own:

    fast    one layer at a time, from the means of its input
    full    on the network with all earlier layers quantized

NNCF is an optional package, and only this file imports it for its algorithms.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import logging
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, Literal

import numpy as np
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from edgedyn.graph.constants import set_constant
from edgedyn.graph.nodes import bias_of, shape_of, weight_of
from edgedyn.quantize.convert import insert_qdq
from edgedyn.quantize.plan import Plan, QParams
from edgedyn.targets import Int8Scheme

_HELD = 1 << 30  # bytes of layer inputs: NNCF's full correction holds those of all samples, several times


def correct_biases(
    module: fx.GraphModule,
    unrounded: fx.GraphModule,
    plan: Plan,
    qparams: QParams,
    scheme: Int8Scheme,
    samples: Sequence[tuple[Tensor, ...]],
    how: Literal["fast", "full"],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, np.ndarray]:
    """Return the corrected biases of the INT8 layers by ``layer.bias``; layers without a bias get none.

    Args:
        module: a folded program with its rounded weights.
        unrounded: the same program with its float weights; its mean outputs are the ones to restore. Changed
            in place: a layer without a bias gets a bias of 0 where ``module`` has one.
        plan: INT8 layers of ``module``.
        qparams: scales and zero points of their tensors.
        scheme: how the target annotates INT8.
        samples: calibration inputs.
        how: fast, or full, on as many of the samples as fit into memory.
        progress: called with (samples run, samples); every sample runs several times.
    """
    quantized = insert_qdq(copy.deepcopy(module), plan, qparams, scheme, fold=False)
    # NNCF reads the shape of every node
    FakeTensorProp(quantized, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*samples[0])
    _add_biases(unrounded, [x.node.name for x in plan.layers if bias_of(module, x.node) is not None])
    if how == "full":
        samples = _thin(plan, samples)
    corrected = _run_nncf(quantized, unrounded, samples, how, progress)
    nodes = {node.name: node for node in corrected.graph.nodes}
    biases = {layer: bias_of(corrected, nodes[layer.node.name]) for layer in plan.layers}
    return {layer.bias: bias.numpy() for layer, bias in biases.items() if bias is not None}


def _run_nncf(
    quantized: fx.GraphModule,
    unrounded: fx.GraphModule,
    samples: Sequence[tuple[Tensor, ...]],
    how: Literal["fast", "full"],
    progress: Callable[[int, int], None],
) -> fx.GraphModule:
    """Return the program of Q/DQ pairs with the biases that NNCF corrects."""
    import nncf
    from nncf.common.factory import build_graph
    from nncf.quantization.algorithms.bias_correction.algorithm import (
        BIAS_CORRECTION_THRESHOLD,
        BiasCorrection,
    )
    from nncf.quantization.algorithms.fast_bias_correction.algorithm import (
        FAST_BIAS_CORRECTION_THRESHOLD,
        FastBiasCorrection,
    )
    from nncf.quantization.algorithms.pipeline import collect_statistics

    reads = itertools.count(1)

    def read(sample: tuple[Tensor, ...]) -> Any:
        progress(min(next(reads), len(samples)), len(samples))
        return sample[0] if len(sample) == 1 else sample

    algorithm = (
        FastBiasCorrection(len(samples), FAST_BIAS_CORRECTION_THRESHOLD)
        if how == "fast"
        else BiasCorrection(len(samples), BIAS_CORRECTION_THRESHOLD)
    )
    nncf.set_log_level(logging.ERROR)
    # its progress bars: standard output is the command's result
    with contextlib.redirect_stdout(io.StringIO()):
        data = nncf.Dataset(list(samples), read)
        graph = build_graph(unrounded)
        means = collect_statistics(algorithm.get_statistic_points(unrounded, graph), unrounded, graph, data)
        return algorithm.apply(quantized, build_graph(quantized), means)  # type: ignore[no-any-return]


def _add_biases(module: fx.GraphModule, layers: Collection[str]) -> None:
    """Add a bias of 0 to the named calls without one: NNCF looks for a bias."""
    for node in list(module.graph.nodes):
        if node.name in layers and bias_of(module, node) is None:
            set_constant(module, node, 2, weight_of(module, node).new_zeros(len(weight_of(module, node))))
    module.recompile()


def _thin(plan: Plan, samples: Sequence[tuple[Tensor, ...]]) -> Sequence[tuple[Tensor, ...]]:
    """Return every n-th sample, with the smallest n whose layer inputs take at most ``_HELD`` bytes."""
    each = 4 * sum(math.prod(shape_of(layer.node.args[0])) for layer in plan.layers)  # of float32
    return samples[:: -(-len(samples) * each // _HELD) or 1]
