"""Networks of strangers: each is built around one thing that real networks have and ours do not."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

C = 8


def conv(inputs: int, outputs: int, side: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, side, padding=side // 2, **options)


class Residual(nn.Module):
    """x minus a chain of layers."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.body(x)


def around(layer: nn.Module) -> nn.Module:
    """Return a denoiser of one layer, C to C channels, between two convolutions."""
    return Residual(conv(3, C), nn.ReLU(), layer, nn.ReLU(), conv(C, 3))


# factories that make no network


def raises() -> nn.Module:
    raise RuntimeError("my config is missing")


def not_a_module() -> int:
    return 7


def needs_a_width(width: int) -> nn.Module:
    return nn.Conv2d(3, width, 1)


def exits() -> nn.Module:
    print("usage: train.py DATA")
    sys.exit(2)


def interrupted() -> nn.Module:
    raise KeyboardInterrupt


def opens_a_file() -> nn.Module:
    import json

    return json.loads("{")


made = nn.Identity()


class RaisesLater(nn.Module):
    """A network that can be made and not called."""

    def forward(self, x: Tensor) -> Tensor:
        raise KeyError("sigma")


def raises_later() -> nn.Module:
    return RaisesLater()


# weights that are computed from parameters alone


class Doubled(nn.Module):
    """A parametrization of a user."""

    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight - weight.mean()


class Noisy(nn.Module):
    """A parametrization that draws random numbers."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


def parametrized(layer: nn.Module, parametrization: nn.Module) -> nn.Module:
    nn.utils.parametrize.register_parametrization(layer, "weight", parametrization)
    return layer


def hooked(layer: nn.Conv2d) -> nn.Conv2d:
    """Return a layer whose weight a hook of the user computes, as torch's old ones do."""
    weight = layer.weight
    del layer._parameters["weight"]
    layer.register_parameter("raw", nn.Parameter(weight.data))
    layer.weight = layer.raw * 2

    def double(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        module.weight = module.raw * 2

    layer.register_forward_pre_hook(double)
    return layer


def pruned(layer: nn.Conv2d) -> nn.Conv2d:
    prune.l1_unstructured(layer, "weight", amount=0.5)
    return prune.random_unstructured(layer, "bias", amount=0.5)


NORMED = {
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(conv(C, C)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(conv(C, C)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(conv(C, C)),
    "custom": lambda: parametrized(conv(C, C), Doubled()),
    "two": lambda: parametrized(nn.utils.parametrizations.weight_norm(conv(C, C)), Doubled()),
    "weight_norm_hook": lambda: nn.utils.weight_norm(conv(C, C)),
    "spectral_norm_hook": lambda: nn.utils.spectral_norm(conv(C, C)),
    "pruned": lambda: pruned(conv(C, C)),
}


def normed(kind: str) -> nn.Module:
    return around(NORMED[kind]())


# weights that are computed from data: CondConv, dynamic convolution, and their like in many spellings

K = 3


class Mixed(nn.Module):
    """A layer of K kernels, mixed per image by a rule of its subclass.

    Args:
        inputs: channels in.
        outputs: channels out.
        groups: of the convolution.
    """

    def __init__(self, inputs: int = C, outputs: int = C, groups: int = 1) -> None:
        super().__init__()
        shape = (K, outputs, inputs // groups, 3, 3)
        self.weight = nn.Parameter(torch.randn(shape) / (9 * shape[2]) ** 0.5)
        self.bias = nn.Parameter(torch.randn(K, outputs) / 4)
        self.route, self.groups, self.outputs = nn.Linear(inputs, K), groups, outputs

    def attention(self, x: Tensor) -> Tensor:
        return self.route(x.mean((2, 3))).softmax(1)

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.attention(x).view(-1, 1, 1, 1, 1) * self.weight).sum(0)
        return F.conv2d(x, weight, None, padding=1, groups=self.groups)


class BySample(Mixed):
    """As repositories of CondConv and DyConv write it: one group of channels per sample, bias mixed too."""

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        a = self.attention(x)
        weight = torch.mm(a, self.weight.view(K, -1)).view(b * self.outputs, c // self.groups, 3, 3)
        bias = torch.mm(a, self.bias).view(-1)
        y = F.conv2d(x.view(1, -1, h, w), weight, bias, padding=1, stride=2, groups=self.groups * b)
        return F.interpolate(y.view(b, self.outputs, *y.shape[2:]), scale_factor=2.0)


class ByEinsum(Mixed):
    """Sigmoid, einsum, a constant bias and a static kernel beside the mixed ones; BatchNorm follows."""

    def __init__(self) -> None:
        super().__init__()
        self.static, self.norm = nn.Parameter(torch.randn(C, C, 3, 3) / 9), nn.BatchNorm2d(C)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        a = self.route(x.mean((2, 3))).sigmoid()
        weight = torch.einsum("bk,koihw->boihw", a, self.weight)[0] + self.static
        return self.norm(F.conv2d(x, weight, self.bias[0], padding="same", dilation=2))


class BySum(Mixed):
    """A Python sum over kernels, in place; the numbers are of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(C, 1)

    def forward(self, x: Tensor) -> Tensor:
        a, gate = self.attention(x), self.gate(x.mean((2, 3))).tanh()
        weight = self.weight[0] * a[0, 0] + self.weight[1] * a[0, 1] + gate[0, 0] * self.weight[2]
        return F.conv2d(x, weight, self.bias[0], padding=1)


class ByRawLinear(Mixed):
    """The numbers are no function of a sigmoid: the weight is affine in the image itself."""

    def attention(self, x: Tensor) -> Tensor:
        return self.route(x.mean((2, 3)))


class Transposed(Mixed):
    def forward(self, x: Tensor) -> Tensor:
        weight = (self.attention(x).view(-1, 1, 1, 1, 1) * self.weight).sum(0)
        return F.conv_transpose2d(x, weight, self.bias[0], padding=1)


class MixedLinear(nn.Module):
    """A linear layer per pixel whose weight is a mix."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.route = nn.Parameter(torch.randn(K, C, C) / C), nn.Linear(C, K)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.tensordot(self.route(x.mean((2, 3))).softmax(1), self.weight, 1)[0]
        return F.linear(x.permute(0, 2, 3, 1), weight, None).permute(0, 3, 1, 2).contiguous()


class Modulated(nn.Module):
    """A weight scaled per input channel and normalised: linear in no few numbers (StyleGAN2)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.style = nn.Parameter(torch.randn(1, C, C, 3, 3) / 9), nn.Linear(C, C)
        self.norm = nn.BatchNorm2d(C)
        self.norm.running_var.fill_(2)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight * self.style(x.mean((2, 3))).view(-1, 1, C, 1, 1)
        weight = weight * (weight.square().sum((2, 3, 4), keepdim=True) + 1e-8).rsqrt()
        return self.norm(F.conv2d(x, weight[0], padding=1))


class HyperNetwork(nn.Module):
    """A weight that a layer writes, more hidden numbers than a mix may have."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(C, 32), nn.Linear(32, C * 9)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.last(self.hidden(x.mean((2, 3))).relu())[0].view(C, 1, 3, 3)
        return F.conv2d(x, weight, padding=1, groups=C)


class Rows(Mixed):
    """A convolution along rows; BatchNorm behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.norm = nn.Parameter(torch.randn(K, C, C, 3) / 9), nn.BatchNorm1d(C)
        self.norm.running_var.fill_(2)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.einsum("bk,koit->boit", self.attention(x), self.rows)[0]
        return self.norm(F.conv1d(x.flatten(2), weight, padding=1)).view(x.shape)


class OfOneImage(Mixed):
    """Takes one image alone, and BatchNorm follows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(C)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 1:
            raise ValueError("one image at a time")
        return self.norm(super().forward(x))


MIXES = {
    "rows": Rows,
    "of_one_image": OfOneImage,
    "condconv": Mixed,
    "by_sample": BySample,
    "by_sample_in_groups": lambda: BySample(groups=2),
    "depthwise": lambda: Mixed(groups=C),
    "by_einsum": ByEinsum,
    "by_sum": BySum,
    "raw_linear": ByRawLinear,
    "transposed": Transposed,
    "linear": MixedLinear,
}
FLOAT = {"modulated": Modulated, "hyper_network": HyperNetwork}


def dynamic(kind: str) -> nn.Module:
    return around((MIXES | FLOAT)[kind]())


# weights that ``forward`` computes from parameters alone


class Standardized(nn.Conv2d):
    """Weight standardisation."""

    def forward(self, x: Tensor) -> Tensor:
        mean = self.weight.mean((1, 2, 3), keepdim=True)
        std = self.weight.std((1, 2, 3), keepdim=True)
        return F.conv2d(x, (self.weight - mean) / (std + 1e-5), self.bias, padding=1)


class Averaged(nn.Conv2d):
    """A moving average of the weights, kept in a buffer and applied in place."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self.register_buffer("average", torch.randn_like(self.weight) / 9)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.average * 0.9
        weight += self.weight * 0.1
        return F.conv2d(x, weight, self.bias, padding=1)


class Branches(nn.Module):
    """Kernels of three branches, added in ``forward`` (RepVGG, re-parametrised at run time)."""

    def __init__(self) -> None:
        super().__init__()
        self.square, self.point, self.scale = conv(C, C), conv(C, C, 1), nn.Parameter(torch.rand(C))

    def forward(self, x: Tensor) -> Tensor:
        identity = torch.diag(self.scale)[:, :, None, None]
        weight = self.square.weight + F.pad(self.point.weight + identity, (1, 1, 1, 1))
        return F.conv2d(x, weight, self.square.bias + self.point.bias, padding=1)


class Products(nn.Module):
    """Products with stored matrices: a low-rank layer."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Parameter(torch.randn(C, 4) / 4), nn.Parameter(torch.randn(C, 4) / 2)

    def forward(self, x: Tensor) -> Tensor:
        y = (x.flatten(2).transpose(1, 2) @ self.down).relu().view(1, *x.shape[2:], 4)
        return torch.matmul(y, self.up.t()).permute(0, 3, 1, 2)


FOLDED = {
    "products": Products,
    "standardized": lambda: Standardized(C, C, 3, padding=1),
    "averaged": lambda: Averaged(C, C, 3, padding=1),
    "branches": Branches,
    "masked": lambda: MaskedLinear(),
}


class MaskedLinear(nn.Linear):
    """A linear layer per pixel with a mask on its weight (MADE)."""

    def __init__(self) -> None:
        super().__init__(C, C)
        self.register_buffer("mask", torch.ones(C, C).tril())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.permute(0, 2, 3, 1), self.weight * self.mask, self.bias).permute(0, 3, 1, 2)


def folded(kind: str) -> nn.Module:
    return around(FOLDED[kind]())


# types in other words: they are float32 whatever the type of the network


class Typed(nn.Module):
    """A layer whose weight a subclass makes in float32; float64 may not reach its convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(C, C, 3, 3) / 9)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.make(), padding=1)


class Ternary(Typed):
    def make(self) -> Tensor:
        return ((self.weight > 0.05).float() - (self.weight < -0.05).float()) * 0.1


class InHalf(Typed):
    def __init__(self) -> None:
        super().__init__()
        self.weight.data = self.weight.data.half()

    def make(self) -> Tensor:
        return self.weight.float()


class InComplex(Typed):
    """A weight stored by its spectrum."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.fft.rfft2(self.weight.data))

    def make(self) -> Tensor:
        return torch.fft.irfft2(self.weight, s=(3, 3))


class Blur(nn.Module):
    """A kernel computed from a range of numbers, moved by a grid that ``linspace`` makes."""

    def __init__(self) -> None:
        super().__init__()
        self.sigma = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor) -> Tensor:
        row = torch.exp(-(torch.arange(-2.0, 3.0) ** 2) / (2 * self.sigma.float() ** 2))
        kernel = (row[:, None] * row).expand(x.shape[1], 1, 5, 5) / row.sum() ** 2
        return F.conv2d(x, kernel, padding=2, groups=x.shape[1])


TYPED = {"ternary": Ternary, "in_half": InHalf, "in_complex": InComplex, "blur": Blur}


def typed(kind: str) -> nn.Module:
    return around(TYPED[kind]())


class Open(nn.Module):
    """A network that makes a tensor of a size that the image decides."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y - y[y > 0].mean()


class Vectorised(Mixed):
    """Mixes kernels under ``torch.vmap``."""

    def mix(self, x: Tensor, a: Tensor) -> Tensor:
        return F.conv2d(x[None], torch.einsum("k,koihw->oihw", a, self.weight), padding=1)[0]

    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(self.mix)(x, self.attention(x))


def vectorised() -> nn.Module:
    return around(Vectorised())


class Spectrum(nn.Module):
    """Filters a map's spectrum by complex numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.irfft2(torch.fft.rfft2(x) * 0.9, s=x.shape[2:])


def spectrum() -> nn.Module:
    return around(Spectrum())


class Brightness(nn.Module):
    """A network that decides on a number of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 3), conv(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.where(x.mean() > 0.3, self.a(x), self.b(x))


class OnlyFloat32(nn.Module):
    """A network that asks for its type."""

    def __init__(self) -> None:
        super().__init__()
        self.body = conv(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.float32, "expected float32"
        return self.body(x)


# operators that can draw random numbers, and draw none in evaluation mode


class Attention(nn.Module):
    """Attention between pixels, by torch's operator or by its layer."""

    def __init__(self, *, layer: bool = False) -> None:
        super().__init__()
        self.qkv, self.last = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.layer = nn.MultiheadAttention(C, 2, dropout=0.1, batch_first=True) if layer else None

    def forward(self, x: Tensor) -> Tensor:
        rows = F.avg_pool2d(x, 4).flatten(2).transpose(1, 2)
        if self.layer:
            mixed = self.layer(rows, rows, rows, need_weights=False)[0]
        else:
            q, k, v = (t[:, None] for t in self.qkv(rows).chunk(3, 2))
            mixed = F.scaled_dot_product_attention(q, k, v)[:, 0]
        y = self.last(mixed).transpose(1, 2).reshape(*x.shape[:2], x.shape[2] // 4, x.shape[3] // 4)
        return x + F.interpolate(y, scale_factor=4.0)


IDLE = {
    "attention": Attention,
    "attention_layer": lambda: Attention(layer=True),
    "alpha_dropout": lambda: nn.Sequential(nn.AlphaDropout(0.2), nn.Dropout2d(0.3)),
}


def idle(kind: str) -> nn.Module:
    return around(IDLE[kind]())


# padding in other words

PADDED = {
    "even_same": lambda: nn.Conv2d(C, C, 4, padding="same"),
    "uneven_same": lambda: nn.Conv2d(C, C, (2, 5), padding="same", dilation=(3, 1)),
    "valid": lambda: nn.Sequential(nn.Conv2d(C, C, 3, padding="valid"), nn.ZeroPad2d(1)),
    "one_sided": lambda: nn.Sequential(nn.ZeroPad2d((2, 0, 0, 2)), nn.Conv2d(C, C, 3)),
    "reflect": lambda: nn.Conv2d(C, C, 3, padding=1, padding_mode="reflect"),
    "replicate": lambda: nn.Conv2d(C, C, 3, padding=1, padding_mode="replicate"),
    "circular": lambda: nn.Conv2d(C, C, 3, padding=1, padding_mode="circular"),
    "reflect_even_same": lambda: nn.Conv2d(C, C, 4, padding="same", padding_mode="reflect"),
}


def padded(kind: str) -> nn.Module:
    return around(PADDED[kind]())


# operators and ranks that a runtime lacks


class Burst(nn.Module):
    """A 3-d convolution over the channels of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.t = nn.Conv3d(1, C, 3, padding=1), conv(3 * C, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.t(self.a(x.unsqueeze(1)).relu().flatten(1, 2))


def condconv() -> nn.Module:
    return dynamic("condconv")


def strided_malleconv() -> nn.Module:
    """A denoiser around a K x K MalleConv with stride 2."""
    from edgedyn.layers.malleconv import MalleConv

    layer = MalleConv(C, C, num_blocks=1, stride=2)
    return around(nn.Sequential(layer, nn.Upsample(scale_factor=2)))


class Forgetful(nn.Module):
    """A network with Dropout that stays in training mode, and one that calls it so."""

    def __init__(self, *, stays: bool) -> None:
        super().__init__()
        self.body, self.stays = conv(3, 3), stays

    def train(self, mode: bool = True) -> nn.Module:
        return super().train(mode or self.stays)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if self.stays else F.dropout(self.body(x), 0.5)
