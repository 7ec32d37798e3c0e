"""DynConv: decisions, dilated masks, refusals of the authors' classes, and foreign classes of their names."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from disturbed import redraw
from torch import nn

from edgedyn.checkpoints.authors import from_authors
from edgedyn.errors import ModelError, WeightsError
from edgedyn.layers import canonicalize
from edgedyn.layers.dynconv import (
    LAYER,
    CanonicalBasicBlock,
    CanonicalBottleneck,
    CanonicalInvertedResidual,
    SparseBasicBlock,
    SparseBottleneck,
    SparseInvertedResidual,
)
from edgedyn.layers.dynconv.masks import (
    CanonicalMaskUnit,
    MaskUnit,
    PointMaskHead,
    PooledMaskHead,
    Selection,
    decide,
    dilate,
)
from edgedyn.layers.dynconv.residual import BasicBlock, Bottleneck, InvertedResidual


def fresh(module: nn.Module, seed: int = 5) -> nn.Module:
    """Return it redrawn, in evaluation mode and float64."""
    return redraw(module, seed=seed).eval().double()


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(6)).double()


SMALLEST = torch.finfo(torch.float32).smallest_normal


def test_equality_with_zero_is_active_and_the_smallest_negative_number_is_not():
    logits = torch.tensor(
        [0.0, -0.0, SMALLEST, -SMALLEST, -1e-45, 1e-45, 7.0, -7.0, float("inf"), -float("inf")]
    )
    mask = decide(logits, torch.ones(1))
    assert mask.tolist() == [1, 1, 1, 0, 0, 1, 1, 0, 1, 0]
    assert torch.equal(mask, (logits >= 0).float())


@pytest.mark.parametrize("head", [PooledMaskHead, PointMaskHead])
@pytest.mark.parametrize("stride", [1, 2])
def test_mask_is_the_sign_of_the_logits_exactly(head, stride):
    unit, x = fresh(MaskUnit(head(4, stride))), rand(2, 4, 9, 14)
    for found in (unit(x), CanonicalMaskUnit(unit)(x)):
        assert torch.equal(found.mask, (unit.maskconv(x) >= 0).double())
        assert 0 < found.mask.mean() < 1
        assert found.mask.dtype == x.dtype


def test_gradient_of_the_decision_is_that_of_sigmoid():
    unit = fresh(MaskUnit(PointMaskHead(3)))
    x = rand(2, 3, 5, 4)
    masks = unit(x)
    (gradient,) = torch.autograd.grad(masks.mask.sum(), masks.logits, retain_graph=True)
    soft = masks.logits.sigmoid()
    torch.testing.assert_close(gradient, soft * (1 - soft), rtol=1e-12, atol=0)
    assert not masks.dilated.requires_grad


def test_training_decides_with_logistic_noise_and_not_once_it_is_switched_off():
    """Of N equal logits z, sigmoid(z) N are active: the logistic distribution."""
    torch.manual_seed(3)
    unit = fresh(MaskUnit(PointMaskHead(1))).train()
    unit.maskconv.weight.data.fill_(1)
    unit.maskconv.bias.data.fill_(0)
    for z in (-2.0, 0.5, 3.0):
        x = torch.full((1, 1, 300, 300), z, dtype=torch.float64)
        share = unit(x).mask.mean().item()
        assert share == pytest.approx(torch.tensor(z).sigmoid().item(), abs=0.006)
        unit.noisy = False
        assert unit(x).mask.mean() == float(z >= 0)
        unit.noisy = True
        assert unit.eval()(x).mask.mean() == float(z >= 0)
        unit.train()


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(9, 14), (12, 7)], ids=str)
def test_dilated_mask_of_both_units_agrees_where_there_are_pixels(stride, size):
    unit, x = fresh(MaskUnit(PooledMaskHead(3, stride), stride)), rand(2, 3, *size)
    reference, canonical = unit(x), CanonicalMaskUnit(unit, stride=stride)(x)
    assert canonical.dilated.shape[2:] == size
    assert torch.equal(canonical.dilated, reference.dilated[:, :, : size[0], : size[1]])
    assert 0 < canonical.mask.sum() < canonical.dilated.sum()


def test_dilation_puts_zeros_between_positions_first():
    mask = torch.zeros(1, 1, 3, 4)
    mask[0, 0, 1, 2] = 1
    expected = torch.zeros(6, 8)
    expected[1:4, 3:6] = 1
    assert torch.equal(dilate(mask, 2)[0, 0], expected)
    reach_two = torch.zeros(6, 8)
    reach_two[0:5, 2:7] = 1
    unit = CanonicalMaskUnit(MaskUnit(nn.Conv2d(1, 1, 1, stride=2)), stride=2, reach=2)
    unit.maskconv.weight.data.fill_(1)
    unit.maskconv.bias.data.fill_(-0.5)
    x = F.interpolate(mask, scale_factor=2.0)
    assert torch.equal(unit(x).dilated[0, 0], reach_two)


def test_heads_are_what_stays_in_float32():
    assert set(LAYER.float32) == {PooledMaskHead, PointMaskHead, Selection}
    for block in (SparseBasicBlock(4, 4), SparseBottleneck(8, 2), SparseInvertedResidual(4, 4)):
        canonical = canonicalize(block.eval())
        heads = [path for path, part in canonical.named_modules() if type(part) in LAYER.float32]
        assert heads == ["masker.maskconv"]


@pytest.mark.parametrize(
    ("block", "shape"),
    [(SparseBasicBlock(4, 4), (2, 4, 9, 12)), (SparseInvertedResidual(4, 4), (2, 4, 9, 12))],
    ids=["basic", "inverted"],
)
@pytest.mark.parametrize("active", [True, False])
def test_whole_mask_gives_the_dense_block_and_no_mask_its_identity(block, shape, active):
    block, x = fresh(copy.deepcopy(block)), rand(*shape)
    for head in (m for m in block.modules() if isinstance(m, nn.Conv2d) and m.out_channels == 1):
        head.bias.data.fill_(1e3 if active else -1e3)
    is_inverted = isinstance(block, InvertedResidual)
    dense = (InvertedResidual if is_inverted else BasicBlock).forward(block, x)
    idle = x if is_inverted else F.relu(x)
    for module in (block, canonicalize(block)):
        torch.testing.assert_close(module(x), dense if active else idle, rtol=0, atol=1e-12)


def test_inner_convolutions_run_on_the_dilated_mask_only():
    """Else a sparse kernel could not leave anything out."""
    canonical, x = canonicalize(fresh(SparseInvertedResidual(3, 3))), rand(2, 3, 8, 11)
    seen = {}
    canonical.depthwise.register_forward_hook(lambda m, given, y: seen.update(x=given[0], y=y))
    canonical(x)
    masks = canonical.masker(x)
    assert (seen["x"] * (1 - masks.dilated)).abs().max() == 0
    assert (seen["y"] * (1 - masks.mask)).abs().max() == 0


def test_blocks_take_and_give_the_authors_pair():
    block, x = fresh(SparseBottleneck(8, 2)), rand(2, 8, 5, 7)
    meta = {"masks": []}
    for module in (block, canonicalize(block)):
        y, given = module((x, meta))
        assert torch.equal(y, module(x))
        assert given is meta
        assert meta == {"masks": []}


# arguments that the authors' classes refuse or ignore


def record(block: nn.Module) -> dict:
    return block.state_dict()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("BasicBlock", {"groups": 2}, "groups=2; expected 1: their BasicBlock asserts it"),
        ("BasicBlock", {"dilation": 2}, "dilation=2; expected 1: their BasicBlock asserts it"),
        ("BasicBlock", {"base_width": 128}, "base_width=128; expected 64: their BasicBlock ignores it"),
        ("BasicBlock", {"norm_layer": "GroupNorm"}, "norm_layer='GroupNorm'.*ignores it"),
        ("BasicBlock", {"stride": 2}, "stride 2 without a downsample branch"),
        ("BasicBlock", {"planes": 8}, "4 channels in, 8 out"),
        ("BasicBlock", {"kernel": 5}, "BasicBlock got arguments.*kernel"),
        (
            "Bottleneck",
            {"norm_layer": "GroupNorm"},
            "norm_layer='GroupNorm'; expected None: BatchNorm is folded",
        ),
        ("Bottleneck", {}, "4 channels in, 16 out and stride 1"),
    ],
)
def test_residual_block_refuses_what_the_authors_refuse_or_ignore(name, arguments, message):
    given = {"inplanes": 4, "planes": 4, "sparse": True} | arguments
    with pytest.raises(ModelError, match=message):
        from_authors(name, given, {})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"oup": 6}, "4 channels in, 6 out"),
        ({"stride": 2}, "stride=2.*expected stride 1"),
        ({"expand_ratio": 1}, "expand_ratio=1; expected.*Use the dense block"),
        ({"stride": 3, "sparse": False}, "stride=3; expected 1 or 2"),
    ],
)
def test_inverted_residual_refuses_what_the_authors_assert(arguments, message):
    with pytest.raises(ModelError, match=message):
        from_authors("InvertedResidual", {"inp": 4, "oup": 4, "sparse": True} | arguments, {})


def test_weights_of_another_block_are_refused():
    weights = SparseBasicBlock(4, 4).state_dict()
    with pytest.raises(
        WeightsError, match="the state_dict does not fit BasicBlock: 0 keys missing, 4 unknown"
    ):
        from_authors("BasicBlock", {"inplanes": 4, "planes": 4, "sparse": False}, weights)


@pytest.mark.parametrize(
    ("name", "arguments", "block"),
    [
        ("BasicBlock", {"inplanes": 4, "planes": 4}, SparseBasicBlock(4, 4)),
        ("BasicBlock", {"inplanes": 4, "planes": 4, "stride": 1}, BasicBlock(4, 4)),
        (
            "Bottleneck",
            {
                "inplanes": 4,
                "planes": 4,
                "with_downsample": True,
                "base_width": 32,
                "groups": 2,
                "dilation": 2,
            },
            SparseBottleneck(4, 4, downsample=True, base_width=32, groups=2, dilation=2),
        ),
        ("Bottleneck", {"inplanes": 8, "planes": 2}, Bottleneck(8, 2)),
        (
            "InvertedResidual",
            {"inp": 4, "oup": 4, "expand_ratio": 3},
            SparseInvertedResidual(4, 4, expand_ratio=3),
        ),
        (
            "InvertedResidual",
            {"inp": 4, "oup": 6, "expand_ratio": 1, "cfg": None},
            InvertedResidual(4, 6, expand_ratio=1),
        ),
        ("MaskUnit", {"channels": 4, "stride": 2}, MaskUnit(PooledMaskHead(4, 2))),
        ("MaskUnit", {"channels": 4, "dilate_stride": 2}, MaskUnit(PointMaskHead(4), 2)),
    ],
)
def test_weights_say_whether_a_block_is_gated_and_by_which_head(name, arguments, block):
    block = fresh(block)
    found = from_authors(name, arguments, block.state_dict())
    assert type(found) is type(block)
    x = rand(2, 8 if arguments.get("inplanes") == 8 else 4, 6, 9)
    y, expected = found(x), block(x)
    for a, b in zip(y, expected, strict=True):
        assert torch.equal(a, b)


def test_mask_unit_refuses_unknown_arguments():
    with pytest.raises(ModelError, match=r"unexpected arguments \['size'\]"):
        from_authors("MaskUnit", {"channels": 4, "size": 2}, {})


# Foreign classes: same names, attributes and keys as the authors', and their call (x, meta)


class Squeeze(nn.Module):
    def __init__(self, channels, stride):
        super().__init__()
        self.fc = nn.Linear(channels, 1)
        self.conv = nn.Conv2d(channels, 1, 3, stride=stride, padding=1)

    def forward(self, x):
        return self.conv(x) + self.fc(x.mean((2, 3))).view(-1, 1, 1, 1)


class ForeignMasks(nn.Module):
    """MaskUnit, with either head."""

    def __init__(self, head, dilate_stride=1):
        super().__init__()
        self.maskconv = head
        self.expandmask = nn.Identity()
        self.expandmask.stride = dilate_stride

    def forward(self, x, meta):
        soft = self.maskconv(x)
        hard = (soft >= 0).to(x.dtype)
        meta["masks"].append(hard)
        m = {"std": SimpleNamespace(hard=hard, soft=soft), "dilate": SimpleNamespace(hard=hard)}
        return (m, meta) if isinstance(self.maskconv, nn.Conv2d) else m


class ForeignBlock(nn.Module):
    """BasicBlock with two, Bottleneck with three convolutions."""

    def __init__(self, convs, *, stride=1, downsample=None, head=Squeeze, eps=1e-5):
        super().__init__()
        for k, conv in enumerate(convs, start=1):
            setattr(self, f"conv{k}", conv)
            setattr(self, f"bn{k}", nn.BatchNorm2d(conv.out_channels, eps=eps))
        self.relu, self.downsample = nn.ReLU(inplace=True), downsample
        self.stride, self.sparse, self.depth = stride, head is not None, len(convs)
        if head is not None:
            self.masker = ForeignMasks(head(convs[0].in_channels, stride), stride)

    def forward(self, pair):
        x, meta = pair
        y = x
        for k in range(1, self.depth + 1):
            y = getattr(self, f"bn{k}")(getattr(self, f"conv{k}")(y))
            y = self.relu(y) if k < self.depth else y
        mask = self.masker(x, meta)["std"].hard if self.sparse else 1
        identity = x if self.downsample is None else self.downsample(x)
        return self.relu(identity + mask * y), meta


class ForeignInverted(nn.Module):
    def __init__(self, inp, oup, ratio=6, *, sparse=True, act=nn.ReLU6):
        super().__init__()
        hidden = round(inp * ratio)
        self.conv = nn.Sequential(
            *(nn.Conv2d(inp, hidden, 1, bias=False), nn.BatchNorm2d(hidden), act()),
            *(nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), act()),
            *(nn.Conv2d(hidden, oup, 1, bias=False), nn.BatchNorm2d(oup)),
        )
        self.sparse, self.identity = sparse, inp == oup
        self.masker = ForeignMasks(nn.Conv2d(inp, 1, 1)) if sparse else None

    def forward(self, pair):
        x, meta = pair
        if not self.sparse:
            return self.conv(x) + x, meta
        m, meta = self.masker(x, meta)
        return x + m["std"].hard * self.conv(x), meta


def conv(inp, out, side=3, **options):
    return nn.Conv2d(inp, out, side, padding=options.get("dilation", 1) * (side // 2), bias=False, **options)


def shortcut(inp, out, stride):
    return nn.Sequential(nn.Conv2d(inp, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out))


def recognise(name, foreign):
    return LAYER.recognise[name](foreign)


FOREIGN = {
    "basic": ("BasicBlock", lambda: ForeignBlock([conv(4, 4), conv(4, 4)], eps=1e-3), CanonicalBasicBlock),
    "basic_stride_2": (
        "BasicBlock",
        lambda: ForeignBlock([conv(4, 6, stride=2), conv(6, 6)], stride=2, downsample=shortcut(4, 6, 2)),
        CanonicalBasicBlock,
    ),
    "bottleneck": (
        "Bottleneck",
        lambda: ForeignBlock([conv(4, 3, 1), conv(3, 3), conv(3, 4, 1)]),
        CanonicalBottleneck,
    ),
    "bottleneck_wide_stride_2": (
        "Bottleneck",
        lambda: ForeignBlock(
            [conv(4, 14, 1), conv(14, 14, stride=2, groups=2), conv(14, 48, 1)],
            stride=2,
            downsample=shortcut(4, 48, 2),
        ),
        CanonicalBottleneck,
    ),
    "bottleneck_dilated": (
        "Bottleneck",
        lambda: ForeignBlock([conv(4, 3, 1), conv(3, 3, dilation=2), conv(3, 4, 1)]),
        CanonicalBottleneck,
    ),
    "bottleneck_of_an_odd_width": (
        "Bottleneck",  # 64 * 13 / 23 * 23 / 64 is below 13 in floating point
        lambda: ForeignBlock([conv(4, 13, 1), conv(13, 13), conv(13, 92, 1)], downsample=shortcut(4, 92, 1)),
        CanonicalBottleneck,
    ),
    "inverted": ("InvertedResidual", lambda: ForeignInverted(4, 4, 2.5), CanonicalInvertedResidual),
}


@pytest.mark.parametrize(("name", "make", "canonical_class"), FOREIGN.values(), ids=FOREIGN)
def test_foreign_block_keeps_its_numbers_and_its_call(name, make, canonical_class):
    foreign, x = fresh(make()), rand(2, 4, 11, 8)
    expected, _ = foreign((x, {"masks": []}))
    ours = recognise(name, foreign)
    canonical = canonicalize(nn.Sequential(ours).eval())
    assert type(canonical[0]) is canonical_class
    for module in (ours, canonical):
        meta = object()
        y, given = module((x, meta))
        assert given is meta
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12 * expected.abs().max().item())
    assert not ours.training
    assert all(ours.state_dict()[key].dtype == value.dtype for key, value in foreign.state_dict().items())


@pytest.mark.parametrize("training", [True, False])
def test_mode_of_the_foreign_block_stays(training):
    foreign = ForeignInverted(4, 4).train(training)
    assert all(part.training is training for part in recognise("InvertedResidual", foreign).modules())


def test_weights_are_copied():
    foreign = fresh(ForeignInverted(4, 4))
    ours = recognise("InvertedResidual", foreign)
    before = ours.conv[0].weight.clone()
    foreign.conv[0].weight.data.zero_()
    assert torch.equal(ours.conv[0].weight, before)


def test_pose_block_computes_with_the_hard_coded_epsilon():
    """The authors' sparse evaluation never reads the norm's own."""
    foreign = fresh(ForeignInverted(4, 4))
    same = recognise("InvertedResidual", foreign)
    for part in foreign.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eps = 0.1
    x = rand(2, 4, 6, 7)
    assert torch.equal(recognise("InvertedResidual", foreign)(x), same(x))


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("BasicBlock", ForeignBlock([conv(4, 4), conv(4, 4)], head=None)),
        ("Bottleneck", ForeignBlock([conv(4, 1, 1), conv(1, 1), conv(1, 4, 1)], head=None)),
        ("InvertedResidual", ForeignInverted(4, 4, sparse=False)),
        ("MaskUnit", nn.Identity()),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_ordinary_module_that_shares_a_name_is_left_alone(name, module):
    assert recognise(name, module) is None


def without(module, attribute):
    delattr(module, attribute)
    return module


def with_attribute(module, attribute, value):
    setattr(module, attribute, value)
    return module


STRANGE = {
    "pose_head_in_a_classification_block": (
        "BasicBlock",
        lambda: ForeignBlock([conv(4, 4), conv(4, 4)], head=lambda c, s: nn.Conv2d(c, 1, 1)),
        "has other parameters than expected, the first is",
    ),
    "classification_head_in_a_pose_block": (
        "InvertedResidual",
        lambda: with_attribute(ForeignInverted(4, 4), "masker", ForeignMasks(Squeeze(4, 1))),
        "has other parameters than expected",
    ),
    "other_padding": (
        "BasicBlock",
        lambda: ForeignBlock([nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect", bias=False), conv(4, 4)]),
        "has conv1.padding_mode = reflect, expected zeros",
    ),
    "dilated_basic_block": (
        "BasicBlock",
        lambda: ForeignBlock([conv(4, 4), conv(4, 4, dilation=2)]),
        r"has conv2.padding = \(2, 2\), expected \(1, 1\)",
    ),
    "kernel_of_5": (
        "BasicBlock",
        lambda: ForeignBlock([conv(4, 4, 5), conv(4, 4)]),
        r"has 'conv1.weight' of shape \(4, 4, 5, 5\), expected \(4, 4, 3, 3\)",
    ),
    "another_activation": (
        "InvertedResidual",
        lambda: ForeignInverted(4, 4, act=nn.ReLU),
        "has ReLU as 'conv.2', expected ReLU6",
    ),
    "relu6_for_relu": (
        "BasicBlock",
        lambda: with_attribute(ForeignBlock([conv(4, 4), conv(4, 4)]), "relu", nn.ReLU6()),
        "has ReLU6 as 'relu', expected ReLU",
    ),
    "no_activation": (
        "BasicBlock",
        lambda: without(ForeignBlock([conv(4, 4), conv(4, 4)]), "relu"),
        "has no module 'relu'",
    ),
    "no_convolution": (
        "BasicBlock",
        lambda: without(ForeignBlock([conv(4, 4), conv(4, 4)]), "conv1"),
        "is dynamic but not of the published structure",
    ),
    "gate_switched_off": (
        "BasicBlock",
        lambda: with_attribute(ForeignBlock([conv(4, 4), conv(4, 4)]), "sparse", False),
        "has a masker but sparse=False",
    ),
    "gated_change_of_channels": ("InvertedResidual", lambda: ForeignInverted(4, 6), "4 channels in, 6 out"),
    "mask_unit_without_its_dilation": (
        "MaskUnit",
        lambda: without(ForeignMasks(nn.Conv2d(4, 1, 1)), "expandmask"),
        "is dynamic but not of the published structure",
    ),
    "mask_unit_of_3x3": ("MaskUnit", lambda: ForeignMasks(nn.Conv2d(4, 1, 3)), r"of shape \(1, 4, 3, 3\)"),
}


@pytest.mark.parametrize(("name", "make", "message"), STRANGE.values(), ids=STRANGE)
def test_dynamic_module_of_another_structure_is_refused(name, make, message):
    with pytest.raises(ModelError, match=message) as caught:
        recognise(name, make())
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    "head", [lambda: Squeeze(4, 2), lambda: nn.Conv2d(4, 1, 1, stride=2)], ids=["pooled", "point"]
)
def test_foreign_mask_unit_alone_keeps_its_call(head):
    foreign, x = fresh(ForeignMasks(head(), 2)), rand(2, 4, 9, 6)
    ours = recognise("MaskUnit", foreign)
    found, expected = ours(x, {"masks": []}), foreign(x, {"masks": []})
    if isinstance(foreign.maskconv, nn.Conv2d):
        (found, meta), (expected, _) = found, expected
        assert meta == {"masks": []}
    assert torch.equal(found["std"].hard, expected["std"].hard)
    assert torch.equal(found["std"].soft, expected["std"].soft)
    assert torch.equal(found["dilate"].hard, dilate(expected["std"].hard, 2))
    assert found["std"].flops_per_position == 0
