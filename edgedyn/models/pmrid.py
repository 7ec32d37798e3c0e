"""PMRID, a raw denoiser for phones, a static network; it loads the published weights.

Wang et al., "Practical Deep Raw Image Denoising on Mobile Devices", ECCV 2020 (arXiv 2010.06935); weights:
github.com/MegEngine/PMRID, models/torch_pretrained.ckp, Apache-2.0.

    y = x + unet(x)     x, y: (B, 4, H, W) packed Bayer R, G, G, B; H and W multiples of 16; 256 is white

    x = 256 * (k_a / k * v + k_a * (s / k^2 - s_a / k_a^2) / V)          v: raw value, 0 black, 1 white

The second line is the paper's k-sigma transform: with noise of variance k * (V v) + s at white level V, x has
the noise of the anchor, ISO 1600, at every sensitivity; at ISO 1600 itself x = 256 v. It is affine, so a
recipe states it as ``input.range``: the values of black and white, which ``k_sigma_range`` returns.

Four strided encoder stages of bottleneck blocks, a thinner decoder that adds projected skips. All but the
first and the last convolution are separable: 5 x 5 depthwise in the encoder, 3 x 3 elsewhere.
"""

from __future__ import annotations

from torch import Tensor, nn

WHITE = 256.0
ANCHOR_ISO = 1600.0
# Of the paper's phone, an OPPO Reno 10x: variance = k * value + s, in 10-bit values above the black level.
_WHITE_LEVEL = 959.0
_K = (0.0005995267, 0.00868861)
_S = (7.11772e-7, 6.514934e-4, 0.11492713)


def noise_of(iso: float) -> tuple[float, float]:
    """Return the phone's noise at a sensitivity: ``gain`` and ``read_noise`` of an image set, 0..1 scale."""
    k, s = _coefficients(iso)
    return k / _WHITE_LEVEL, s**0.5 / _WHITE_LEVEL


def k_sigma_range(iso: float) -> tuple[float, float]:
    """Return the values of black and white in the network, ``input.range``, for the paper's phone."""
    (k, s), (k_a, s_a) = _coefficients(iso), _coefficients(ANCHOR_ISO)
    black = WHITE * k_a * (s / k**2 - s_a / k_a**2) / _WHITE_LEVEL
    return black, black + WHITE * k_a / k


def _coefficients(iso: float) -> tuple[float, float]:
    return _K[0] * iso + _K[1], (_S[0] * iso + _S[1]) * iso + _S[2]


class Separable(nn.Sequential):
    """A depthwise convolution, a pointwise one, which alone has a bias, and a ReLU where ``relu``."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, relu: bool = True) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, kernel, stride, kernel // 2, groups=inputs, bias=False)
        self.pointwise = nn.Conv2d(inputs, outputs, 1)
        if relu:
            self.relu = nn.ReLU()


class Dense(nn.Sequential):
    """A 3 x 3 convolution, and a ReLU where ``relu``."""

    def __init__(self, inputs: int, outputs: int, *, relu: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1)
        if relu:
            self.relu = nn.ReLU()


class Bottleneck(nn.Module):
    """Two 5 x 5 separable convolutions with a quarter of the channels between them, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = Separable(inputs, outputs // 4, 5, stride=stride)
        self.conv2 = Separable(outputs // 4, outputs, 5, relu=False)
        changes = stride > 1 or inputs != outputs
        self.proj = Separable(inputs, outputs, 3, stride=stride, relu=False) if changes else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, outputs, H / stride, W / stride) of (B, inputs, H, W)."""
        y: Tensor = self.relu(self.conv2(self.conv1(x)) + self.proj(x))
        return y


def _stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    further = (Bottleneck(outputs, outputs, 1) for _ in range(blocks - 1))
    return nn.Sequential(Bottleneck(inputs, outputs, 2), *further)


class Refine(nn.Module):
    """Two 3 x 3 separable convolutions that add to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv0 = Separable(channels, channels, 3)
        self.conv1 = Separable(channels, channels, 3, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return a tensor of the shape of ``x``."""
        y: Tensor = x + self.conv1(self.conv0(x))
        return y


class Decoder(nn.Module):
    """A refinement, enlarged to twice the size, plus the projected features of the encoder."""

    def __init__(self, inputs: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.decode_conv = Refine(inputs)
        self.upsample = nn.ConvTranspose2d(inputs, outputs, 2, stride=2)
        self.proj_conv = Separable(skip, outputs, 3)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Return (B, outputs, 2 H, 2 W) of x (B, inputs, H, W) and skip (B, skip, 2 H, 2 W)."""
        y: Tensor = self.upsample(self.decode_conv(x)) + self.proj_conv(skip)
        return y


class PMRID(nn.Module):
    """The published network: 1.03 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = Dense(4, 16, relu=True)
        self.enc1, self.enc2 = _stage(16, 64, 2), _stage(64, 128, 2)
        self.enc3, self.enc4 = _stage(128, 256, 4), _stage(256, 512, 4)
        self.encdec = Separable(512, 64, 3)
        self.dec1, self.dec2 = Decoder(64, 256, 64), Decoder(64, 128, 32)
        self.dec3, self.dec4 = Decoder(32, 64, 32), Decoder(32, 16, 16)
        self.out0 = Refine(16)
        self.out1 = Dense(16, 4, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """Denoise (B, 4, H, W), H and W multiples of 16."""
        features = [self.conv0(x)]
        for stage in (self.enc1, self.enc2, self.enc3, self.enc4):
            features.append(stage(features[-1]))
        y = self.encdec(features.pop())
        for decoder in (self.dec1, self.dec2, self.dec3, self.dec4):
            y = decoder(y, features.pop())
        denoised: Tensor = x + self.out1(self.out0(y))
        return denoised


NETWORK = PMRID
