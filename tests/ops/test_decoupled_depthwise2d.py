"""decoupled_depthwise2d: its formula at single pixels, defaults, refusals, its form in the runtimes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from edgedyn import ops, targets
from edgedyn.errors import ModelError
from edgedyn.ops.decoupled_depthwise2d import OP, decoupled_depthwise2d, oracle

CASES = list(OP.examples())


@pytest.mark.parametrize("args", CASES, ids=lambda args: "-".join(map(str, args[3:])))
def test_oracle_equals_the_formula_at_single_pixels(args):
    """The docstring's formula, one scalar loop a pixel, at the corners and in the middle."""
    x, channel, spatial, side, stride, dilation, heads, combine = args
    x, channel, spatial = x.double(), channel.double(), spatial.double()
    y = OP.overload(x, channel, spatial, *args[3:])
    (b, c, height, width), (h, w) = x.shape, spatial.shape[2:]
    assert y.shape == (b, c, height // stride, width // stride)
    for bi, ci, py, px in [
        (0, 0, 0, 0),
        (b - 1, c - 1, h - 1, w - 1),
        (0, c - 1, h // 2, 0),
        (1, 1, 0, w // 2),
    ]:
        total = 0.0
        for tap in range(side**2):
            qy = py * stride + dilation * (tap // side - side // 2)
            qx = px * stride + dilation * (tap % side - side // 2)
            if 0 <= qy < height and 0 <= qx < width:
                ch = channel[bi, tap * c + ci, 0, 0].item()
                sp = spatial[bi, tap * heads + ci // (c // heads), py, px].item()
                total += (ch * sp if combine == "mul" else ch + sp) * x[bi, ci, qy, qx].item()
        # 25 taps of 2 operations and a sum each: 75 roundings of 1.1e-16
        assert y[bi, ci, py, px].item() == pytest.approx(total, rel=1e-12, abs=1e-13)


def test_examples_cover_every_option():
    options = {k: {args[3 + k] for args in CASES} for k in range(5)}
    assert options[1] >= {1, 2}
    assert options[2] >= {1, 2}
    assert options[4] == {"mul", "add"}
    assert any(heads == 1 for *_, heads, _ in CASES)
    assert any(1 < heads < x.shape[1] for x, *_, heads, _ in CASES)
    assert any(heads == x.shape[1] for x, *_, heads, _ in CASES)
    assert any(x.shape[2] % 2 and args[1] == 2 for x, _, _, *args in CASES)


def test_defaults_of_the_wrapper_are_those_of_the_schema():
    x, channel, spatial = torch.randn(2, 2, 5, 6), torch.randn(2, 18, 1, 1), torch.randn(2, 9, 5, 6)
    y = decoupled_depthwise2d(x, channel, spatial, 3)
    assert torch.equal(y, oracle(x, channel, spatial, 3, 1, 1, 1, "mul"))
    assert torch.equal(y, torch.ops.edgedyn.decoupled_depthwise2d(x, channel, spatial, 3))


X, CHANNEL, SPATIAL = torch.zeros(2, 6, 5, 7), torch.zeros(2, 54, 1, 1), torch.zeros(2, 9, 5, 7)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X, CHANNEL, SPATIAL, 2), "kernel_size=2.*odd kernel_size"),
        ((X, CHANNEL, SPATIAL, -1), "kernel_size=-1.*odd kernel_size"),
        ((X, CHANNEL, SPATIAL, 3, 0), "stride=0.*stride >= 1"),
        ((X, CHANNEL, SPATIAL, 3, 1, 0), "dilation=0.*dilation >= 1"),
        ((X, CHANNEL, SPATIAL, 3, 1, 1, 1, "sub"), "combine='sub'.*'mul' or 'add'"),
        ((X[0], CHANNEL, SPATIAL, 3), r"x \(6, 5, 7\).*\(B, C, H, W\)"),
        ((X, CHANNEL, SPATIAL, 3, 1, 1, 4), "heads=4 for 6 channels.*divisor"),
        ((X, CHANNEL, SPATIAL, 3, 1, 1, 0), "heads=0 for 6 channels.*divisor"),
        (
            (X, CHANNEL[:1], SPATIAL, 3),
            r"channel_filter \(1, 54, 1, 1\); expected \(2, 54, 1, 1\).*tap-major",
        ),
        ((X, CHANNEL[:, :53], SPATIAL, 3), r"channel_filter \(2, 53, 1, 1\); expected \(2, 54, 1, 1\)"),
        ((X, CHANNEL.flatten(1), SPATIAL, 3), r"channel_filter \(2, 54\); expected"),
        ((X, CHANNEL, SPATIAL[:1], 3), r"spatial_filter \(1, 9, 5, 7\); expected \(2, 9, 5, 7\).*tap-major"),
        ((X, CHANNEL, SPATIAL, 3, 2), r"spatial_filter \(2, 9, 5, 7\); expected \(2, 9, 2, 3\)"),
        ((X, CHANNEL, SPATIAL, 3, 1, 1, 2), r"spatial_filter \(2, 9, 5, 7\); expected \(2, 18, 5, 7\)"),
        ((X, CHANNEL, SPATIAL[:, :, :0], 3, 6), r"spatial_filter .*not empty"),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_precondition_is_refused_with_what_was_found(args, message, device):
    args = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    with pytest.raises(ModelError, match=message) as caught:
        OP.overload(*args)
    assert caught.value.exit_code == 4


class Call(nn.Module):
    def __init__(self, settings):
        super().__init__()
        self.settings = settings

    def forward(self, x, channel, spatial):
        return decoupled_depthwise2d(x, channel, spatial, *self.settings)


RUNTIMES = {
    "heads at stride 2": (3, 2, 1, 2, "mul"),
    "dilated sum": (3, 1, 2, 1, "add"),
    "stride 3": (3, 3, 1, 4, "mul"),
}


@pytest.mark.parametrize("settings", RUNTIMES.values(), ids=list(RUNTIMES))
@pytest.mark.parametrize("name", ["executorch", "onnxruntime"])
def test_form_runs_in_the_runtime_as_one_delegate(name, settings, tmp_path):
    side, stride, _, heads, _ = settings
    generator = torch.Generator().manual_seed(2)
    shapes = (1, 4, 13, 18), (1, side**2 * 4, 1, 1), (1, side**2 * heads, 13 // stride, 18 // stride)
    inputs = tuple(torch.randn(shape, generator=generator) for shape in shapes)
    target = targets.load(name)
    program = torch.export.export(Call(settings), inputs)
    program = ops.decompose(program, ops.choose_forms(program, target, {}), "before_quantize")
    artifact = target.lower({"forward": program}, tmp_path, "fp32")
    if name == "executorch":
        assert (artifact.facts["delegates"], artifact.facts["portable"]) == (1, {})
    (y,) = target.load(tmp_path / artifact.programs["forward"], "forward")(*(x.numpy() for x in inputs))
    exact = OP.overload(*(x.double() for x in inputs), *settings).numpy()
    terms = OP.overload(*(x.abs().double() for x in inputs), *settings).numpy()
    # two products or sums and one addition per tap, each rounded once, of at most the sum of the terms
    assert (np.abs(y - exact) <= 3 * side**2 * 2.0**-24 * terms + 1e-30).all()
