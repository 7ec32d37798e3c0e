"""Channel equalization: the network computes the same, and its channels share one range."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgedyn.quantize.fold import fold
from edgedyn.quantize.observe.statistics import channel_maxima, look
from edgedyn.quantize.rescale.passes import find_places, rescale_channels
from edgedyn.quantize.rescale.place import Place
from edgedyn.recipe.keys import QuantizeSection

ONLY = {"equalize_outputs": False, "equalize_inputs": False}


def spread(net: nn.Sequential) -> nn.Sequential:
    """Give the channels between convolutions ranges that differ by orders of magnitude."""
    with torch.no_grad():
        for layer in net:
            if isinstance(layer, nn.Conv2d):
                layer.weight *= torch.logspace(0, 2, layer.out_channels)[:, None, None, None]
    return net.eval()


NETS = {
    "relu": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)),
    "prelu": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.Conv2d(8, 4, 3, bias=False)),
    "nothing": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 4, 1)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 16, 3, groups=8)),
    "three": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 4, 3)
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_channels_get_one_range_and_the_network_stays(name):
    torch.manual_seed(1)
    net, x = spread(NETS[name]()).double(), torch.randn(2, 3, 12, 13).double()
    samples = [(part,) for part in x.split(1)]
    module = fold(torch.export.export(net, samples[0]))
    pairs = find_pairs(module)
    assert len(pairs) == (2 if name == "three" else 1)
    expected, before = net(x), ranges(module, pairs, samples)
    equalize(module, samples, equalize_dense=3)
    y = torch.cat([module(*sample) for sample in samples])
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))
    after = ranges(module, pairs, samples)
    most = 32 if name == "depthwise" else 3  # of its range a channel is lifted to all of it, or this often
    for pair in pairs:
        expected = (shares(before, pair) * most).clamp(max=1)
        torch.testing.assert_close(shares(after, pair), expected)
        for node in quantized(pair):  # the range of neither grows
            assert after[node].max() <= before[node].max() * (1 + 1e-12)


def find_pairs(module) -> list[Place]:
    return [place for _, place in find_places(module, QuantizeSection(**ONLY))]


def equalize(module, samples, **values) -> None:
    places = find_places(module, QuantizeSection(**ONLY, **values))
    nodes = {node for _, place in places for node in place.activations}
    rescale_channels(module, places, channel_maxima(module, nodes, samples))


def quantized(pair: Place) -> set[torch.fx.Node]:
    """Return the INT8 activations of a pair: behind a fused ReLU, and on both sides of a PReLU."""
    first, between = pair.layers[0], pair.layers[1].args[0]
    is_fused = between.target == torch.ops.aten.relu.default or "relu_" in str(between.target)
    return {between} if is_fused else {first, between}


def shares(largest: dict[torch.fx.Node, Tensor], pair: Place) -> Tensor:
    """Return the share of the range that each channel takes, in the activation where it is larger."""
    return torch.stack([largest[node] / largest[node].max() for node in quantized(pair)]).amax(0)


def ranges(module, pairs, samples) -> dict[torch.fx.Node, Tensor]:
    """Return the largest absolute value of each channel of the INT8 activations."""
    found: dict[torch.fx.Node, Tensor] = {}
    nodes = {node for pair in pairs for node in quantized(pair)}
    for sample in samples:
        look(module, nodes, sample, lambda n, y: found.setdefault(n, []).append(y.abs().amax((0, 2, 3))))
    return {node: torch.stack(values).amax(0) for node, values in found.items()}


def test_channel_that_a_prelu_makes_small_does_not_take_the_steps_in_front_of_it():
    torch.manual_seed(4)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.PReLU(4, init=0.05), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        net[0].bias[0] = -9  # always negative: as large as any in front of the PReLU, small behind it
    x = torch.rand(1, 3, 6, 7)
    module = fold(torch.export.export(net, (x,)))
    pairs = find_pairs(module)
    before = ranges(module, pairs, [(x,)])
    equalize(module, [(x,)])
    after = ranges(module, pairs, [(x,)])
    first = pairs[0].layers[0]
    assert after[first].max() <= before[first].max() * (1 + 1e-6)


class Joined(nn.Module):
    """Activations with further readers, or behind a function that is not homogeneous."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 1) for _ in range(4))
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.a(x))
        y = y + self.b(y)
        y = self.c(nn.functional.relu6(self.d(y)))
        return self.grouped(y)


def test_activations_with_other_readers_or_that_do_not_scale_are_left_alone():
    module = fold(torch.export.export(Joined().eval(), (torch.randn(1, 4, 5, 6),)))
    assert find_pairs(module) == []


def test_dead_channel_takes_no_more_than_the_limit():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        net[0].weight[1] = 0
        net[0].bias[1] = -1
    x = torch.rand(1, 3, 6, 7)
    module = fold(torch.export.export(net, (x,)))
    with torch.no_grad():
        expected = net(x)
        equalize(module, [(x,)])
        torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-6)
    weights = [p for name, p in module.named_parameters() if "weight" in name and p.shape[0] == 2]
    assert torch.isfinite(weights[-1]).all()
