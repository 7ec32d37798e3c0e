"""Static capacity: gated blocks that compute at most k positions, and count those that do not fit.

    rows       = the first k active positions, row by row                       (k,)
    y          = identity + scatter(F(gather(x, rows)))                         (1, C, h, w)
    overflow   = sum over masks of max(active - k, 0)                           (1,); y is exact while it is 0

Batch 1. All shapes are fixed, so a runtime needs no sparse kernel: the block counts the active positions,
scatters them into a list of k, gathers patches, multiplies one matrix per convolution, and scatters the rows.
The inner convolutions of F have a capacity of their own, for the dilated mask. The host runs the dense
network where overflow is above 0: a routed program of rule ``fallback``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers import canonicalize, replace_modules
from edgedyn.layers.dynconv import (
    CanonicalBasicBlock,
    CanonicalBottleneck,
    CanonicalInvertedResidual,
    MaskedConv2d,
)
from edgedyn.layers.dynconv.masks import CanonicalMaskUnit, Masks, Selection

BLOCKS = (CanonicalBasicBlock, CanonicalBottleneck, CanonicalInvertedResidual)
DILATED = ".dilated"  # behind a block's path: the capacity of its inner convolutions


class Overflow:
    """Number of positions that did not fit in one call; shared by all blocks, returned by their network."""

    def __init__(self) -> None:
        self.counts: list[Tensor] = []

    def add_to(self, network: nn.Module) -> nn.Module:
        """Let a network of such blocks return (y, overflow (1,)) in place of y.

        By hooks, not by a module around it, so that its layers keep the paths that recipes name.
        """
        network.register_forward_pre_hook(self._begin)
        network.register_forward_hook(self._end)
        return network

    def _begin(self, network: nn.Module, x: Any) -> None:
        self.counts.clear()

    def _end(self, network: nn.Module, x: Any, y: Any) -> tuple[Any, Tensor]:
        counts = torch.stack(self.counts)
        self.counts.clear()
        return y, counts.sum(0, keepdim=True)


class Grid(NamedTuple):
    """The positions that ``Selection`` selected from a mask (1, 1, h, w).

    Attributes:
        positions: int64 (k,) of ``i * w + j``, the active ones in order, then 0.
        slots: int64 (1, 1, h, w), each position's index in ``positions``; k where it is inactive or did not
            fit.
        overflow: scalar, how many did not fit.
    """

    positions: Tensor
    slots: Tensor
    overflow: Tensor

    def patches(self, source_width: int, conv: GatheredConv2d) -> Tensor:
        """Return indices (k * T,) into the rows of a source that has the convolution's padding."""
        width, padded_width = self.slots.shape[3], source_width + 2 * conv.padding
        row = torch.div(self.positions, width, rounding_mode="floor")
        column = self.positions - row * width
        corner = (row * padded_width + column) * conv.stride
        taps = [
            conv.dilation * (dy * padded_width + dx) for dy in range(conv.side) for dx in range(conv.side)
        ]
        return (corner[:, None] + torch.tensor(taps, device=corner.device)).flatten()

    def scatter(self, rows: Tensor) -> Tensor:
        """Put rows (k, C) back to their positions: (1, C, h, w), 0 elsewhere."""
        y = _with_zero_row(rows).index_select(0, self.slots.flatten())
        return y.view(1, *self.slots.shape[2:], -1).permute(0, 3, 1, 2)


def _with_zero_row(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.zeros_like(rows[:1])])


class GatheredConv2d(nn.Module):
    """A convolution of gathered patches: a matrix product, or for depthwise kernels a product and a sum."""

    def __init__(self, conv: MaskedConv2d) -> None:
        super().__init__()
        self.side, self.stride = conv.weight.shape[2], conv.stride
        self.padding, self.dilation, self.groups = conv.padding, conv.dilation, conv.groups
        outputs, inputs, side, _ = conv.weight.shape
        self.is_depthwise = inputs == 1 and self.groups == outputs
        if self.is_depthwise:
            self.taps = nn.Parameter(conv.weight.detach().view(outputs, side**2).t().flatten().clone())
            self.bias = nn.Parameter(conv.bias.detach())
            return
        # a patch is tap-major, because rows of whole positions are gathered
        weight = conv.weight.detach().permute(0, 2, 3, 1).flatten(1).chunk(self.groups)
        self.products = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0]).to(w) for w in weight)
        biases = conv.bias.detach().chunk(self.groups)
        for product, w, b in zip(self.products, weight, biases, strict=True):
            product.load_state_dict({"weight": w, "bias": b})

    def forward(self, rows: Tensor) -> Tensor:
        """Compute (k, O) of patches (k * T, I)."""
        channels, taps = rows.shape[1], self.side**2
        if self.is_depthwise:
            # slices and sums: XNNPACK has no split, and no sum over one dimension (executorch 1.5)
            terms = rows.view(-1, taps * channels) * self.taps
            starts = range(0, taps * channels, channels)
            return sum((terms[:, t : t + channels] for t in starts), start=self.bias)
        patches = rows.view(-1, taps, channels)
        parts = patches.chunk(self.groups, dim=2) if self.groups > 1 else (patches,)
        y = [product(part.flatten(1)) for product, part in zip(self.products, parts, strict=True)]
        return torch.cat(y, dim=1) if self.groups > 1 else y[0]


class CapacityBlock(nn.Module):
    """A gated block of fixed capacities; batch 1.

    Args:
        block: the canonical block, whose weights are copied.
        capacity: positions of the mask that fit.
        inner_capacity: positions of the dilated mask that fit.
        overflow: counts the positions that did not fit.
    """

    def __init__(self, block: nn.Module, capacity: int, inner_capacity: int, overflow: Overflow) -> None:
        super().__init__()
        self.masker: Any = block.masker
        self.downsample: Any = getattr(block, "downsample", None)
        self.convs = [name for name, child in block.named_children() if isinstance(child, MaskedConv2d)]
        for name in self.convs:
            self.add_module(name, GatheredConv2d(getattr(block, name)))
        self.outer, self.inner, self.overflow = Selection(capacity), Selection(inner_capacity), overflow
        self.is_inverted = isinstance(block, CanonicalInvertedResidual)

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for x (1, C, H, W), and count the positions that did not fit.

        Raises:
            ModelError: for a batch: its samples have different positions.
        """
        if x.shape[0] != 1:
            raise ModelError(
                f"a block of fixed capacity got x {tuple(x.shape)}; expected a batch of 1. Run the images "
                "one by one, as edgedyn.RoutedModel does."
            )
        activate = F.relu6 if self.is_inverted else F.relu
        _, mask, dilated = self.masker(x)
        inner, outer = Grid(*self.inner(dilated)), Grid(*self.outer(mask))
        self.overflow.counts += [inner.overflow, outer.overflow]
        convs: list[Any] = [getattr(self, name) for name in self.convs]
        y = activate(convs[0](_gather_patches(x, inner, convs[0])))
        y = convs[1](_gather_rows(y, inner, outer, convs[1]))
        y = convs[2](activate(y)) if len(convs) == 3 else y
        identity = x if self.downsample is None else self.downsample(x)
        out = identity + outer.scatter(y)
        return out if self.is_inverted else F.relu(out)


def _gather_patches(x: Tensor, grid: Grid, conv: GatheredConv2d) -> Tensor:
    """Gather the patches of a feature map (1, C, H, W) at a grid's positions: (k * T, C)."""
    padded = F.pad(x, (conv.padding,) * 4) if conv.padding else x
    return padded.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, grid.patches(x.shape[3], conv))


def _gather_rows(rows: Tensor, source: Grid, grid: Grid, conv: GatheredConv2d) -> Tensor:
    """Gather the patches at a grid's positions from the rows (k, C) of another grid: (k' * T, C)."""
    slots = F.pad(source.slots, (conv.padding,) * 4, value=source.positions.shape[0])
    index = slots.flatten().index_select(0, grid.patches(source.slots.shape[3], conv))
    return _with_zero_row(rows).index_select(0, index)


def with_capacity(model: nn.Module, capacities: Mapping[str, int]) -> nn.Module:
    """Return the capacity variant of a network: its gated blocks compute at most k positions.

    It maps x (1, ...) to y, as the network returns it, and overflow (1,). While overflow is 0, y is exact.

    Args:
        model: network of DynConv blocks, in evaluation mode; not changed.
        capacities: path of a block -> positions of its mask; path + ``.dilated`` -> positions of the dilated
            mask, by default the most that k can need. ``capacities_of`` measures both. Other blocks keep
            their masks.

    Raises:
        ModelError: for a path that is no gated block, a capacity below 1, or no capacities.
    """
    model, overflow = canonicalize(model), Overflow()
    blocks = {path: module for path, module in model.named_modules() if isinstance(module, BLOCKS)}
    named = [path for path in capacities if path in blocks]
    unknown = [path for path in capacities if path.removesuffix(DILATED) not in named]
    if unknown or not named or min(capacities.values()) < 1:
        strange = f", not {unknown[0]!r}" if unknown else ""
        raise ModelError(
            f"with_capacity got {dict(capacities)}; expected at least one capacity, each 1 or more, for "
            f"paths of gated blocks{strange}. Found blocks: {list(blocks)}. Measure them by capacities_of."
        )

    def make(block: Any, path: str) -> nn.Module | None:
        if path not in named:
            return None
        k, window = capacities[path], (2 * block.masker.reach + 1) ** 2
        return CapacityBlock(block, k, capacities.get(path + DILATED, window * k), overflow)

    return overflow.add_to(replace_modules(model, make).eval())


def capacities_of(model: nn.Module, inputs: Iterable[Tensor], quantile: float = 1.0) -> dict[str, int]:
    """Measure the capacity of each mask that suffices for a share of the inputs.

    Args:
        model: network of DynConv blocks, reference or canonical, in evaluation mode.
        inputs: batches for the network.
        quantile: share in (0, 1] of samples whose active positions fit each mask.

    Returns:
        path of a block -> active positions of its mask, and path + ``.dilated`` -> of its dilated mask, at
        that quantile, rounded up, at least 1.

    Raises:
        ModelError: for a quantile outside (0, 1], or a network without gated blocks, or no inputs.
    """
    counts: dict[str, list[Tensor]] = {}

    def count(path: str) -> Any:
        def hook(unit: nn.Module, inputs: Any, masks: Masks) -> None:
            for name, mask in ((path, masks.mask), (path + DILATED, masks.dilated)):
                counts.setdefault(name, []).append(mask.detach().flatten(1).sum(1))

        return hook

    model = canonicalize(model)  # its dilated masks are those of the convolutions
    for path, unit in model.named_modules():
        if isinstance(unit, CanonicalMaskUnit):
            block = path.removesuffix("masker").removesuffix(".")
            unit.register_forward_hook(count(block))
    with torch.no_grad():
        for x in inputs:
            model(x)
    if not counts or not 0 < quantile <= 1:
        raise ModelError(
            f"capacities_of got quantile={quantile} and counted {len(counts)} masks; expected a "
            "quantile in (0, 1], a network with gated blocks and at least one input."
        )
    return {
        name: max(1, math.ceil(torch.cat(n).double().quantile(quantile, interpolation="higher").item()))
        for name, n in counts.items()
    }
