"""masked_conv2d: its formula pixel by pixel, its refusals, its form in the real runtimes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgedyn import ops, targets
from edgedyn.errors import ModelError
from edgedyn.ops.masked_conv2d import OP, masked_conv2d, oracle
from edgedyn.quantize import to_float

CASES = list(OP.examples())
every_case = pytest.mark.parametrize("args", CASES, ids=range(len(CASES)))


def to_double(args):
    return tuple(a.double() if isinstance(a, Tensor) else a for a in args)


@every_case
def test_oracle_equals_the_formula_position_by_position(args):
    """The docstring's formula in scalar loops: every position of one channel, both kinds of mask."""
    x, weight, bias, mask, stride, padding, dilation, groups, activation = to_double(args)
    low, high = {"none": (-math.inf, math.inf), "relu": (0, math.inf), "relu6": (0, 6)}[activation]
    y = oracle(*to_double(args))
    (_, _, height, width), (outputs, inputs, side, _) = x.shape, weight.shape
    b, o = x.shape[0] - 1, outputs - 1
    first = o // (outputs // groups) * inputs
    for i in range(y.shape[2]):
        for j in range(y.shape[3]):
            total = 0.0 if bias is None else bias[o].item()
            for tap in range(side**2):
                row = i * stride - padding + dilation * (tap // side)
                column = j * stride - padding + dilation * (tap % side)
                if 0 <= row < height and 0 <= column < width:
                    kernel = weight[o, :, tap // side, tap % side]
                    total += (kernel * x[b, first : first + inputs, row, column]).sum().item()
            # at most 75 products of about 1, each rounded at 1.1e-16
            expected = min(max(total, low), high) * mask[b, 0, i, j].item()
            assert y[b, o, i, j].item() == pytest.approx(expected, rel=0, abs=1e-12)


def test_examples_have_active_and_inactive_positions_and_whole_samples_of_each():
    densities = [mask.mean((1, 2, 3)) for _, _, _, mask, *_ in CASES]
    assert all(0 < density.mean() < 1 for density in densities)
    assert densities[-1][0] == 1
    assert densities[-1][1] == 0


def test_bias_is_masked_too():
    y = masked_conv2d(
        torch.zeros(1, 1, 2, 3), torch.ones(1, 1, 1, 1), torch.tensor([5.0]), torch.zeros(1, 1, 2, 3)
    )
    assert torch.equal(y, torch.zeros(1, 1, 2, 3))


def test_nothing_is_read_where_the_mask_is_not_set():
    x = torch.full((1, 2, 3, 4), torch.nan)
    x[:, :, :, 0] = 1
    mask = torch.zeros(1, 1, 3, 4)
    mask[:, :, :, 0] = 1
    y = masked_conv2d(x, torch.ones(1, 2, 1, 1), None, mask)
    assert torch.equal(y, 2 * mask)


def test_defaults_of_the_wrapper_are_those_of_the_schema():
    x, weight, mask = torch.randn(2, 2, 5, 6), torch.randn(3, 2, 3, 3), torch.ones(2, 1, 3, 4)
    assert torch.equal(
        masked_conv2d(x, weight, None, mask), oracle(x, weight, None, mask, 1, 0, 1, 1, "none")
    )


def test_cost_is_that_of_every_position():
    x, weight, bias, mask = torch.zeros(2, 6, 9, 8), torch.zeros(4, 3, 3, 3), None, torch.zeros(2, 1, 5, 4)
    assert OP.apply_macs(x, weight, bias, mask, 2, 1, 1, 2) == 2 * 4 * 5 * 4 * 3 * 9
    assert OP.generated == ("mask",)


X, WEIGHT, MASK = torch.zeros(2, 6, 5, 7), torch.zeros(4, 6, 3, 3), torch.zeros(2, 1, 5, 7)


@pytest.mark.parametrize(
    ("args", "found", "expected"),
    [
        ((X, WEIGHT, None, MASK, 0, 1), "stride=0", "others >= 1"),
        ((X, WEIGHT, None, MASK, 1, -1), "padding=-1", "padding >= 0"),
        ((X, WEIGHT, None, MASK, 1, 1, 0), "dilation=0", "others >= 1"),
        ((X, WEIGHT, None, MASK, 1, 1, 1, 0), "groups=0", "others >= 1"),
        ((X[0], WEIGHT, None, MASK, 1, 1), r"x \(6, 5, 7\)", r"\(B, I, H, W\)"),
        ((X, WEIGHT[..., :1], None, MASK, 1, 1), r"weight \(4, 6, 3, 1\)", "zeros to a square"),
        ((X, WEIGHT[:, :5], None, MASK, 1, 1), "x of 6 channels", "I / groups channels"),
        ((X, WEIGHT[:3, :3], None, MASK, 1, 1, 1, 2), "groups=2", "groups to divide O"),
        ((X, WEIGHT, torch.zeros(5), MASK, 1, 1), r"bias \(5,\)", r"expected \(4,\)"),
        ((X, WEIGHT, None, MASK, 2, 1), r"mask \(2, 1, 5, 7\)", r"expected \(2, 1, 3, 4\)"),
        ((X, WEIGHT, None, MASK[:1], 1, 1), r"mask \(1, 1, 5, 7\)", r"expected \(2, 1, 5, 7\)"),
        ((X[:, :, :1], WEIGHT, None, MASK, 1, 0), r"x \(2, 6, 1, 7\)", "at least one position"),
        ((X, WEIGHT, None, MASK, 1, 1, 1, 1, "gelu"), "activation='gelu'", "one of none, relu, relu6"),
        ((X, WEIGHT, None, MASK.bool(), 1, 1), "mask of torch.bool", "Cast the mask"),
    ],
    ids=lambda v: v.replace(" ", "_") if isinstance(v, str) else "",
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_precondition_is_refused_with_what_was_found(args, found, expected, device):
    args = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    with pytest.raises(ModelError, match=f"{found}.*{expected}") as caught:
        OP.overload(*args)
    assert caught.value.exit_code == 4


def test_mask_of_other_values_is_refused():
    with pytest.raises(ModelError, match=r"values from 0\.0 to 0\.5; expected 0 and 1 only"):
        masked_conv2d(X, WEIGHT, None, torch.where(torch.rand(MASK.shape) > 0.5, 0.5, 0.0), padding=1)


class Gated(nn.Module):
    """One call of the op whose mask is an input."""

    def __init__(self, weight, bias, options):
        super().__init__()
        self.weight, self.options = nn.Parameter(weight), options
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x, mask):
        return OP.overload(x, self.weight, self.bias, mask, *self.options)


def capture(args):
    x, weight, bias, mask, *options = args
    inputs = (x[:1], mask[:1])
    return torch.export.export(Gated(weight, bias, options).eval(), inputs), inputs


@pytest.mark.parametrize("name", ["executorch", "onnxruntime"])
@pytest.mark.parametrize("args", [CASES[1], CASES[3]], ids=["stride_2", "depthwise"])
def test_dense_form_runs_in_the_real_runtime(name, args, tmp_path):
    target = targets.load(name)
    program, inputs = capture(args)
    forms = ops.choose_forms(program, target, {})
    assert [form.name for form in forms.values()] == ["dense_times_mask"]
    program = to_float(ops.decompose(program, forms, "before_quantize"), inputs, "fp32").program
    artifact = target.lower({"forward": program}, tmp_path, "fp32")
    (y,) = target.load(tmp_path / artifact.programs["forward"], "forward")(*(x.numpy() for x in inputs))
    expected = oracle(*(x.double() for x in inputs[:1]), *to_double(args[1:3]), inputs[1].double(), *args[4:])
    # at most 54 products of about 1, summed in float32
    np.testing.assert_allclose(y, expected.numpy(), rtol=0, atol=54 * 6e-8 * 10)
    if name == "executorch":
        assert (artifact.facts["delegates"], artifact.facts["portable"]) == (1, {})
