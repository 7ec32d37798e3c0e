"""DDF: FilterNorm on noise, refusals, and references made from the authors' classes."""

from __future__ import annotations

import pytest
import torch
from golden_ddf import deployed_norm
from torch import Tensor, nn

from edgedyn.checkpoints.authors import from_authors
from edgedyn.errors import ModelError, WeightsError
from edgedyn.layers import canonicalize, find_dynamic, float32_classes
from edgedyn.layers.ddf import LAYER, CanonicalDDFPack, DDFPack, DDFUpPack, FilterGenerator, FilterNorm
from edgedyn.ops.decoupled_depthwise2d import decoupled_depthwise2d


def randn(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(cls, *arguments, **options) -> nn.Module:
    torch.manual_seed(8)
    module = cls(*arguments, **options).eval()
    for name, tensor in module.named_parameters():
        if "channel_branch" in name and name.endswith(".1.bias"):
            tensor.data += 1  # no hidden unit is dead by accident
    return module


def largest_difference(module: nn.Module, other: nn.Module, *inputs: Tensor) -> float:
    with torch.no_grad():
        expected = module(*inputs)
        return ((other(*inputs) - expected).abs().max() / expected.abs().max()).item()


def equal_taps(filters: int = 1, taps: int = 9, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return (2, filters * taps, 40, 50) whose taps are equal at every pixel, thirds of something."""
    values = randn(2, filters, 1, 40, 50).to(dtype) / 3
    return values.expand(-1, -1, taps, -1, -1).reshape(2, filters * taps, 40, 50)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("filters", "side"), [(1, 3), (2, 3), (1, 5), (3, 7)])
def test_equal_taps_are_blown_up_as_published_and_deployed_as_zero(filters, side, dtype):
    norm, x = FilterNorm(filters, side, "spatial", "relu"), equal_taps(filters, side**2, dtype)
    with torch.no_grad():
        published, deployed = norm(x), deployed_norm(norm, x)
    # the rounding error of a mean, about one of the last bits of 0.3, over 1e-10
    assert published.abs().max() > 1e-2 * torch.finfo(dtype).eps / 1e-10
    assert torch.equal(deployed, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equal_rows_of_a_generator_give_exact_zeros_of_any_input(dtype):
    """Where the weights of all taps are one and the same, centring leaves nothing, at any precision."""
    pack = make(DDFPack, 6, se_ratio=0.5).to(dtype)
    conv = pack.spatial_branch[0]
    conv.weight.data[:], conv.bias.data[:] = randn(1, 6, 1, 1).to(dtype) / 3, 0.1
    x = randn(2, 6, 9, 14).to(dtype)
    canonical = canonicalize(pack)
    with torch.no_grad():
        published, filters = pack.spatial_branch(x), canonical.spatial_branch(x)
        assert published.abs().max() > 1e-2 * torch.finfo(dtype).eps / 1e-10
        assert not canonical.spatial_branch[0].conv.weight[:9].any()
        assert not filters.any()
        assert not canonical(x).any()


def test_pixels_and_channels_of_equal_taps_do_not_disturb_the_others():
    norm, x = FilterNorm(2, 3, "spatial"), randn(2, 18, 6, 9).double()
    x[:, :, 2, 3], x[1, :9, 4] = 0.1, 0.7
    with torch.no_grad():
        published, deployed = norm(x), deployed_norm(norm, x)
    keep = torch.ones_like(x, dtype=torch.bool)
    keep[:, :, 2, 3], keep[1, :9, 4] = False, False
    torch.testing.assert_close(deployed[keep], published[keep], rtol=1e-12, atol=1e-12)
    assert not deployed[~keep].any()


@pytest.mark.parametrize("exponent", [-3, -1, 0, 4])
def test_small_spreads_above_the_noise_are_normalised_as_published(exponent):
    """A spread of 1e-4 of the mean, a hundred times the noise of float32, is a spread."""
    x = (1 + 1e-4 * randn(2, 9, 6, 9)) * 10.0**exponent
    norm = FilterNorm(1, 3, "spatial")
    with torch.no_grad():
        published, deployed, exact = norm(x), deployed_norm(norm, x), norm(x.double())
    assert deployed.abs().max() > 0.5
    # taps of 1 +- 1e-4 hold 1e-4 / 6e-8 steps: each is off by a few roundings of 6e-8 / 1e-4 of the spread
    bound = 20 * 2.0**-24 / 1e-4
    assert (deployed - exact).abs().max() < bound
    assert (published - exact).abs().max() < bound


def test_noise_bound_is_what_the_docstring_says():
    """Just below 2 T eps of the mean: 0; well above: not. Spreads that the formula cannot tell from noise."""
    norm = FilterNorm(1, 3, "spatial")
    noise = 2 * 9 * torch.finfo(torch.float64).eps
    pattern = torch.tensor([1.0, -1.0] * 4 + [0.0], dtype=torch.float64).view(1, 9, 1, 1)  # unbiased spread 1
    with torch.no_grad():
        below, above = (deployed_norm(norm, 1e6 * (1 + factor * noise * pattern)) for factor in (0.5, 4.0))
    assert not below.any()
    assert above.abs().max() > 0.1


@pytest.mark.parametrize("filter_type", ["spatial", "channel"])
@pytest.mark.parametrize("running_std", [False, True])
@pytest.mark.parametrize("running_mean", [False, True])
@pytest.mark.parametrize("nonlinearity", ["relu", "linear", "leaky_relu", "tanh"])
def test_every_option_of_filter_norm_is_deployed_exactly(
    filter_type, running_std, running_mean, nonlinearity
):
    norm = FilterNorm(3, 3, filter_type, nonlinearity, running_std, running_mean).double()
    x = randn(2, 27, 5, 8).double() if filter_type == "spatial" else randn(2, 27, 1, 1).double()
    with torch.no_grad():
        expected, y = norm(x), deployed_norm(norm, x)
    assert y.shape == expected.shape == (x.shape if filter_type == "spatial" else (2, 27))
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


def test_published_spread_is_gain_over_side():
    y = FilterNorm(1, 5, "spatial", "relu")(randn(2, 25, 4, 7).double())
    torch.testing.assert_close(y.std(1), torch.full((2, 4, 7), 2**0.5 / 5, dtype=torch.float64))
    assert y.mean(1).abs().max() < 1e-15


def test_classes_that_normalise_stay_in_float32():
    expected = {f"{cls.__module__}.{cls.__qualname__}" for cls in (FilterNorm, FilterGenerator)}
    assert expected <= float32_classes()


OPTIONS = [
    ({"kernel_size": 4}, "kernel_size=4; expected an odd side of at least 3"),
    ({"kernel_size": 1}, "kernel_size=1; expected an odd side of at least 3"),
    ({"head": 3}, "head=3 for in_channels=8; expected a divisor"),
    ({"head": 0}, "head=0 for in_channels=8; expected a divisor"),
    ({"se_ratio": 0.1}, r"in_channels=8, se_ratio=0.1, .*0 hidden channels; expected at least 1"),
    ({"kernel_combine": "max"}, "kernel_combine='max'; expected 'mul' or 'add'"),
    ({"dilation": 0}, "dilation=0; expected a number of at least 1"),
    ({"gen_kernel_size": 2}, "gen_kernel_size=2; expected an odd number"),
    ({"nonlinearity": "mish"}, "nonlinearity='mish', which has no gain"),
]


@pytest.mark.parametrize(
    ("options", "message"), OPTIONS, ids=lambda v: "-".join(v) if isinstance(v, dict) else ""
)
@pytest.mark.parametrize("name", ["DDFPack", "DDFUpPack"])
def test_options_that_the_published_code_cannot_run_are_refused(name, options, message):
    with pytest.raises(ModelError, match=message) as caught:
        from_authors(f"ddf.ddf.{name}", {"in_channels": 8, **options}, {})
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("DDFPack", {"in_channels": 4}, "in_channels=4, se_ratio=0.2"),
        ("DDFPack", {"in_channels": 8, "stride": 0}, "stride=0; expected a number of at least 1"),
        ("DDFPack", {"in_channels": 8, "padding": 1}, "unexpected keyword argument 'padding'"),
        ("DDFUpPack", {"in_channels": 8, "scale_factor": 0}, "scale_factor=0; expected a number"),
        ("FilterNorm", {"in_channels": 0, "kernel_size": 3, "filter_type": "spatial"}, "in_channels=0"),
        ("FilterNorm", {"in_channels": 1, "kernel_size": 1, "filter_type": "spatial"}, "kernel_size=1"),
        ("FilterNorm", {"in_channels": 1, "kernel_size": 3, "filter_type": "pixel"}, "filter_type='pixel'"),
    ],
)
def test_other_arguments_are_refused(name, arguments, message):
    with pytest.raises(ModelError, match=message):
        from_authors(name, arguments, {})


@pytest.mark.parametrize("size", [(9, 12), (10, 15)])
def test_uneven_sizes_at_stride_2_are_refused_before_export(size):
    pack = make(DDFPack, 8, stride=2)
    for module in (pack, canonicalize(pack)):
        message = f"features of {size[0]} x {size[1]} pixels at stride 2; expected multiples of 2"
        with pytest.raises(ModelError, match=message):
            module(randn(2, 8, *size))


def test_guide_of_another_shape_is_refused():
    up, x = make(DDFUpPack, 8, joint_channels=5), randn(2, 8, 6, 9)
    for module in (up, canonicalize(up)):
        for guide in (randn(2, 5, 12, 18), randn(1, 5, 6, 9), randn(2, 4, 6, 9), None):
            found = "8, 6, 9" if guide is None else ", ".join(map(str, guide.shape[1:]))
            with pytest.raises(
                ModelError, match=rf"guide \(\d, {found}\).*expected \(2, 5, 6, 9\).*low resol"
            ):
                module(x, guide)


def test_plain_upsampling_also_takes_a_guide_of_its_own_channels():
    up, x, guide = make(DDFUpPack, 8), randn(2, 8, 6, 9), randn(2, 8, 6, 9, seed=4)
    with torch.no_grad():
        assert not torch.equal(up(x), up(x, guide))
    assert largest_difference(up.double(), canonicalize(up.double()), x.double(), guide.double()) < 1e-12


@pytest.mark.parametrize("other", [{"kernel_size": 5}, {"gen_kernel_size": 3}, {"joint_channels": 8}])
def test_first_version_refuses_what_it_cannot_combine(other):
    with pytest.raises(ModelError, match=r"dw_kernel_size=3.*dw_kernel_size=kernel_size alone, or 0"):
        DDFUpPack(8, dw_kernel_size=3, **other)


def first_version_weights(**options) -> dict[str, Tensor]:
    return make(DDFUpPack, 8, dw_kernel_size=3, **options).state_dict()


def test_version_of_the_upsampler_is_told_by_the_keys():
    first, repaired = first_version_weights(), make(DDFUpPack, 8).state_dict()
    assert "spatial_branch.0.1.0.weight" in first
    assert isinstance(
        from_authors("DDFUpPack", {"in_channels": 8}, first).spatial_branch[0][1], nn.Sequential
    )
    assert isinstance(
        from_authors("DDFUpPack", {"in_channels": 8}, repaired).spatial_branch[0][1], FilterNorm
    )
    smaller = from_authors("DDFUpPack", {"in_channels": 8, "dw_kernel_size": 1}, first)  # raised to 3 by them
    assert smaller.spatial_branch[0][0].kernel_size == (3, 3)


def test_first_version_with_a_guide_is_the_repaired_one_without():
    weights = make(DDFUpPack, 8).state_dict()
    up = from_authors("DDFUpPack", {"in_channels": 8, "joint_channels": 8}, weights)
    x, guide = randn(2, 8, 6, 9), randn(2, 8, 6, 9, seed=4)
    with torch.no_grad():
        assert torch.equal(up(x, guide), make(DDFUpPack, 8)(x, guide))


@pytest.mark.parametrize(
    ("arguments", "first", "message"),
    [
        ({"gen_kernel_size": 3}, True, "gen_kernel_size=3 and weights of the first published version"),
        ({"dw_kernel_size": 5}, True, "dw_kernel_size=5, kernel_size=3"),
        ({"dw_kernel_size": 3}, False, "dw_kernel_size=3 and weights of the repaired version"),
        ({"joint_channels": 5}, False, "joint_channels=5, in_channels=8.*ignores joint_channels"),
        ({"joint_channels": 8, "gen_kernel_size": 3}, False, "first published version with a guide"),
        ({"joint_channels": 8, "dw_kernel_size": 3}, False, "first published version with a guide"),
    ],
)
def test_arguments_of_the_other_version_are_refused(arguments, first, message):
    weights = first_version_weights() if first else make(DDFUpPack, 8).state_dict()
    with pytest.raises(ModelError, match=message):
        from_authors("DDFUpPack", {"in_channels": 8, **arguments}, weights)


def test_weights_of_another_layer_are_refused():
    with pytest.raises(WeightsError, match="does not fit DDFPack"):
        from_authors("DDFPack", {"in_channels": 12}, make(DDFPack, 8).state_dict())


def foreign(name: str, ours: nn.Module, **attributes) -> nn.Module:
    """Dress one of our modules like an instance of a foreign class of that name, which only runs on CUDA."""

    def forward(self, *inputs):
        raise RuntimeError("features must be a CUDA tensor")

    module = type(name, (nn.Module,), {"forward": forward, "__module__": "ddf.ddf"})()
    for key, child in ours._modules.items():
        module.add_module(key, dress(child))
    for key, value in attributes.items():
        setattr(module, key, value)
    return module.eval()


def dress(part: nn.Module) -> nn.Module:
    if isinstance(part, FilterNorm):
        norm = foreign("FilterNorm", nn.Module(), filter_type=part.filter_type, in_channels=part.in_channels)
        norm.std, norm.runing_std, norm.runing_mean = part.std, isinstance(part.std, Tensor), False
        return norm
    if isinstance(part, nn.Sequential | nn.ModuleList):
        children = [dress(child) for child in part]
        return nn.Sequential(*children) if isinstance(part, nn.Sequential) else nn.ModuleList(children)
    return nn.ReLU(True) if isinstance(part, nn.ReLU) else part


def foreign_pack(pack: DDFPack, **changed) -> nn.Module:
    names = ("kernel_size", "stride", "dilation", "head", "kernel_combine")
    return foreign("DDFPack", pack, **({name: getattr(pack, name) for name in names} | changed))


def foreign_up_pack(up: DDFUpPack, **changed) -> nn.Module:
    names = ("kernel_size", "scale_factor", "dilation", "head", "kernel_combine")
    return foreign("DDFUpPack", up, **({name: getattr(up, name) for name in names} | changed))


PACKS = {
    "plain": {},
    "stride": {"stride": 2, "dilation": 2},
    "heads": {"head": 2, "kernel_combine": "add", "nonlinearity": "leaky_relu"},
    "generator": {"gen_kernel_size": 3, "kernel_size": 5, "se_ratio": 0.7},
    "everything": {"stride": 2, "gen_kernel_size": 5, "nonlinearity": "linear", "se_ratio": 1.0},
}


@pytest.mark.parametrize("options", PACKS.values(), ids=list(PACKS))
def test_foreign_pack_is_recognised_with_its_weights(options):
    pack, x = make(DDFPack, 8, **options), randn(2, 8, 10, 14)
    found = LAYER.recognise["DDFPack"](foreign_pack(pack))
    assert type(found) is DDFPack
    assert not found.training
    assert largest_difference(pack, found, x) == 0


UPS = {
    "plain": {},
    "first version": {"dw_kernel_size": 3, "head": 2},
    "joint": {"joint_channels": 5, "kernel_combine": "add"},
    "generator": {"gen_kernel_size": 3, "scale_factor": 3, "nonlinearity": "relu"},
}


@pytest.mark.parametrize("options", UPS.values(), ids=list(UPS))
def test_foreign_upsampler_is_recognised_with_its_weights(options):
    up, x = make(DDFUpPack, 8, **options).double(), randn(2, 8, 6, 9).double()
    guide = randn(2, options.get("joint_channels", 8), 6, 9).double()
    found = LAYER.recognise["DDFUpPack"](foreign_up_pack(up))
    assert type(found) is DDFUpPack
    assert next(found.parameters()).dtype == torch.float64
    assert largest_difference(up, found, x, guide) == 0


def test_ordinary_modules_of_these_names_are_left_alone():
    for name in ("DDFPack", "DDFUpPack"):
        ordinary = type(name, (nn.Sequential,), {})(nn.Conv2d(3, 3, 1)).eval()
        assert LAYER.recognise[name](ordinary) is None
        assert find_dynamic(canonicalize(nn.Sequential(ordinary).eval())) == []


def without(pack: nn.Module, path: str, replacement: nn.Module) -> nn.Module:
    parent, _, name = path.rpartition(".")
    setattr(pack.get_submodule(parent), name, replacement)
    return pack


def other_norm(**changed) -> nn.Module:
    norm = dress(FilterNorm(1, 3, "spatial", "relu"))
    for name, value in changed.items():
        setattr(norm, name, value)
    return norm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: without(p, "spatial_branch.0", nn.Conv2d(8, 9, 1, stride=2)), "spatial_branch.0.stride"),
        (lambda p: without(p, "spatial_branch.0", nn.Conv2d(8, 9, 1, bias=False)), "spatial_branch.0.bias"),
        (lambda p: without(p, "spatial_branch.1", nn.Identity()), "Identity.*spatial_branch.1.*FilterNorm"),
        (
            lambda p: without(p, "spatial_branch.1", other_norm(runing_mean=True)),
            "has .*True.*spatial_branch.1",
        ),
        (lambda p: without(p, "spatial_branch.1", other_norm(in_channels=3)), "has .*3.*spatial_branch.1"),
        (lambda p: without(p, "channel_branch.0", nn.AdaptiveAvgPool2d(2)), "channel_branch.0"),
        (lambda p: without(p, "channel_branch.2", nn.Sigmoid()), "Sigmoid as 'channel_branch.2'"),
        (lambda p: setattr(p, "kernel_combine", "max") or p, "kernel_combine='max'"),
        (lambda p: setattr(p, "kernel_size", 5) or p, "shape"),
        (lambda p: delattr(p, "dilation") or p, "no attribute 'dilation'"),
        (lambda p: delattr(p, "channel_branch") or p, "no attribute 'channel_branch'"),
        (lambda p: without(p, "channel_branch", nn.Conv2d(8, 72, 1)), "published structure"),
        (lambda p: p.add_module("gate", nn.Linear(8, 1)) or p, "other parameters.*gate.bias"),
    ],
)
def test_dynamic_modules_of_another_structure_are_refused_with_the_reason(change, message):
    with pytest.raises(ModelError, match=message):
        LAYER.recognise["DDFPack"](change(foreign_pack(make(DDFPack, 8))))


class Backbone(nn.Module):
    """Somebody's network around the authors' layers, three levels down; ``packs`` are their references."""

    def __init__(self, pack: nn.Module, up: nn.Module) -> None:
        super().__init__()
        block = nn.ModuleDict({"inner": nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), pack)})
        self.blocks, self.up = nn.ModuleList([block]), up

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.blocks[0]["inner"](x))


def test_authors_layers_deep_inside_a_foreign_network_are_rewritten():
    pack, up = make(DDFPack, 8, stride=2).double(), make(DDFUpPack, 8, head=2).double()
    torch.manual_seed(1)
    expected = Backbone(pack, up).double().eval()
    theirs = Backbone(foreign_pack(pack), foreign_up_pack(up)).double().eval()
    theirs.blocks[0]["inner"][0].load_state_dict(expected.blocks[0]["inner"][0].state_dict())
    canonical = canonicalize(theirs)
    assert isinstance(canonical.blocks[0]["inner"][2], CanonicalDDFPack)
    x = randn(2, 3, 10, 14).double()
    assert largest_difference(expected, canonical, x) < 1e-12
    program = torch.export.export(canonical, (x,))
    called = [n.target for n in program.graph.nodes if "edgedyn" in str(n.target)]
    assert called == [torch.ops.edgedyn.decoupled_depthwise2d.default] * 5


def test_wrapper_takes_what_the_canonical_module_makes():
    """Tap-major filters, heads and all: the op called by hand equals the module."""
    pack, x = make(DDFPack, 8, head=2), randn(2, 8, 6, 9)
    canonical = canonicalize(pack)
    with torch.no_grad():
        channel, spatial = canonical.channel_branch(x), canonical.spatial_branch(x)
        assert channel.shape == (2, 72, 1, 1)
        assert spatial.shape == (2, 18, 6, 9)
        y = decoupled_depthwise2d(x, channel, spatial, 3, heads=2)
    assert torch.equal(y, canonical(x))
