"""Output scales that XNNPACK can requantize to.

    input scale * weight scale < 256 * output scale        for every output channel

XNNPACK refuses a program in which a convolution breaks this (executorch 1.5.1: XNN Runtime creation failed
with xnn_status_unsupported_parameter). An example is a layer with large inputs whose outputs are all zero on
the calibration images: PMRID's ``encdec`` with its ReLU. With 128 in place of 256, two different sums of
products are 128 quantized values apart: a smaller scale would distinguish no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from edgedyn.quantize.plan import QuantizableLayer
from edgedyn.quantize.table.entries import Entry

_LARGEST = 128.0


def raise_scales(entries: Mapping[str, Entry], layers: Sequence[QuantizableLayer]) -> dict[str, Entry]:
    """Return the output activations whose scale is too small, each with the smallest scale that is allowed.

    Args:
        entries: tensors by name, weights included.
        layers: in the order of the graph: the raised output of one is the input of the next.
    """
    raised: dict[str, Entry] = {}
    for layer in layers:
        x, y = (raised.get(name, entries.get(name)) for name in (layer.input, layer.output))
        if x is None or y is None or x.affine is None or y.affine is None:
            continue
        (input_scale, _), (scale, zero_point) = x.affine, y.affine
        smallest = float(np.float32(input_scale * max(entries[layer.weight].channels) / _LARGEST))
        if scale < smallest:
            low = (-128 - zero_point) * scale
            moved = int(np.clip(round(-128 - low / smallest), -128, 127))
            raised[layer.output] = replace(y, affine=(smallest, moved))
    return raised
