"""Bias correction by NNCF: the mean that rounding takes from a layer's output goes into its bias.

NNCF's algorithms (fast: a layer at a time, on means of its input; full: on the network with all earlier
layers quantized) run on our steps, not on ranges of their own.
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

import nncf
import numpy as np
from nncf.common.factory import build_graph
from nncf.quantization.algorithms.bias_correction.algorithm import BIAS_CORRECTION_THRESHOLD, BiasCorrection
from nncf.quantization.algorithms.fast_bias_correction.algorithm import (
    FAST_BIAS_CORRECTION_THRESHOLD,
    FastBiasCorrection,
)
from nncf.quantization.algorithms.pipeline import collect_statistics
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from edgedyn.graph.constants import set_constant
from edgedyn.graph.nodes import bias_of, shape_of, weight_of
from edgedyn.quantize.convert import insert_qdq
from edgedyn.quantize.plan import Plan, QParams
from edgedyn.targets import Int8Scheme

_HELD = 1 << 30  # bytes of what layers read: NNCF's full correction holds it of all samples, several times


def correct_biases(
    module: fx.GraphModule,
    wanted: fx.GraphModule,
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
        wanted: the same with the weights that were rounded: what its layers write on average is wanted.
            Layers that have no bias get one of 0 where ``module`` has one.
        plan: INT8 layers of ``module``.
        qparams: scales and zero points of their tensors.
        scheme: how the target annotates INT8.
        samples: calibration inputs.
        how: fast, or full, on as many of the samples as fit into memory.
        progress: called with (samples seen, samples); the samples are read several times.
    """
    quantized = insert_qdq(copy.deepcopy(module), plan, qparams, scheme, fold=False)
    # NNCF reads the shape of every node
    FakeTensorProp(quantized, FakeTensorMode(allow_non_fake_inputs=True)).propagate(*samples[0])
    _add_biases(wanted, [site.node.name for site in plan.layers if bias_of(module, site.node) is not None])
    if how == "full":
        samples = _thin(plan, samples)
    reads = itertools.count(1)

    def read(sample: tuple[Tensor, ...]) -> Any:
        progress(min(next(reads), len(samples)), len(samples))
        return sample[0] if len(sample) == 1 else sample

    chosen = (
        FastBiasCorrection(len(samples), FAST_BIAS_CORRECTION_THRESHOLD)
        if how == "fast"
        else BiasCorrection(len(samples), BIAS_CORRECTION_THRESHOLD)
    )
    nncf.set_log_level(logging.ERROR)
    # its progress bars: standard output is the command's result
    with contextlib.redirect_stdout(io.StringIO()):
        data = nncf.Dataset(list(samples), read)
        graph = build_graph(wanted)
        means = collect_statistics(chosen.get_statistic_points(wanted, graph), wanted, graph, data)
        corrected = chosen.apply(quantized, build_graph(quantized), means)
    nodes = {node.name: node for node in corrected.graph.nodes}
    biases = {site: bias_of(corrected, nodes[site.node.name]) for site in plan.layers}
    return {site.bias: bias.numpy() for site, bias in biases.items() if bias is not None}


def _add_biases(module: fx.GraphModule, layers: Collection[str]) -> None:
    """Give layers of these names a bias of 0 where they have none: NNCF looks for one."""
    for node in list(module.graph.nodes):
        if node.name in layers and bias_of(module, node) is None:
            set_constant(module, node, 2, weight_of(module, node).new_zeros(len(weight_of(module, node))))
    module.recompile()


def _thin(plan: Plan, samples: Sequence[tuple[Tensor, ...]]) -> Sequence[tuple[Tensor, ...]]:
    """Return every n-th sample, so many that what layers read of them takes no more than ``_HELD`` bytes."""
    each = 4 * sum(math.prod(shape_of(site.node.args[0])) for site in plan.layers)  # of float32
    return samples[:: -(-len(samples) * each // _HELD) or 1]
