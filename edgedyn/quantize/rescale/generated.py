"""Generated kernels: how far they depend on the image, and one range for all of their taps.

    k[n, c, p]  value of channel c, a tap of a filter, at position p of image n;  m[c] its mean over n and p
    spread           rms of k - m, over rms of k: 0 would be a static layer
    between images   rms of mean_p k - m, over rms of k: the part that changes from image to image

    tensor   w_c x + b_c -> Q -> DQ                          one scale, set by the largest tap
    tap      s_c w_c x + s_c b_c -> Q -> DQ -> Mul 1 / s_c   every tap uses all 256 values

``tap`` is the output rescale of ``output_rescale.py``, on the small grid of the kernels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from edgedyn.graph.nodes import channel_axis
from edgedyn.quantize.plan import QuantizableLayer, find_quantizable_layers
from edgedyn.quantize.rescale.output_rescale import can_scale, scale_output
from edgedyn.quantize.rescale.place import Place, RescalePass, Scope, always

_LIMIT = 1024.0  # largest factor: a tap that the samples hardly use keeps room for larger values


@dataclass(frozen=True)
class Content:
    """How far one generated kernel depends on the image.

    Attributes:
        spread: as above, a share of the kernel's rms.
        between_images: as above.
    """

    spread: float
    between_images: float


def find_generating(module: fx.GraphModule, names: Collection[str]) -> list[QuantizableLayer]:
    """Return the layers whose output is a generated kernel.

    Args:
        module: a folded program.
        names: of the kernels, from ``find_generators``.
    """
    return [layer for layer in find_quantizable_layers(module) if layer.output in names]


def find_taps(module: fx.GraphModule, scope: Scope) -> list[Place]:
    """Return the layers that write generated kernels, where the taps can be scaled exactly.

    A kernel that a convolution reads too, or that passes through a function that is not homogeneous, is left
    alone.
    """
    return [
        Place((layer.output_node,), (layer.node,), _LIMIT, layer.output)
        for layer in find_generating(module, scope.generated)
        if can_scale(layer)
    ]


EQUALIZE_TAPS = RescalePass(
    "equalize_taps", lambda section: section.generated == "tap", find_taps, always, scale_output
)


class ContentMeter:
    """Measures how far generated kernels depend on the image, one sample after another.

    Args:
        kernels: the nodes that write them, by name.
    """

    def __init__(self, kernels: Mapping[str, fx.Node]) -> None:
        self.names = {node: name for name, node in kernels.items()}
        self._moments: dict[fx.Node, list[tuple[Tensor, Tensor]]] = {node: [] for node in self.names}

    def add(self, node: fx.Node, value: Tensor) -> None:
        """Add the kernel of one sample."""
        flat = value.double().movedim(channel_axis(value), 0).flatten(1)
        self._moments[node].append((flat.mean(1), flat.square().mean(1)))

    def read(self) -> dict[str, Content]:
        """Return the content of each kernel, by name."""
        content = {}
        for node, name in self.names.items():
            means, squares = (torch.stack(parts) for parts in zip(*self._moments[node], strict=True))
            mean, power = means.mean(0), squares.mean().clamp(min=torch.finfo(torch.float64).tiny)
            all_, images = squares.mean() - mean.square().mean(), (means - mean).square().mean()
            shares = [float((part.clamp(min=0) / power).sqrt()) for part in (all_, images)]
            content[name] = Content(*shares)
        return content
