"""DDS-Net: the gate picks a configuration for each sample, and a routed program does the same."""

from __future__ import annotations

import copy

import pytest
import torch
from small_slimmable import GATED, STEM, Chain, assert_equal, fresh, make_gated, make_net, noise
from torch import nn

from edgedyn.checkpoints.authors import from_authors
from edgedyn.errors import ModelError
from edgedyn.layers import RoutedModel, canonicalize, find_dynamic
from edgedyn.layers.ddsnet import LAYER
from edgedyn.layers.ddsnet.blocks import BlockOptions, Stage
from edgedyn.layers.ddsnet.dsnet import MBNET_14, DSNet
from edgedyn.layers.ddsnet.gates import SlimmableGate, make_activation
from edgedyn.layers.ddsnet.networks import GatedNetwork, ImageGate, check_configurations
from edgedyn.layers.malleconv import CanonicalMalleConv, MalleConv


def tell_apart(gate: SlimmableGate, run) -> None:
    """Make output k of a gate 1 for sample k of the batch and 0 for the others before it."""
    seen = []
    handle = gate.act1.register_forward_hook(lambda module, inputs, r: seen.append(r))
    run()
    handle.remove()
    (weight,) = gate.gate.parameters()
    weight.copy_(torch.linalg.pinv(seen[0][: gate.outputs, :, 0, 0]).t()[:, :, None, None])


@pytest.mark.parametrize("example", range(2))
def test_examples_are_routed_to_several_configurations(example):
    module, (x,) = list(LAYER.examples())[example]
    with torch.no_grad():
        logits = canonicalize(module).route(x)[0]
    assert len(set(logits.argmax(1).tolist())) > 1


@torch.no_grad()
def test_network_routes_each_sample_of_a_batch_by_argmax():
    net = make_net(noskip=True, se_ratio=1.0)
    x = noise(6, 3, 14, 17) + 3 * noise(6, 3, 1, 1)
    tell_apart(net.stages[0].first_block.gate, lambda: net.logits(x))
    choices = net.logits(x).argmax(1).tolist()
    assert choices[:4] == [0, 1, 2, 3]
    y = net(x)
    for sample, choice in enumerate(choices):
        assert_equal(y[sample : sample + 1], net(x[sample : sample + 1], choice))
    routed = canonicalize(net)
    assert type(routed) is RoutedModel
    assert list(routed.variants) == ["w0", "w1", "w2", "w3"]
    logits, carried = routed.route(x)
    assert_equal(logits, net.logits(x))
    assert_equal(routed(x), y)
    for choice, variant in enumerate(routed.variants.values()):
        assert_equal(variant(*carried), net(x, choice))
        assert_equal(net.static(choice)(x), net(x, choice))


@pytest.mark.parametrize("noskip", [True, False])
def test_router_carries_the_blocks_input_only_for_a_shortcut(noskip):
    carried = canonicalize(make_net(noskip=noskip)).route(noise(1, 3, 14, 17))[1]
    assert len(carried) == (1 if noskip else 2)


def test_configurations_are_one_channel_number_a_list():
    net = make_net()
    assert net.configurations == tuple((4, w, v) for w, v in [(8, 8), (12, 12), (16, 16), (20, 24)])
    assert net.largest == (6, 20, 24)


@torch.no_grad()
def test_network_without_a_gate_runs_at_fixed_widths_and_is_not_routed():
    net = make_net([STEM, [[8, 12], 2, 3, 2, "ds", False], []], noskip=True)
    assert net.configurations == ((4, 8), (6, 12))
    x = noise(2, 3, 9, 11)
    assert_equal(net.static(1)(x), net.run_widths(x, net.largest))
    with pytest.raises(ModelError, match=r"has 0 gated stages; expected 1.*static\(choice\)"):
        canonicalize(net)


def test_two_gates_are_refused():
    net = make_net([STEM, GATED, [[8, 12, 16, 20], 1, 3, 1, "ds", True], []], noskip=True)
    with pytest.raises(ModelError, match="has 2 gated stages; expected 1"):
        net(noise(1, 3, 9, 11))


def test_published_network_runs_at_fixed_widths_but_not_by_its_gate():
    state = DSNet(7, 3, MBNET_14, act_layer="swish", noskip=True).state_dict()
    net = from_authors("slimmable_mbnet_v1_bn_uniform", {"num_classes": 7}, state)
    assert len(net.configurations) == 14
    with torch.no_grad():
        assert net(torch.rand(1, 3, 33, 40), 13).shape == (1, 7)
    for run in (canonicalize, lambda net: net(torch.rand(1, 3, 33, 40))):
        with pytest.raises(ModelError, match=r"gate of DSNet has 4 outputs for 14 configurations.*that many"):
            run(net)


@torch.no_grad()
def test_gated_network_routes_each_sample_by_argmax():
    net = make_gated()
    x = noise(8, 3, 11, 14) * torch.linspace(0.1, 5, 8).view(8, 1, 1, 1).double()
    choices = net.gate(x).argmax(1).tolist()
    assert len(set(choices)) > 1
    y = net(x)
    for sample, choice in enumerate(choices):
        assert_equal(y[sample : sample + 1], net.network(x[sample : sample + 1], choice))
    routed = canonicalize(net)
    assert list(routed.variants) == ["w0", "w1", "w2"]
    assert_equal(routed(x), y)


@torch.no_grad()
def test_configurations_that_share_a_width_have_statistics_of_their_own():
    net = make_gated().network
    x = noise(2, 3, 11, 14)
    assert [entry.num_features for entry in net.first.norm.aux_bn] == [4, 4, 10]
    assert (net.first(0, x) - net.first(1, x)).abs().max() > 0.01
    for choice in range(3):
        assert_equal(net.static(choice)(x), net(x, choice))


class CarryingGate(nn.Module):
    outputs = 3

    def __init__(self):
        super().__init__()
        self.gate = ImageGate(3, features=8)

    def forward(self, x):
        return self.gate(x), 2 * x


@torch.no_grad()
def test_network_takes_what_its_gate_carries():
    net = make_gated()
    carrying = GatedNetwork(CarryingGate(), net.network).double().eval()
    carrying.gate.gate = net.gate
    x = noise(4, 3, 11, 14)
    choices = net.gate(x).argmax(1).tolist()
    expected = torch.cat([net.network(2 * x[k : k + 1], c) for k, c in enumerate(choices)])
    assert_equal(carrying(x), expected)
    assert_equal(canonicalize(carrying)(x), expected)


@pytest.mark.parametrize("outputs", [2, 4])
def test_gate_of_another_number_of_outputs_is_refused(outputs):
    with pytest.raises(ModelError, match=f"gate of Chain has {outputs} outputs for 3 configurations"):
        make_gated(outputs)


@pytest.mark.parametrize(
    ("configurations", "message"),
    [
        ([(4, 6)], r"Chain got 1 configurations; expected at least 2"),
        ([], r"Chain got 0 configurations"),
        ([(4, 6), (4, 8, 8)], r"configuration 1 \[4, 8, 8\]; expected 2 positive .*first, second"),
        ([(4, 6), (0, 8)], r"configuration 1 \[0, 8\]; expected 2 positive whole"),
        ([(4, 6), (5.5, 8)], r"configuration 1 \[5\.5, 8\]"),
        ([(4, 6), (8, 5)], r"\[4, 6\] and \[8, 5\], which are not increasing \(second gets narrower\)"),
        ([(4, 6), (4, 6)], r"not increasing \(they are equal\).*Sort them"),
        ([(4, 6), (8, 8), (4, 6)], r"configurations 1 and 2, .*first gets narrower"),
    ],
)
def test_configurations_that_do_not_grow_are_refused(configurations, message):
    with pytest.raises(ModelError, match=message):
        check_configurations(configurations, ["first", "second"], "Chain")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_activation("gelu"), "activation 'gelu' is unknown; expected one of hardswish, relu"),
        (lambda: SlimmableGate([4], attn_act_fn="softmax"), "attention 'softmax' is unknown"),
        (lambda: Stage("er", [4], [6], 1, BlockOptions()), "type 'er' and 1 blocks; expected ds or ir"),
        (lambda: Stage("ds", [4], [6], 0, BlockOptions()), "type 'ds' and 0 blocks"),
        (lambda: DSNet(5, 3, [[[4], 2, 3, 2], GATED, []]), "stem of choices_cfg has 2 blocks"),
        (lambda: DSNet(5, 3, [STEM, []]), r"rows of \[4, 0\] entries; expected 4 \(stem\), 6 for each stage"),
        (lambda: DSNet(5, 3, [STEM, GATED[:5], []]), r"rows of \[4, 5, 0\] entries"),
        (lambda: DSNet(5, 3, []), r"rows of \[\] entries"),
        (
            lambda: DSNet(5, 3, [STEM, GATED, [[8, 12], 1, 3, 1, "ds", False], []]),
            r"from the gated one on have \[4, 2\] widths",
        ),
    ],
)
def test_unknown_structure_is_refused(make, message):
    with pytest.raises(ModelError, match=message):
        make()


@pytest.mark.parametrize("make", [make_gated, make_net])
def test_gated_network_inside_another_is_refused(make):
    model = nn.Sequential(nn.Identity(), nn.Sequential(make())).eval()
    with pytest.raises(
        ModelError, match=r"1\.0 \(\w+\) becomes a routed program.*found it inside Sequential"
    ):
        canonicalize(model)


@pytest.mark.parametrize("make", [make_gated, make_net])
def test_hooks_anywhere_in_a_gated_network_are_refused(make):
    model = make()
    norm = next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d))
    norm.register_forward_hook(lambda *args: None)
    with pytest.raises(ModelError, match=r"aux_bn\.0 \(BatchNorm2d\) carries forward hooks.*Remove them"):
        canonicalize(model)


def test_dynamic_layer_in_a_variant_is_rewritten_too():
    class Ending(Chain):
        def __init__(self, configurations):
            super().__init__(configurations)
            self.end = MalleConv(4, 4, scale=2, num_blocks=1)

        def forward(self, x, choice):
            return self.end(super().forward(x, choice))

        def static(self, choice):
            return nn.Sequential(super().static(choice), copy.deepcopy(self.end))

    net = fresh(GatedNetwork(ImageGate(2, features=8), Ending([(4, 6), (6, 8)])))
    routed = canonicalize(net)
    assert not find_dynamic(routed)
    assert sum(isinstance(m, CanonicalMalleConv) for m in routed.modules()) == 2
    x = noise(2, 3, 16, 24)
    with torch.no_grad():
        assert_equal(routed(x), net(x))
