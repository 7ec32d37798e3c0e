"""Slimmable layers and blocks: every width is a prefix, and its static counterpart equals it."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from small_slimmable import STEM, assert_equal, fresh, make_net, noise
from torch import nn

from edgedyn.errors import ModelError
from edgedyn.layers.ddsnet.blocks import (
    BlockOptions,
    DepthwiseSeparable,
    HalvingPool,
    InvertedResidual,
    Stage,
)
from edgedyn.layers.ddsnet.dsnet import DSNet
from edgedyn.layers.ddsnet.gates import SlimmableGate, make_divisible
from edgedyn.layers.ddsnet.slimmable import (
    SlimmableBatchNorm2d,
    SlimmableConv2d,
    SlimmableDepthwiseConv2d,
    SlimmableJoin2d,
    SlimmableLinear,
)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("o", [3, 7])
@pytest.mark.parametrize("i", [2, 5])
@torch.no_grad()
def test_convolution_uses_first_rows_and_columns(i, o, stride):
    conv = fresh(SlimmableConv2d([2, 5], [3, 7], 3, stride=stride, dilation=2))
    x = noise(2, i, 9, 12)
    expected = F.conv2d(x, conv.weight[:o, :i], conv.bias[:o], stride, [0, 2, 2][stride], 2)
    assert_equal(conv(x, o), expected)
    static = conv.static(i, o)
    assert type(static) is nn.Conv2d
    assert (static.in_channels, static.out_channels, static.weight.shape) == (i, o, (o, i, 3, 3))
    assert_equal(static(x), expected)


@pytest.mark.parametrize(
    ("side", "stride", "dilation", "padding"),
    [(1, 1, 1, 0), (3, 2, 1, 1), (5, 2, 1, 2), (3, 2, 2, 2), (2, 2, 1, 1)],
)
def test_padding_is_the_authors(side, stride, dilation, padding):
    conv = SlimmableConv2d(3, 4, side, stride=stride, dilation=dilation)
    assert conv.padding == (padding, padding)
    assert conv.static(3, 4).padding == (padding, padding)


@pytest.mark.parametrize("width", [2, 5])
@torch.no_grad()
def test_depthwise_convolution_has_the_width_of_its_input(width):
    conv = fresh(SlimmableDepthwiseConv2d([2, 5], 3, stride=2, bias=False))
    x = noise(2, width, 9, 12)
    assert_equal(conv(x), F.conv2d(x, conv.weight[:width], None, 2, 1, 1, width))
    assert conv.static(width).groups == width
    assert_equal(conv.static(width)(x), conv(x))


@pytest.mark.parametrize("second", [2, 4])
@pytest.mark.parametrize("first", [3, 5])
@torch.no_grad()
def test_concatenation_uses_one_prefix_an_input(first, second):
    conv = fresh(SlimmableJoin2d([[3, 5], [2, 4]], [3, 6], 3))
    a, b = noise(2, first, 7, 8), noise(2, second, 7, 8) * 2 + 1
    full = torch.zeros(2, 9, 7, 8, dtype=torch.float64)
    full[:, :first], full[:, 5 : 5 + second] = a, b
    expected = F.conv2d(full, conv.weight[:3], conv.bias[:3], padding=1)
    assert_equal(conv((a, b), 3), expected)
    assert_equal(conv.static((first, second), 3)(torch.cat([a, b], 1)), expected)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("width", [2, 4, 7])
@torch.no_grad()
def test_norm_takes_its_widths_statistics_and_the_last_entrys_affine_and_eps(width, affine):
    norm = fresh(SlimmableBatchNorm2d([2, 4, 7], eps=0.3, affine=affine))
    entry = norm.aux_bn[[2, 4, 7].index(width)]
    x = noise(2, width, 5, 6)
    column = (1, width, 1, 1)
    expected = (x - entry.running_mean.view(column)) / (entry.running_var.view(column) + 0.3).sqrt()
    if affine:
        expected = expected * norm.last.weight[:width].view(column) + norm.last.bias[:width].view(column)
    assert_equal(norm(x), expected)
    static = norm.static(width)
    assert type(static) is nn.BatchNorm2d
    assert not static.training
    assert_equal(static(x), expected)


@torch.no_grad()
def test_norm_of_equal_widths_has_statistics_for_each_entry():
    norm = fresh(SlimmableBatchNorm2d([3, 3, 5]))
    x = noise(2, 3, 4, 5)
    assert_equal(norm(x), norm(x, 0))
    assert (norm(x, 1) - norm(x, 0)).abs().max() > 0.01
    assert_equal(norm.static(3, 1)(x), norm(x, 1))
    with pytest.raises(ModelError, match=r"got 3 channels for entry 2, whose statistics are of 5"):
        norm(x, 2)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_training_updates_the_statistics_of_one_width_like_batchnorm(momentum):
    norm, plain = SlimmableBatchNorm2d([3, 5], momentum=momentum), nn.BatchNorm2d(3, momentum=momentum)
    for seed in range(3):
        x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(norm(x), plain(x), rtol=0, atol=0)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(getattr(norm.aux_bn[0], name), getattr(plain, name))
    assert norm.aux_bn[1].num_batches_tracked == 0
    assert torch.equal(norm.aux_bn[1].running_mean, torch.zeros(5))


@torch.no_grad()
def test_linear_uses_first_columns():
    linear = fresh(SlimmableLinear([3, 6], 4))
    x = noise(2, 3)
    assert_equal(linear(x), x @ linear.weight[:, :3].t() + linear.bias)
    assert_equal(linear.static(3)(x), linear(x))


@torch.no_grad()
def test_a_call_does_not_depend_on_the_calls_before():
    """The authors' layers forget their width after a call and then run at the largest."""
    block = fresh(DepthwiseSeparable([4, 6], [6, 9], BlockOptions(noskip=True)))
    x = noise(2, 4, 7, 8)
    first = block(x, 6)
    block(noise(2, 6, 7, 8), 9)
    assert torch.equal(block(x, 6), first)


def test_static_layers_have_weights_of_their_own():
    conv = SlimmableConv2d([2, 4], [3, 5], 1)
    static = conv.static(2, 3)
    before = conv.weight.detach().clone()
    with torch.no_grad():
        static.weight.fill_(9)
    assert torch.equal(conv.weight, before)
    assert static.weight.requires_grad


@pytest.mark.parametrize("attention", ["sigmoid", "tanh", "hard_sigmoid"])
@torch.no_grad()
def test_gate_rescales_and_decides(attention):
    gate = fresh(SlimmableGate([4, 8], 0.5, attn_act_fn=attention, act_layer="swish", channel_gate_num=3))
    x = noise(3, 4, 5, 6)
    r = F.silu(x.mean((2, 3)) @ gate.conv_reduce.weight[:, :4, 0, 0].t() + gate.conv_reduce.bias)
    scale = r @ gate.conv_expand.weight[:4, :, 0, 0].t() + gate.conv_expand.bias[:4]
    scale = {"sigmoid": torch.sigmoid, "tanh": lambda s: 1 + s.tanh(), "hard_sigmoid": F.hardsigmoid}[
        attention
    ](scale)
    assert_equal(gate(x), x * scale[:, :, None, None])
    assert_equal(gate.logits(x), r @ gate.state_dict()["gate.0.weight"][:, :, 0, 0].t())
    y, logits = gate.static_gate(4)(x)
    assert_equal(y, gate(x))
    assert_equal(logits, gate.logits(x))
    assert_equal(gate.static(4)(x), gate(x))


@pytest.mark.parametrize(
    ("value", "divisor", "rounded"),
    [(3, 8, 8), (12, 8, 16), (18, 8, 24), (19, 8, 24), (25, 8, 24), (27, 8, 32), (2.5, 1, 3), (1.4, 1, 2)],
)
def test_channel_numbers_are_rounded_as_the_authors_do(value, divisor, rounded):
    assert make_divisible(value, divisor) == rounded


BLOCKS = {
    "ds": lambda: DepthwiseSeparable([4, 6], [6, 9], BlockOptions(noskip=True)),
    "ds-skip-s2": lambda: DepthwiseSeparable(
        [4, 6], [6, 9], BlockOptions(stride=2, act_layer="swish", bias=True)
    ),
    "ir-skip": lambda: InvertedResidual(
        [4, 6], [4, 6], BlockOptions(exp_ratio=3.0, norm_kwargs={"eps": 0.1})
    ),
    "ir-skip-s2": lambda: InvertedResidual([4, 6], [4, 6], BlockOptions(5, 2, gate_outputs=2)),
    "ir-skip-wider": lambda: InvertedResidual(
        [4, 6], [6, 9], BlockOptions(se_ratio=0.5, norm_kwargs={"affine": False})
    ),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("entry", [0, 1])
@torch.no_grad()
def test_static_block_equals_the_block_at_its_width(name, entry):
    block = fresh(BLOCKS[name]())
    i, o = block.in_channels_list[entry], block.out_channels_list[entry]
    x = noise(2, i, 9, 12)
    static = block.static(i, o)
    assert not [m for m in static.modules() if isinstance(m, SlimmableConv2d | SlimmableBatchNorm2d)]
    assert_equal(static(x), block(x, o))


@torch.no_grad()
def test_gated_block_splits_at_the_gate():
    block = fresh(BLOCKS["ir-skip-s2"]())
    x = noise(2, 4, 9, 12)
    features, logits = block.static_opening(4)(x)
    assert_equal(logits, block.logits(x))
    assert_equal(block.static_closing(4, 4)(features, x), block(x, 4))


@torch.no_grad()
def test_inner_widths_made_equal_by_rounding_use_the_first_statistics():
    block = fresh(InvertedResidual([5, 6], [5, 6], BlockOptions(exp_ratio=4.0)))
    assert block.inner == [24, 24]
    assert [entry.num_features for entry in block.bn1.aux_bn] == [24, 24]
    x = noise(2, 6, 5, 7)
    before = block(x, 6)
    block.bn1.aux_bn[1].running_mean.add_(1)
    assert torch.equal(block(x, 6), before)
    block.bn1.aux_bn[0].running_mean.add_(1)
    assert not torch.equal(block(x, 6), before)


@torch.no_grad()
def test_only_the_first_block_of_a_stage_halves_and_decides():
    stage = fresh(Stage("ds", [4, 6], [6, 9], 3, BlockOptions(stride=2, gate_outputs=2)))
    assert [block.gate.outputs for block in stage.all_blocks] == [2, 0, 0]
    x = noise(2, 4, 9, 12)
    y = stage(x, 6)
    assert y.shape == (2, 6, 5, 6)
    for block in stage.all_blocks:
        x = block(x, 6)
    assert torch.equal(y, x)


@pytest.mark.parametrize("size", [(6, 8), (7, 8), (6, 9), (7, 9), (1, 1)], ids=str)
def test_halving_pool_equals_the_pool_with_a_ceiling(size):
    x = noise(2, 3, *size)
    assert_equal(HalvingPool()(x), nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)(x))


def test_shortcut_of_another_width_is_refused():
    block = fresh(DepthwiseSeparable([4, 6], [4, 6], BlockOptions()))
    with pytest.raises(ModelError, match=r"shortcut \(2, 4, 5, 7\) for a branch \(2, 6, 5, 7\).*noskip=True"):
        block(noise(2, 4, 5, 7), 6)


def test_branch_with_a_shortcut_starts_switched_off():
    x = torch.rand(2, 6, 5, 7)
    block = InvertedResidual([4, 6], [4, 6], BlockOptions()).eval()
    assert torch.equal(block(x, 6), x)


@pytest.mark.parametrize("widths", [[8, 4], [4, 4], []])
def test_widths_that_are_not_increasing_are_refused(widths):
    found = r"got widths \[.*(not increasing|expected positive whole)"
    makers = [
        lambda: SlimmableConv2d(widths, [3, 4], 3),
        lambda: SlimmableConv2d([3, 4], widths, 3),
        lambda: SlimmableDepthwiseConv2d(widths, 3),
        lambda: SlimmableJoin2d([[2], widths], [3, 4], 3),
        lambda: SlimmableLinear(widths, 3),
        lambda: DepthwiseSeparable(widths, [3, 4], BlockOptions(noskip=True)),
        lambda: DSNet(5, 3, [STEM, [widths, 1, 3, 1, "ds", False], []], noskip=True),
    ]
    makers += [lambda: SlimmableBatchNorm2d(widths)] if widths != [4, 4] else []
    for make in makers:
        with pytest.raises(ModelError, match=found):
            make()


def test_width_below_one_is_refused():
    with pytest.raises(ModelError, match=r"SlimmableLinear got widths \[0, 4\]; expected positive whole"):
        SlimmableLinear([0, 4], 2)


def test_unlisted_width_is_refused():
    x = torch.rand(2, 3, 5, 7)
    calls = {
        "SlimmableConv2d (input)": lambda: SlimmableConv2d([2, 4], [3, 5], 3)(x, 5),
        "SlimmableConv2d (output)": lambda: SlimmableConv2d([3, 4], [3, 5], 3).static(3, 4),
        "SlimmableDepthwiseConv2d": lambda: SlimmableDepthwiseConv2d([2, 4], 3)(x),
        "SlimmableJoin2d (input)": lambda: SlimmableJoin2d([[3], [2]], [3, 5], 3)((x, x), 3),
        "SlimmableJoin2d (output)": lambda: SlimmableJoin2d([[3], [3]], [3, 5], 3)((x, x), 4),
        "SlimmableBatchNorm2d": lambda: SlimmableBatchNorm2d([2, 4]).eval()(x),
        "SlimmableLinear": lambda: SlimmableLinear([2, 4], 5).static(3),
    }
    for name, call in calls.items():
        with pytest.raises(ModelError, match=rf"{re.escape(name)}.* got width [34]; expected one of"):
            call()


def test_static_norm_in_training_mode_is_refused():
    with pytest.raises(ModelError, match=r"SlimmableBatchNorm2d is in training mode.*eval\(\) first"):
        SlimmableBatchNorm2d([2, 4]).static(2)
    with pytest.raises(ModelError, match="training mode"):
        make_net().train().static(0)


def test_attention_without_a_gate_has_no_logits():
    gate = SlimmableGate([4, 8]).eval()
    for call in (gate.logits, lambda x: gate.static_gate(4)):
        with pytest.raises(ModelError, match="no gate; expected channel_gate_num"):
            call(torch.rand(1, 4, 3, 5))
