"""The slimmable denoisers: their sizes, their variants, and their programs in the phone's runtime."""

from __future__ import annotations

import pytest
import torch
from small_int8 import quantize_program
from small_slimmable import assert_equal, fresh, noise
from torch import nn

from edgedyn import ops, pipeline, quantize, targets
from edgedyn.errors import ModelError
from edgedyn.layers import canonicalize
from edgedyn.models import dsnet, slimmable_dncnn, slimmable_unet
from edgedyn.recipe.keys import QuantizeSection

DNCNN = [(3, 4, 4), (4, 4, 6)]
UNET = [(3, 4, 4, 5, 4, 6, 5, 6, 5, 4, 3), (4, 4, 5, 5, 6, 6, 7, 8, 5, 6, 4)]
MAKERS = {
    "dncnn": lambda **rest: slimmable_dncnn.gated_dncnn(DNCNN, gate_features=4, **rest),
    "unet": lambda **rest: slimmable_unet.gated_unet(UNET, gate_features=4, **rest),
}
every_network = pytest.mark.parametrize("name", MAKERS)


def make_net(name, **arguments):
    torch.manual_seed(1)
    return fresh(MAKERS[name](**arguments))


@pytest.mark.parametrize(
    ("make", "million"), [(slimmable_dncnn.NETWORK, 0.32), (slimmable_unet.NETWORK, 0.44)]
)
def test_parameter_count_is_the_stated_one(make, million):
    with torch.device("meta"):
        net = make()
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == million
    assert len(net.network.configurations) == net.gate.outputs == 4


def test_default_configurations_differ_by_more_than_one_ratio():
    for configurations in (slimmable_dncnn.CONFIGURATIONS, slimmable_unet.CONFIGURATIONS):
        narrow, *_, wide = configurations
        assert len({a / b for a, b in zip(narrow, wide, strict=True)}) > 1


@every_network
@pytest.mark.parametrize("choice", [0, 1])
@torch.no_grad()
def test_static_variant_equals_the_network_in_that_configuration(name, choice):
    net = make_net(name).network
    x = noise(2, 3, 13, 18)
    y = net(x, choice)
    assert y.shape == x.shape
    assert (y - x).abs().max() > 0.01
    static = net.static(choice)
    assert_equal(static(x), y)
    assert {type(m) for m in static.modules() if isinstance(m, nn.Conv2d)} == {nn.Conv2d}
    assert_equal(canonicalize(make_net(name))(x), make_net(name)(x))


@every_network
@pytest.mark.parametrize("colors", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (9, 30), (16, 24)], ids=str)
@torch.no_grad()
def test_output_has_the_size_of_the_input(name, colors, size):
    x = noise(2, colors, *size)
    y = make_net(name, colors=colors)(x)
    assert y.shape == x.shape
    assert y.isfinite().all()


@every_network
@torch.no_grad()
def test_network_removes_what_its_tail_says(name):
    net = make_net(name)
    net.network.tail.weight.zero_()
    net.network.tail.bias.copy_(torch.tensor([0.5, 0.25, -0.125]))
    x = noise(2, 3, 9, 14)
    assert_equal(net(x), x - net.network.tail.bias.view(1, 3, 1, 1))


@torch.no_grad()
def test_unet_pads_to_multiples_of_8_by_reflection():
    net = make_net("unet").network
    x = noise(1, 3, 12, 17)
    padded = nn.functional.pad(x, (0, 7, 0, 4), mode="reflect")
    assert_equal(net(x, 1), net(padded, 1)[:, :, :12, :17])


@torch.no_grad()
def test_unet_joins_the_prefix_of_each_input():
    """Channels that a narrow configuration lacks are zero in the wide weight, on both sides of the join."""
    unit = make_net("unet").network.units["up_0"]
    below, same = noise(2, 4, 6, 7), noise(2, 4, 6, 7) + 1
    narrow = unit.conv((same, below), 3)
    wide = torch.cat([same, below, torch.zeros(2, 2, 6, 7, dtype=torch.float64)], 1)
    assert unit.conv.in_channels_lists == [[4], [4, 6]]
    assert_equal(narrow, nn.functional.conv2d(wide, unit.conv.weight[:3], padding=1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: slimmable_dncnn.NETWORK(colors=2), "SlimmableDnCNN got colors=2"),
        (lambda: slimmable_unet.NETWORK(colors=2), "SlimmableUNet got colors=2; expected 3 or 1"),
        (lambda: slimmable_dncnn.NETWORK([]), "SlimmableDnCNN got .*vectors of at least 2"),
        (lambda: slimmable_dncnn.NETWORK([(4,), (8,)]), "SlimmableDnCNN got .*vectors of at least 2"),
        (lambda: slimmable_dncnn.NETWORK([DNCNN[1], DNCNN[0]]), r"not increasing \(head gets narrower\)"),
        (lambda: slimmable_unet.NETWORK([UNET[0]]), "SlimmableUNet got 1 configurations"),
        (lambda: slimmable_unet.NETWORK(DNCNN), "expected 11 positive .* down_0_0, down_0_1, .*, up_0"),
        (lambda: slimmable_unet.NETWORK([UNET[1], UNET[0]]), r"not increasing \(down_0_0 gets narrower\)"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(make, message):
    with pytest.raises(ModelError, match=message):
        make()


def make_dsnet():
    stages = [[[4, 6], 1, 3, 1, "ds", False], [[6, 8], 1, 3, 2, "ir", True]]
    torch.manual_seed(1)
    return fresh(dsnet.NETWORK(5, 3, [[[4], 1, 3, 2], *stages, []], act_layer="swish", gate_outputs=2))


def makers():
    """Yield every network in both precisions; lowering is slow, so one stands for all in the short run."""
    networks = {"dncnn": lambda: make_net("dncnn"), "unet": lambda: make_net("unet"), "dsnet": make_dsnet}
    for name, make in networks.items():
        for precision in ("fp32", "int8"):
            quick = (name, precision) == ("dncnn", "int8")
            marks = () if quick else (pytest.mark.slow,)
            yield pytest.param(make, precision, id=f"{name}-{precision}", marks=marks)


@pytest.mark.parametrize(("make", "precision"), makers())
def test_router_and_variant_run_on_the_phone_as_one_delegate(make, precision, tmp_path):
    routed = canonicalize(make()).float()
    x = noise(1, 3, 16, 24).float()
    with torch.no_grad():
        carried = routed.route(x)[1]
    target = targets.load("executorch")
    for module, inputs in ((routed.router, (x,)), (routed.variants["w1"], carried)):
        program = pipeline.capture(module, inputs)
        assert ops.choose_forms(program, target, {}) == {}
        if precision == "fp32":
            converted = quantize.to_float(program, inputs, "fp32")
        else:
            converted = quantize_program(
                program, inputs, scheme=target.int8, section=QuantizeSection(), samples=[inputs]
            )
        artifact = target.lower({"forward": converted.program}, tmp_path, precision)
        assert artifact.facts["delegates"] == 1
        assert artifact.facts["portable"] == {}
        outputs = target.load(tmp_path / artifact.programs["forward"])(*(tensor.numpy() for tensor in inputs))
        with torch.no_grad():
            expected = module(*inputs)
        expected = expected if isinstance(expected, tuple) else (expected,)
        # fp32: sums of at most 81 products in another order; int8: a few per cent, the steps of one image
        bound = 1e-5 if precision == "fp32" else 0.1
        for y, true in zip(outputs, expected, strict=True):
            assert (torch.from_numpy(y) - true).abs().max() <= bound * true.abs().max()
