"""INT8 with both roundings and for both schemes: the Q/DQ pairs, and the account of float operators."""

from __future__ import annotations

import functools

import pytest
import torch
from small_int8 import quantize_program
from small_networks import LAYERS, make_input
from torch import Tensor, nn

from edgedyn import ops, quantize, targets
from edgedyn.errors import CalibrationError, RecipeError
from edgedyn.graph.nodes import fused_activation
from edgedyn.layers import canonicalize
from edgedyn.recipe.keys import QuantizeSection
from edgedyn.targets import Int8Scheme

EXECUTORCH, TENSORRT = targets.load("executorch"), targets.load("tensorrt")
SHAPE = (1, 3, 32, 48)
ROUNDINGS = ["nearest", "reconstruct"]
HOW = ["none", "fast", "full"]


class SmallNet(nn.Module):
    """A residual denoiser around one dynamic layer."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.PReLU(8))
        self.dynamic = LAYERS[layer]()
        self.tail = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.tail(self.dynamic(self.head(x)))


def make_net(layer: str) -> nn.Module:
    torch.manual_seed(12)
    net = SmallNet(layer)
    for name, tensor in net.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "gate")):
            tensor.add_(0.3)
    return net.eval()


def make_samples(count: int = 3) -> list[tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(13)
    return [(torch.rand(SHAPE, generator=generator),) for _ in range(count)]


def capture(net: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    program = torch.export.export(canonicalize(net), (x,), strict=False)
    return ops.decompose(program, ops.choose_forms(program, EXECUTORCH, {}), "before_quantize")


def to_int8(
    net: nn.Module, scheme: Int8Scheme, rounding: str = "reconstruct", **section
) -> quantize.Quantized:
    samples = make_samples()
    return quantize_program(
        capture(net, samples[0][0]),
        samples[0],
        scheme=scheme,
        section=QuantizeSection(rounding=rounding, **section),
        samples=samples,
    )


@functools.cache
def quantized(layer: str, rounding: str, target: str) -> quantize.Quantized:
    return to_int8(make_net(layer), targets.load(target).int8, rounding)


CASES = [("affine", "nearest"), ("affine", "reconstruct"), ("kernels", "reconstruct")]
every_case = pytest.mark.parametrize(
    ("layer", "rounding", "target"),
    [(*case, target) for case in CASES for target in ("executorch", "tensorrt")],
)


def calls(program: torch.export.ExportedProgram, name: str) -> list[torch.fx.Node]:
    return [n for n in program.graph.nodes if n.op == "call_function" and name in str(n.target)]


def qparams(program: torch.export.ExportedProgram) -> list[tuple[float, int]]:
    return [node.args[1:3] for node in calls(program, ".quantize_per_tensor")]


def constant(program: torch.export.ExportedProgram, node: torch.fx.Node) -> Tensor:
    signature = program.graph_signature
    name = {**signature.inputs_to_buffers, **signature.inputs_to_parameters}.get(node.name)
    return (
        program.state_dict[name]
        if name
        else program.constants[signature.inputs_to_lifted_tensor_constants[node.name]]
    )


@every_case
def test_every_convolution_is_int8(layer, rounding, target):
    result = quantized(layer, rounding, target)
    assert result.int8_mac_share == 1
    convolutions = calls(result.program, "conv2d")
    assert len(convolutions) >= 5
    for node in convolutions:
        assert "dequantize_per_tensor" in str(node.args[0].target)
        assert "dequantize_per_channel" in str(node.args[1].target)


@every_case
def test_weights_are_symmetric_with_one_scale_a_channel(layer, rounding, target):
    program = quantized(layer, rounding, target).program
    for node in calls(program, "dequantize_per_channel"):
        weight, scales, zeros, axis = *(constant(program, n) for n in node.args[:3]), node.args[3]
        assert weight.dtype == torch.int8
        assert weight.min() >= -127
        # the largest weight of a layer becomes the largest int8 value; reconstruction moves it a little
        assert weight.abs().amax() >= (127 if rounding == "nearest" else 100)
        assert axis == 0
        assert scales.shape == (weight.shape[0],)
        assert scales.unique().numel() > 1
        assert not zeros.any()


@every_case
def test_batch_norm_is_folded(layer, rounding, target):
    assert calls(capture(make_net("affine"), make_samples()[0][0]), "batch_norm")
    assert not calls(quantized(layer, rounding, target).program, "batch_norm")


@every_case
def test_zero_points_are_those_of_the_scheme(layer, rounding, target):
    found = qparams(quantized(layer, rounding, target).program)
    assert all(scale > 0 for scale, _ in found)
    zero_points = {zero_point for _, zero_point in found}
    if target == "tensorrt":
        assert zero_points == {0}
    else:
        assert len(zero_points) > 1
    assert zero_points <= set(range(-128, 128))


@every_case
def test_outputs_are_quantized_only_where_the_scheme_wants_it(layer, rounding, target):
    program = quantized(layer, rounding, target).program
    last = [fused_activation(node) or node for node in calls(program, "conv2d")]
    readers = [user for node in last for user in node.users]
    is_quantize = [".quantize_per_tensor" in str(user.target) for user in readers]
    assert readers
    assert all(is_quantize) if target == "executorch" else not all(is_quantize)


@every_case
def test_what_stays_float_is_counted_with_a_reason(layer, rounding, target):
    result = quantized(layer, rounding, target)
    rows = {row["node"]: row for row in result.float_nodes}
    for row in rows.values():
        assert row["count"] >= 1
        assert len(row["reason"]) > 10
    assert rows["bmm"]["count"] == len(calls(result.program, "bmm")) > 0
    assert rows["bmm"]["reason"] == "interpolates generated kernels"
    assert rows["prelu"]["count"] == len(calls(result.program, "prelu"))
    assert "quantize_per_tensor" not in rows


@every_case
def test_int8_is_close_to_float_on_other_images(layer, rounding, target):
    net, x = make_net(layer), torch.rand(SHAPE, generator=torch.Generator().manual_seed(14))
    with torch.no_grad():
        expected = net(x)
        noise = quantized(layer, rounding, target).program.module()(x) - expected
    # uniform rounding over a tensor's range leaves about 6.02 * 8 - 7 dB (the peak is a few deviations above
    # the mean square); the fifteen tensors on the way add 12 dB of noise; a wrong scale or bias leaves about
    # 0 dB
    assert 10 * torch.log10((expected - x).square().mean() / noise.square().mean()) > 20
    assert noise.abs().max() > 1e-5, "nothing was quantized"


class TwiceNet(nn.Module):
    """One convolution at two places, with inputs of different ranges."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(5 * torch.sigmoid(self.conv(x)))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_layer_that_is_called_twice_is_quantized_twice_with_its_own_constants(rounding):
    torch.manual_seed(15)
    result = to_int8(TwiceNet().eval(), EXECUTORCH.int8, rounding)
    first, second = calls(result.program, "conv2d")
    assert result.int8_mac_share == 1
    assert first.args[2] is not second.args[2]
    assert first.args[1] is not second.args[1]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_kept_layers_stay_float_and_are_accounted(rounding):
    net = make_net("affine")
    result = to_int8(net, EXECUTORCH.int8, rounding, keep_float=["tail", "dynamic.scales.*"])
    program = capture(net, make_samples()[0][0])
    macs = {quantize.module_path(n): quantize.multiply_adds(n) for n in calls(program, "conv2d")}
    kept = macs["tail"] + macs["dynamic.scales.0"]
    assert result.int8_mac_share == pytest.approx(1 - kept / sum(macs.values()), rel=1e-12)
    rows = {row["node"]: row["reason"] for row in result.float_nodes}
    for path in ("tail", "dynamic.scales.0"):
        assert "keep_float" in rows[path]
    floats = [n for n in calls(result.program, "conv2d") if "dequantize" not in str(n.args[1].target)]
    assert len(floats) == 2


class ManyOps(nn.Module):
    """Operators without an INT8 rule, one of them in place, between operators that only move values."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(2, 8, 1)
        self.norm, self.act = nn.GroupNorm(2, 8), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.gelu(self.act(self.norm(self.first(x))))
        y = nn.functional.pad(y, (1, 1, 0, 0), mode="reflect")[:, :, :, 1:-1]
        y = y * torch.sigmoid(y.mean((2, 3), keepdim=True))
        y = nn.functional.pixel_shuffle(y.reshape(1, 2, 4, *y.shape[2:]).permute(0, 2, 1, 3, 4)[0], 1)
        left, right = torch.tanh(self.second(y)).chunk(2, dim=1)
        return left - right


def test_operator_without_int8_rule_is_listed_and_one_that_only_moves_values_is_not():
    torch.manual_seed(19)
    rows = to_int8(ManyOps().eval(), EXECUTORCH.int8).float_nodes
    counts = {row["node"]: row["count"] for row in rows if row["reason"] == "no INT8 rule for this operator"}
    assert counts == dict.fromkeys(("group_norm", "relu", "gelu", "pad", "mean", "sigmoid", "tanh"), 1)
    assert {row["node"] for row in rows} - counts.keys() == {"mul", "sub"}


def test_unknown_layer_to_keep_is_refused_with_the_known_ones():
    module = quantize.fold(capture(make_net("affine"), make_samples()[0][0]))
    other = quantize.fold(torch.export.export(nn.Sequential(nn.Conv2d(3, 3, 1)), (make_samples()[0][0],)))
    # a variant need not have every layer
    quantize.refuse_unknown_layers([module, other], "keep_float", ["tail", "0"])
    with pytest.raises(RecipeError) as caught:
        quantize.refuse_unknown_layers([module, other], "keep_float", ["tail", "tial"])
    assert "keep_float: 'tial' matches no layer" in str(caught.value)
    assert "head.0, dynamic.predictor.0" in str(caught.value)
    assert caught.value.exit_code == 2


def test_no_samples_are_refused():
    x = make_samples()[0]
    program = capture(make_net("affine"), x[0])
    with pytest.raises(
        CalibrationError, match="no calibration samples; INT8 needs at least one image"
    ) as caught:
        quantize_program(program, x, scheme=EXECUTORCH.int8, section=QuantizeSection(), samples=[])
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("bias_correction", ["none", "fast"])
def test_progress_is_reported_and_standard_output_stays_clean(bias_correction, capfd):
    """``--json`` owns the standard output; NNCF draws its bars there."""
    torch.manual_seed(17)
    net, samples, seen = nn.Conv2d(3, 3, 3).eval(), make_samples(), []
    quantize_program(
        torch.export.export(net, samples[0]),
        samples[0],
        scheme=EXECUTORCH.int8,
        section=QuantizeSection(bias_correction=bias_correction),
        samples=samples,
        progress=lambda phase, done, total: seen.append((phase, done, total)),
    )
    assert seen[:4] == [*(("observe", done, 3) for done in (1, 2, 3)), ("round weights", 1, 1)]
    assert {phase for phase, _, _ in seen[4:]} == ({"correct biases"} if bias_correction == "fast" else set())
    assert capfd.readouterr().out == ""


def test_full_bias_correction_reads_no_more_samples_than_fit_into_memory(monkeypatch):
    """NNCF holds the inputs of every layer for all of them."""
    torch.manual_seed(17)
    net, samples, seen = nn.Conv2d(3, 3, 3).eval(), make_samples(), []
    monkeypatch.setattr("edgedyn.quantize.rounding.bias_correction._HELD", 2 * samples[0][0].nbytes)
    quantize_program(
        torch.export.export(net, samples[0]),
        samples[0],
        scheme=EXECUTORCH.int8,
        section=QuantizeSection(bias_correction="full"),
        samples=samples,
        progress=lambda phase, done, total: seen.append((phase, total)),
    )
    assert len(samples) == 3
    assert {total for phase, total in seen if phase == "correct biases"} == {2}


@pytest.mark.parametrize("target", ["executorch", "tensorrt"])
def test_bias_correction_moves_biases_and_nothing_else(target):
    torch.manual_seed(18)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 3, 3)).eval()
    x = torch.cat([x for (x,) in make_samples()])
    scheme, plain = targets.load(target).int8, {"rounding": "nearest", "equalize": False}
    programs = {how: to_int8(net, scheme, bias_correction=how, **plain).program for how in HOW}
    weights, biases, shifts = {}, {}, {}
    with torch.no_grad():
        for how, program in programs.items():
            weights[how] = [constant(program, n.args[0]) for n in calls(program, "dequantize_per_channel")]
            biases[how] = torch.cat([constant(program, n.args[2]) for n in calls(program, "conv2d")])
            y = torch.cat([program.module()(image[None]) for image in x])
            shifts[how] = (y - net(x)).mean((0, 2, 3)).abs().max()
    assert torch.equal(biases["none"], torch.cat([net[0].bias, net[2].bias]))
    for how in ("fast", "full"):
        assert all(torch.equal(a, b) for a, b in zip(weights["none"], weights[how], strict=True))
        assert 0 < (biases[how] - biases["none"]).abs().max() < 0.1
    # the fast one sees only the mean of an input, not its border, and moved this small network further
    assert shifts["full"] < 0.5 * shifts["none"]


@pytest.mark.parametrize("how", ["fast", "full"])
def test_biases_behind_reconstructed_weights_are_corrected_too(how):
    """Reconstruction gives a layer without a bias its first one."""
    torch.manual_seed(19)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), nn.Conv2d(8, 3, 3)).eval()
    plain, corrected = (
        torch.cat([constant(program, node.args[2]) for node in calls(program, "conv2d")]).detach()
        for program in (to_int8(net, EXECUTORCH.int8, bias_correction=x).program for x in ("none", how))
    )
    assert 0 < (corrected - plain).abs().max() < 0.1


def test_folding_is_exact_in_float64():
    net, x = make_net("affine").double(), make_samples()[0][0].double()
    module = quantize.fold(capture(net, x))
    assert not [n for n in module.graph.nodes if "batch_norm" in str(n.target)]
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(module(x), expected, rtol=1e-12, atol=1e-12)


class SharedNet(nn.Module):
    """One convolution at two places, each with a BatchNorm of its own, or the second without."""

    def __init__(self, second: nn.Module) -> None:
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 3, padding=1), make_norm(), second

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.conv(self.first(self.conv(x))))


def make_norm() -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(3)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 2)
    return norm


@pytest.mark.parametrize("second", [make_norm, nn.Identity], ids=["other_norm", "no_norm"])
def test_each_call_of_a_shared_convolution_folds_its_own_norm(second):
    torch.manual_seed(17)
    net, x = SharedNet(second()).eval(), make_samples()[0]
    result = quantize.to_float(capture(net, x[0]), x, "fp32")
    assert not calls(result.program, "batch_norm")
    with torch.no_grad():
        torch.testing.assert_close(result.program.module()(x[0]), net(x[0]), rtol=1e-5, atol=1e-5)


class PaddedNet(nn.Module):
    """Padding by name, one of it uneven, and a transposed convolution, which no target has in INT8."""

    def __init__(self) -> None:
        super().__init__()
        self.same = nn.Conv2d(3, 4, 3, padding="same", dilation=2)
        self.valid = nn.Conv2d(4, 4, 3, padding="valid", stride=2)
        self.even = nn.Conv2d(4, 4, 2, padding="same")
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.even(self.valid(self.same(x))))


def test_padding_by_name_is_quantized_and_what_cannot_be_is_counted():
    torch.manual_seed(18)
    net, x = PaddedNet().eval(), make_samples()[0][0]
    result = to_int8(net, EXECUTORCH.int8)
    same, valid = x[0, 0].numel() * 4 * 27, net.valid(net.same(x)).numel() * 36
    pixels = net.valid(net.same(x))[0, 0].numel()
    even, up = pixels * 4 * 16, pixels * 4 * 12
    assert result.int8_mac_share == pytest.approx((same + valid + even) / (same + valid + even + up))
    assert result.multiply_add_nodes == 4
    reasons = {row["node"]: row["reason"] for row in result.float_nodes}
    assert reasons["up"] == "no INT8 rule for this operator"
    assert "even" not in reasons
    with torch.no_grad():
        folded = quantize.fold(torch.export.export(net, (x,)))
        torch.testing.assert_close(folded(x), net(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("fp16", torch.float16)])
def test_float_program_is_folded_and_of_its_precision(precision, dtype):
    net, x = make_net("affine"), make_samples()[0]
    result = quantize.to_float(capture(net, x[0]), x, precision)
    assert not calls(result.program, "batch_norm")
    assert {t.dtype for t in result.program.state_dict.values() if t.is_floating_point()} == {dtype}
    assert (result.int8_mac_share, result.float_nodes, result.calibrated) == (0, (), None)
    with torch.no_grad():
        y, expected = result.program.module()(x[0].to(dtype)), net(x[0])
    # each of about thirty operators rounds once; the largest intermediate is below 8
    assert (y - expected).abs().max() < 30 * 8 * torch.finfo(dtype).eps / 2
    assert y.dtype == dtype


@pytest.mark.parametrize(
    ("layer", "shape", "count"),
    [
        (nn.Conv2d(3, 8, 3, padding=1), (2, 3, 5, 7), 2 * 8 * 5 * 7 * 3 * 9),
        (nn.Conv2d(8, 12, 3, stride=2, groups=4), (1, 8, 9, 11), 12 * 4 * 5 * 2 * 9),
        (nn.Linear(6, 5), (4, 3, 6), 4 * 3 * 6 * 5),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (2, 4, 5, 7), 2 * 4 * 5 * 7 * 3 * 9),
    ],
    ids=["dense", "grouped", "linear", "transposed"],
)
def test_multiply_adds_are_counted_from_the_shapes(layer, shape, count):
    program = torch.export.export(layer, (torch.zeros(shape),))
    (node,) = [n for n in program.graph.nodes if n.target in quantize.COUNTED_OPS]
    assert quantize.multiply_adds(node) == count


def test_half_precision_leaves_the_expanded_program_in_float32():
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    x = torch.rand(1, 3, 8, 9)
    program = torch.export.export(module, (x,)).run_decompositions({})
    half = quantize.to_float(program, (x,), "fp16").program
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    assert {p.dtype for p in program.parameters()} == {torch.float32}
    assert program.module()(x).dtype == torch.float32


class Narrow(nn.Module):
    """Divides by a spread that float16 takes for zero."""

    def forward(self, x):
        centred = x - x.mean(1, keepdim=True)
        return centred / (centred.square().sum(1, keepdim=True).sqrt() + 1e-10)


class WithNarrow(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.narrow, self.tail = nn.Conv2d(3, 8, 1), Narrow(), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        y = self.narrow(self.head(x) * 1e-6)
        return self.tail((y >= 0).to(y.dtype) * y)


FLOAT32 = frozenset({f"{Narrow.__module__}.Narrow"})


def test_half_precision_leaves_excluded_modules_in_float32():
    torch.manual_seed(1)
    net, x = WithNarrow().eval(), torch.rand(1, 3, 8, 12)
    program = torch.export.export(net, (x,))
    kept = quantize.to_float(program, (x,), "fp16", FLOAT32).program.module()(x.half())
    lost = quantize.to_float(program, (x,), "fp16").program.module()(x.half())
    expected = net(x)
    assert kept.dtype == lost.dtype == torch.float16
    # a half has 11 bits, and the head computes in half: its rounding is up to 2**-11 of values of order 1
    assert (kept - expected).abs().max() < 0.05
    assert not (lost - expected).abs().max() < 0.05  # not a number, or far off
    casts = [
        n
        for n in quantize.to_float(program, (x,), "fp16", FLOAT32).program.graph.nodes
        if n.target is torch.ops.aten._to_copy.default
    ]
    assert len(casts) == 2


def test_modules_that_stay_float_are_not_quantized_and_say_why():
    torch.manual_seed(1)
    net, x = (
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1)), nn.Conv2d(4, 3, 1)),
        make_input(),
    )
    result = quantize_program(
        torch.export.export(net.eval(), (x,)),
        (x,),
        scheme=EXECUTORCH.int8,
        section=QuantizeSection(),
        samples=[(x,)],
        float32={"torch.nn.modules.container.Sequential"},
    )
    reasons = {row["node"]: row["reason"] for row in result.float_nodes}
    assert reasons == dict.fromkeys(("0", "1.0", "2"), "decides or normalises: float32 in every precision")
    assert result.int8_mac_share == 0


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.ReLU(inplace=True)], ids=str)
def test_activation_behind_a_convolution_is_quantized_with_it(activation):
    torch.manual_seed(2)
    net, x = nn.Sequential(nn.Conv2d(3, 8, 3), activation, nn.Conv2d(8, 3, 3)).eval(), make_input()
    result = quantize_program(
        torch.export.export(net, (x,)),
        (x,),
        scheme=EXECUTORCH.int8,
        section=QuantizeSection(),
        samples=[(x,)],
    )
    (first, _) = calls(result.program, "conv2d")
    assert next(iter(first.users)).target is fused_activation(first).target
    assert result.float_nodes == ()
    zero_points = [zero_point for _, zero_point in qparams(result.program)]
    assert zero_points[1] == -128  # nothing of the 8 bits below zero
