"""The interpreter in INT8 rounding computes what the program of Q/DQ pairs computes."""

from __future__ import annotations

import copy

import pytest
import torch
from small_networks import capture, make_net, small_affine_net, small_mallenet
from torch import Tensor, fx, nn

from edgedyn import ops, quantize, targets
from edgedyn.graph.nodes import bias_of, weight_of
from edgedyn.layers import canonicalize
from edgedyn.quantize.calibration import CalibrationInputs, Calibrator
from edgedyn.quantize.convert import insert_qdq
from edgedyn.quantize.fake_quantize import FakeQuantizer, round_weight
from edgedyn.quantize.observe.statistics import look
from edgedyn.quantize.plan import Int8Method, make_plan
from edgedyn.quantize.search.precision import Rounded
from edgedyn.recipe.keys import QuantizeSection
from edgedyn.targets import Int8Scheme

SCHEMES = {
    "affine": targets.load("executorch").int8,
    "symmetric": targets.load("tensorrt").int8,
    "affine, float outputs": Int8Scheme(symmetric=False, outputs=False),
    "symmetric, outputs": Int8Scheme(symmetric=True, outputs=True),
}
KERNELS = frozenset(op.overload for op in ops.load_all().values())


class Mixed(nn.Module):
    """A layer called twice, depthwise, dense and linear; PReLU, ReLU6, a mask, and a bias-free layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.norm, self.act = (
            nn.Conv2d(3, 8, 3, padding="same"),
            nn.BatchNorm2d(8),
            nn.PReLU(8),
        )
        self.body = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU6(), nn.Conv2d(8, 8, 1, bias=False)
        )
        self.mask, self.linear = nn.Conv2d(8, 1, 1), nn.Linear(8, 8)
        self.tail = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.head(x)))
        y = y + self.body(y + self.body(y))
        y = y * (self.mask(y) > 0)
        y = y * torch.sigmoid(self.linear(y.mean((2, 3))))[:, :, None, None]
        return x + self.tail(y)


def mixed() -> nn.Module:
    torch.manual_seed(8)
    return Mixed().eval()


class Filtered(nn.Module):
    """A filter of ours between two convolutions, which a runtime with our kernels computes in INT8."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.grid = nn.Parameter(torch.randn(1, 36, 4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.ops.edgedyn.sliced_depthwise2d(self.first(x), self.grid, None, 3))


def seeded(net: type[nn.Module]) -> nn.Module:
    torch.manual_seed(8)
    return net().eval()


NETS = {
    "prelu": make_net,
    "mixed": lambda: seeded(Mixed),
    "filtered": lambda: seeded(Filtered),
    "kernels": lambda: canonicalize(small_mallenet()),
    "affine kernels": lambda: canonicalize(small_affine_net()),
}
SECTIONS = {
    "nearest": QuantizeSection(rounding="nearest"),
    "reconstruct": QuantizeSection(rounding="reconstruct"),
    "scaled": QuantizeSection(rounding="nearest", equalize_inputs=True, generated="tap"),
    "dynamic": QuantizeSection(rounding="nearest", dynamic=["*"]),
}
WITH_INT8_KERNELS = {"filtered", "kernels"}  # our op stands between INT8 layers
HAS_DYNAMIC = "affine"  # the scheme whose layers may take the range of each image


def make_samples() -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.rand(1, 3, 16, 24, generator=generator) * 1.5 - 0.25,) for _ in range(3)]


def calibrated(net: str, scheme: Int8Scheme, section: QuantizeSection, samples) -> Rounded:
    method = Int8Method(scheme, section, kernels=KERNELS)
    module = quantize.fold(capture(NETS[net](), samples[0][0]))
    generated = quantize.find_generators(module)
    calibrator = Calibrator(module, CalibrationInputs(samples), method, generated)
    return calibrator.round(*calibrator.observe())


def dequantized_weights(converted: fx.GraphModule, calls: list[str], sample) -> dict[str, Tensor]:
    """Return the weights that the layers of a Q/DQ program compute with, by the name of their call."""
    calls_by_weight = {node.args[1]: node.name for node in converted.graph.nodes if node.name in calls}
    found: dict[str, Tensor] = {}
    look(converted, calls_by_weight, sample, lambda node, w: found.update({calls_by_weight[node]: w}))
    return found


@pytest.mark.parametrize("section", SECTIONS)
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("net", NETS)
def test_interpreter_equals_the_qdq_program_to_the_bit(net, scheme, section):
    if section == "dynamic" and scheme != HAS_DYNAMIC:
        pytest.skip("ranges of this scheme are calibrated")
    samples = make_samples()
    made = calibrated(net, SCHEMES[scheme], SECTIONS[section], samples)
    plan = made.plan
    assert bool(plan.dynamic) == (section == "dynamic")
    assert bool(plan.kernels) == (net in WITH_INT8_KERNELS and not SCHEMES[scheme].outputs)
    converted = insert_qdq(copy.deepcopy(made.module), plan, made.qparams, SCHEMES[scheme])
    weights = dequantized_weights(converted, [layer.node.name for layer in plan.layers], samples[0])
    constants = {node: (weights[node.name], bias) for node, (_, bias) in made.constants.items()}
    assert constants
    for node, (weight, _) in made.constants.items():
        # the same integers; scaled, they may round otherwise, once
        torch.testing.assert_close(weight, weights[node.name], rtol=2**-23, atol=0)
    program = FakeQuantizer(made.module, plan, made.qparams, SCHEMES[scheme], constants.get)
    with torch.no_grad():
        for sample in samples:
            y, float_ = program.run(*sample)[0], made.module(*sample)[0]
            assert torch.equal(y, converted(*sample)[0])
            assert (y - float_).abs().max() > 1e-4


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rounded_program_is_the_one_that_apply_makes(scheme):
    samples, section = make_samples(), SECTIONS["reconstruct"]
    made = calibrated("mixed", SCHEMES[scheme], section, samples)
    program = capture(NETS["mixed"](), samples[0][0])
    method = Int8Method(SCHEMES[scheme], section)
    applied = quantize.apply(program, samples[0], made.calibrated, method).program.module()
    with torch.no_grad():
        for sample in samples:
            # reconstructed weights lie on the grid: a scale times an integer, which nothing rounds again
            assert torch.equal(made.run(sample), applied(*sample))


def test_layer_that_is_kept_float_reads_and_computes_in_float():
    samples, scheme = make_samples(), SCHEMES["affine"]
    made = calibrated("prelu", scheme, SECTIONS["reconstruct"], samples)
    plan = make_plan(made.module, scheme=scheme, kept=("body",))
    converted = insert_qdq(copy.deepcopy(made.module), plan, made.qparams, scheme)
    (body,) = (layer.node for layer in made.plan.layers if layer.name == "body")
    float_layers = {"body": (weight_of(made.module, body), bias_of(made.module, body))}
    observed: list[fx.Node] = []
    with torch.no_grad():
        y = made.run(samples[0], float_layers, lambda node, value: observed.append(node))
        assert torch.equal(y, converted(*samples[0]))
    assert observed == [layer.node for layer in made.plan.layers if layer.node is not body]


def test_weights_are_rounded_by_channel_and_clipped():
    weight = torch.tensor([[[0.26, -9.0]], [[0.04, 5.1]]])
    rounded = round_weight(weight, torch.tensor([0.05, 0.1]))
    torch.testing.assert_close(rounded, torch.tensor([[[0.25, -6.35]], [[0.0, 5.1]]]))
