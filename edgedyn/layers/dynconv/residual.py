"""Static residual blocks of ResNet and MobileNetV2; a gated block with all positions active equals them.

    y = ReLU(identity + F(x))      BasicBlock, Bottleneck (arXiv 1512.03385)
    y = x + F(x), or F(x)          InvertedResidual (arXiv 1801.04381)

x: (B, C, H, W)   y: (B, O, h, w)   F: convolutions, BatchNorm, activations

State_dict keys are those of torchvision.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from edgedyn.errors import ModelError


def _shortcut(inplanes: int, outplanes: int, stride: int, *, downsample: bool) -> nn.Module | None:
    if downsample:
        return nn.Sequential(
            nn.Conv2d(inplanes, outplanes, 1, stride=stride, bias=False), nn.BatchNorm2d(outplanes)
        )
    if stride != 1 or inplanes != outplanes:
        raise ModelError(
            f"a residual block got {inplanes} channels in, {outplanes} out and stride {stride} without a "
            "downsample branch; the terms of its sum would differ in shape. Pass downsample=True."
        )
    return None


class BasicBlock(nn.Module):
    """Dense residual block: two 3x3 convolutions.

    Args:
        inplanes: channels of x.
        planes: channels of y.
        stride: of the first convolution and of the shortcut.
        downsample: whether the shortcut is a 1x1 convolution and BatchNorm.

    Raises:
        ModelError: without downsample, where a stride or channel numbers keep x from having the shape of y.
    """

    expansion = 1

    def __init__(self, inplanes: int, planes: int, stride: int = 1, *, downsample: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = _shortcut(inplanes, planes, stride, downsample=downsample)

    def branch(self, x: Tensor) -> Tensor:
        """Compute F(x) everywhere."""
        y: Tensor = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return y

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(identity + F(x)); (B, inplanes, H, W) to (B, planes, h, w)."""
        identity = x if self.downsample is None else self.downsample(x)
        return F.relu(identity + self.branch(x))


class Bottleneck(nn.Module):
    """Dense residual block: 1x1, 3x3 and 1x1 convolutions, the last to 4 * planes channels.

    Args:
        inplanes: channels of x.
        planes: channels of y divided by 4.
        stride: of the 3x3 convolution and of the shortcut.
        downsample: whether the shortcut is a 1x1 convolution and BatchNorm.
        groups: of the 3x3 convolution.
        base_width: its width is planes * base_width / 64 * groups.
        dilation: of the 3x3 convolution.

    Raises:
        ModelError: without downsample, where a stride or channel numbers keep x from having the shape of y.
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        *,
        downsample: bool = False,
        groups: int = 1,
        base_width: float = 64,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        width, outplanes = int(planes * (base_width / 64)) * groups, 4 * planes
        self.conv1 = nn.Conv2d(inplanes, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, dilation, dilation, groups, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outplanes, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outplanes)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(inplanes, outplanes, stride, downsample=downsample)

    def branch(self, x: Tensor) -> Tensor:
        """Compute F(x) everywhere."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return y  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Return ReLU(identity + F(x)); (B, inplanes, H, W) to (B, 4 * planes, h, w)."""
        identity = x if self.downsample is None else self.downsample(x)
        return F.relu(identity + self.branch(x))


class InvertedResidual(nn.Module):
    """Dense MobileNetV2 block: 1x1 to a hidden width, depthwise 3x3, 1x1; ReLU6 between, none behind.

    x is added where it has the shape of F(x).

    Args:
        inp: channels of x.
        oup: channels of y.
        stride: of the depthwise convolution, 1 or 2.
        expand_ratio: hidden channels per channel of x; 1 leaves out the first convolution.

    Raises:
        ModelError: for another stride.
    """

    def __init__(self, inp: int, oup: int, stride: int = 1, *, expand_ratio: float = 6) -> None:
        super().__init__()
        if stride not in (1, 2):
            raise ModelError(f"InvertedResidual got stride={stride}; expected 1 or 2, as published.")
        hidden = round(inp * expand_ratio)
        layers: list[nn.Module] = []
        if expand_ratio != 1:
            layers += [nn.Conv2d(inp, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6()]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, oup, 1, bias=False),
            nn.BatchNorm2d(oup),
        ]
        self.conv = nn.Sequential(*layers)
        self.identity = stride == 1 and inp == oup

    def forward(self, x: Tensor) -> Tensor:
        """Return F(x), or x + F(x); (B, inp, H, W) to (B, oup, h, w)."""
        y: Tensor = self.conv(x)
        return x + y if self.identity else y
