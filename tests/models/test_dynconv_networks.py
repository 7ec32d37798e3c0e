"""Networks of DynConv blocks: sizes, input shapes, exact rewrite, the authors' arguments."""

from __future__ import annotations

import pytest
import torch
from disturbed import disturb
from torch import nn

from edgedyn.checkpoints.authors import from_authors
from edgedyn.errors import ModelError
from edgedyn.layers import canonicalize, find_dynamic
from edgedyn.models.dynconv_denoiser import DynConvDenoiser
from edgedyn.models.dynconv_hourglass import DynConvHourglass, HourglassNet
from edgedyn.models.dynconv_resnet import NETWORK, CifarResNet, ImageNetResNet
from edgedyn.models.mallenet import pad_reflect


def fresh(module: nn.Module) -> nn.Module:
    return disturb(module, seed=12, spread=0.05).eval().double()


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(13)).double()


def count(make, **options) -> tuple[int, int]:
    """Return (parameters, gated blocks)."""
    with torch.device("meta"):
        network = make(**options)
    return sum(p.numel() for p in network.parameters()), len(find_dynamic(network))


def test_published_hourglass_has_its_size_and_57_gated_blocks():
    parameters, gated = count(DynConvHourglass)
    assert round(parameters / 1e6, 3) == 6.885
    assert gated == 57
    assert count(DynConvHourglass, sparse=False)[1] == 0


@pytest.mark.parametrize(
    ("depth", "gated", "million"),
    # million: the known sizes of the same networks without gates (arXiv 1512.03385; torchvision), CIFAR with
    # projection shortcuts
    [
        *((8, 3, 0.08), (14, 6, 0.18), (20, 9, 0.27), (26, 12, 0.37), (32, 15, 0.47)),
        *((18, 8, 11.69), (34, 16, 21.80), (50, 16, 25.56), (101, 33, 44.55)),
    ],
)
def test_resnet_has_its_blocks_and_its_size_without_gates(depth, gated, million):
    assert count(NETWORK, depth=depth)[1] == gated
    parameters, none = count(NETWORK, depth=depth, sparse=False)
    assert none == 0
    assert round(parameters / 1e6, 2) == million


def test_denoiser_is_small():
    assert count(DynConvDenoiser) == (185_528, 12)


NETWORKS = {
    "resnet8": (lambda: CifarResNet(8, num_classes=5), (2, 3, 33, 38)),
    "resnet18": (lambda: ImageNetResNet(18, width_mult=0.0625, num_classes=4), (2, 3, 45, 38)),
    "resnet50_dilated": (
        lambda: ImageNetResNet(
            50,
            width_mult=0.0625,
            groups=2,
            width_per_group=32,
            replace_stride_with_dilation=(False, True, True),
        ),
        (2, 3, 38, 45),
    ),
    "hourglass": (lambda: DynConvHourglass(12, 2, 2, joints=3), (2, 3, 64, 128)),
    "denoiser": (lambda: DynConvDenoiser(8, 2, colors=1), (2, 1, 15, 22)),
}


@pytest.mark.parametrize(("make", "shape"), NETWORKS.values(), ids=NETWORKS)
def test_canonical_network_equals_the_reference(make, shape):
    torch.manual_seed(14)
    network, x = fresh(make()), rand(*shape)
    with torch.no_grad():
        expected, y = network(x), canonicalize(network)(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12 * expected.abs().max().item())
    assert not find_dynamic(canonicalize(network))


def test_hourglass_gives_its_last_heatmaps_and_the_authors_all():
    every = fresh(HourglassNet(8, 2, joints=3))
    last = fresh(DynConvHourglass(8, 2, joints=3))
    last.load_state_dict(every.state_dict())
    x = rand(1, 3, 64, 128)
    heatmaps = every(x)
    assert [tuple(h.shape) for h in heatmaps] == [(1, 3, 16, 32)] * 2
    assert torch.equal(last(x), heatmaps[-1])


def test_stack_feeds_features_and_scores_back():
    network, seen = fresh(HourglassNet(8, 2, joints=3)), {}
    for name in ("hg.0", "hg.1", "fc.0"):
        keep = lambda part, given, y, name=name: seen.update({name: (given[0], y)})  # noqa: E731
        network.get_submodule(name).register_forward_hook(keep)
    first, _ = network(rand(1, 3, 64, 128))
    features = seen["fc.0"][1]
    assert torch.equal(first, network.score[0](features))
    expected = seen["hg.0"][0] + network.fc_[0](features) + network.score_[0](first)
    torch.testing.assert_close(seen["hg.1"][0], expected, rtol=1e-12, atol=1e-12)


def test_hourglass_joins_every_level_with_what_stands_beside_it():
    hourglass = fresh(HourglassNet(8, 1, joints=3)).hg[0]
    for blocks in hourglass.hg:
        for place in blocks:
            place.forward = lambda x: x
    x = rand(1, 8, 16, 32)

    def joined(x, levels):
        if levels == 0:
            return x
        return x + nn.functional.interpolate(
            joined(nn.functional.max_pool2d(x, 2), levels - 1), scale_factor=2.0
        )

    torch.testing.assert_close(hourglass(x), joined(x, 4), rtol=1e-12, atol=0)


def test_dilation_replaces_the_stride_from_the_second_block_on():
    with torch.device("meta"):
        network = ImageNetResNet(50, replace_stride_with_dilation=(False, True, True))
    found = [
        [(block.conv2.dilation[0], block.conv2.stride[0]) for block in network.get_submodule(f"layer{k}")]
        for k in (2, 3, 4)
    ]
    assert found[0] == [(1, 2), *[(1, 1)] * 3]
    assert found[1] == [(1, 1), *[(2, 1)] * 5]  # the first keeps the dilation of the layer before
    assert found[2] == [(2, 1), *[(4, 1)] * 2]


def test_cifar_pool_reads_the_top_left_of_the_last_map_only():
    network, x = fresh(CifarResNet(8)), rand(1, 3, 60, 44)
    changed = []
    network.layer3.register_forward_hook(lambda m, given, y: changed.append(y) or y)
    expected = network(x)
    assert changed[0].shape[2:] == (15, 11)
    network.layer3.register_forward_hook(lambda m, given, y: nn.functional.pad(y[:, :, :8, :8], (0, 3, 0, 7)))
    assert torch.equal(network(x), expected)


@pytest.mark.parametrize("size", [(28, 32), (32, 61), (64, 64)])
def test_cifar_resnet_refuses_sizes_that_its_pool_does_not_fit_once(size):
    with pytest.raises(ModelError, match="29 to 60"):
        CifarResNet(8).eval()(torch.zeros(1, 3, *size))
    for edge in ((29, 60), (60, 29)):
        assert CifarResNet(8).eval()(torch.zeros(1, 3, *edge)).shape == (1, 10)


def test_hourglass_refuses_sizes_that_it_cannot_halve():
    with pytest.raises(
        ModelError, match=r"x \(1, 3, 64, 96\); expected height and width that are multiples of 64"
    ):
        DynConvHourglass(8, 1).eval()(torch.zeros(1, 3, 64, 96))


@pytest.mark.parametrize("colors", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (7, 12), (8, 5)])
def test_denoiser_takes_any_size(colors, size):
    network = fresh(DynConvDenoiser(4, 1, colors=colors))
    x = rand(2, colors, *size)
    y = network(x)
    assert y.shape == x.shape
    assert not torch.equal(y, x)
    even = network(pad_reflect(x, 2))
    assert torch.equal(y, even[:, :, : size[0], : size[1]])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NETWORK(19), r"depth=19; expected one of \[8, 14, 18, 20, 26, 32, 34, 50, 101\]"),
        (lambda: CifarResNet(18), r"depth=18; expected one of \[8, 14, 20, 26, 32\]"),
        (lambda: ImageNetResNet(18, groups=2), "ResNet-18 got groups=2.*Take depth 50 or 101"),
        (lambda: ImageNetResNet(34, width_per_group=128), "width_per_group=128"),
        (lambda: ImageNetResNet(18, replace_stride_with_dilation=(False, False, True)), "no dilation"),
        (lambda: ImageNetResNet(50, replace_stride_with_dilation=(True,)), "three booleans"),
        (lambda: HourglassNet(3), "features=3"),
        (lambda: HourglassNet(stacks=0), "stacks=0"),
        (lambda: DynConvDenoiser(blocks=0), "blocks=0"),
    ],
)
def test_network_that_was_not_published_is_refused(make, message):
    with torch.device("meta"), pytest.raises(ModelError, match=message):
        make()


FIELDS = {"NUM_FEATURES": 8, "NUM_STACKS": 1, "NUM_BLOCKS": 1, "NUM_JOINTS": 2}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("resnet18", {"pretrained": True}, "resnet18 got pretrained=True; weights come from the state_dict"),
        ("resnet20", {"pretrained": True}, "pretrained=True"),
        ("resnet50", {"norm_layer": "GroupNorm"}, "BatchNorm is folded"),
        ("resnet20", {"width_mult": 2}, "resnet20 got arguments.*width_mult"),
        ("resnet18", {"depth_mult": 2}, "resnet18 got arguments.*depth_mult"),
        ("resnet34", {"groups": 2}, "ResNet-34 got groups=2"),
        ("HourglassNet", FIELDS | {"NUM_FEATURE": 8}, r"got the fields.*NUM_FEATURE'.*expected"),
        ("HourglassNet", {"NUM_FEATURES": 8}, "got the fields"),
    ],
)
def test_arguments_that_the_authors_refuse_or_ignore_are_refused(name, arguments, message):
    with torch.device("meta"), pytest.raises(ModelError, match=message):
        from_authors(name, arguments, {})


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize(
    ("name", "arguments", "make"),
    [
        ("resnet14", {"num_classes": 7}, lambda sparse: CifarResNet(14, num_classes=7, sparse=sparse)),
        (
            "resnet50",
            {
                "width_mult": 0.0625,
                "progress": False,
                "zero_init_residual": True,
                "replace_stride_with_dilation": None,
            },
            lambda sparse: ImageNetResNet(50, width_mult=0.0625, sparse=sparse),
        ),
        ("HourglassNet", FIELDS, lambda sparse: HourglassNet(8, 1, joints=2, sparse=sparse)),
    ],
)
def test_weights_say_whether_a_network_is_gated(name, arguments, make, sparse):
    network = make(sparse)
    found = from_authors(name, arguments, network.state_dict())
    assert len(find_dynamic(found)) == len(find_dynamic(network))
    assert bool(find_dynamic(found)) is sparse


def test_fields_may_carry_the_path_of_the_configuration():
    fields = {f"MODEL.EXTRA.{name}": value for name, value in FIELDS.items()} | {"DYNCONV.ENABLED": False}
    network = HourglassNet(8, 1, joints=2, sparse=False)
    assert find_dynamic(from_authors("HourglassNet", fields, network.state_dict())) == []
