"""Layers that decide stay float, in shipped networks and in others, on both targets."""

from __future__ import annotations

import pytest
import torch
from small_decisions import BrightParts, NearestBrightness
from small_int8 import quantize_program
from small_slimmable import make_gated
from small_slimmable import make_net as make_dsnet
from torch import Tensor, fx, nn

from edgedyn import ops, quantize, targets
from edgedyn.graph.nodes import belongs_to
from edgedyn.layers import canonicalize, float32_classes
from edgedyn.layers.dynconv.capacity import capacities_of, with_capacity
from edgedyn.models.dynconv_denoiser import DynConvDenoiser
from edgedyn.models.dynconv_hourglass import DynConvHourglass
from edgedyn.models.dynconv_resnet import CifarResNet, ImageNetResNet
from edgedyn.models.slimmable_dncnn import gated_dncnn
from edgedyn.models.slimmable_unet import gated_unet
from edgedyn.quantize.deciding import find_deciding_layers, find_decisions
from edgedyn.recipe.keys import QuantizeSection

TARGETS = ["executorch", "tensorrt"]
SECTION = QuantizeSection(rounding="nearest", equalize=False)


def quantized(net: nn.Module, x: Tensor, target: str, *, float32=frozenset(), is_router: bool = False):
    loaded = targets.load(target)
    program = torch.export.export(net, (x,), strict=False)
    program = ops.decompose(program, ops.choose_forms(program, loaded, {}), "before_quantize")
    return quantize_program(
        program,
        (x,),
        scheme=loaded.int8,
        section=SECTION,
        samples=[(x,)],
        float32=float32,
        is_router=is_router,
    )


def layers_behind(node: fx.Node) -> list[fx.Node]:
    """Return the convolutions and linear layers that a value was last computed by."""
    found, waiting = [], [node]
    while waiting:
        node = waiting.pop()
        if node.target in quantize.COUNTED_OPS:
            found.append(node)
        else:
            waiting += node.all_input_nodes
    return found


def is_float(node: fx.Node) -> bool:
    return "dequantize" not in str(node.args[1].target)


def small_denoiser() -> nn.Module:
    return DynConvDenoiser(8, 2)


MASKED = {
    "denoiser": (small_denoiser, (1, 3, 16, 24)),
    "resnet8": (lambda: CifarResNet(8, num_classes=5), (1, 3, 32, 36)),
    "resnet50": (lambda: ImageNetResNet(50, width_mult=0.0625, num_classes=4), (1, 3, 64, 32)),
    "hourglass": (lambda: DynConvHourglass(8, 1, 1, joints=3), (1, 3, 64, 128)),
}
ROUTERS = {
    "gated": lambda: make_gated().float(),
    "dncnn": lambda: gated_dncnn([(3, 4, 4), (4, 4, 6)], gate_features=4),
    "unet": lambda: gated_unet([[3, 4, 4, 5, 4, 6, 5, 6, 5, 4, 3], [4, 4, 5, 5, 6, 6, 7, 8, 5, 6, 4]]),
    "dsnet": lambda: make_dsnet().float(),
}


every_masked = pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] if n in ("resnet50", "hourglass") else []) for n in MASKED],
)


@pytest.mark.parametrize("target", TARGETS)
@every_masked
def test_logits_of_every_mask_of_a_shipped_network_are_computed_in_float(name, target):
    make, shape = MASKED[name]
    torch.manual_seed(1)
    result = quantized(canonicalize(make().eval()), torch.rand(shape), target, float32=float32_classes())
    masks, others = find_decisions(result.program)
    nodes = {node.name: node for node in result.program.graph.nodes}
    assert len(masks) >= 2
    assert others == 0
    for mask in masks:
        layers = layers_behind(nodes[mask.logits])
        assert layers
        assert all(is_float(layer) for layer in layers)
    assert result.int8_mac_share > 0.5


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ROUTERS)
def test_logits_of_every_shipped_gate_are_computed_in_float(name, target):
    torch.manual_seed(1)
    router = canonicalize(ROUTERS[name]().eval()).router
    result = quantized(router, torch.rand(1, 3, 16, 24), target, float32=float32_classes(), is_router=True)
    end = next(node for node in result.program.graph.nodes if node.op == "output")
    layers = layers_behind(end.args[0][0])
    assert layers
    assert all(is_float(layer) for layer in layers)


def refuse_more_float(net: nn.Module, x: Tensor) -> None:
    module = quantize.fold(torch.export.export(net, (x,), strict=False))
    layers = find_deciding_layers(module)
    assert layers
    assert all(belongs_to(layer, float32_classes()) for layer in layers)


@every_masked
def test_shipped_networks_keep_no_more_in_float_than_their_layers_say(name):
    make, shape = MASKED[name]
    refuse_more_float(canonicalize(make().eval()), torch.rand(shape))


def test_capacity_variant_keeps_no_more_in_float_than_its_layers_say():
    net, x = small_denoiser().eval(), torch.rand(1, 3, 16, 24)
    refuse_more_float(with_capacity(net, capacities_of(net, [x], 0.5)), x)


@pytest.mark.parametrize("target", TARGETS)
def test_mask_of_a_network_that_nobody_told_us_of_is_computed_in_float(target):
    torch.manual_seed(2)
    result = quantized(BrightParts().eval(), torch.rand(1, 3, 8, 10), target)
    (mask,), _ = find_decisions(result.program)
    (layer,) = layers_behind(next(n for n in result.program.graph.nodes if n.name == mask.logits))
    assert is_float(layer)
    reasons = {row["node"]: row["reason"] for row in result.float_nodes}
    assert reasons["head"] == "decides or normalises: float32 in every precision"
    assert "body.0" not in reasons
    assert "body.2" not in reasons


@pytest.mark.parametrize("target", TARGETS)
def test_layer_behind_the_logits_of_a_router_that_nobody_told_us_of_is_float(target):
    gate = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), NearestBrightness()).eval()
    for is_router in (True, False):
        result = quantized(gate, torch.rand(1, 3, 8, 10), target, is_router=is_router)
        convolution, linear = (n for n in result.program.graph.nodes if n.target in quantize.COUNTED_OPS)
        assert not is_float(convolution)
        assert is_float(linear) is is_router


class Deciding(nn.Module):
    """Three layers in a row with residual sums, and a rule that decides on them."""

    def __init__(self, rule) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rule(self, x)
        return y


def paths(rule) -> list[str]:
    module = quantize.fold(torch.export.export(Deciding(rule).eval(), (torch.rand(1, 3, 8, 10),)))
    return sorted(quantize.module_path(node) for node in find_deciding_layers(module))


def residual(net, x):
    y = x + net.a(x)
    y = y + net.b(torch.relu(y))
    return torch.where(y > 0.5, net.c(y), y)


def sum_of_two(net, x):
    logits = net.a(x) + net.b(x).mean((2, 3), keepdim=True)
    return net.c(x) * (logits >= 0) * torch.sigmoid(logits)


def by_floor(net, x):
    logits = net.a(x) + 0.5 * net.b(x)
    return net.c(x) * (logits.clamp(-1, 0).floor() + 1) + logits


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (lambda net, x: net.c(net.b(net.a(x))), []),
        (lambda net, x: net.b(x) * (net.a(x) > 0), ["a"]),
        (lambda net, x: net.c(x) * torch.round(torch.sigmoid(net.b(net.a(x)))), ["b"]),
        (lambda net, x: net.c(x) * net.a(x).argmax(1, keepdim=True), ["a"]),
        (residual, ["b"]),
        (sum_of_two, ["a", "b"]),
        (by_floor, ["a", "b"]),
    ],
    ids=["none", "mask", "round", "index", "residual", "sum", "floor"],
)
def test_last_layers_in_front_of_a_decision_are_found(rule, expected):
    assert paths(rule) == expected


def test_layers_behind_a_router_are_found_where_a_variant_takes_its_logits_too():
    def route(net, x):
        logits = net.a(x).mean((2, 3)) + net.b(x).mean((2, 3))
        return logits, net.c(x) * logits.sum()

    module = quantize.fold(torch.export.export(Deciding(route).eval(), (torch.rand(1, 3, 8, 10),)))
    layers = find_deciding_layers(module, is_router=True)
    assert sorted(quantize.module_path(node) for node in layers) == ["a", "b"]
