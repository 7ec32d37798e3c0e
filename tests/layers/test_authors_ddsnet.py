"""DS-Net's own classes: their constructor arguments, and their instances."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from small_slimmable import STEM, assert_equal
from torch import nn

from edgedyn.checkpoints.authors import from_authors
from edgedyn.errors import ModelError, WeightsError
from edgedyn.layers import canonicalize
from edgedyn.layers.ddsnet import LAYER
from edgedyn.layers.ddsnet.blocks import Stage
from edgedyn.layers.ddsnet.dsnet import DSNet
from edgedyn.layers.ddsnet.gates import make_divisible
from edgedyn.layers.ddsnet.slimmable import SlimmableConv2d, SlimmableDepthwiseConv2d

GOLDEN = Path(__file__).parents[1] / "golden/ds_net_4choices.safetensors"
SIZES = {"in_channels_list": [4, 6], "out_channels_list": [6, 9]}
SQUARE = {"in_channels_list": [4, 6], "out_channels_list": [4, 6]}
BLOCK = SIZES | {"kernel_size": 3, "layer_num": 1}
GATE = {"in_chs": [4, 6], "channel_gate_num": 4}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "DSConv2d",
            SIZES | {"kernel_size": 3, "padding_mode": "reflect"},
            "padding_mode='reflect', which its code ignores",
        ),
        ("DSConv2d", SIZES | {"kernel_size": 3, "groups": 3}, "groups=3 for .*expected 1, or"),
        (
            "DSConv2d",
            SIZES | {"kernel_size": [3, 5]},
            r"kernel_size=\[3, 5\]; its padding is computed from one axis",
        ),
        ("DSConv2d", SIZES | {"kernel_size": 3, "stride": (1, 2)}, r"stride=\(1, 2\)"),
        ("DSConv2d", SIZES | {"kernel_size": 3, "padding": 1}, "DSConv2d got padding=1; expected only"),
        ("DSdwConv2d", {"channels_list": [4, 6], "kernel_size": 0}, "kernel_size=0"),
        (
            "DSBatchNorm2d",
            {"num_features_list": [4, 6], "track_running_stats": False},
            "track_running_stats=False, which",
        ),
        ("MultiHeadGate", {"in_chs": [4, 6]}, "no channel_gate_num"),
        ("MultiHeadGate", GATE | {"gate_num_features": 9}, "gate_num_features=9, which"),
        ("DSDepthwiseSeparable", BLOCK | {"conv_kwargs": {"a": 1}}, "conv_kwargs=.*ignores"),
        ("DSDepthwiseSeparable", BLOCK | {"norm_layer": "GroupNorm"}, "another norm_layer"),
        ("DSDepthwiseSeparable", BLOCK | {"exp_ratio": 4.0}, "exp_ratio=4.0; expected only"),
        ("DSInvertedResidual", BLOCK | {"norm_kwargs": {"track": 1}}, "norm_kwargs got track=1"),
        ("DSNet", {"num_classes": 5}, "no choices_cfg"),
        ("DSNet", {"choices_cfg": [STEM, []], "drop_path_rate": 0.1}, "drop_path_rate=0.1, which"),
        ("DSNet", {"choices_cfg": [STEM, []], "global_pool": "max"}, "global_pool='max'; expected only"),
        ("slimmable_mbnet_v1_bn_uniform", {"noskip": False}, "noskip=False, which"),
    ],
)
def test_what_the_authors_class_refuses_or_ignores_is_refused(name, arguments, message):
    with pytest.raises(ModelError, match=message):
        from_authors(name, arguments, {})


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("DSpwConv2d", SIZES | {"bias": False}, SlimmableConv2d),
        ("DSConv2d", SQUARE | {"kernel_size": (3, 3), "groups": 6}, SlimmableDepthwiseConv2d),
        (
            "DSConv2d",
            {"in_channels_list": 3, "out_channels_list": 6, "kernel_size": 3, "stride": [2, 2]},
            SlimmableConv2d,
        ),
        (
            "DSStage",
            SIZES
            | {
                "stage_type": "IR",
                "kernel_size": 3,
                "layer_num": 2,
                "stride": 2,
                "norm_layer": "DSBatchNorm2d",
                "has_gate": True,
            },
            Stage,
        ),
    ],
)
def test_authors_arguments_give_our_class(name, arguments, expected):
    state = LAYER.authors[name](arguments, {}).state_dict()
    assert type(from_authors(name, arguments, state)) is expected


def test_state_dict_of_other_widths_is_refused():
    state = SlimmableConv2d([4, 8], [6, 9], 1).state_dict()
    with pytest.raises(WeightsError, match="does not fit DSpwConv2d"):
        from_authors("DSpwConv2d", SIZES, state)


class DSConv2d(nn.Conv2d):
    """The attributes of an authors' instance: lists, and a choice that the program around it sets."""

    def __init__(self, in_channels_list, out_channels_list, kernel_size, **rest):
        super().__init__(in_channels_list[-1], out_channels_list[-1], kernel_size, **rest)
        self.in_channels_list, self.out_channels_list = in_channels_list, out_channels_list
        self.channel_choice = -1


class DSBatchNorm2d(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.out_channels_list, self.channel_choice = widths, -1
        entries = [nn.BatchNorm2d(width, affine=False) for width in widths[:-1]]
        self.aux_bn = nn.ModuleList([*entries, nn.BatchNorm2d(widths[-1])])


class DSLinear(nn.Linear):
    def __init__(self, widths, out_features):
        super().__init__(widths[-1], out_features)
        self.in_channels_list, self.out_channels_list, self.channel_choice = widths, [out_features], -1


class MultiHeadGate(nn.Module):
    def __init__(self, widths, gates):
        super().__init__()
        reduced = make_divisible(widths[-1] / 4, 1)
        self.attn_act_fn, self.channel_gate_num, self.channel_choice = torch.sigmoid, gates, None
        self.conv_reduce = DSConv2d(widths, [reduced], 1)
        self.act1 = nn.ReLU()
        self.conv_expand = DSConv2d([reduced], widths, 1)
        if gates > 1:
            self.gate = nn.Sequential(DSConv2d([reduced], [gates], 1, bias=False))


class DSDepthwiseSeparable(nn.Module):
    def __init__(self, ins, outs, stride, *, has_gate):
        super().__init__()
        self.in_channels_list, self.out_channels_list, self.kernel_size = ins, outs, 3
        self.has_residual, self.has_gate, self.channel_choice = False, has_gate, -1
        self.conv_dw = DSConv2d(ins, ins, 3, stride=stride, groups=ins[-1], bias=False)
        self.bn1, self.act1 = DSBatchNorm2d(ins), nn.SiLU()
        self.gate = MultiHeadGate(ins, 4 if has_gate else 0)
        self.conv_pw = DSConv2d(ins, outs, 1, bias=False)
        self.bn2, self.act2 = DSBatchNorm2d(outs), nn.SiLU()


class DSStage(nn.Module):
    def __init__(self, ins, outs, layer_num, stride, *, has_gate):
        super().__init__()
        self.stage_type, self.layer_num, self.channel_choice = "ds", layer_num, -1
        self.first_block = DSDepthwiseSeparable(ins, outs, stride, has_gate=has_gate)
        rest = [DSDepthwiseSeparable(outs, outs, 1, has_gate=False) for _ in range(layer_num - 1)]
        self.residual_blocks = nn.Sequential(*rest)


def make_foreign_net(arguments) -> nn.Module:
    class DSNet(nn.Module):
        def __init__(self, num_classes, choices_cfg):
            super().__init__()
            widths = choices_cfg[0][0]
            self.conv_stem = DSConv2d([3], widths, 3, stride=choices_cfg[0][3], bias=False)
            self.bn1, self.act1 = DSBatchNorm2d(widths), nn.SiLU()
            self.blocks = nn.ModuleList()
            for outs, layers, _, stride, _, has_gate in choices_cfg[1:-1]:
                self.blocks.append(DSStage(widths, outs, layers, stride, has_gate=has_gate))
                widths = outs
            self.has_head = False
            self.classifier = DSLinear(widths, num_classes)

    return DSNet(arguments["num_classes"], arguments["choices_cfg"])


def load_foreign_net() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """Return the authors' structure with the golden weights, its input and its output by the gate."""
    with safe_open(GOLDEN, "pt") as file:
        arguments = json.loads(file.metadata()["constructor"])
        state = {key[6:]: file.get_tensor(key) for key in file.keys() if key.startswith("param.")}  # noqa: SIM118
        x, y = file.get_tensor("input.x"), file.get_tensor("output64.y_dynamic_argmax")
    net = make_foreign_net(arguments)
    net.load_state_dict(state)
    return net.double().eval(), x.double(), y


@torch.no_grad()
def test_instance_of_the_authors_network_becomes_ours():
    foreign, x, expected = load_foreign_net()
    ours = LAYER.recognise["DSNet"](foreign)
    assert type(ours) is DSNet
    assert not ours.training
    assert_equal(ours(x), expected)
    assert_equal(canonicalize(ours)(x), expected)
    with torch.no_grad():
        foreign.classifier.bias.add_(1)
    assert_equal(ours(x), expected)


def change_activation(net):
    net.blocks[1].first_block.act2 = nn.ReLU()


def change_eps(net):
    net.blocks[2].residual_blocks[0].bn1.aux_bn[-1].eps = 0.01


def change_attention(net):
    net.blocks[0].first_block.gate.attn_act_fn = "tanh"


def change_attention_function(net):
    net.blocks[0].first_block.gate.attn_act_fn = F.hardsigmoid


def change_dilation(net):
    net.blocks[0].first_block.conv_dw.dilation = (2, 2)


def change_shortcut(net):
    net.blocks[0].first_block.has_residual = True


def drop_stem(net):
    del net.conv_stem


def change_ratio(net):
    net.blocks[0].first_block.gate.conv_reduce.out_channels = 12


def add_weights(net):
    net.extra = nn.Conv2d(3, 3, 1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (change_activation, r"activations differ: \['ReLU', 'SiLU'\]"),
        (change_eps, r"norms \(eps\) differ"),
        (change_attention, "'str' object is not callable"),
        (change_attention_function, "attention of a block is no sigmoid"),
        (change_dilation, "a block is dilated"),
        (change_shortcut, "shortcuts differ"),
        (drop_stem, "conv_stem"),
        (change_ratio, "no se_ratio gives the reduced widths"),
        (add_weights, "Error.* in loading state_dict"),
    ],
)
def test_network_of_another_structure_is_refused(change, reason):
    foreign, _, _ = load_foreign_net()
    change(foreign)
    with pytest.raises(ModelError, match=f"a DSNet is not the authors' network: .*{reason}.*from_authors"):
        LAYER.recognise["DSNet"](foreign)


@pytest.mark.parametrize(
    "module",
    [
        DSConv2d([4, 6], [6, 9], 3),
        DSConv2d([3], [6, 9], 3),
        DSBatchNorm2d([4, 6]),
        DSLinear([4, 6], 3),
        MultiHeadGate([4, 6], 4),
        DSDepthwiseSeparable([4, 6], [6, 9], 1, has_gate=False),
        DSStage([4, 6], [6, 9], 1, 1, has_gate=True),
    ],
    ids=lambda module: type(module).__name__,
)
def test_slimmable_layer_alone_is_refused_with_what_to_do(module):
    name = type(module).__name__
    with pytest.raises(ModelError, match=rf"a {name} stands in a network that is no DSNet.*Deploy the whole"):
        LAYER.recognise[name](module)


@pytest.mark.parametrize("name", sorted(LAYER.recognise))
def test_ordinary_module_of_the_same_name_is_left_alone(name):
    """Depthwise separable convolutions, for one, are often called DSConv2d."""
    ordinary = type(name, (nn.Sequential,), {})(nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 6, 1))
    assert LAYER.recognise[name](ordinary) is None


def test_layer_of_a_single_width_is_left_alone():
    assert LAYER.recognise["DSConv2d"](DSConv2d([3], [6], 3)) is None
