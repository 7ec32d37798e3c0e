"""The community's FlyingConv: recognised by structure, and refused where it is another layer."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgedyn import from_authors
from edgedyn.errors import ModelError
from edgedyn.layers import canonicalize
from edgedyn.layers.malleconv import CanonicalMalleConv, MalleConv
from edgedyn.layers.malleconv.slicing import Geometry, filter_sliced, slice_and_convolve


def make_foreign(**changes):
    """Make an instance of another class of that name, with the community's attributes and modules."""
    torch.manual_seed(0)
    ours = MalleConv(8, 6, groups=2, num_blocks=2).eval()

    class FlyingConv(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_channel, self.out_channel, self.n_ch, self.bias = 8, 6, 0, False
            self.pooling, self.num_blocks, self.groups = True, 2, 2
            self.pool, self.clipper = nn.AvgPool2d(4, 4), nn.Hardtanh(-2, 2)
            self.predictor, self.expander, self.pwconv = ours.predictor, ours.expander, ours.pwconv

        def forward(self, x):
            raise NotImplementedError("its operator needs CUDA")

    foreign = FlyingConv().eval()
    for name, value in changes.items():
        setattr(foreign, name, value)
    return foreign.eval(), ours


def test_foreign_layer_deep_in_a_model_becomes_ours_with_its_weights():
    foreign, ours = make_foreign()
    canonical = canonicalize(nn.Sequential(nn.Identity(), nn.Sequential(foreign)).eval().double())
    assert isinstance(canonical[1][0], CanonicalMalleConv)
    x = torch.rand(2, 8, 16, 24, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(canonical(x), ours.double()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": True}, "cannot run"),
        ({"n_ch": 4}, r"predictor\.0\.weight' of shape"),
        ({"dilation": (2, 2)}, "filters with"),
        ({"forward": lambda x: x[:, :6]}, "another forward: its outputs differ"),
        ({"forward": lambda x: x}, r"returns \(2, 8, 32, 48\) for .* expected \(2, 6, 32, 48\)"),
        ({"clipper": nn.Hardtanh(-1, 1)}, r"clips its grid to \(-1.*expected \(-2, 2\)"),
        ({"groups": 1}, "of shape"),
        ({"num_blocks": 4}, "other parameters"),
        ({"pwconv": nn.Conv2d(8, 6, 1, stride=2)}, "pwconv.stride"),
    ],
)
def test_layer_of_that_name_that_computes_something_else_is_refused(changes, message):
    foreign, _ = make_foreign(**changes)
    with pytest.raises(ModelError, match=message):
        canonicalize(foreign)


def test_class_of_that_name_without_its_attributes_is_refused():
    FlyingConv = type("FlyingConv", (nn.Conv2d,), {})  # noqa: N806 a class
    with pytest.raises(ModelError, match="not of the published structure"):
        canonicalize(nn.Sequential(FlyingConv(3, 3, 1)).eval())


def test_arguments_without_effect_are_taken_and_unknown_ones_refused():
    weights = MalleConv(8, 6).state_dict()
    assert isinstance(
        from_authors("FlyingConv", {"in_channel": 8, "out_channel": 6, "dropout": 0.1}, weights), MalleConv
    )
    with pytest.raises(ModelError, match=r"FlyingConv got arguments .*kernel"):
        from_authors("model.common.FlyingConv", {"in_channel": 8, "out_channel": 6, "kernel": 3}, weights)


def test_noise_map_and_stride_are_those_of_the_community():
    weights = MalleConv(8, 6, noise_channels=3).state_dict()
    layer = from_authors("FlyingConv", {"in_channel": 8, "out_channel": 6, "n_ch": 3}, weights).eval()
    x, noise = torch.rand(2, 8, 32, 24), torch.rand(2, 3, 8, 6)
    with torch.no_grad():
        y = layer(x, noise)
        assert not torch.equal(y, layer(x, noise + 1))
        torch.testing.assert_close(canonicalize(layer)(x, noise), y, rtol=1e-4, atol=1e-5)
    for wrong in (None, noise[:, :2], x):
        for module in (layer, canonicalize(layer)):
            with pytest.raises(ModelError, match=r"3 noise channels got .* expected \(2, 3, 8, 6\)"):
                module(x, wrong)
    with pytest.raises(ModelError, match="0 noise channels got"):
        MalleConv(8, 6)(x, noise)


def test_recognised_layer_keeps_its_noise_map_and_stride():
    foreign, _ = make_foreign(n_ch=2, stride=(2, 2), kernel_size=(3, 3), padding=(1, 1))
    foreign.predictor[0] = nn.Conv2d(10, 8, 1).eval()
    found = canonicalize(foreign)
    assert isinstance(found, CanonicalMalleConv)
    assert found(torch.rand(1, 8, 16, 24), torch.rand(1, 2, 4, 6)).shape == (1, 6, 8, 12)


@pytest.mark.parametrize("stride", [2, (1, 2), (3, 2)])
@pytest.mark.parametrize(
    "options", [{}, {"kernel_size": (5, 3)}, {"dilation": 2, "padding": (2, 1)}], ids=str
)
def test_strided_filter_equals_the_definition(stride, options):
    torch.manual_seed(1)
    geometry = Geometry.of(
        *(options.get(k, d) for k, d in (("kernel_size", 3), ("dilation", 1))), stride, options.get("padding")
    )
    x = torch.randn(2, 6, 15, 22, dtype=torch.float64)
    h, w = geometry.output_size(x)
    taps = geometry.kernel_size[0] * geometry.kernel_size[1]
    weight, bias = torch.randn(2, 3, taps, 4, 5).double(), torch.randn(2, 3, 4, 5).double()
    kernels = nn.functional.interpolate(weight.flatten(1, 2), size=(h, w), mode="bilinear").view(
        2, 3, taps, h, w
    )
    offset = nn.functional.interpolate(bias, size=(h, w), mode="bilinear").repeat_interleave(2, 1)
    (_, kw), (dh, dw), (ph, pw), (sh, sw) = geometry
    expected = torch.zeros(2, 6, h, w, dtype=torch.float64)
    for i in range(h):
        for j in range(w):
            for t in range(taps):
                row, column = i * sh + dh * (t // kw) - ph, j * sw + dw * (t % kw) - pw
                if 0 <= row < 15 and 0 <= column < 22:
                    kernel = kernels[:, :, t, i, j].repeat_interleave(2, 1)
                    expected[:, :, i, j] += kernel * x[:, :, row, column]
    expected += offset
    found = slice_and_convolve(x, weight, bias, stride=stride, **options)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    grid = weight.transpose(1, 2).flatten(1, 2)
    torch.testing.assert_close(filter_sliced(x, grid, bias, geometry), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("same", [True, False])
def test_outputs_of_a_foreign_layer_are_compared_where_it_runs(same):
    foreign, _ = make_foreign(n_ch=2)
    foreign.predictor[0] = nn.Conv2d(10, 8, 1).eval()
    reference = MalleConv(8, 6, groups=2, num_blocks=2, noise_channels=2).eval()
    reference.load_state_dict(foreign.state_dict())
    reference.double()
    foreign.forward = reference.forward if same else lambda x, noise: 1.1 * reference(x, noise)
    if same:
        assert isinstance(canonicalize(foreign), CanonicalMalleConv)
    else:
        with pytest.raises(ModelError, match="another forward: its outputs differ"):
            canonicalize(foreign)


def test_layer_of_ours_with_another_forward_is_refused():
    layer = MalleConv(8, 6).eval()
    layer.forward = lambda x: x
    with pytest.raises(ModelError, match=r"0 is MalleConv with a forward of its own"):
        canonicalize(nn.Sequential(layer).eval())
