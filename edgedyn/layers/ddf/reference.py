"""The published modules of DDF and DDF-Up (arXiv 2104.14107), as their authors call and store them.

x: (B, C, H, W)   channel filters: (B, C * T)   spatial filters: (B, G * T, h, w), filters outermost
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedyn.errors import ModelError

EPSILON = 1e-10  # the published one


def decoupled_filter(
    x: Tensor,
    channel: Tensor,
    spatial: Tensor,
    kernel_size: int,
    *,
    stride: int = 1,
    dilation: int = 1,
    head: int = 1,
    combine: str = "mul",
) -> Tensor:
    """Filter x with the combined kernels (arXiv 2104.14107, eq. 2), in the published layout.

    Args:
        x: features (B, C, H, W), zero-padded.
        channel: channel filters (B, C * T), index ``c * T + t``.
        spatial: spatial filters (B, G * T, H // stride, W // stride), index ``g * T + t``.
        kernel_size: odd kernel side R, T = R * R.
        stride: distance between output pixels, pixels.
        dilation: distance between taps, pixels.
        head: number G of spatial filters; each serves C / G consecutive channels.
        combine: ``mul`` or ``add``.

    Returns:
        (B, C, H // stride, W // stride).
    """
    (b, c, height, width), (h, w), taps = x.shape, spatial.shape[2:], kernel_size**2
    padding = dilation * (kernel_size // 2)
    patches = F.unfold(x, kernel_size, dilation=dilation, padding=padding, stride=stride)
    rows, columns = -(-height // stride), -(-width // stride)
    patches = patches.view(b, head, c // head, taps, rows, columns)[..., :h, :w]
    per_channel = channel.reshape(b, head, c // head, taps, 1, 1)
    per_pixel = spatial.reshape(b, head, 1, taps, h, w)
    kernels = per_channel * per_pixel if combine == "mul" else per_channel + per_pixel
    return (kernels * patches).sum(3).view(b, c, h, w)


class FilterNorm(nn.Module):
    """Normalise the T taps of every filter to mean 0 and a given or learned spread (arXiv 2104.14107, eq. 5).

    The published formula to the letter: equal taps that are not exactly representable differ from their
    computed mean by a rounding error, which the division by 1e-10 magnifies. ``FilterGenerator`` returns 0
    there.

    Args:
        in_channels: number F of filters.
        kernel_size: kernel side R, at least 2; T = R * R.
        filter_type: ``spatial``, (B, F * T, h, w) -> the same, or ``channel``, F * T values per sample ->
            (B, F * T).
        nonlinearity: a name that torch's ``calculate_gain`` knows; the spread is gain / R.
        running_std: learn one factor per tap and filter in place of the constant.
        running_mean: learn one offset per tap and filter, added at the end.

    Raises:
        ModelError: for arguments outside of these.
    """

    std: Tensor | float

    def __init__(
        self,
        in_channels: int,
        kernel_size: int,
        filter_type: str,
        nonlinearity: str = "linear",
        running_std: bool = False,
        running_mean: bool = False,
    ) -> None:
        super().__init__()
        if filter_type not in ("spatial", "channel") or in_channels < 1 or kernel_size < 2:
            raise ModelError(
                f"FilterNorm got filter_type={filter_type!r}, in_channels={in_channels}, kernel_size="
                f"{kernel_size}; expected 'spatial' or 'channel', at least 1 filter and a side of at least 2 "
                "(one tap has no spread)."
            )
        self.in_channels, self.taps, self.filter_type = in_channels, kernel_size**2, filter_type
        spread = _gain(nonlinearity) / kernel_size
        values = in_channels * self.taps
        self.std = nn.Parameter(torch.randn(values) * spread) if running_std else spread
        self.mean = nn.Parameter(torch.randn(values)) if running_mean else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the taps of every filter; index ``f * T + t``."""
        pixels = x.shape[2:] if self.filter_type == "spatial" else ()
        taps = x.reshape(x.shape[0], self.in_channels, self.taps, *pixels)
        taps = taps - taps.mean(dim=2, keepdim=True)
        taps = taps / (taps.std(dim=2, keepdim=True) + EPSILON)
        y = taps.reshape(x.shape[0], -1, *pixels)
        y = y * (self.std.view(-1, *(1 for _ in pixels)) if isinstance(self.std, Tensor) else self.std)
        return y if self.mean is None else y + self.mean.view(-1, *(1 for _ in pixels))


def _gain(nonlinearity: str) -> float:
    try:
        return nn.init.calculate_gain(nonlinearity)  # type: ignore[arg-type]
    except ValueError as error:
        raise ModelError(
            f"FilterNorm got nonlinearity={nonlinearity!r}, which has no gain in torch.nn.init; expected "
            "'relu' or 'linear', or another name that calculate_gain knows."
        ) from error


def spatial_branch(
    in_channels: int, kernel_size: int, head: int, nonlinearity: str, stride: int, gen_kernel_size: int
) -> nn.Sequential:
    """Make the generator of spatial filters: [depthwise,] 1x1 to head * T, FilterNorm."""
    norm = FilterNorm(head, kernel_size, "spatial", nonlinearity)
    rows = head * kernel_size**2
    if gen_kernel_size == 1:
        return nn.Sequential(nn.Conv2d(in_channels, rows, 1, stride=stride), norm)
    depthwise = nn.Conv2d(
        in_channels,
        in_channels,
        gen_kernel_size,
        stride=stride,
        padding=gen_kernel_size // 2,
        groups=in_channels,
    )
    return nn.Sequential(depthwise, nn.Conv2d(in_channels, rows, 1), norm)


def channel_branch(in_channels: int, kernel_size: int, nonlinearity: str, se_ratio: float) -> nn.Sequential:
    """Make the generator of channel filters: global average, 1x1, ReLU, 1x1 to C * T, FilterNorm."""
    hidden = int(in_channels * se_ratio)
    return nn.Sequential(
        nn.AdaptiveAvgPool2d((1, 1)),
        nn.Conv2d(in_channels, hidden, 1),
        nn.ReLU(),
        nn.Conv2d(hidden, in_channels * kernel_size**2, 1),
        FilterNorm(in_channels, kernel_size, "channel", nonlinearity, running_std=True),
    )


def check_options(
    name: str,
    in_channels: int,
    kernel_size: int,
    head: int,
    se_ratio: float,
    kernel_combine: str,
    **at_least_1: int,
) -> None:
    """Refuse options that the published code cannot run.

    Raises:
        ModelError: with the class ``name``, the argument and the expected values.
    """
    if kernel_size < 3 or kernel_size % 2 == 0:
        raise ModelError(
            f"{name} got kernel_size={kernel_size}; expected an odd side of at least 3: an even kernel has "
            "no centre pixel, a single tap nothing to normalise. Retrain with an odd one."
        )
    if head < 1 or in_channels % head:
        raise ModelError(
            f"{name} got head={head} for in_channels={in_channels}; expected a divisor of the channels, "
            "which are shared out in consecutive runs. Choose another number of heads."
        )
    if int(in_channels * se_ratio) < 1:
        raise ModelError(
            f"{name} got in_channels={in_channels}, se_ratio={se_ratio}, which leaves its channel branch "
            "int(in_channels * se_ratio) = 0 hidden channels; expected at least 1. Raise se_ratio."
        )
    if kernel_combine not in ("mul", "add"):
        raise ModelError(f"{name} got kernel_combine={kernel_combine!r}; expected 'mul' or 'add'. Pass one.")
    for option, value in at_least_1.items():
        odd = option.endswith("kernel_size")
        if value < 1 or (odd and value % 2 == 0):
            raise ModelError(
                f"{name} got {option}={value}; expected {'an odd number' if odd else 'a number'} of at least "
                "1, or the filters would not cover the output. Choose another."
            )


def refuse_uneven_sizes(x: Tensor, stride: int) -> None:
    """Refuse sizes at which the published generator and operator disagree about the output's size.

    Raises:
        ModelError: where H or W of x (B, C, H, W) is no multiple of the stride.
    """
    height, width = x.shape[2:]
    if height % stride or width % stride:
        raise ModelError(
            f"DDFPack got features of {height} x {width} pixels at stride {stride}; expected multiples of "
            f"{stride}: its generator rounds sizes up, its operator down. Pad or crop the network's input."
        )


class DDFPack(nn.Module):
    """Decoupled dynamic filter with its two generators, in place of a depthwise or 3x3 convolution.

    Args:
        in_channels: channels C of input and output.
        kernel_size: odd kernel side R, at least 3.
        stride: distance between output pixels; H and W must be multiples of it.
        dilation: distance between taps, pixels.
        head: number G of spatial filters, a divisor of C.
        se_ratio: hidden channels of the channel branch as a share of C.
        nonlinearity: activation behind the layer, for FilterNorm's gain.
        kernel_combine: ``mul`` or ``add``.
        gen_kernel_size: odd side of a depthwise convolution in front of the spatial branch; 1 for none.

    Raises:
        ModelError: for arguments that the published code cannot run, or sizes that do not divide by stride.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        dilation: int = 1,
        head: int = 1,
        se_ratio: float = 0.2,
        nonlinearity: str = "relu",
        kernel_combine: str = "mul",
        gen_kernel_size: int = 1,
    ) -> None:
        super().__init__()
        sizes = {"stride": stride, "dilation": dilation, "gen_kernel_size": gen_kernel_size}
        check_options("DDFPack", in_channels, kernel_size, head, se_ratio, kernel_combine, **sizes)
        self.kernel_size, self.stride, self.dilation = kernel_size, stride, dilation
        self.head, self.kernel_combine = head, kernel_combine
        self.spatial_branch = spatial_branch(
            in_channels, kernel_size, head, nonlinearity, stride, gen_kernel_size
        )
        self.channel_branch = channel_branch(in_channels, kernel_size, nonlinearity, se_ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Filter (B, C, H, W) to (B, C, H / stride, W / stride)."""
        refuse_uneven_sizes(x, self.stride)
        return decoupled_filter(
            x,
            self.channel_branch(x),
            self.spatial_branch(x),
            self.kernel_size,
            stride=self.stride,
            dilation=self.dilation,
            head=self.head,
            combine=self.kernel_combine,
        )


class DDFUpPack(nn.Module):
    """Upsample by decoupled dynamic filters: one pair of generators for each output pixel of an input pixel.

    Args:
        in_channels: channels C of input and output.
        kernel_size: odd kernel side R, at least 3.
        scale_factor: output pixels along an input pixel; scale_factor ** 2 pairs of generators.
        dilation: distance between taps, pixels of the input.
        head: number G of spatial filters per pair, a divisor of C.
        se_ratio: hidden channels of a channel branch as a share of C.
        nonlinearity: activation behind the layer, for FilterNorm's gain.
        gen_kernel_size: odd side of a depthwise convolution in front of each spatial branch; 1 for none.
        joint_channels: channels of a guide that the spatial branches read instead of x; gen_kernel_size is
            then raised to at least 3. Below 1 for no guide.
        kernel_combine: ``mul`` or ``add``.
        dw_kernel_size: side of the depthwise convolution of the first published version, which must be
            kernel_size; 0 for the repaired version, which has gen_kernel_size in its place.

    Raises:
        ModelError: for arguments that the published code cannot run, or a guide that does not fit x.
    """

    def __init__(
        self,
        in_channels: int,
        kernel_size: int = 3,
        scale_factor: int = 2,
        dilation: int = 1,
        head: int = 1,
        se_ratio: float = 0.2,
        nonlinearity: str = "linear",
        gen_kernel_size: int = 1,
        joint_channels: int = -1,
        kernel_combine: str = "mul",
        dw_kernel_size: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"scale_factor": scale_factor, "dilation": dilation, "gen_kernel_size": gen_kernel_size}
        check_options("DDFUpPack", in_channels, kernel_size, head, se_ratio, kernel_combine, **sizes)
        if dw_kernel_size and (dw_kernel_size != kernel_size or gen_kernel_size > 1 or joint_channels > 0):
            raise ModelError(
                f"DDFUpPack got dw_kernel_size={dw_kernel_size}, kernel_size={kernel_size}, gen_kernel_size="
                f"{gen_kernel_size}, joint_channels={joint_channels}; the first published version pads its "
                "depthwise convolution by kernel_size // 2 and has neither of the others. Expected "
                "dw_kernel_size=kernel_size alone, or 0."
            )
        self.kernel_size, self.scale_factor, self.dilation = kernel_size, scale_factor, dilation
        self.head, self.kernel_combine = head, kernel_combine
        self.guide_channels = joint_channels if joint_channels > 0 else in_channels
        side = max(gen_kernel_size, 3) if joint_channels > 0 else gen_kernel_size
        self.spatial_branch, self.channel_branch = nn.ModuleList(), nn.ModuleList()
        for _ in range(scale_factor**2):
            spatial = spatial_branch(self.guide_channels, kernel_size, head, nonlinearity, 1, side)
            if dw_kernel_size:
                depthwise = nn.Conv2d(
                    in_channels, in_channels, dw_kernel_size, padding=kernel_size // 2, groups=in_channels
                )
                spatial = nn.Sequential(depthwise, spatial)
            self.spatial_branch.append(spatial)
            self.channel_branch.append(channel_branch(in_channels, kernel_size, nonlinearity, se_ratio))

    def forward(self, x: Tensor, joint_x: Tensor | None = None) -> Tensor:
        """Upsample (B, C, H, W) to (B, C, H * scale, W * scale), guided by (B, joint_channels, H, W)."""
        guide = x if joint_x is None else joint_x
        refuse_other_guide(x, guide, self.guide_channels)
        outputs = [
            decoupled_filter(
                x,
                channel(x),
                spatial(guide),
                self.kernel_size,
                dilation=self.dilation,
                head=self.head,
                combine=self.kernel_combine,
            )
            for spatial, channel in zip(self.spatial_branch, self.channel_branch, strict=True)
        ]
        return F.pixel_shuffle(torch.stack(outputs, dim=2).flatten(1, 2), self.scale_factor)


def refuse_other_guide(x: Tensor, guide: Tensor, channels: int) -> None:
    """Refuse a guide that is not (B, channels, H, W) for x (B, C, H, W).

    Raises:
        ModelError: with both shapes.
    """
    expected = (x.shape[0], channels, *x.shape[2:])
    if guide.shape != expected:
        raise ModelError(
            f"DDFUpPack got a guide {tuple(guide.shape)} for features {tuple(x.shape)}; expected {expected}: "
            "the guide has the low resolution. Rearrange a larger one with pixel_unshuffle."
        )
