"""Small networks of inverted-residual blocks, and a MobileNetV2 of a user, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from edgedyn.quantize.fold import fold

ACTIVATIONS: dict[str, Callable[[int], nn.Module]] = {
    "none": lambda channels: nn.Identity(),
    "relu": lambda channels: nn.ReLU(),
    "relu_inplace": lambda channels: nn.ReLU(inplace=True),
    "relu6": lambda channels: nn.ReLU6(),
    "prelu": nn.PReLU,
    "prelu1": lambda channels: nn.PReLU(),
    "leaky": lambda channels: nn.LeakyReLU(0.2),
    "hardswish": lambda channels: nn.Hardswish(),
}


class Block(nn.Module):
    """One block; every attribute may be replaced, or its forward overridden, by a test.

    Args:
        channels: of x.
        hidden: between the convolutions.
        outputs: of y.
        side: of the depthwise kernel.
        stride: of the depthwise convolution.
        activations: names of ``ACTIVATIONS``, behind each convolution.
        bias: whether convolutions have one.
        residual: whether x is added.
        depthwise: options of the depthwise convolution.
    """

    def __init__(
        self,
        channels: int = 4,
        hidden: int = 12,
        outputs: int = 4,
        *,
        side: int = 3,
        stride: int = 1,
        activations: tuple[str, str, str] = ("relu6", "relu6", "none"),
        bias: bool = True,
        residual: bool = True,
        depthwise: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        options = {
            "padding": side // 2,
            "groups": hidden,
            "stride": stride,
            "bias": bias,
            **(depthwise or {}),
        }
        self.expand = nn.Conv2d(channels, hidden, 1, bias=bias)
        self.depthwise = nn.Conv2d(hidden, hidden, side, **options)
        self.project = nn.Conv2d(hidden, outputs, 1, bias=bias)
        self.act1, self.act2 = (ACTIVATIONS[name](hidden) for name in activations[:2])
        self.act3 = ACTIVATIONS[activations[2]](outputs)
        self.residual = residual

    def branch(self, x: Tensor) -> Tensor:
        """Return F(x)."""
        y = self.act2(self.depthwise(self.act1(self.expand(x))))
        return self.act3(self.project(y))

    def forward(self, x: Tensor) -> Tensor:
        """Return F(x), or x + F(x)."""
        y = self.branch(x)
        return x + y if self.residual else y


class Masked(Block):
    """A block whose branch counts where its head decides so; each mask is made by a function of the mask."""

    def __init__(self, hidden_mask: Any, filtered_mask: Any, mask: Any, **options: Any) -> None:
        super().__init__(**options)
        self.head = nn.Conv2d(4, 1, 1)
        self.masks = hidden_mask, filtered_mask, mask

    def decide(self, x: Tensor) -> Tensor:
        """Return the mask."""
        return (self.head(x) >= 0).float()

    def forward(self, x: Tensor) -> Tensor:
        """Return x + mask * F(x)."""
        decided = self.decide(x)
        hidden, filtered, mask = (make(decided) if make else None for make in self.masks)
        y = self.act1(self.expand(x))
        y = y if hidden is None else hidden * y
        y = self.act2(self.depthwise(y))
        y = y if filtered is None else y * filtered
        y = self.act3(self.project(y))
        return x + (y if mask is None else mask * y)


def dilated(side: int) -> Callable[[Tensor], Tensor]:
    """Return the dilation of a mask by side // 2."""
    return lambda mask: F.max_pool2d(mask, side, stride=1, padding=side // 2)


class MobileNetV2(nn.Module):
    """MobileNetV2 (arXiv 1801.04381) as torchvision builds it, for ImageNet's 1000 classes.

    Args:
        width: multiple of the published channels.
        classes: number of logits.
        settings: (expansion, channels, blocks, stride) of each group of blocks.
    """

    SETTINGS = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(
        self, width: float = 1.0, classes: int = 1000, settings: tuple[tuple[int, ...], ...] = SETTINGS
    ) -> None:
        super().__init__()
        channels, last = _multiple_of_8(32 * width), _multiple_of_8(1280 * max(1.0, width))
        layers: list[nn.Module] = [_normed(3, channels, 3, stride=2)]
        for expansion, published, blocks, stride in settings:
            outputs = _multiple_of_8(published * width)
            for k in range(blocks):
                layers.append(InvertedResidual(channels, outputs, stride if k == 0 else 1, expansion))
                channels = outputs
        self.features = nn.Sequential(*layers, _normed(channels, last, 1))
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(last, classes))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes) of x (B, 3, H, W)."""
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


def small_mobilenet() -> nn.Module:
    """Return a MobileNetV2 of a block without expansion and two with it."""
    return MobileNetV2(0.25, 10, ((1, 8, 1, 1), (4, 8, 2, 1)))


class InvertedResidual(nn.Module):
    """Block of MobileNetV2; an expansion of 1 has no first convolution."""

    def __init__(self, channels: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels * expansion
        first = [] if expansion == 1 else [_normed(channels, hidden, 1)]
        self.conv = nn.Sequential(
            *first,
            _normed(hidden, hidden, 3, stride=stride, groups=hidden),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.use_res_connect = stride == 1 and channels == outputs

    def forward(self, x: Tensor) -> Tensor:
        """Return F(x), or x + F(x) where the shapes are equal."""
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


def _normed(channels: int, outputs: int, side: int, **options: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, outputs, side, padding=side // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


def _multiple_of_8(channels: float) -> int:
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded


def block_net() -> nn.Module:
    """Return a denoiser of a wide block between two convolutions."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), Block(16, 80, 16), nn.Conv2d(16, 3, 3, padding=1)
    ).eval()


def folded(network: nn.Module, *shape: int, seed: int = 3) -> fx.GraphModule:
    """Return the folded program of a network with random weights."""
    return fold(export(network, *shape, seed=seed))


def export(network: nn.Module, *shape: int, seed: int = 3) -> torch.export.ExportedProgram:
    """Return the exported program of a network with random weights."""
    return torch.export.export(randomize(network, seed), (torch.zeros(shape or (2, 4, 9, 7)),))


def randomize(network: nn.Module, seed: int = 3) -> nn.Module:
    """Give a network random weights, biases, slopes and statistics, and return it in evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in network.parameters():
            spread = 1.5 / max(tensor[0].numel(), 1) ** 0.5 if tensor.dim() > 1 else 0.3
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * spread + (tensor.dim() == 1) * 0.4)
        for name, tensor in network.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.3)
    return network.eval()
