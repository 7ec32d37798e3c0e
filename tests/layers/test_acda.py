"""ACDA: its bases, its refusals, and classes of the authors' name."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from edgedyn.checkpoints.authors import from_authors
from edgedyn.errors import ModelError
from edgedyn.layers import acda, canonicalize
from edgedyn.layers.acda import (
    LAYER,
    ACDAConv,
    CanonicalACDAConv,
    fourier_bessel,
    multi_scale_bases,
)

GOLDEN = Path(__file__).parents[1] / "golden"
RECOGNISE = LAYER.recognise["Conv_DCFD"]
ARGUMENTS = {"in_channels": 4, "out_channels": 5, "kernel_size": 3, "padding": 1}


def make_layer(*args, **arguments) -> ACDAConv:
    torch.manual_seed(6)
    return ACDAConv(*args, **arguments).eval()


def test_bases_have_the_published_3x3_values():
    bases = multi_scale_bases(3, 6).view(6, 3, 3)
    edge, corner, centre = 0.305299, 0.049333, 0.673105
    expected = [
        [[corner, edge, corner], [edge, centre, edge], [corner, edge, corner]],
        [[-0.078269, -0.592837, -0.078269], [0, 0, 0], [0.078269, 0.592837, 0.078269]],
    ]
    torch.testing.assert_close(bases[:2], torch.tensor(expected), rtol=0, atol=6e-7)  # printed to 6 digits
    torch.testing.assert_close(bases[2], bases[1].t(), rtol=0, atol=1e-7)
    cross = torch.tensor([[0, 1, 0], [-1, 0, -1], [0, 1, 0]]) * 0.679931
    torch.testing.assert_close(bases[3], cross, rtol=0, atol=6e-7)


@pytest.mark.parametrize(
    ("file", "kernel_size", "num_bases"),
    [("acda_k3_m6", 3, 6), ("acda_k5_m4", 5, 4), ("acda_k7_m3_nobias", 7, 3)],
)
def test_bases_are_those_of_the_authors_to_the_bit(file, kernel_size, num_bases):
    published = load_file(GOLDEN / f"{file}.safetensors")["param.bases"]
    assert torch.equal(multi_scale_bases(kernel_size, num_bases), published)


@pytest.mark.parametrize(("radius", "functions"), [(1, 6), (2, 14), (3, 38)])
def test_number_of_functions_and_their_mean_norm(radius, functions):
    found = fourier_bessel(radius)
    assert found.shape == (functions, (2 * radius + 1) ** 2)
    assert (found**2).sum(1).mean() == pytest.approx(1, abs=1e-12)


def test_bases_of_a_state_dict_are_used():
    layer = make_layer(4, 5)
    state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    state["bases"] = state["bases"].flip(0)
    loaded = from_authors("Conv_DCFD", ARGUMENTS, state)
    assert torch.equal(loaded.bases, state["bases"])
    x = torch.randn(2, 4, 5, 7)
    with torch.no_grad():
        assert not torch.equal(loaded(x), layer(x))
        canonical = CanonicalACDAConv(loaded)
        torch.testing.assert_close(canonical(x), loaded(x), rtol=1e-5, atol=1e-5)


def test_coefficients_are_bounded_by_one():
    layer, x = make_layer(4, 5), torch.randn(2, 4, 5, 7) * 100
    alpha = layer.coefficients(x)
    assert alpha.shape == (2, 6, 6, 5, 7)
    assert 0.1 < alpha.abs().max() <= 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 4}, "kernel_size=4; expected an odd number >= 3"),
        ({"kernel_size": 1}, "kernel_size=1; expected an odd number >= 3"),
        ({"stride": 0}, "stride=0; expected a whole number"),
        ({"num_bases": 7}, "num_bases=7; expected 1 to 6"),
        ({"num_bases": 0}, "num_bases=0; expected 1 to 6"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_layer_that_cannot_be_built_is_refused(arguments, message):
    with pytest.raises(ModelError, match=message) as caught:
        ACDAConv(4, 4, **arguments)
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("make", [lambda layer: layer, CanonicalACDAConv], ids=["reference", "canonical"])
@pytest.mark.parametrize("size", [(5, 8), (6, 7)], ids=str)
def test_size_that_the_stride_does_not_divide_is_refused(make, size):
    layer = make(make_layer(3, 4, stride=2))
    with pytest.raises(ModelError, match=rf"x \(2, 3, {size[0]}, {size[1]}\) with stride=2; .*divisible by"):
        layer(torch.zeros(2, 3, *size))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 2, "padding": 1}, "kernel_size=2; expected an odd"),
        ({"num_bases": 8}, "num_bases=8; expected 1 to 6"),
        ({"padding": 0}, "padding=0 for kernel_size=3; expected 1: the published class computes no other"),
        ({"padding": [1, 2]}, r"padding=\[1, 2\] for kernel_size=3; expected 1"),
        ({"dilation": 2}, "dilation=2; expected 1.*accepts any value and ignores it"),
        ({"groups": 4}, "groups=4; expected 1.*accepts any value and ignores it"),
        ({"inter_kernel_size": 3}, "inter_kernel_size=3; expected 5.*accepts any value and ignores it"),
        ({"mode": "mode2"}, "mode='mode2'.*'mode0' and 'mode1'"),
        ({"kernel_size": [3, 3]}, r"\{'kernel_size': \[3, 3\]\}.*one whole number"),
        ({"stride": (2, 2)}, r"\{'stride': \(2, 2\)\}.*one whole number"),
        ({"filters": 3}, "unexpected keyword argument 'filters'"),
    ],
    ids=lambda v: str(v) if isinstance(v, dict) else "",
)
def test_constructor_arguments_of_the_authors_are_refused(arguments, message):
    given = {**ARGUMENTS, **arguments}
    with pytest.raises(ModelError, match=message):
        from_authors("Conv_DCFD.Conv_DCFD", given, {})


@pytest.mark.parametrize(
    "arguments",
    [{"padding": [1, 1]}, {"padding": (1, 1)}, {"mode": "mode0"}, {"bases_grad": False}, {"bases_drop": 0.1}],
    ids=str,
)
def test_constructor_arguments_that_change_no_output_are_accepted(arguments):
    given = {**ARGUMENTS, **arguments}
    layer = make_layer(4, 5)
    x = torch.randn(2, 4, 5, 7)
    with torch.no_grad():
        assert torch.equal(from_authors("Conv_DCFD", given, layer.state_dict())(x), layer(x))


class Conv_DCFD(nn.Module):  # noqa: N801 the authors' name
    """Attributes, modules and tensors of the authors' class; its forward cannot be traced."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0, num_bases=6, bias=True):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding, self.num_bases = kernel_size, stride, padding, num_bases
        self.inter_kernel_size, self.dilation, self.groups = 5, 1, 1
        self.mode, self.bases_grad, self.bases_drop = "mode1", True, None
        count = num_bases * (kernel_size // 2)
        self.register_buffer("bases", torch.randn(count, kernel_size**2))
        hidden = max(64, num_bases * count // 2)
        self.bases_net = nn.Sequential(
            nn.Conv2d(in_channels, hidden, kernel_size=3, padding=1, stride=stride),
            nn.BatchNorm2d(hidden),
            nn.Tanh(),
            nn.Conv2d(hidden, num_bases * count, kernel_size=3, padding=1),
            nn.BatchNorm2d(num_bases * count),
            nn.Tanh(),
        )
        self.coef = nn.Parameter(torch.randn(out_channels, in_channels * num_bases, 1, 1))
        self.register_parameter("bias", nn.Parameter(torch.randn(out_channels)) if bias else None)
        self.drop = nn.Dropout(0.1)

    def forward(self, x):
        raise AssertionError("the authors' forward calls numpy: it must never run")


def make_foreign(**arguments) -> Conv_DCFD:
    torch.manual_seed(9)
    return Conv_DCFD(**{**ARGUMENTS, **arguments}).eval()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"stride": 2},
        {"kernel_size": 5, "padding": 2, "num_bases": 4},
        {"kernel_size": 9, "padding": 4},
        {"bias": False},
        {"padding": (1, 1)},
    ],
    ids=str,
)
def test_instance_of_the_authors_class_is_recognised(arguments):
    foreign = make_foreign(**arguments).double()
    foreign.bases_net[1].eps = 1e-3
    ours = RECOGNISE(foreign)
    assert type(ours) is ACDAConv
    assert not ours.training
    assert ours.bases_net[1].eps == 1e-3
    expected = from_authors("Conv_DCFD", {**ARGUMENTS, **arguments}, foreign.state_dict())
    expected.bases_net[1].eps = 1e-3
    x = torch.randn(2, 4, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(ours(x), expected(x))


def test_recognised_layer_shares_no_tensor():
    foreign = make_foreign()
    before = copy.deepcopy(foreign.state_dict())
    with torch.no_grad():
        for tensor in RECOGNISE(foreign).state_dict().values():
            tensor.zero_()
    assert all(torch.equal(before[key], tensor) for key, tensor in foreign.state_dict().items())


def test_ordinary_module_of_that_name_is_no_dynamic_layer():
    ordinary = type("Conv_DCFD", (nn.Conv2d,), {})(3, 4, 3)
    assert RECOGNISE(ordinary) is None


def without_attribute(layer):
    del layer.groups


def with_key(layer):
    layer.gain = nn.Parameter(torch.ones(1))


def without_key(layer):
    layer.bases_net[0].bias = None


def with_shape(layer):
    layer.coef = nn.Parameter(torch.randn(5, 17, 1, 1))


def with_activation(layer):
    layer.bases_net[2] = nn.Sigmoid()


def with_module(layer):
    layer.bases_net.append(nn.Tanh())


def with_padding(layer):
    layer.bases_net[3].padding_mode = "reflect"


def with_dilation(layer):
    layer.dilation = 2


def with_pair(layer):
    layer.kernel_size = (3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_attribute, "no attribute 'groups'"),
        (with_key, r"'gain' of shape \(1,\); expected None"),
        (without_key, r"'bases_net.0.bias' of shape None; expected \(64,\)"),
        (with_shape, r"'coef' of shape \(5, 17, 1, 1\); expected \(5, 24, 1, 1\)"),
        (with_activation, "bases_net .*Sigmoid.*another layer than that of arXiv 2108.07895"),
        (with_module, "bases_net .*another layer"),
        (with_padding, "padding_mode=reflect.* in bases_net; expected Conv2d"),
        (with_dilation, "dilation=2; expected 1"),
        (with_pair, "one whole number"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_dynamic_layer_of_another_structure_is_refused(change, message):
    foreign = make_foreign()
    change(foreign)
    with pytest.raises(ModelError, match=message):
        RECOGNISE(foreign)


@pytest.mark.parametrize("changed", [False, True])
def test_class_of_the_name_is_refused_where_its_outputs_differ(changed):
    """A copied class that runs on the CPU: the published mathematics, and the same without the last Tanh."""
    torch.manual_seed(0)
    ours = ACDAConv(4, 6).eval().double()

    class Conv_DCFD(nn.Module):  # noqa: N801 the published name
        def __init__(self):
            super().__init__()
            options = {name: value for name, value in acda._OPTIONS.items() if name != "bias"}
            sizes = {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "padding": 1}
            vars(self).update(options | sizes)
            self.bases_net, self.coef, self.bias = ours.bases_net, ours.coef, ours.bias
            self.register_buffer("bases", ours.bases)

        def forward(self, x):
            net = self.bases_net
            alpha = (net[:-1] if changed else net)(x).unflatten(1, (6, -1))
            kernels = torch.einsum("bmkhw,kt->bmthw", alpha, self.bases)
            patches = nn.functional.unfold(x, 3, padding=1).view(x.shape[0], 4, 9, *x.shape[2:])
            z = torch.einsum("bmthw,bcthw->bcmhw", kernels, patches).flatten(1, 2)
            return nn.functional.conv2d(z, self.coef, self.bias)

    foreign = Conv_DCFD().eval()
    if changed:
        with pytest.raises(ModelError, match="another forward: its outputs differ"):
            canonicalize(nn.Sequential(foreign).eval())
    else:
        assert isinstance(canonicalize(nn.Sequential(foreign).eval())[0], CanonicalACDAConv)
