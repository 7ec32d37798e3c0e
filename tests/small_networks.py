"""Small networks and what is made of them, for tests of several targets."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torchao.quantization.pt2e import HistogramObserver, PerChannelMinMaxObserver
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, QuantizationSpec, Quantizer

from edgedyn.layers import RoutedModel
from edgedyn.layers.malleconv import AffineMalleConv, MalleConv

SHAPE = (2, 3, 10, 14)


class TinyNet(nn.Module):
    """Convolution, PReLU, residual convolution, 1x1 convolution: one feature map has two readers."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.act = nn.PReLU(channels)
        self.body = nn.Conv2d(channels, channels, 3, padding=1)
        self.tail = nn.Conv2d(channels, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.head(x))
        return x + self.tail(y + self.body(y))


class ConvInputs(Quantizer):
    """INT8 at the inputs of convolutions and per channel in their weights, as TensorRT wants it."""

    def __init__(self, activation_scheme: torch.qscheme = torch.per_tensor_symmetric) -> None:
        super().__init__()
        self.activation = QuantizationSpec(
            torch.int8, HistogramObserver, quant_min=-128, quant_max=127, qscheme=activation_scheme
        )
        self.weight = QuantizationSpec(
            torch.int8,
            PerChannelMinMaxObserver,
            quant_min=-127,
            quant_max=127,
            qscheme=torch.per_channel_symmetric,
            ch_axis=0,
        )

    def annotate(self, model: torch.fx.GraphModule) -> torch.fx.GraphModule:
        for node in model.graph.nodes:
            if node.target == torch.ops.aten.conv2d.default:
                specs = {node.args[0]: self.activation, node.args[1]: self.weight}
                node.meta["quantization_annotation"] = QuantizationAnnotation(specs, _annotated=True)
        return model

    def validate(self, model: torch.fx.GraphModule) -> None:
        pass


def make_net(channels: int = 8) -> TinyNet:
    torch.manual_seed(5)
    return TinyNet(channels).eval()


def make_input(shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(6)) * 1.5 - 0.25


def capture(net: nn.Module, x: Tensor) -> ExportedProgram:
    return torch.export.export(net, (x,))


def quantize(
    net: nn.Module, x: Tensor, quantizer: Quantizer | None = None, *, fold_quantize: bool = True
) -> ExportedProgram:
    prepared = prepare_pt2e(capture(net, x).module(), quantizer or ConvInputs())
    prepared(x)
    return capture(convert_pt2e(prepared, fold_quantize=fold_quantize), x)


def make_program(precision: str) -> tuple[ExportedProgram, Tensor]:
    x = make_input()
    if precision == "int8":
        return quantize(make_net(), x), x
    if precision == "fp16":
        return capture(make_net().half(), x.half()), x.half()
    return capture(make_net(), x), x


def sum_of_terms(net: nn.Module, x: Tensor) -> Tensor:
    """Sum the absolute values of all terms: the network with absolute weights, on the absolute input."""
    net = copy.deepcopy(net).double()
    for parameter in net.parameters():
        parameter.data = parameter.data.abs()
    with torch.no_grad():
        return net(x.abs().double())


def small_affine() -> AffineMalleConv:
    """An affine layer whose predictor keeps one block a stage: lowering time grows with the nodes."""
    layer = AffineMalleConv(8, 4, 2)
    head, act, first, *_, pool, second, _, _ = layer.predictor
    layer.predictor = nn.Sequential(head, act, first, pool, second)
    return layer


LAYERS = {"affine": small_affine, "kernels": lambda: MalleConv(8, 8, num_blocks=1)}


def small_mallenet(first: nn.Module | None = None) -> nn.Module:
    """Return a denoiser of one MalleConv between two convolutions."""
    torch.manual_seed(0)
    first = first or nn.Conv2d(3, 8, 3, padding=1)
    return nn.Sequential(first, LAYERS["kernels"](), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)).eval()


def pointwise_mallenet() -> nn.Module:
    """Return the same with a first convolution of one tap."""
    return small_mallenet(nn.Conv2d(3, 8, 1))


def wide_convolutions() -> nn.Module:
    """Return a denoiser whose convolutions have the names of the same's."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.ReLU(), nn.Conv2d(12, 3, 3, padding=1)
    ).eval()


def small_affine_net() -> nn.Module:
    """Return a denoiser of one affine MalleConv between two convolutions."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), small_affine(), nn.Conv2d(8, 3, 3, padding=1))
    nn.init.ones_(net[1].gate)
    return net.eval()


def coarse_identity() -> nn.Module:
    """Return a network that gives back its input; a large channel beside it leaves few INT8 steps to it."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 3, 1, bias=False))
    with torch.no_grad():
        net[0].weight.copy_(torch.cat([torch.eye(3), torch.full((1, 3), 100.0)])[:, :, None, None])
        net[1].weight.copy_(torch.eye(3, 4)[:, :, None, None])
    return net.eval()


class ColourClasses(nn.Module):
    """Logits of seven classes, of which 1, 3 and 5 are the mean red, green and blue behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 1)
        self.last = nn.Conv2d(8, 7, 1)
        with torch.no_grad():
            self.first.weight.zero_()[:3, :, 0, 0] = torch.eye(3)
            self.first.bias.zero_()
            self.last.weight.zero_()[[1, 3, 5], [0, 1, 2]] = 20.0
            self.last.bias.copy_(torch.tensor([-1.0, 0, -2, 0, -3, 0, -4]))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.first(x))).mean((2, 3))


class BrightSpots(nn.Module):
    """Heatmaps of a quarter of the size: where red, green and blue are brightest."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.eye(3)[:, :, None, None])

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(self.first(x), 4)


class ColourGate(nn.Module):
    """Logits of two variants: the mean of the first colour, and that of the second."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))[:, :2]


def small_routed() -> nn.Module:
    """Return a denoiser of two widths and a gate without convolutions."""
    torch.manual_seed(0)
    variants = {
        name: nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, 3, 3, padding=1))
        for name, width in (("narrow", 4), ("wide", 6))
    }
    return RoutedModel(ColourGate(), variants).eval()


class FilterBetween(nn.Module):
    """Convolution, filter, convolution; the filter's y is also read in float where ``is_read_twice``."""

    def __init__(self, *, is_read_twice: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.is_read_twice = is_read_twice

    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        y = torch.ops.edgedyn.sliced_depthwise2d(self.first(x), grid, None, 3)
        return y + self.second(y) if self.is_read_twice else self.second(y)
