"""DDF and DDF-Up in deployed form, on ``edgedyn::decoupled_depthwise2d``.

The rows of the generators' last 1x1 convolutions are permuted to tap-major once, and FilterNorm's mean is
subtracted there, from the rows themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgedyn.layers.ddf.reference import (
    EPSILON,
    DDFPack,
    DDFUpPack,
    FilterNorm,
    refuse_other_guide,
    refuse_uneven_sizes,
)
from edgedyn.ops.decoupled_depthwise2d import decoupled_depthwise2d

# any positive difference of spreads of at least 1e-22 in float32 is above 1 when multiplied by it
_STEEP = 2.0**100


class FilterGenerator(nn.Module):
    """1x1 convolution and FilterNorm in deployed form: tap-major, 0 where the spread is rounding noise.

        a = W' x + b'    W' = W - mean_t W, b' = b - mean_t b      spread = sqrt(sum_t a_t^2 / (T - 1))
        m = mean_t v     v = W x + b                               noise  = 2 T eps |m|
        y = a / (spread + 1e-10) * gain / R  where spread > noise, else 0

    The mean is subtracted from the rows, once and in float64, so equal rows leave exact zeros. Where
    T values equal m, their computed mean is off by up to T eps / 2 |m| (T - 1 additions and a division, each
    by eps / 2), and a product with the matrix 1 - 1/T by up to twice (T + 1) eps / 2 |m|; the root of their
    mean square over T - 1 is at most sqrt(T / (T - 1)) times that, below ``noise`` for every T > 2. The
    published formula cannot tell such a spread from none, and divides by 1e-10. Everywhere else both are
    equal up to rounding. The rows of m cost 1 / T of the convolution.

    The module stays in float32: 1e-10 is 0 in float16, and taps that are divided by a small spread must not
    be rounded to multiples of the largest tap's precision.

    Args:
        conv: the reference's last 1x1 convolution, F * T rows, index ``f * T + t``.
        norm: the FilterNorm behind it.
    """

    average: Tensor
    scale: Tensor | None
    shift: Tensor | None

    def __init__(self, conv: nn.Conv2d, norm: FilterNorm) -> None:
        super().__init__()
        self.filters, self.taps = norm.in_channels, norm.taps
        rows = (self.taps + 1) * self.filters
        self.conv = nn.Conv2d(conv.in_channels, rows, 1, stride=conv.stride)  # type: ignore[arg-type]
        self.conv.to(conv.weight.device, conv.weight.dtype)
        assert conv.bias is not None
        with torch.no_grad():
            self.conv.weight.copy_(self._center(conv.weight))
            self.conv.bias.copy_(self._center(conv.bias))  # type: ignore[union-attr]
        self.register_buffer("average", conv.weight.new_full((1, self.taps, 1, 1), 1 / (self.taps - 1)))
        self.gain = 1.0 if isinstance(norm.std, Tensor) else norm.std
        for name, values in (("scale", norm.std), ("shift", norm.mean)):
            tap_major = self._transpose(values.detach()) if isinstance(values, Tensor) else None
            self.register_buffer(name, tap_major)

    def forward(self, x: Tensor) -> Tensor:
        """Make the filters (B, T * F, h, w), index ``t * F + f``, from features (B, I, H, W)."""
        rows = self.conv(x)
        b, _, h, w = rows.shape
        if self.filters > 1:  # filters move to the axis of rows, so that the axis of channels is T alone
            rows = rows.reshape(b, self.taps + 1, self.filters * h, w)
        taps, mean = rows[:, : self.taps], rows[:, self.taps :]
        spread = F.conv2d(taps * taps, self.average).sqrt()
        noise = mean.abs() * (2 * self.taps * torch.finfo(mean.dtype).eps)
        # gain or 0 without a comparison, which XNNPACK does not have (executorch 1.5.1)
        gain = ((spread - noise) * _STEEP).clamp(0.0, self.gain)
        y: Tensor = taps * (gain / (spread + EPSILON))
        y = y.reshape(b, -1, h, w)
        y = y if self.scale is None else y * self.scale
        return y if self.shift is None else y + self.shift

    def _center(self, rows: Tensor) -> Tensor:
        """Return the rows (F * T, ...) minus their mean over the taps, tap-major, then the means."""
        by_filter = rows.double().reshape(self.filters, self.taps, *rows.shape[1:])
        # the first tap goes off first: equal rows then leave exact zeros in every dtype
        rest = by_filter - by_filter[:, :1]
        centered = (rest - rest.mean(1, keepdim=True)).transpose(0, 1).flatten(0, 1)
        return torch.cat([centered, by_filter.mean(1)])

    def _transpose(self, values: Tensor) -> Tensor:
        """Return (F * T,) as (1, T * F, 1, 1), tap-major."""
        return values.view(self.filters, self.taps).t().reshape(1, -1, 1, 1)


def deploy_branch(branch: nn.Sequential) -> nn.Sequential:
    """Return a branch whose last convolution and FilterNorm are one FilterGenerator."""
    *front, last = branch
    if isinstance(last, nn.Sequential):  # the first published DDFUpPack: depthwise, (1x1, FilterNorm)
        return nn.Sequential(*front, *deploy_branch(last))
    *front, conv = front
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(last, FilterNorm)
    return nn.Sequential(*front, FilterGenerator(conv, last))


class CanonicalDDFPack(nn.Module):
    """DDFPack on ``edgedyn::decoupled_depthwise2d``; both filters are tap-major."""

    def __init__(self, layer: DDFPack) -> None:
        super().__init__()
        self.spatial_branch = deploy_branch(layer.spatial_branch)
        self.channel_branch = deploy_branch(layer.channel_branch)
        self.kernel_size, self.stride, self.dilation = layer.kernel_size, layer.stride, layer.dilation
        self.head, self.kernel_combine = layer.head, layer.kernel_combine

    def forward(self, x: Tensor) -> Tensor:
        """Filter (B, C, H, W) to (B, C, H / stride, W / stride)."""
        refuse_uneven_sizes(x, self.stride)
        return decoupled_depthwise2d(
            x,
            self.channel_branch(x),
            self.spatial_branch(x),
            self.kernel_size,
            self.stride,
            self.dilation,
            self.head,
            self.kernel_combine,
        )


class CanonicalDDFUpPack(nn.Module):
    """DDFUpPack on ``edgedyn::decoupled_depthwise2d``: scale_factor ** 2 calls at the resolution of x."""

    def __init__(self, layer: DDFUpPack) -> None:
        super().__init__()
        self.spatial_branch = nn.ModuleList(deploy_branch(branch) for branch in layer.spatial_branch)  # type: ignore[arg-type]
        self.channel_branch = nn.ModuleList(deploy_branch(branch) for branch in layer.channel_branch)  # type: ignore[arg-type]
        self.kernel_size, self.scale_factor, self.dilation = (
            layer.kernel_size,
            layer.scale_factor,
            layer.dilation,
        )
        self.head, self.kernel_combine = layer.head, layer.kernel_combine
        self.guide_channels = layer.guide_channels

    def forward(self, x: Tensor, joint_x: Tensor | None = None) -> Tensor:
        """Upsample (B, C, H, W) to (B, C, H * scale, W * scale), guided by (B, joint_channels, H, W)."""
        guide = x if joint_x is None else joint_x
        refuse_other_guide(x, guide, self.guide_channels)
        k, d, g, combine = self.kernel_size, self.dilation, self.head, self.kernel_combine
        outputs = [
            decoupled_depthwise2d(x, channel(x), spatial(guide), k, 1, d, g, combine)
            for spatial, channel in zip(self.spatial_branch, self.channel_branch, strict=True)
        ]
        return F.pixel_shuffle(torch.stack(outputs, dim=2).flatten(1, 2), self.scale_factor)
