"""DDF and DDF-Up (arXiv 2104.14107, CVPR 2021): depthwise kernels from a channel and a spatial filter.

    y[b, c, p] = sum_t (channel[b, c, t] o spatial[b, g(c), t, p]) * x[b, c, p * stride + off(t)]   o: * or +
    FilterNorm   v -> (v - mean_t v) / (std_t v + 1e-10) * gain / R         std is the unbiased one
    DDF-Up       scale^2 pairs of filters on the grid of x, their outputs pixel-shuffled

x: (B, C, H, W)   channel: (B, C * T)   spatial: (B, G * T, h, w), filters outermost   y: (B, C, h, w)
T = R * R taps, G heads: head g serves C / G consecutive channels.

``reference.py`` follows the published code, ``canonical.py`` calls our op with the same weights, and
``authors.py`` makes references from the authors' arguments and instances.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from edgedyn.layers import Layer
from edgedyn.layers.ddf.authors import BUILD, RECOGNISE
from edgedyn.layers.ddf.canonical import CanonicalDDFPack, CanonicalDDFUpPack, FilterGenerator
from edgedyn.layers.ddf.reference import DDFPack, DDFUpPack, FilterNorm, decoupled_filter

__all__ = [
    "LAYER",
    "CanonicalDDFPack",
    "CanonicalDDFUpPack",
    "DDFPack",
    "DDFUpPack",
    "FilterGenerator",
    "FilterNorm",
    "decoupled_filter",
]


def _examples() -> Iterator[tuple[nn.Module, tuple[Tensor, ...]]]:
    """Yield reference modules in evaluation mode, each with an input that discriminates (B >= 2, H != W)."""
    generator = torch.Generator().manual_seed(5)
    cases: list[tuple[nn.Module, list[tuple[int, ...]]]] = [
        (DDFPack(12), [(2, 12, 13, 18)]),
        (DDFPack(8, 5, head=2, se_ratio=0.5, kernel_combine="add"), [(2, 8, 11, 14)]),
        (DDFPack(12, stride=2, head=12, dilation=2, nonlinearity="linear"), [(2, 12, 14, 10)]),
        (DDFPack(10, stride=2, gen_kernel_size=3, kernel_combine="add"), [(3, 10, 10, 18)]),
        (DDFUpPack(10, scale_factor=3, dilation=2), [(2, 10, 7, 9)]),
        (DDFUpPack(10, 5, dw_kernel_size=5, se_ratio=0.3), [(2, 10, 10, 9)]),
        (DDFUpPack(8, head=2, joint_channels=5, kernel_combine="add"), [(2, 8, 8, 11), (2, 5, 8, 11)]),
    ]
    for module, shapes in cases:
        for name, tensor in module.named_parameters():
            if "channel_branch" in name and name.endswith(".1.bias"):
                tensor.data += 1  # one or two hidden units: none may be dead by accident
        yield module.eval(), tuple(torch.randn(shape, generator=generator) for shape in shapes)


LAYER = Layer(
    name="ddf",
    paper="DDF and DDF-Up (arXiv 2104.14107)",
    primitive="decoupled_depthwise2d",
    canonical={DDFPack: CanonicalDDFPack, DDFUpPack: CanonicalDDFUpPack},
    examples=_examples,
    authors=BUILD,
    recognise=RECOGNISE,
    float32=(FilterNorm, FilterGenerator),
)
