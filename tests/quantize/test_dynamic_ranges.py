"""Layers that take their input range from each image: the INT8 operators, and the error."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from decibels import apart_db, rms_of_psnr
from small_int8 import quantize_program
from small_networks import make_input
from torch import Tensor, nn

from edgedyn import quantize, targets
from edgedyn.quantize.search.precision import EvaluationSet
from edgedyn.recipe.keys import QuantizeSection

SCHEMES = {name: targets.load(name).int8 for name in ("executorch", "tensorrt", "onnxruntime")}
SHAPE = (1, 3, 16, 24)


class Net(nn.Module):
    """A dense layer, a depthwise one, a dense one behind PReLU, and a linear one."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.act = nn.PReLU(8)
        self.last = nn.Conv2d(8, 3, 3, padding=1)
        self.linear = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.last(self.act(self.depthwise(torch.relu(self.first(x))))))


def make_net() -> nn.Module:
    torch.manual_seed(31)
    return Net().eval()


SAMPLES = [(make_input(SHAPE),), (make_input(SHAPE).flip(3),)]


def to_int8(net: nn.Module, *, target: str = "executorch", **section) -> quantize.Quantized:
    program = torch.export.export(net, SAMPLES[0])
    method = QuantizeSection(**section)
    scheme = SCHEMES[target]
    return quantize_program(program, SAMPLES[0], scheme=scheme, section=method, samples=SAMPLES)


def dynamic_layers(program: torch.export.ExportedProgram) -> set[str]:
    """Return the layers whose input is quantized with a range from run time."""
    layers = [n for n in program.graph.nodes if n.target in quantize.MULTIPLY_ADD_OPS]
    return {
        quantize.module_path(node)
        for node in layers
        if node.args[0].target is torch.ops.quantized_decomposed.dequantize_per_tensor.tensor
    }


def error(result: quantize.Quantized, net: nn.Module, x: Tensor) -> float:
    """Return |INT8 - float| / |float|."""
    with torch.no_grad():
        expected = net(x)
        return float((result.program.module()(x) - expected).norm() / expected.norm())


def test_dense_layers_find_their_range_and_the_others_keep_their_step():
    result = to_int8(make_net(), dynamic=["*"])
    assert dynamic_layers(result.program) == {"first", "last"}
    assert result.dynamic == ("first", "last")
    assert result.int8_mac_share == 1


def test_linear_layers_of_rows_do_too():
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    rows = (make_input((1, 3, 8, 4)).flatten(0, 2),)
    result = quantize_program(
        torch.export.export(net, rows),
        rows,
        scheme=SCHEMES["executorch"],
        section=QuantizeSection(dynamic=["*"]),
        samples=[rows],
    )
    assert dynamic_layers(result.program) == {"0", "2"}


def test_only_named_layers_do_and_keep_float_goes_before():
    assert dynamic_layers(to_int8(make_net(), dynamic=["la*"]).program) == {"last"}
    result = to_int8(make_net(), dynamic=["*"], keep_float=["last"])
    assert dynamic_layers(result.program) == {"first"}
    assert 0 < result.int8_mac_share < 1


def test_what_they_write_is_float():
    program = to_int8(make_net(), dynamic=["*"]).program
    (last,) = [
        n for n in program.graph.nodes if quantize.module_path(n) == "last" and "conv2d" in str(n.target)
    ]
    # linear, which reads it, brings its own scale
    assert [str(user.target) for user in last.users] == ["quantized_decomposed.quantize_per_tensor.default"]
    pairs = [n for n in program.graph.nodes if ".quantize_per_tensor.default" in str(n.target)]
    assert len(pairs) == 4  # inputs and outputs of depthwise and linear


@pytest.mark.parametrize("rounding", ["nearest", "reconstruct"])
def test_image_outside_of_every_calibrated_range_is_not_clipped(rounding):
    net, bright = make_net(), 4 * SAMPLES[0][0]
    plain = {"rounding": rounding, "keep_float": ["depthwise", "linear"]}
    dynamic, static = to_int8(net, dynamic=["*"], **plain), to_int8(net, **plain)
    assert error(dynamic, net, bright) < 0.02
    assert error(static, net, bright) > 0.2
    assert error(dynamic, net, SAMPLES[0][0]) < error(static, net, SAMPLES[0][0])


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_target_that_cannot_keeps_its_steps(target):
    plain, asked = (to_int8(make_net(), target=target, dynamic=d).program for d in ([], ["*"]))
    assert dynamic_layers(asked) == set()
    assert asked.graph_module.code == plain.graph_module.code
    assert torch.equal(asked.module()(*SAMPLES[0]), plain.module()(*SAMPLES[0]))


def test_layer_that_writes_generated_kernels_may_be_int8_when_it_writes_float():
    program = torch.export.export(make_net(), SAMPLES[0])
    common = {"scheme": SCHEMES["executorch"], "samples": SAMPLES, "generated": {"last.output"}}
    shares = [
        quantize_program(program, SAMPLES[0], section=QuantizeSection(dynamic=d), **common).int8_mac_share
        for d in ([], ["last"])
    ]
    assert shares[0] < shares[1] == 1


@pytest.mark.parametrize("how", ["fast", "full"])
def test_biases_are_corrected_as_those_of_other_layers(how):
    net, errors = make_net(), []
    for dynamic in ([], ["*"]):
        result = to_int8(net, rounding="nearest", bias_correction=how, dynamic=dynamic)
        assert {"first.bias", "last.bias"} <= result.calibrated.constants.keys()
        errors.append(error(result, net, SAMPLES[0][0]))
    assert errors[1] < 1.1 * errors[0]


def test_table_makes_the_same_program():
    program = torch.export.export(make_net(), SAMPLES[0])
    common = {"scheme": SCHEMES["executorch"], "section": QuantizeSection(dynamic=["*"])}
    made = quantize_program(program, SAMPLES[0], samples=SAMPLES, **common)
    again = quantize_program(program, SAMPLES[0], calibrated=made.calibrated, **common)
    x = 2 * SAMPLES[1][0]
    assert torch.equal(made.program.module()(x), again.program.module()(x))


def test_cost_of_each_layer_is_measured_as_it_runs():
    net = make_net()
    truth = SAMPLES[0][0].numpy() + np.float32(0.1)
    evaluation = EvaluationSet([SAMPLES[0]], [truth], ["sigma=25"])
    program = torch.export.export(net, SAMPLES[0])
    result = quantize_program(
        program,
        SAMPLES[0],
        scheme=SCHEMES["executorch"],
        section=QuantizeSection(dynamic=["*"]),
        samples=SAMPLES,
        evaluation=evaluation,
    )
    with torch.no_grad():
        psnr = [
            evaluation.psnr_db([y])["sigma=25"]
            for y in (net(*SAMPLES[0]), result.program.module()(*SAMPLES[0]))
        ]
    # the same quantized values; a dequantized weight may round otherwise, once, in values around 1
    apart = 2 * apart_db(2**-20, rms_of_psnr(max(psnr)))
    assert result.calibrated.precision.drop_db == pytest.approx(psnr[0] - psnr[1], rel=0, abs=apart)
