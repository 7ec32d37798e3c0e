"""Generated kernels: how far they depend on the image, and an INT8 step for each of their taps.

    k[n, c, p]  value of channel c, a tap of a filter, at position p of image n;  m[c] its mean over n and p
    spread           rms of k - m, over rms of k: 0 would be a static layer
    between images   rms of mean_p k - m, over rms of k: what a whole image changes

    tensor   w_c x + b_c -> Q -> DQ                            one step, set by the largest tap
    tap      s_c w_c x + s_c b_c -> Q -> DQ -> times 1 / s_c   every tap uses all of the steps

The second is ``products.py`` on the small grid of the kernels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from edgedyn.graph.nodes import channel_axis
from edgedyn.quantize.plan import QuantizableLayer, find_quantizable_layers
from edgedyn.quantize.rescale.output_rescale import can_scale, insert_output_rescales, scale_channels

_LARGEST = 1024.0  # a tap that is hardly ever used keeps a step that is worth one


@dataclass(frozen=True)
class Content:
    """What calibration saw of one generated kernel.

    Attributes:
        largest: absolute value of each channel, (C,).
        spread: as above, a share of the kernel's rms.
        between_images: as above.
    """

    largest: Tensor
    spread: float
    between_images: float


def find_generating(module: fx.GraphModule, names: Collection[str]) -> list[QuantizableLayer]:
    """Return the layers that write generated kernels.

    Args:
        module: a folded program.
        names: of the kernels, from ``find_generators``.
    """
    return [site for site in find_quantizable_layers(module) if site.output in names]


class ContentMeter:
    """Looks at generated kernels, one sample after another.

    Args:
        kernels: the nodes that write them, by name.
    """

    def __init__(self, kernels: Mapping[str, fx.Node]) -> None:
        self.names = {node: name for name, node in kernels.items()}
        self._seen: dict[fx.Node, list[tuple[Tensor, Tensor, Tensor]]] = {node: [] for node in self.names}

    def add(self, node: fx.Node, value: Tensor) -> None:
        """Take a kernel of one sample."""
        flat = value.double().movedim(channel_axis(value), 0).flatten(1)
        self._seen[node].append((flat.abs().amax(1), flat.mean(1), flat.square().mean(1)))

    def read(self) -> dict[str, Content]:
        """Return what was seen, by name of the kernel."""
        found = {}
        for node, name in self.names.items():
            largest, means, squares = (torch.stack(parts) for parts in zip(*self._seen[node], strict=True))
            mean, power = means.mean(0), squares.mean().clamp(min=torch.finfo(torch.float64).tiny)
            all_, images = squares.mean() - mean.square().mean(), (means - mean).square().mean()
            shares = [float((part.clamp(min=0) / power).sqrt()) for part in (all_, images)]
            found[name] = Content(largest.amax(0).float(), *shares)
        return found


def scale_taps(
    module: fx.GraphModule, sites: Sequence[QuantizableLayer], content: Mapping[str, Content]
) -> dict[str, Tensor]:
    """Bring the channels of generated kernels to one range; return the factors that undo it, by name.

    A kernel that a convolution reads, or that went through what is not homogeneous, stays as it is.
    """
    factors = {}
    for site in sites:
        largest = content[site.output].largest
        if can_scale(site) and largest.any():
            up = largest.max() / largest.clamp(min=largest.max() / _LARGEST)
            factors[site.output] = scale_channels(module, site, up)
    insert_output_rescales(module, factors)
    return factors
