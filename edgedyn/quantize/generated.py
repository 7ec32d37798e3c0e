"""Generated kernels: how far they depend on the image, and an INT8 step for each of their taps.

    k[n, c, p]  value of channel c, a tap of a filter, at position p of image n;  m[c] its mean over n and p
    spread           rms of k - m, over rms of k: 0 would be a static layer
    between images   rms of mean_p k - m, over rms of k: what a whole image changes

    tensor   w_c x + b_c -> Q -> DQ                            one step, set by the largest tap
    tap      s_c w_c x + s_c b_c -> Q -> DQ -> times 1 / s_c   every tap uses all of the steps

The second is the exact rewrite of ``equalize.py`` with a float product, on the small grid of the kernels,
where that has a second convolution.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from edgedyn.quantize.nodes import MULTIPLY_ADD_OPS, bias_of, set_constant, weight_of
from edgedyn.quantize.plan import Site, find_sites
from edgedyn.quantize.statistics import look

_LARGEST = 1024.0  # a tap that is hardly ever used keeps a step that is worth one
_SCALES = {torch.ops.aten.relu.default, torch.ops.aten.relu_.default}  # f(s y) = s f(y)
TAPS = "taps"  # in a node's meta: the product that gives taps their size back


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


def find_generating(module: fx.GraphModule, names: Collection[str]) -> list[Site]:
    """Return the layers that write generated kernels.

    Args:
        module: a folded program.
        names: of the kernels, from ``find_generators``.
    """
    return [site for site in find_sites(module) if site.y in names]


def measure_content(
    module: fx.GraphModule, sites: Sequence[Site], samples: Sequence[tuple[Tensor, ...]]
) -> dict[str, Content]:
    """Look at the kernels that layers write on every sample; by name of the kernel."""
    seen: dict[fx.Node, list[tuple[Tensor, Tensor, Tensor]]] = {site.last: [] for site in sites}

    def add(node: fx.Node, value: Tensor) -> None:
        flat = value.double().movedim(_axis(value), 0).flatten(1)
        seen[node].append((flat.abs().amax(1), flat.mean(1), flat.square().mean(1)))

    for sample in samples if sites else ():
        look(module, seen, sample, add)
    found = {}
    for site in sites:
        largest, means, squares = (torch.stack(parts) for parts in zip(*seen[site.last], strict=True))
        mean, power = means.mean(0), squares.mean().clamp(min=torch.finfo(torch.float64).tiny)
        all_, images = squares.mean() - mean.square().mean(), (means - mean).square().mean()
        shares = [float((part.clamp(min=0) / power).sqrt()) for part in (all_, images)]
        found[site.y] = Content(largest.amax(0).float(), *shares)
    return found


def scale_taps(
    module: fx.GraphModule, sites: Sequence[Site], content: Mapping[str, Content]
) -> dict[str, Tensor]:
    """Bring the channels of generated kernels to one range; return the factors that undo it, by name.

    A kernel that a convolution reads, or that went through what is not homogeneous, stays as it is.
    """
    factors = {}
    for site in sites:
        largest = content[site.y].largest
        is_read_here = any(user.target in MULTIPLY_ADD_OPS for user in site.last.users)
        if (
            is_read_here
            or not largest.any()
            or (site.last is not site.node and site.last.target not in _SCALES)
        ):
            continue
        up = largest.max() / largest.clamp(min=largest.max() / _LARGEST)
        weight, bias = weight_of(module, site.node), bias_of(module, site.node)
        set_constant(module, site.node, 1, weight * up.reshape(-1, *[1] * (weight.dim() - 1)))
        if bias is not None:
            set_constant(module, site.node, 2, bias * up)
        factors[site.y] = 1 / up
    undo_taps(module, factors)
    return factors


def undo_taps(module: fx.GraphModule, factors: Mapping[str, Tensor]) -> None:
    """Multiply generated kernels, by name, with a factor a channel: what reads them finds their own size."""
    for site in find_sites(module):
        if site.y not in factors:
            continue
        value = site.last.meta["val"]
        column = factors[site.y].reshape([-1 if k == _axis(value) else 1 for k in range(value.dim())])
        name = f"{site.node.name}_taps"
        module.register_parameter(name, nn.Parameter(column.clone(), requires_grad=False))
        readers = list(site.last.users)
        with module.graph.inserting_after(site.last):
            constant = module.graph.get_attr(name)
        constant.meta = {"val": column}
        with module.graph.inserting_after(constant):
            product = module.graph.call_function(torch.ops.aten.mul.Tensor, (site.last, constant))
        product.meta = {**site.last.meta, TAPS: True}
        for reader in readers:
            reader.replace_input_with(site.last, product)
    module.recompile()


def _axis(value: Tensor) -> int:
    """Return the axis of channels: of a map, or of what a linear layer writes."""
    return 1 if value.dim() == 4 else value.dim() - 1
