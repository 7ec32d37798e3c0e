"""The result of calibrating one program, and its use on a program.

    entries     a range, a histogram and quantization parameters per tensor, in the order of the graph
    constants   weights and biases that calibration changed

From these, ``restore`` and ``qparams_of`` make the same INT8 program without an image. A calibration table
holds one ``Calibrated`` per program.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, fx

from edgedyn.errors import CalibrationError
from edgedyn.graph.constants import set_constant
from edgedyn.graph.nodes import by_output, weight_of
from edgedyn.quantize.plan import QParams, QuantizableLayer, find_quantizable_layers
from edgedyn.quantize.table.entries import Entry, Precision
from edgedyn.targets import Int8Scheme


@dataclass(frozen=True)
class Calibrated:
    """The calibration of one program.

    Attributes:
        entries: its tensors, in the order of its graph.
        constants: changed weights and biases by ``layer.weight``, ``layer.bias``: a rounded weight as int8
            values, whose scales are in its entry; else float32.
        precision: result of the precision search, where it ran.
        ablation: PSNR drop by change of the method, dB, where it was measured.
    """

    entries: tuple[Entry, ...]
    constants: Mapping[str, np.ndarray]
    precision: Precision | None = None
    ablation: Mapping[str, float] = field(default_factory=dict)

    @property
    def kept(self) -> tuple[str, ...]:
        """Names of the layers that the precision search keeps in float."""
        return self.precision.kept if self.precision else ()

    def __repr__(self) -> str:
        """Return one line with counts; the values are in the fields."""
        return (
            f"Calibrated({len(self.entries)} tensors, {len(self.constants)} changed constants, "
            f"{len(self.kept)} layers kept float)"
        )


def refuse_other_layers(
    module: fx.GraphModule, layers: Sequence[QuantizableLayer], calibrated: Calibrated
) -> None:
    """Refuse a calibration of other layers: ``--force`` applies a table to any program.

    Args:
        module: a folded program.
        layers: its INT8 layers.
        calibrated: from a calibration table.

    Raises:
        CalibrationError: naming the first layer that does not fit.
    """
    entries = {entry.name: entry for entry in calibrated.entries}
    int8 = {layer.node for layer in layers}
    for layer in find_quantizable_layers(module):
        shape, entry = tuple(weight_of(module, layer.node).shape), entries.get(layer.weight)
        value = calibrated.constants.get(layer.weight)
        if entry is None and layer.node in int8:
            actual = "none"
        elif entry is not None and len(entry.channels) != shape[0]:
            actual = f"one of {len(entry.channels)} output channels"
        elif value is not None and value.shape != shape:
            actual = f"one of {value.shape}"
        else:
            continue
        raise CalibrationError(
            f"layer {layer.name!r} has a weight of {shape}, and the calibration table has {actual}: it is of "
            "another network, or of other forms of our ops, and cannot be forced on this one. Calibrate "
            "again, or give this recipe the table's kernels and forms."
        )


def restore(module: fx.GraphModule, calibrated: Calibrated) -> None:
    """Set the weights and biases of a folded program to those of its calibration; in place."""
    scales = {entry.name: entry.channels for entry in calibrated.entries}
    for layer in find_quantizable_layers(module):
        for index, name in ((1, layer.weight), (2, layer.bias)):
            value = calibrated.constants.get(name)
            if value is None:
                continue
            tensor = torch.from_numpy(np.ascontiguousarray(value))
            if tensor.dtype == torch.int8:
                tensor = tensor.float() * by_output(torch.tensor(scales[name]), tensor)
            set_constant(module, layer.node, index, tensor)
    module.recompile()


def qparams_of(entries: Sequence[Entry], scheme: Int8Scheme) -> QParams:
    """Return the quantization parameters of all tensors for a target's scheme."""
    tensors, weights = {}, {}
    for entry in entries:
        if entry.kind == "weight":
            weights[entry.name] = torch.tensor(entry.channels)
        elif entry.affine is not None and entry.symmetric is not None:
            tensors[entry.name] = (entry.symmetric, 0) if scheme.symmetric else entry.affine
    return QParams(tensors, weights)


def rescale_factors(entries: Sequence[Entry]) -> dict[str, Tensor]:
    """Return the per-channel factors of the rescale Muls, by name of the activation beside each."""
    return {e.name: torch.tensor(e.channels) for e in entries if e.channels and e.kind != "weight"}


def without_rescales(calibrated: Calibrated, kept: Collection[str]) -> Calibrated:
    """Return a calibration without the output rescales of tensors that are not INT8.

    Args:
        calibrated: of a program.
        kept: names of the INT8 outputs, whose rescales stay.
    """
    dropped = {
        name.removesuffix(".output"): factors
        for name, factors in rescale_factors(calibrated.entries).items()
        if name.endswith(".output") and name not in kept
    }
    constants, entries = dict(calibrated.constants), []
    for entry in calibrated.entries:
        layer, _, tensor = entry.name.rpartition(".")
        factors = dropped.get(layer)
        if factors is not None and tensor == "weight":
            scales = tuple(float(x) for x in torch.tensor(entry.channels) * factors)
            entries.append(replace(entry, channels=scales))
            for name in (entry.name, f"{layer}.bias"):
                value = constants.get(name)
                if value is not None and value.dtype != np.int8:
                    constant = torch.from_numpy(value)
                    constants[name] = (constant * by_output(factors, constant)).numpy()
        else:
            is_dropped = factors is not None and tensor == "output"
            entries.append(replace(entry, channels=()) if is_dropped else entry)
    return replace(calibrated, entries=tuple(entries), constants=constants)
