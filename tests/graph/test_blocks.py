"""Inverted-residual blocks in folded programs: all that is one, and the reason why another is none."""

from __future__ import annotations

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from small_blocks import ACTIVATIONS, Block, Masked, MobileNetV2, dilated, folded
from torch import Tensor, nn

from edgedyn.graph.blocks import find_blocks
from edgedyn.graph.stages import slopes_of
from edgedyn.graph.values import is_binary, possible_values
from edgedyn.layers.malleconv import ResConvBlock

EXPECTED = {"relu_inplace": "relu", "prelu1": "prelu", "leaky": "prelu"}


def only_block(network: nn.Module, *shape: int):
    module = folded(network, *shape)
    blocks, refusals = find_blocks(module)
    assert len(blocks) == 1, refusals
    assert refusals == ()
    return module, blocks[0]


def reason(network: nn.Module, *shape: int) -> str:
    blocks, refusals = find_blocks(folded(network, *shape))
    assert blocks == ()
    assert len(refusals) == 1
    assert refusals[0].path == "depthwise"
    return refusals[0].reason


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_every_activation_is_found_at_every_place(activation, place):
    kinds = ["relu6", "relu6", "none"]
    kinds[place] = activation
    module, block = only_block(Block(activations=tuple(kinds)))
    expected = EXPECTED.get(activation, activation)
    assert block.stages[place].activation == expected
    slopes = slopes_of(module, block.stages[place])
    channels = 4 if place == 2 else 12
    assert (slopes is not None) == (expected == "prelu")
    if slopes is not None:
        assert slopes.shape == (channels,)
        x = torch.randn(1, channels, 3, 3)
        network = Block(activations=tuple(kinds))
        folded(network)  # the same weights
        torch.testing.assert_close(F.prelu(x, slopes), getattr(network, f"act{place + 1}")(x))


@pytest.mark.parametrize(
    ("options", "residual"),
    [
        ({}, True),
        ({"bias": False}, True),
        ({"side": 5}, True),
        ({"residual": False}, False),
        ({"stride": 2, "residual": False, "outputs": 6}, False),
        ({"stride": 2, "side": 5, "residual": False}, False),
    ],
)
def test_sizes_and_sums_are_found(options, residual):
    _, block = only_block(Block(**options))
    assert block.is_residual == residual
    assert [stage.conv.args[1].target for stage in block.stages] == [
        f"{name}.weight" for name in ("expand", "depthwise", "project")
    ]
    assert block.x.op == "placeholder"
    assert block.output.target in (torch.ops.aten.add.Tensor, torch.ops.aten.conv2d.default)
    assert (block.output.target == torch.ops.aten.add.Tensor) == residual


class Swapped(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x


class AddsAnother(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.branch(x) + x.abs()


class AddsTwice(Block):
    def forward(self, x: Tensor) -> Tensor:
        return torch.add(x, self.branch(x), alpha=2)


class Doubled(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        return y + y


class Scaled(Block):
    """As LayerScale: a factor behind the branch."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.5 * self.branch(x)


@pytest.mark.parametrize(
    ("network", "residual"),
    [(Swapped, True), (AddsAnother, False), (AddsTwice, False), (Doubled, False), (Scaled, False)],
)
def test_only_the_sum_with_x_belongs_to_a_block(network, residual):
    _, block = only_block(network())
    assert block.is_residual == residual
    assert (block.output is block.stages[2].end) != residual


@pytest.mark.parametrize("side", [3, 5])
@pytest.mark.parametrize("hidden", [None, "dilated"])
@pytest.mark.parametrize("filtered", [None, "mask"])
def test_masks_that_follow_from_that_of_y_are_found(side, hidden, filtered):
    masks = dilated(side) if hidden else None, (lambda m: m) if filtered else None, lambda m: m
    _, block = only_block(Masked(*masks, side=side))
    assert block.is_residual
    assert block.mask is not None
    assert block.mask.target == torch.ops.aten.to.dtype
    assert [stage.mask is not None for stage in block.stages] == [bool(hidden), bool(filtered), True]


def test_a_larger_dilation_covers_and_several_add_up():
    for make in (dilated(7), lambda m: dilated(3)(dilated(3)(m))):
        assert only_block(Masked(make, None, lambda m: m, side=5))[1].mask is not None


class IntoBranch(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        y += x
        return y


class IntoX(Block):
    """The sum is written into x, which a later sum reads."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        y = x
        x += self.branch(x)
        return x + y


class Overwritten(Block):
    """An operator in place between two readers of x."""

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        y = self.expand(x)
        x.relu_()
        return x + self.project(self.act2(self.depthwise(self.act1(y))))


class OverwrittenView(Overwritten):
    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        y = self.expand(x)
        x[:, :1].relu_()
        return x + self.project(self.act2(self.depthwise(self.act1(y))))


def test_sums_in_place_belong_to_a_block_where_x_stays_as_it_is():
    assert only_block(IntoBranch())[1].is_residual
    assert not only_block(IntoX())[1].is_residual


def test_a_block_whose_input_is_overwritten_is_refused():
    for network in (Overwritten(), OverwrittenView()):
        assert reason(network) == "relu overwrites the input of expand in place"


def test_a_sum_behind_stride_2_stays_outside():
    _, block = only_block(Block(stride=2), 1, 4, 1, 1)
    assert not block.is_residual


def same(mask: Tensor) -> Tensor:
    return mask


@pytest.mark.parametrize(
    ("masks", "side", "found"),
    [
        ((dilated(3), None, None), 3, "a map inside is masked"),
        ((None, same, None), 3, "a map inside is masked"),
        ((dilated(3), None, same), 5, r"max_pool2d\(mask, 5, stride=1, padding=2\)"),
        ((same, None, same), 3, "not the output's mask dilated"),
        ((lambda m: 1 - m, None, same), 3, "not the output's mask dilated"),
        ((None, dilated(3), same), 3, "have different masks"),
    ],
)
def test_masks_that_do_not_follow_are_refused(masks, side, found):
    assert re.search(found, reason(Masked(*masks, side=side)))


class Attention(Masked):
    def decide(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.head(x))


class Halves(Masked):
    def decide(self, x: Tensor) -> Tensor:
        return (self.head(x) >= 0).float() * 0.5


def test_an_attention_map_is_no_mask():
    for network in (Attention, Halves):
        _, block = only_block(network(None, None, same))
        assert block.mask is None  # behind the block
        assert not block.is_residual
        assert "a factor that is no mask" in reason(network(dilated(3), None, same))


@pytest.mark.parametrize(
    ("decide", "expected"),
    [
        (lambda x: (x > 0).float(), True),
        (lambda x: x.clamp(-1, 0).floor() + 1, True),
        (lambda x: torch.round(torch.sigmoid(x)), True),
        (lambda x: ((x > 0) & (x < 1)).to(x.dtype), True),
        (lambda x: torch.where(x > 0, torch.ones(1), torch.zeros(1)), True),
        (lambda x: 1 - (x > 0).float(), True),
        (lambda x: (x > 0).float() * (x < 2).float(), True),
        (lambda x: F.interpolate((x > 0).float(), scale_factor=2), True),
        (lambda x: (torch.sign(x) + 1) / 2, False),  # 0.5 at 0
        (lambda x: (x > 0).float() + (x > 1).float(), False),
        (lambda x: F.avg_pool2d((x > 0).float(), 3, 1, 1), False),
        (lambda x: x.clamp(-2, 0).floor() + 1, False),
        (lambda x: x.clamp(0, 1), False),
        (lambda x: x.round(), False),
        (lambda x: F.interpolate((x > 0).float(), scale_factor=2, mode="bilinear"), False),
    ],
)
def test_values_of_masks_are_told_from_the_graph(decide, expected):
    class Decides(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return decide(x)

    module = folded(Decides(), 1, 1, 4, 5)
    (end,) = (node for node in module.graph.nodes if node.op == "output")
    assert is_binary(module, end.args[0][0]) == expected
    values = possible_values(module, end.args[0][0])
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.1, 0.7, 1.0, 1.5, 2.5, 9.0]).reshape(1, 1, 2, 5)
    if values is not None:
        assert set(decide(x).unique().tolist()) <= set(values.tolist())


class TwoReaders(Block):
    def forward(self, x: Tensor) -> Tensor:
        y = self.act1(self.expand(x))
        return self.project(self.act2(self.depthwise(y))) + y[:, :4]


class SqueezeExcite(Block):
    def __init__(self) -> None:
        super().__init__()
        self.reduce, self.grow = nn.Conv2d(12, 3, 1), nn.Conv2d(3, 12, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act2(self.depthwise(self.act1(self.expand(x))))
        scale = torch.sigmoid(self.grow(F.relu(self.reduce(y.mean((2, 3), keepdim=True)))))
        return x + self.project(y * scale)


class Between(Block):
    """An operator between expand and depthwise."""

    def __init__(self, function, **options) -> None:
        super().__init__(**options)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.act2(self.depthwise(self.function(self.act1(self.expand(x))))))


class NoExpand(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.act2(self.depthwise(x.repeat(1, 3, 1, 1))))


class OtherKernel(Block):
    def __init__(self, name: str, make) -> None:
        super().__init__(residual=False)
        setattr(self, name, make())


@pytest.mark.parametrize(
    ("network", "found"),
    [
        (TwoReaders(), "2 operators read the output of expand"),
        (SqueezeExcite(), r"2 operators read the output of depthwise \(mean, mul\), as with a squeeze"),
        (NoExpand(), "no 1 x 1 convolution stands in front of it, as with an expand_ratio of 1"),
        (Between(F.silu), "silu stands behind expand"),
        (Between(lambda y: F.pad(y, (1, 1, 1, 1), mode="reflect"), depthwise={"padding": 0}), "pad"),
        (
            Between(lambda y: F.pad(y, (0, 1, 0, 1)), depthwise={"padding": 0, "stride": 2}),
            "zero padding by the",
        ),
        (Between(lambda y: F.max_pool2d(y, 2)), "max_pool2d stands behind expand"),
        (Between(lambda y: y * 0.5), "a factor that is no mask"),
        (Block(depthwise={"padding": 0}, residual=False), r"depthwise has padding \[0, 0\]; expected 1"),
        (Block(depthwise={"padding": 2}, residual=False), "has padding"),
        (Block(depthwise={"dilation": 2, "padding": 2}), "dilation"),
        (Block(depthwise={"stride": 3}, residual=False), "stride"),
        (Block(depthwise={"stride": (2, 1)}, residual=False), "stride"),
        (Block(side=7), r"kernel \(7, 7\); expected 3 x 3 or 5 x 5"),
        (Block(depthwise={"groups": 4}), "expected one filter per channel"),
        (
            OtherKernel("depthwise", lambda: nn.Conv2d(12, 12, (3, 5), padding=(1, 2), groups=12)),
            r"kernel \(3, 5\)",
        ),
        (OtherKernel("expand", lambda: nn.Conv2d(4, 12, 1, stride=2)), "expand has kernel .*stride"),
        (OtherKernel("expand", lambda: nn.Conv2d(4, 12, 1, padding=1)), "padding"),
        (OtherKernel("expand", lambda: nn.Conv2d(4, 12, 1, groups=2)), "no 1 x 1 convolution stands"),
        (OtherKernel("expand", lambda: nn.Conv2d(4, 12, 3, padding=1)), "no 1 x 1 convolution stands"),
        (OtherKernel("project", lambda: nn.Conv2d(12, 4, 1, stride=2)), "project has kernel"),
    ],
)
def test_what_differs_is_refused_with_its_reason(network, found):
    assert re.search(found, reason(network))


class Multiplied(Block):
    """A depth multiplier of 2."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.project = nn.Conv2d(24, 4, 1)


def test_a_depth_multiplier_is_refused():
    assert "12 groups and 24 output channels" in reason(Multiplied())


def test_a_reflecting_convolution_is_refused():
    network = OtherKernel(
        "depthwise", lambda: nn.Conv2d(12, 12, 3, padding=1, groups=12, padding_mode="reflect")
    )
    assert "pad stands behind expand" in reason(network)


class Shared(nn.Module):
    """A chain of separable convolutions: the second block would begin with the first one's end."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))
        self.depths = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, groups=8) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.points[1](F.relu(self.depths[0](F.relu(self.points[0](x)))))
        return self.points[2](F.relu(self.depths[1](F.relu(y))))


def test_no_layer_belongs_to_two_blocks():
    blocks, refusals = find_blocks(folded(Shared(), 1, 8, 6, 6))
    assert [block.stages[0].conv.args[1].target for block in blocks] == ["points.0.weight"]
    assert [(r.path, r.reason) for r in refusals] == [
        ("depths.1", "points.1 in front of it belongs to another block")
    ]


def test_depthwise_convolutions_that_meet_no_1x1_are_no_blocks():
    network = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 4, 3)
    )
    assert find_blocks(folded(network)) == ((), ())


def test_a_computed_weight_is_no_block():
    class Computed(Block):
        def forward(self, x: Tensor) -> Tensor:
            y = self.act1(self.expand(x))
            return self.project(F.conv2d(y, self.depthwise.weight * x.mean(), None, 1, 1, 1, 12))

    assert find_blocks(folded(Computed())) == ((), ())


def test_every_block_of_a_mobilenet_but_its_first_is_found():
    blocks, refusals = find_blocks(folded(MobileNetV2(), 1, 3, 64, 64))
    assert len(blocks) == 16
    assert [block.path for block in blocks[:2]] == ["features.2.conv", "features.3.conv"]
    assert sum(block.is_residual for block in blocks) == 10
    assert sum(stage.activation == "relu6" for block in blocks for stage in block.stages) == 32
    assert [(r.path, "expand_ratio of 1" in r.reason) for r in refusals] == [("features.1.conv.0.0", True)]


def test_the_mobilenet_has_the_published_parameters():
    assert sum(p.numel() for p in MobileNetV2().parameters()) == 3_504_872


def test_blocks_of_mallenet_are_found_with_their_paths():
    blocks, refusals = find_blocks(folded(nn.Sequential(*[ResConvBlock(4) for _ in range(3)]), 1, 4, 8, 8))
    assert [repr(block) for block in blocks] == [
        f"Block({k}.body: prelu prelu prelu, residual)" for k in range(3)
    ]
    assert refusals == ()
    assert all(a.output is b.x for a, b in itertools.pairwise(blocks))


def test_positions_of_one_pixel_are_found():
    assert len(find_blocks(folded(Block(), 1, 4, 1, 1))[0]) == 1
