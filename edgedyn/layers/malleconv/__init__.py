"""MalleConv (arXiv 2201.00392, ECCV 2022): depthwise kernels from a predicted grid, sliced at every pixel.

    K x K    y[b, c, p] = sum_t Resize(grid)[b, t, c, p] * x[b, c, s * p + off(t)]  (+ Resize(bias)[b, c, p])
    affine   y[b, c, p] = Resize(scale)[b, c, p] * x[b, c, p] + Resize(offset)[b, c, p]
             out = x + gate * clip(PReLU(BN(y)), -1, 1)
    depth D  Resize(grid)[p] becomes sum_z weight_z(p) * Resize(grid[:, z])[p]
             weight_z = max(1 - |clip(D g, 1/2, D - 1/2) - (z + 1/2)|, 0)

x: (B, C, H, W)   y: (B, C, H / s, W / s), s: stride, 1 but in the K x K form   grids: (B, n, gh, gw)
Resize: bilinear to the size of y, half-pixel centres, clamped at the border.

The reference modules follow the published code, channel-major grids and all, and load its state_dicts. The
canonical modules hold the same weights and call ``edgedyn::sliced_depthwise2d`` with tap-major grids: the
rows of the last 1x1 convolution are permuted once, so nothing is transposed at run time.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedyn.errors import ModelError
from edgedyn.layers import Layer
from edgedyn.layers._adopt import SIZE, adopt, require, require_outputs
from edgedyn.layers.malleconv.slicing import (
    Geometry,
    Sides,
    bilateral_slice,
    depth_weights,
    filter_sliced,
    slice_and_convolve,
)
from edgedyn.ops.sliced_depthwise2d import sliced_depthwise2d


class PConvBlock(nn.Module):
    """Residual predictor block of the K x K form: 3x3 on a quarter of x, 1x1, GroupNorm(1), GELU, 1x1."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        quarter = channels // 4
        self.pconv = nn.Conv2d(quarter, quarter, 3, padding=1, bias=False)
        self.pwconv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.norm = nn.GroupNorm(1, channels)
        self.pwconv2 = nn.Conv2d(channels, channels, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus the branch; (B, C, H, W) both."""
        quarter = self.pconv.in_channels
        head, tail = torch.split(x, [quarter, x.shape[1] - quarter], dim=1)
        branch: Tensor = self.pwconv1(torch.cat([self.pconv(head), tail], dim=1))
        branch = self.pwconv2(F.gelu(self.norm(branch)))
        return x + branch


class MalleConv(nn.Module):
    """K x K MalleConv: a pooled predictor emits a grid of 3x3 depthwise kernels, a 1x1 convolution follows.

    Args:
        in_channel: channels C of the input.
        out_channel: channels of the output of the last 1x1 convolution.
        num_blocks: predictor blocks; with ``pooling`` the resolution is halved once more half-way.
        groups: number of consecutive channels that share one filter (the published meaning).
        scale: side of the average pool before the predictor, pixels.
        noise_channels: channels of a noise map that the predictor reads beside the pooled features.
        stride: distance between filtered pixels, a number or (height, width).

    Raises:
        ModelError: for channel counts that the published code cannot split.
    """

    def __init__(
        self,
        in_channel: int,
        out_channel: int,
        *,
        pooling: bool = True,
        num_blocks: int = 4,
        groups: int = 1,
        scale: int = 4,
        noise_channels: int = 0,
        stride: Sides = 1,
    ) -> None:
        super().__init__()
        if in_channel < 4 or in_channel % groups:
            raise ModelError(
                f"MalleConv got in_channel={in_channel}, groups={groups}; it needs at least 4 channels, "
                "divisible by groups (the number of consecutive channels that share one filter). "
                "Choose another width."
            )
        blocks: list[nn.Module] = [nn.Conv2d(in_channel + noise_channels, in_channel, 1)]
        for i in range(num_blocks):
            blocks.append(PConvBlock(in_channel))
            if i == num_blocks // 2 - 1 and pooling:
                blocks.append(nn.AvgPool2d(2, 2))
        self.pool = nn.AvgPool2d(scale, scale)
        self.predictor = nn.Sequential(*blocks)
        self.filters, self.noise_channels = in_channel // groups, noise_channels
        self.geometry = Geometry.of(3, 1, stride, None)
        self.expander = nn.Conv2d(in_channel, self.filters * 9, 1)
        nn.init.normal_(self.expander.bias, 0, 1 / 3)  # type: ignore[arg-type]
        nn.init.normal_(self.expander.weight, 0, 0.1 / 3)
        self.pwconv = nn.Conv2d(in_channel, out_channel, 1)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Filter (B, in_channel, H, W) and mix the channels: (B, out_channel, H / stride, W / stride).

        Args:
            x: features.
            noise: (B, noise_channels, H / scale, W / scale), where the layer has noise channels.

        Raises:
            ModelError: for a noise map of another shape, or a missing one.
        """
        grid = F.hardtanh(self.expander(self.predictor(_beside(self, x, noise))), -2, 2)
        grid = grid.view(x.shape[0], self.filters, 9, grid.shape[2], grid.shape[3])
        y: Tensor = self.pwconv(slice_and_convolve(x, grid, stride=self.geometry.stride))
        return y


def _beside(layer: MalleConv | CanonicalMalleConv, x: Tensor, noise: Tensor | None) -> Tensor:
    """Return the pooled features of a layer, followed by the noise map where it has one."""
    pooled: Tensor = layer.pool(x)
    expected = (x.shape[0], layer.noise_channels, *pooled.shape[2:])
    found = None if noise is None else tuple(noise.shape)
    if found != (expected if layer.noise_channels else None):
        raise ModelError(
            f"MalleConv with {layer.noise_channels} noise channels got a noise map of shape {found} for "
            f"features {tuple(x.shape)}; expected {expected if layer.noise_channels else None}. The map "
            "stands beside the pooled features: resize it to them."
        )
    return pooled if noise is None else torch.cat([pooled, noise], dim=1)


class CanonicalMalleConv(nn.Module):
    """MalleConv on ``edgedyn::sliced_depthwise2d``; the expander's rows are tap-major."""

    def __init__(self, layer: MalleConv) -> None:
        super().__init__()
        self.pool, self.predictor, self.pwconv = layer.pool, layer.predictor, layer.pwconv
        self.geometry, self.noise_channels = layer.geometry, layer.noise_channels
        rows = torch.arange(layer.expander.out_channels).view(layer.filters, 9).t().flatten()
        self.expander = _select_rows(layer.expander, rows)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Filter (B, in_channel, H, W) and mix the channels, as ``MalleConv``."""
        grid = F.hardtanh(self.expander(self.predictor(_beside(self, x, noise))), -2, 2)
        y: Tensor = self.pwconv(filter_sliced(x, grid, None, self.geometry))
        return y


class ResConvBlock(nn.Module):
    """Residual block of MalleNet: 1x1 (C -> 5C), depthwise 3x3, 1x1 (5C -> C), each with BatchNorm, PReLU."""

    def __init__(self, channels: int, expansion: int = 5) -> None:
        super().__init__()
        hidden = channels * expansion
        self.body = nn.Sequential(
            nn.Conv2d(channels, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.PReLU(hidden),
            nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.PReLU(hidden),
            nn.Conv2d(hidden, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.PReLU(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus the body's output; (B, C, H, W) both."""
        y: Tensor = x + self.body(x)
        return y


class AffineMalleConv(nn.Module):
    """Affine MalleConv: R = 1 with offset, sliced from a bilateral grid, added through a trainable gate.

    Args:
        channels: channels C of input and output.
        features: width of the predictor.
        stages: predictor stages of 3 ResConvBlocks; the grid is 2 ** (stages - 1) times smaller than the
            input.
        depth: cells D of the grid's depth axis; the guide is the feature itself, clipped to [0, 1].
    """

    def __init__(self, channels: int, features: int, stages: int, depth: int = 1) -> None:
        super().__init__()
        self.depth = depth
        blocks: list[nn.Module] = [nn.Conv2d(channels, features, 3, padding=1), nn.PReLU(features)]
        for stage in range(stages):
            blocks += [nn.MaxPool2d(2)] if stage else []
            blocks += [ResConvBlock(features) for _ in range(3)]
        self.predictor = nn.Sequential(*blocks)
        self.coefficients = nn.Conv2d(features, 2 * channels * depth, 1)
        self.norm = nn.BatchNorm2d(channels)
        self.act = nn.PReLU(channels)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        """Add the gated affine map of x; (B, C, H, W) both, H and W multiples of 2 ** (stages - 1)."""
        y: Tensor = affine_slice(self.coefficients(self.predictor(x)), x, self.depth)
        y = self.act(self.norm(y))
        return x + self.gate * y.clamp(-1, 1)


def affine_slice(coefficients: Tensor, x: Tensor, depth: int = 1) -> Tensor:
    """Slice per-channel scale and offset and apply them: ``scale(p) * x(p) + offset(p)``.

    Args:
        coefficients: (B, 2 * C * D, gh, gw); first half scale, second half offset, index ``c * D + z`` inside
            each.
        x: (B, C, H, W); clipped to [0, 1] it is its own guide.
        depth: cells D of the grid's depth axis.

    Returns:
        (B, C, H, W).
    """
    b, _, gh, gw = coefficients.shape
    cells = coefficients.view(b, 2 * x.shape[1], depth, gh, gw).transpose(1, 2)
    scale, offset = bilateral_slice(cells, x.clamp(0, 1).repeat(1, 2, 1, 1)).chunk(2, dim=1)
    return scale * x + offset


class CanonicalAffineMalleConv(nn.Module):
    """Affine MalleConv on ``edgedyn::sliced_depthwise2d``: one call per depth cell, weighed by the guide.

    Scale and offset have a convolution each: XNNPACK would split the output of a common one outside of its
    delegate. BatchNorm follows an affine map of x whose coefficients come from a 1x1 convolution, and slicing
    keeps constants (interpolation and depth weights sum to one): BN folds into that convolution's rows,
    exactly.
    """

    def __init__(self, layer: AffineMalleConv) -> None:
        super().__init__()
        self.depth = layer.depth
        self.predictor, self.act, self.gate = layer.predictor, layer.act, layer.gate
        folded, channels = _fold_norm(layer), layer.norm.num_features
        rows = torch.arange(folded.out_channels).view(2, channels, layer.depth)
        self.scales = nn.ModuleList(_select_rows(folded, rows[0, :, z]) for z in range(layer.depth))
        self.offsets = nn.ModuleList(_select_rows(folded, rows[1, :, z]) for z in range(layer.depth))

    def forward(self, x: Tensor) -> Tensor:
        """Add the gated affine map of x; (B, C, H, W) both, H and W multiples of 2 ** (stages - 1)."""
        features = self.predictor(x)
        cells = [
            sliced_depthwise2d(x, scale(features), offset(features), 1)
            for scale, offset in zip(self.scales, self.offsets, strict=True)
        ]
        y: Tensor = cells[0]
        if self.depth > 1:
            y = (depth_weights(x.clamp(0, 1), self.depth) * torch.stack(cells, dim=1)).sum(1)
        y = self.act(y)
        return x + self.gate * y.clamp(-1, 1)


def _fold_norm(layer: AffineMalleConv) -> nn.Conv2d:
    """Fold ``norm(scale * x + offset)`` in evaluation mode into the convolution of scale and offset."""
    norm, conv = layer.norm, copy.deepcopy(layer.coefficients)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert conv.bias is not None
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    shift = norm.bias - norm.running_mean * factor
    rows = factor.repeat_interleave(layer.depth).repeat(2)
    with torch.no_grad():
        conv.weight.mul_(rows.view(-1, 1, 1, 1))
        conv.bias.mul_(rows)
        conv.bias[len(rows) // 2 :] += shift.repeat_interleave(layer.depth)
    return conv


def _select_rows(conv: nn.Conv2d, rows: Tensor) -> nn.Conv2d:
    """Copy a 1x1 convolution with its output channels reordered."""
    copy = nn.Conv2d(conv.in_channels, len(rows), 1, bias=conv.bias is not None)
    copy = copy.to(conv.weight.device, conv.weight.dtype)
    copy.load_state_dict({name: tensor[rows] for name, tensor in conv.state_dict().items()})
    return copy.train(conv.training)


def _examples() -> Iterator[tuple[nn.Module, tuple[Tensor, ...]]]:
    """Yield reference modules in evaluation mode, each with an input that discriminates (B >= 2, H != W)."""
    generator = torch.Generator().manual_seed(3)
    cases: list[tuple[nn.Module, list[tuple[int, ...]]]] = [
        (MalleConv(8, 12), [(2, 8, 16, 24)]),
        (MalleConv(8, 8, groups=2, scale=2, num_blocks=2), [(2, 8, 20, 28)]),
        (MalleConv(8, 6, scale=2, num_blocks=2, stride=2), [(2, 8, 20, 28)]),
        (
            MalleConv(4, 4, scale=2, num_blocks=1, noise_channels=3, stride=(1, 2)),
            [(2, 4, 10, 15), (2, 3, 5, 7)],
        ),
        (AffineMalleConv(5, 4, 3), [(2, 5, 12, 20)]),
        (AffineMalleConv(3, 4, 2, depth=4), [(2, 3, 8, 14)]),
    ]
    for module, shapes in cases:
        for p in module.parameters():
            p.data = p.data + 0.1 * torch.randn(p.shape, generator=generator)
        yield module.eval(), tuple(torch.rand(s, generator=generator) * 1.5 - 0.25 for s in shapes)


def _flying_conv(arguments: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> MalleConv:
    """Build the reference from the constructor arguments of the community's ``FlyingConv``."""
    known = {name: value for name, value in arguments.items() if name != "dropout"}  # without effect here
    if known.pop("bias", False):
        raise ModelError(
            "FlyingConv got bias=True, which its own code cannot run (it slices the wrong axis); expected "
            "bias=False. Retrain without."
        )
    known["noise_channels"] = known.pop("n_ch", 0)
    return MalleConv(**known)


def _recognise_flying_conv(foreign: nn.Module) -> nn.Module:
    """Make the reference, with the same weights, from an instance of the community's ``FlyingConv``."""

    def make(layer: Any) -> MalleConv:
        clip = (layer.clipper.min_val, layer.clipper.max_val)
        require(clip == (-2, 2), foreign, f"clips its grid to {clip}, expected (-2, 2)")
        options = {"pooling": layer.pooling, "num_blocks": layer.num_blocks, "groups": layer.groups}
        sizes = {"in_channel": layer.in_channel, "out_channel": layer.out_channel}
        stride = getattr(layer, "stride", 1)
        side, dilation = getattr(layer, "kernel_size", 3), getattr(layer, "dilation", 1)
        geometry = Geometry.of(side, dilation, stride, getattr(layer, "padding", None))
        expected = Geometry.of(3, 1, stride, None)
        require(geometry == expected, foreign, f"filters with {geometry}, expected {expected}")
        extra = {"scale": int(layer.pool.kernel_size), "bias": layer.bias, "n_ch": layer.n_ch}
        extra["stride"] = expected.stride
        return _flying_conv({**sizes, **options, **extra}, {})

    ours: Any = adopt(make, foreign)
    sizes = [size // int(ours.pool.kernel_size) for size in SIZE]
    noise = torch.rand((2, ours.noise_channels, *sizes), generator=torch.Generator().manual_seed(1))
    return require_outputs(ours, foreign, *([noise] if ours.noise_channels else []))


LAYER = Layer(
    name="malleconv",
    paper="MalleConv (arXiv 2201.00392)",
    primitive="sliced_depthwise2d",
    canonical={MalleConv: CanonicalMalleConv, AffineMalleConv: CanonicalAffineMalleConv},
    examples=_examples,
    authors={"FlyingConv": _flying_conv},
    recognise={"FlyingConv": _recognise_flying_conv},
)
