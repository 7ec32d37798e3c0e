"""Shifted zero points on a symmetric runtime: the same int8 values, and the runtime agrees."""

from __future__ import annotations

import onnxruntime
import pytest
import torch
from small_builds import NEEDS_RTX
from small_int8 import quantize_program
from small_networks import LAYERS, make_input
from torch import Tensor, nn

from edgedyn import ops, quantize, targets
from edgedyn.layers import canonicalize
from edgedyn.quantize.accounting import KEPT_SHIFT
from edgedyn.recipe.keys import QuantizeSection
from edgedyn.targets import Int8Scheme
from edgedyn.targets.onnx_export import translate

TENSORRT = targets.load("tensorrt").int8
SHAPE = (1, 3, 17, 24)


class Chain(nn.Module):
    """Layers behind ReLU, behind PReLU, of two readers, without bias, with stride, dilation and groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.strided = nn.Conv2d(8, 8, 3, stride=2, padding=(0, 1))
        self.grouped = nn.Conv2d(8, 8, 3, padding=2, dilation=2, groups=4)
        self.act = nn.PReLU(8)
        self.left, self.right = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 4, 3, padding=1, bias=False)
        self.linear = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.strided(torch.relu(self.first(x))))
        y = self.act(self.grouped(y) + 0.2)
        return self.linear(self.left(y) + self.right(y))


class Skips(nn.Module):
    """Float operators read the inputs of layers too, before their ReLU and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        z = torch.relu(self.second(torch.relu(y)))
        return y + z + self.third(z)


def make_net(cls: type[nn.Module] = Chain) -> nn.Module:
    torch.manual_seed(41)
    return cls().eval()


SAMPLES = [(make_input(SHAPE),), (make_input(SHAPE).flip(3),)]


def to_int8(net: nn.Module, **section) -> quantize.Quantized:
    return quantize_program(
        torch.export.export(net, SAMPLES[0]),
        SAMPLES[0],
        scheme=TENSORRT,
        section=QuantizeSection(rounding="nearest", equalize=False, **section),
        samples=SAMPLES,
    )


def targets_of(program: torch.export.ExportedProgram, name: str) -> list[torch.fx.Node]:
    return [node for node in program.graph.nodes if name in str(node.target)]


@pytest.mark.parametrize("cls", [Chain, Skips])
def test_every_zero_point_is_gone_and_codes_are_those_of_affine_steps(monkeypatch, cls):
    net = make_net(cls)
    shifted = to_int8(net, shift=True)
    monkeypatch.setattr("edgedyn.quantize.quantized.shift_zero_points", lambda module: None)
    affine = to_int8(net, shift=True)
    qparams = [node.args[1:3] for node in targets_of(affine.program, "quantize_per_tensor.default")]
    assert {-128} < {zero for _, zero in qparams}  # behind ReLU, and others elsewhere
    assert {node.args[2] for node in targets_of(shifted.program, "quantize_per_tensor.default")} == {0}
    for x in (SAMPLES[0][0], 1.3 * SAMPLES[1][0] - 0.1):  # also where ranges clip
        with torch.no_grad():
            expected, found = affine.program.module()(x), shifted.program.module()(x)
            exact = net(x)
        # a value on a tie may fall to the other code
        assert (found - expected).norm() < 0.5 * (expected - exact).norm()
        assert (expected - exact).norm() > 1e-3 * exact.norm()


def test_step_behind_a_relu_is_half_as_large():
    scales = []
    for shift in (False, True):
        program = to_int8(make_net(), shift=shift).program
        (layer,) = [n for n in targets_of(program, "conv2d") if quantize.module_path(n) == "strided"]
        scales.append(layer.args[0].args[1])
    assert scales[0] / scales[1] == pytest.approx(255 / 127, rel=1e-6)


def test_move_behind_a_relu_is_free_and_only_padded_maps_are_padded():
    program = to_int8(make_net(), shift=True).program
    assert len(targets_of(program, "clamp")) == 2  # of first and strided, in place of their ReLU
    assert not targets_of(program, "aten.relu")
    assert len(targets_of(program, "constant_pad_nd")) == 4  # first, strided, grouped, right
    # the image, the output of PReLU, and the input of linear; and the network's own two
    assert len(targets_of(program, "add.Tensor")) == 5


def test_all_is_int8_and_accounted():
    result = to_int8(make_net(), shift=True)
    assert result.int8_mac_share == 1
    reasons = {(row["node"], row["reason"]): row["count"] for row in result.float_nodes}
    said = KEPT_SHIFT
    assert (reasons["add", said], reasons["constant_pad_nd", said]) == (3, 4)
    assert sum(count for (_, reason), count in reasons.items() if reason != said) == 3  # two sums, PReLU


def test_runtime_computes_what_the_program_says():
    net, x = make_net(), SAMPLES[0][0]
    program = to_int8(net, shift=True).program
    model = translate(program, ["image"], ["y"])
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    (found,) = session.run(None, {"image": x.numpy()})
    with torch.no_grad():
        expected = program.module()(x)
    torch.testing.assert_close(
        torch.from_numpy(found), expected, rtol=0, atol=2e-2 * float(expected.abs().max())
    )
    assert (torch.from_numpy(found) - expected).abs().mean() < 1e-3 * float(expected.abs().max())


@NEEDS_RTX[0]
@NEEDS_RTX[1]
def test_tensorrt_builds_it(tmp_path):
    target = targets.load("tensorrt")
    artifact = target.lower({"forward": to_int8(make_net(), shift=True).program}, tmp_path, "int8")
    assert artifact.facts["check_build"]["passed"] is True


def test_kernels_of_ours_read_float_then():
    net = canonicalize(nn.Sequential(nn.Conv2d(3, 8, 3), LAYERS["kernels"](), nn.Conv2d(8, 3, 1)).eval())
    program = torch.export.export(net, SAMPLES[0], strict=False)
    common = {"scheme": TENSORRT, "kernels": {op.overload for op in ops.load_all().values()}}
    reads = []
    for shift in (False, True):
        section = QuantizeSection(shift=shift)
        made = quantize_program(program, SAMPLES[0], section=section, samples=SAMPLES, **common)
        (call,) = [node for node in made.program.graph.nodes if ops.is_ours(node)]
        reads.append("dequantize" in str(call.args[0].target))
    assert reads == [True, False]


IMPLICIT = Int8Scheme(symmetric=True, outputs=True)  # of TensorRT's calibration cache


@pytest.mark.parametrize("scheme", [targets.load("executorch").int8, IMPLICIT], ids=["executorch", "cache"])
def test_others_keep_their_steps(scheme):
    program = torch.export.export(make_net(), SAMPLES[0])
    code = [
        quantize_program(
            program, SAMPLES[0], scheme=scheme, section=QuantizeSection(shift=shift), samples=SAMPLES
        ).program.graph_module.code
        for shift in (False, True)
    ]
    assert code[0] == code[1]
