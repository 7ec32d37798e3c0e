"""inverted_residual: both definitions against independent ones, refusals, and the bounds for kernels."""

from __future__ import annotations

import itertools
import math

import block_check
import numpy as np
import pytest
import torch
import torch.ao.quantization.fx._decomposed  # registers quantized_decomposed
from drivers import Result
from kernel_check import int8_bounds, int8_call, rounding, to_double, with_defaults
from op_calls import OpCall, to_int8
from random_calls import describe, random_call
from torch import Tensor, nn

from edgedyn import ops, targets
from edgedyn.errors import ModelError
from edgedyn.graph.nodes import COUNTED_OPS, all_multiply_adds
from edgedyn.ops.inverted_residual import OP, Convolution, inverted_residual
from edgedyn.ops.inverted_residual.definition import Affine
from edgedyn.ops.inverted_residual.forms import three_convolutions
from edgedyn.quantize.accounting import account
from edgedyn.targets.fuse import fuse_int8

CASES = list(OP.examples())
every_case = pytest.mark.parametrize("args", CASES, ids=range(len(CASES)))
RANDOM = [random_call("inverted_residual", 7, k) for k in range(80)]
MODULES = {
    "none": lambda c: nn.Identity(),
    "relu": lambda c: nn.ReLU(),
    "relu6": lambda c: nn.ReLU6(),
    "prelu": lambda c: nn.PReLU(c),
    "hardswish": lambda c: nn.Hardswish(),
}
INT8 = torch.ops.edgedyn.inverted_residual_int8


def network_of(args) -> nn.Sequential:
    """Return torch's own modules for a call, without mask and sum."""
    x, *tensors = args[:10]
    (hidden, channels), outputs, side = tensors[0].shape[:2], tensors[6].shape[0], tensors[3].shape[2]
    net = nn.Sequential(
        nn.Conv2d(channels, hidden, 1),
        MODULES[args[11]](hidden),
        nn.Conv2d(hidden, hidden, side, args[14], side // 2, groups=hidden),
        MODULES[args[12]](hidden),
        nn.Conv2d(hidden, outputs, 1),
        MODULES[args[13]](outputs),
    )
    stored = [tensor for tensor in tensors if tensor is not None]
    assert len(list(net.parameters())) == len(stored)
    for parameter, tensor in zip(net.parameters(), stored, strict=True):
        parameter.data = tensor.clone()
    return net.to(x.dtype).eval()


@every_case
def test_op_equals_torch_s_modules(args):
    args = to_double(args)
    with torch.no_grad():
        y = network_of(args)(args[0])
    mask, residual = args[10], args[15]
    expected = y if mask is None else y * mask
    expected = expected + args[0] if residual else expected
    torch.testing.assert_close(OP.overload(*args), expected, rtol=1e-13, atol=1e-12)


def test_leaky_relu_is_a_prelu_of_equal_slopes(monkeypatch):
    args = list(CASES[1])
    args[3] = torch.full((19,), 0.2)
    monkeypatch.setitem(MODULES, "leaky", lambda c: nn.LeakyReLU(0.2))
    net = network_of([*args[:3], None, *args[4:11], "leaky", *args[12:]])
    with torch.no_grad():
        torch.testing.assert_close(OP.overload(*args), args[0] + net(args[0]), rtol=1e-4, atol=1e-4)


def test_public_function_has_the_op_s_arguments_and_defaults():
    x, tensors = CASES[0][0], CASES[0][1:10]
    y = inverted_residual(x, *(Convolution(*tensors[3 * k : 3 * k + 3]) for k in range(3)))
    assert torch.equal(y, OP.overload(*CASES[0]))
    x, tensors, mask = CASES[4][0], CASES[4][1:10], CASES[4][10]
    convolutions = [Convolution(*tensors[3 * k : 3 * k + 3], CASES[4][11 + k]) for k in range(3)]
    assert torch.equal(inverted_residual(x, *convolutions, mask, residual=True), OP.overload(*CASES[4]))


def test_examples_reach_every_option():
    options = [with_defaults(OP, args)[10:] for args in CASES]
    assert {a for row in options for a in row[1:4]} == set(MODULES)
    assert {row[0] is None for row in options} == {row[5] for row in options} == {True, False}
    assert {row[4] for row in options} == {1, 2}
    assert {args[4].shape[2] for args in CASES} == {3, 5}
    assert any(args[0].shape[2] % 2 == 0 and args[14] == 2 for args in CASES)
    assert [set(mask.flatten().tolist()) for mask in CASES[4][10]] == [{0, 1}, {0}, {1}]


def test_padding_is_of_the_hidden_map_and_not_of_x():
    """Of an x of 0, only the hidden map's bias is filtered: less of it at the border."""
    weights = (torch.ones(1, 1, 1, 1), torch.ones(1, 1, 3, 3), torch.ones(1, 1, 1, 1))
    flat = [t for w in weights for t in (w, torch.zeros(1), None)]
    flat[1] = torch.tensor([5.0])
    y = OP.overload(torch.zeros(1, 1, 3, 4), *flat, None)
    assert y[0, 0].tolist() == [[20, 30, 30, 20], [30, 45, 45, 30], [20, 30, 30, 20]]


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_inactive_position_is_zero_or_x_whatever_its_features_are(value):
    args = list(CASES[4])  # residual; the second sample's mask is empty
    args[0] = args[0].clone()
    args[0][1, 2, 4, 3] = value
    y = OP.overload(*args)
    assert torch.equal(y[1].nan_to_num(), args[0][1].nan_to_num())
    args[15] = False
    assert torch.equal(OP.overload(*args)[1], torch.zeros(7, 9, 6))


@every_case
def test_multiply_adds_are_those_of_the_three_convolutions(args):
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return three_convolutions(x, *args[1:])

    program = torch.export.export(Net(), args[:1])
    assert OP.apply_macs(*args) == sum(all_multiply_adds(program.graph).values())


# --- INT8


def quantized_program(x, x_scale, x_zero, *rest):
    """Compute the INT8 op by PT2E's own operators: DQ, conv, act, Q, DQ, ..., float sum."""
    pair, of_x = torch.ops.quantized_decomposed, (x_scale, x_zero, -128, 127, torch.int8)
    expand, hidden, depthwise = rest[:4], rest[4:6], rest[6:10]
    filtered, project, mask, names = rest[10:12], rest[12:16], rest[16], rest[17:20]
    stride, residual = rest[20:]

    def layer(y, of, name, **options):
        weight, scales, bias, slopes = of
        zeros = torch.zeros_like(scales, dtype=torch.int64)
        weight = pair.dequantize_per_channel(weight, scales, zeros, 0, -127, 127, torch.int8)
        module = MODULES[name](len(bias))
        if name == "prelu":
            module.weight.data = slopes
        return module(nn.functional.conv2d(y, weight, bias, **options))

    def through_int8(y, of):
        return pair.dequantize_per_tensor(pair.quantize_per_tensor(y, *of), *of)

    side = depthwise[0].shape[2]
    y = through_int8(layer(through_int8(x, of_x), expand, names[0]), (*hidden, *of_x[2:]))
    y = layer(y, depthwise, names[1], stride=stride, padding=side // 2, groups=len(depthwise[0]))
    y = layer(through_int8(y, (*filtered, *of_x[2:])), project, names[2])
    y = y if mask is None else y * mask
    return x + y if residual else y


@every_case
@torch.no_grad()
def test_int8_op_equals_the_program_of_quantize_and_dequantize(args):
    _, arguments = int8_call(OP, args)
    y, expected = INT8(*arguments), quantized_program(*arguments)
    assert y.dtype == torch.float32
    step = (y - expected).abs().max() / y.abs().max()
    assert step < 1e-2  # a sum in another order tips a tie at most, one step of 90 on one of many channels
    assert ((y - expected).abs() > 1e-5 * y.abs().max()).float().mean() < 0.05


@pytest.mark.parametrize("affine", [(0.1, 3), (0.037, -128), (1.7, 127), (0.5, 0)])
def test_map_is_rounded_as_quantize_per_tensor_does(affine):
    """To the bit, with ties, and with values on both sides of the range."""
    scale, zero_point = affine
    x = torch.cat([torch.arange(-600, 601) * (scale / 2), torch.randn(2000) * 200 * scale])
    x = torch.cat([x, torch.tensor([math.inf, -math.inf])])
    pair, of = torch.ops.quantized_decomposed, (scale, zero_point, -128, 127, torch.int8)
    stored = pair.quantize_per_tensor(x, *of)
    assert {-128, 127} <= set(stored.tolist())
    assert torch.equal(Affine(*affine).store(x), stored.float())
    assert torch.equal(Affine(*affine).round(x), pair.dequantize_per_tensor(stored, *of))


@every_case
def test_int8_op_is_near_the_float_op(args):
    exact, y = OP.overload(*args), INT8(*int8_call(OP, args)[1])
    noise, signal = (exact - y).square().mean(), exact.square().mean()
    assert 10 * math.log10(signal / noise) > 25


@every_case
def test_int8_registration_passes_opcheck(args):
    torch.library.opcheck(INT8.default, int8_call(OP, args)[1], test_utils=("test_schema", "test_faketensor"))


@every_case
def test_int8_out_variant_writes_what_the_op_returns(args):
    _, arguments = int8_call(OP, args)
    out = torch.full((1,), torch.nan)
    assert INT8.out(*arguments, out=out) is out
    assert torch.equal(out, INT8(*arguments))


# --- refusals

GOOD = with_defaults(OP, (*CASES[0][:10], None, "none", "none", "none"))
NAMES = [argument.name for argument in OP.overload._schema.arguments]
_, GOOD_INT8 = int8_call(OP, GOOD)
NAMES_INT8 = [argument.name for argument in INT8.default._schema.arguments]
REFUSED = [
    ({"x": torch.zeros(5, 17, 23)}, r"x \(5, 17, 23\) and weights .*Keep another"),
    ({"x": torch.zeros(2, 4, 17, 23)}, r"x \(2, 4, 17, 23\).*expected \(B, C, H, W\)"),
    ({"x": torch.zeros(2, 5, 0, 23)}, r"\(2, 5, 0, 23\).*not empty"),
    ({"x": torch.zeros(2, 5, 17, 23).half()}, "(expand_bias|expand) of torch.float32"),
    ({"depthwise_bias": torch.zeros(6)}, r"depthwise_bias \(6,\); expected \(7,\): one value.*Pass zeros"),
    ({"project_bias": torch.zeros(4, 1)}, r"project_bias \(4, 1\); expected \(4,\)"),
    ({"expand_bias": torch.zeros(7).double()}, "expand_bias of torch.float64 for x of torch.float32.*Cast"),
    ({"expand_activation": "gelu"}, "expand_activation='gelu'; expected one of none, relu, .*hardswish"),
    ({"project_activation": ""}, "project_activation=''; expected one of"),
    ({"depthwise_activation": "prelu"}, r"depthwise_slopes None with .*'prelu'; expected \(7,\).*Repeat"),
    ({"expand_slopes": torch.zeros(7)}, r"expand_slopes \(7,\) with .*'none'; expected None"),
    ({"project_activation": "prelu", "project_slopes": torch.zeros(1)}, r"project_slopes \(1,\).*\(4,\)"),
    ({"stride": 0}, "stride=0.*expected stride 1 or 2"),
    ({"stride": 3}, "stride=3.*three convolutions"),
    ({"residual": True}, "residual=True, x of 5 and project of 4.*as many outputs as inputs"),
    ({"mask": torch.ones(2, 1, 9, 12)}, r"mask \(2, 1, 9, 12\) .*expected \(2, 1, 17, 23\).*resolution of y"),
    ({"mask": torch.ones(1, 1, 17, 23)}, r"mask \(1, 1, 17, 23\)"),
    ({"mask": torch.ones(2, 1, 17, 23).bool()}, "mask of torch.bool for x of torch.float32"),
    ({"mask": torch.ones(2, 1, 9, 12).double(), "stride": 2}, "mask of torch.float64"),
]
SHAPES = {
    "expand": [(7, 5, 1, 3), (7, 5), (0, 5, 1, 1), (8, 5, 1, 1)],
    "depthwise": [
        (7, 2, 3, 3),
        (8, 1, 3, 3),
        (7, 1, 3, 5),
        (7, 1, 7, 7),
        (7, 1, 1, 1),
        (7, 1, 4, 4),
        (7, 1, 3),
    ],
    "project": [(4, 6, 1, 1), (4, 7, 3, 3), (0, 7, 1, 1), (4, 7)],
}
REFUSED += [
    ({name: torch.zeros(shape)}, r"weights .*expected \(B, C, H, W\).*R 3 or 5")
    for name, shapes in SHAPES.items()
    for shape in shapes
]
OF_INT8 = [
    ({"x_scale": 0.0}, "x_scale=0.0, x_zero_point=11; expected a scale > 0 .*Calibrate"),
    ({"hidden_scale": -1.0}, "hidden_scale=-1.0"),
    ({"filtered_scale": math.nan}, "filtered_scale=nan"),
    ({"filtered_scale": math.inf}, "filtered_scale=inf"),
    ({"hidden_zero_point": 128}, r"hidden_zero_point=128; .*\[-128, 127\]"),
    ({"x_zero_point": -129}, "x_zero_point=-129"),
    ({"expand_scales": torch.ones(1)}, r"expand_scales \(1,\) of torch.float32; expected \(7,\)"),
    ({"project_scales": torch.ones(4).double()}, r"project_scales \(4,\) of torch.float64; .*per channel"),
    ({"expand": torch.zeros(7, 5, 1, 1)}, "expand of torch.float32; expected torch.int8.*take the op for"),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("changes", "words", "is_int8"),
    [
        *(pytest.param(*case, False, id=f"float-{k}") for k, case in enumerate(REFUSED)),
        *(pytest.param(*case, True, id=f"int8-{k}") for k, case in enumerate([*REFUSED, *OF_INT8])),
        pytest.param({"expand": GOOD_INT8[3]}, "expand of torch.int8; expected torch.float32", False, id="w"),
    ],
)
def test_precondition_is_refused_with_what_was_found(changes, words, is_int8, device):
    names, good = (NAMES_INT8, GOOD_INT8) if is_int8 else (NAMES, GOOD)
    assert set(changes) <= set(names)
    args = [changes.get(name, value) for name, value in zip(names, good, strict=True)]
    args = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    op = "inverted_residual_int8" if is_int8 else "inverted_residual"
    with pytest.raises(ModelError, match=f"{op} got .*{words}"):
        getattr(torch.ops.edgedyn, op)(*args)


@pytest.mark.parametrize("value", [0.5, -1.0, math.nan, math.inf])
def test_mask_of_other_values_is_refused_where_the_op_computes(value):
    mask = torch.ones(2, 1, 17, 23)
    mask[1, 0, 3, 3] = value
    with pytest.raises(ModelError, match=f"values from .*{value}.*0 and 1 only|values from.*0 and 1 only"):
        OP.overload(*GOOD[:10], mask)
    with pytest.raises(ModelError, match="inverted_residual_int8 got a mask with values"):
        INT8(*GOOD_INT8[:19], mask, *GOOD_INT8[20:])


@pytest.mark.parametrize(("name", "at"), [("expand", 3), ("depthwise", 9), ("project", 15)])
def test_weight_of_minus_128_is_refused_where_the_op_computes(name, at):
    weight = GOOD_INT8[at].clone()
    weight.flatten()[-1] = -128
    with pytest.raises(ModelError, match=f"inverted_residual_int8 got {name} with a value of -128"):
        INT8(*GOOD_INT8[:at], weight, *GOOD_INT8[at + 1 :])


# --- targets


def test_fused_kernel_is_taken_by_a_phone_and_by_no_jetson():
    choices = itertools.product(("executorch", "tensorrt"), ("stock", "fused"))
    forms = {at: ops.choose_form(OP, targets.load(*at)).name for at in choices}
    assert forms.pop(("executorch", "fused")) == "fused"
    assert set(forms.values()) == {"three_convolutions"}


def test_call_between_dequantize_and_quantize_stays_as_it_is():
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            pair, of = torch.ops.quantized_decomposed, (0.1, 3, -128, 127, torch.int8)
            y = pair.dequantize_per_tensor(pair.quantize_per_tensor(x, *of), *of)
            y = OP.overload(y, *CASES[0][1:])
            return pair.dequantize_per_tensor(pair.quantize_per_tensor(y, *of), *of)

    program = torch.export.export(Net(), CASES[0][:1])
    assert fuse_int8(program) is program


# --- the bounds that judge kernels


def verdict(call: OpCall, y: Tensor) -> str:
    return call.discrepancy(Result(y.detach().numpy(), ""))


@pytest.mark.parametrize("parity", [0, 1], ids=["float32", "int8"])
def test_definition_in_float32_is_within_the_bounds(parity):
    """Of all random calls, with and without values that are not finite."""
    for call in RANDOM[parity::2]:
        with torch.no_grad():
            y = (INT8 if call.is_int8 else OP.overload)(*call.args)
        assert verdict(call, y) == "", describe(call)


def test_rounding_is_not_larger_than_the_longest_sum_allows():
    for args in CASES:
        y, bound = OP.overload(*to_double(args)), rounding(OP, args)
        assert bound.shape == y.shape
        assert float((bound / y.abs().clamp(min=1)).amax()) < 3e-3
        assert float((bound > 0).float().mean()) == 1


WRONG = {  # argument of the INT8 op: what a kernel could take instead
    "hidden_zero_point": lambda v: 120,
    "filtered_zero_point": lambda v: 120,
    "x_zero_point": lambda v: v + 60,
    "filtered_scale": lambda v: v * 1.01,
    "hidden_scale": lambda v: v * 0.99,
    "x_scale": lambda v: v * 1.01,
    "expand_bias": lambda v: v + 0.02,
    "depthwise_bias": lambda v: v * 0.99,
    "project_bias": lambda v: v + 1e-3,
    "expand_activation": lambda v: "relu" if v == "none" else "none",
    "project": lambda v: v.flip(0),
    "depthwise": lambda v: v.transpose(2, 3),
}


@pytest.mark.parametrize("name", WRONG)
def test_bounds_tell_a_wrong_kernel_of_int8(name):
    for args in CASES[:4]:
        call = to_int8(OpCall(OP, with_defaults(OP, args)))
        changed = [WRONG[name](v) if n == name else v for n, v in zip(NAMES_INT8, call.args, strict=True)]
        if name == "expand_activation":
            changed[NAMES_INT8.index("expand_slopes")] = None
        assert "are wrong" in verdict(call, INT8(*changed))


def test_bounds_tell_a_map_that_is_padded_by_something_else():
    """The zero point's code stands for 0; another code at the border is seen there and only there."""
    call = to_int8(OpCall(OP, with_defaults(OP, CASES[0])))
    y, border = INT8(*call.args), torch.zeros(17, 23, dtype=torch.bool)
    border[[0, -1]] = border[:, [0, -1]] = True
    moved = list(call.args)
    moved[NAMES_INT8.index("expand_bias")] = moved[NAMES_INT8.index("expand_bias")] + 0.5
    wrong = torch.where(border, INT8(*moved), y)
    words = verdict(call, wrong)
    assert "are wrong" in words
    assert verdict(call, y) == ""


def test_bounds_are_exact_but_for_ties():
    """Most outputs meet no tie: there only the roundings of one sum of float32 are allowed."""
    for args in CASES:
        _, arguments = int8_call(OP, args)
        low, high = int8_bounds(OP, arguments)
        step = (
            arguments[NAMES_INT8.index("filtered_scale")] * arguments[NAMES_INT8.index("project")].abs().max()
        )
        step = step * arguments[NAMES_INT8.index("project_scales")].max()  # of one filtered value
        apart = (high - low) / step
        assert (low <= high).all()
        assert float(apart.median()) < 0.02
        assert float((apart > 0.05).float().mean()) < 0.5


def test_value_at_a_tie_may_round_either_way():
    """Hidden 0.5 steps above a code: y of either code is right, and one between them as well; no other is."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.int8)
    centre = torch.zeros(1, 1, 3, 3, dtype=torch.int8)
    centre[..., 1, 1] = 1
    of = [(one, torch.ones(1), torch.tensor([0.5]), None), (centre, torch.ones(1), torch.zeros(1), None)]
    of.append((one, torch.ones(1), torch.zeros(1), None))
    arguments = (torch.full((1, 1, 1, 1), 4.0), 1.0, 0, *of[0], 1.0, 0, *of[1], 1.0, 0, *of[2], None)
    arguments += ("none", "none", "none", 1, False)
    low, high = block_check.int8_bounds(arguments)
    assert low.item() == pytest.approx(4, abs=1e-4)
    assert high.item() == pytest.approx(5, abs=1e-4)
    assert INT8(*arguments).item() == 4  # half to even
    off = list(arguments)
    off[5] = torch.tensor([0.5 + 3 * block_check.TIE])
    low, high = block_check.int8_bounds(tuple(off))
    assert low.item() == pytest.approx(5, abs=1e-4)
    assert high.item() == pytest.approx(5, abs=1e-4)


@pytest.mark.parametrize("activation", ["relu", "relu6", "hardswish", "prelu"])
def test_interval_of_an_activation_holds_every_value_between(activation):
    slopes = torch.tensor([-0.7], dtype=torch.float64) if activation == "prelu" else None
    of = Convolution(torch.zeros(1), torch.zeros(1), slopes, activation)
    points = torch.linspace(-8, 8, 33, dtype=torch.float64)
    for a, b in itertools.combinations(points, 2):
        low, high = block_check._activate(of, a.reshape(1, 1, 1, 1), b.reshape(1, 1, 1, 1))
        found = of.activate(torch.linspace(float(a), float(b), 200, dtype=torch.float64).reshape(1, 1, 1, -1))
        assert low.item() <= found.min().item() + 1e-12
        assert high.item() >= found.max().item() - 1e-12
        assert low.item() >= found.min().item() - 0.06
        assert high.item() <= found.max().item() + 0.06


def test_random_calls_reach_what_kernels_cut():
    calls = [random_call("inverted_residual", 0, k) for k in range(0, 400, 2)]
    assert {call.args[4].shape[2] for call in calls} == {3, 5}
    assert max(call.args[1].shape[0] for call in calls) > 200
    masks = [call.args[10] for call in calls if call.args[10] is not None and call.args[10].numel() > 1]
    sums = [mask.sum().item() for mask in masks]
    assert any(total == 0 for total in sums)
    assert any(total == 1 for total in sums)
    assert any(total == mask.numel() for total, mask in zip(sums, masks, strict=True))
    assert any(call.args[0].shape[2:] == (1, 1) for call in calls)
    assert {call.args[14] for call in calls} == {1, 2}
    assert {call.args[15] for call in calls} == {True, False}
    assert {a for call in calls for a in call.args[11:14]} == set(MODULES)


def test_random_int8_calls_hold_infinities_in_x_alone():
    calls = [random_call("inverted_residual", 0, k) for k in range(1, 200, 2)]
    floats = [[a for a in call.args[1:] if isinstance(a, Tensor)] for call in calls]
    assert any(not torch.isfinite(call.args[0]).all() for call in calls)
    assert all(np.isfinite(a.numpy()).all() for group in floats for a in group)


def test_call_of_a_network_itself_is_float_in_an_int8_program_and_says_how_it_becomes_int8():
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            tensors = CASES[0][1:10]
            return inverted_residual(x, *(Convolution(*tensors[3 * k : 3 * k + 3]) for k in range(3)))

    program = torch.export.export(Net(), CASES[0][:1])
    found = account(program.module(), {})
    assert [row["count"] for row in found] == [1]
    assert "three_convolutions may be INT8" in found[0]["reason"]
    form = {OP: ops.choose_form(OP, targets.load("executorch", "fused"), "three_convolutions")}
    decomposed = ops.decompose(program, form, "before_quantize")
    assert sum(node.target in COUNTED_OPS for node in decomposed.graph.nodes) == 3
