"""Rescale passes: one factor function, an order in which no place is taken twice, and places left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from edgedyn import ops
from edgedyn.quantize.fold import fold
from edgedyn.quantize.observe.statistics import channel_maxima
from edgedyn.quantize.plan import find_quantizable_layers
from edgedyn.quantize.rescale.output_rescale import RESCALE
from edgedyn.quantize.rescale.passes import PASSES, find_places, rescale_channels
from edgedyn.quantize.rescale.place import channel_factors
from edgedyn.recipe.keys import QuantizeSection

OFF = {"equalize": False, "equalize_outputs": False, "equalize_inputs": False, "generated": "float"}
KEYS = {
    "equalize": {"equalize": True},
    "equalize_taps": {"generated": "tap"},
    "rescale_outputs": {"equalize_outputs": True},
    "rescale_inputs": {"equalize_inputs": True},
}
ops.load_all()
INPUT = torch.rand(1, 3, 8, 16, generator=torch.Generator().manual_seed(5))


class Every(nn.Module):
    """A network with a place for every pass: a pair, a generated kernel, a float output and a float input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.second = nn.Conv2d(3, 3, 1), nn.PReLU(3), nn.Conv2d(3, 3, 1)
        self.kernels, self.body, self.tail = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 2, 1)
        with torch.no_grad():
            for layer in (self.first, self.second, self.kernels, self.body):
                layer.weight *= torch.logspace(0, 2, layer.out_channels)[:, None, None, None]
            self.tail.weight *= torch.logspace(0, 2, 3)[:, None, None]

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.act(self.first(x)))
        grid = self.kernels(x[:, :, ::4, ::4])
        y = y + torch.ops.edgedyn.sliced_depthwise2d(x, grid[:, :3], grid[:, 3:], 1)
        z = torch.sigmoid(self.body(y)) * torch.tensor([100.0, 1.0, 0.01])[:, None, None]
        return self.tail(z)


GENERATED = {"kernels.output"}
PLACES = {
    "equalize": [("first", "second")],
    "equalize_taps": [("kernels",)],
    "rescale_outputs": [("first",), ("second",), ("body",), ("tail",)],
    "rescale_inputs": [("first",), ("second",), ("kernels",), ("body",), ("tail",)],
}


def make() -> torch.fx.GraphModule:
    torch.manual_seed(6)
    return fold(torch.export.export(Every().eval(), (INPUT,)))


def named(module: torch.fx.GraphModule, **values) -> dict[str, list[tuple[str, ...]]]:
    names = {layer.node: layer.name for layer in find_quantizable_layers(module)}
    found: dict[str, list[tuple[str, ...]]] = {}
    for rescale_pass, place in find_places(module, QuantizeSection(**{**OFF, **values}), GENERATED):
        found.setdefault(rescale_pass.name, []).append(tuple(names[node] for node in place.layers))
    return found


def test_passes_stand_in_the_order_of_their_docstring():
    assert [rescale_pass.name for rescale_pass in PASSES] == list(KEYS)


@pytest.mark.parametrize("name", KEYS)
def test_a_key_of_the_recipe_turns_on_its_pass_alone(name):
    places = named(make(), **KEYS[name])
    assert list(places) == [name]
    assert places[name] == PLACES[name]


def test_places_with_outliers_need_no_key():
    places = find_places(make(), QuantizeSection(**OFF), GENERATED, for_outliers=True)
    assert {(found.name, place.for_outliers) for found, place in places} == {("rescale_inputs", True)}


def test_no_activation_is_taken_by_two_passes():
    module, values = make(), {key: x for keys in KEYS.values() for key, x in keys.items()}
    assert list(named(module, **values)) == list(KEYS)
    places = find_places(module, QuantizeSection(**values), GENERATED)
    nodes = [node for _, place in places for node in set(place.activations)]
    assert len(nodes) == len(set(nodes))
    found = named(module, **values)
    assert found["rescale_outputs"] == [("second",), ("body",), ("tail",)]  # equalize has first
    assert ("second",) not in found["rescale_inputs"]  # equalize has the activation in front of it


@pytest.mark.parametrize("generated", ["float", "tensor"])
def test_output_pass_leaves_generated_kernels_alone_whatever_their_setting(generated):
    places = named(make(), equalize_outputs=True, generated=generated)
    assert ("kernels",) not in places["rescale_outputs"]


def test_all_passes_together_leave_the_outputs_as_they_are():
    torch.manual_seed(6)
    net, x = Every().eval().double(), INPUT.double()
    module = fold(torch.export.export(net, (x,)))
    values = {key: value for keys in KEYS.values() for key, value in keys.items()}
    places = find_places(module, QuantizeSection(**values), GENERATED)
    nodes = {node for _, place in places for node in place.activations}
    factors, changed = rescale_channels(module, places, channel_maxima(module, nodes, [(x,)]))
    names = {layer.node: layer.name for layer in find_quantizable_layers(module)}
    assert {"first", "second", "kernels", "tail"} <= {names[node] for node in changed}
    assert {"kernels.output", "tail.input"} <= set(factors)
    assert sum(RESCALE in node.meta for node in module.graph.nodes) == len(factors)
    with torch.no_grad():
        expected = net(x)
        torch.testing.assert_close(module(x), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize("value", [0.0, float("nan")], ids=["zeros", "not_finite"])
def test_activation_without_a_range_is_left_alone(value):
    module = make()
    before = {name: p.clone() for name, p in module.named_parameters()}
    values = {key: x for keys in KEYS.values() for key, x in keys.items()}
    places = find_places(module, QuantizeSection(**values), GENERATED)
    nodes = [node for _, place in places for node in place.activations]
    maxima = {node: torch.full((node.meta["val"].shape[1],), value) for node in nodes}
    assert rescale_channels(module, places, maxima) == ({}, set())
    after = dict(module.named_parameters())
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_factors_bring_every_channel_to_the_largest_one_up_to_the_limit():
    factors = channel_factors([torch.tensor([4.0, 1.0, 0.5, 0.0])], limit=6.0)
    assert factors.tolist() == [1.0, 4.0, 6.0, 6.0]


def test_of_two_activations_the_larger_share_of_the_range_counts():
    first, second = torch.tensor([4.0, 1.0, 2.0]), torch.tensor([10.0, 5.0, 1.0])
    assert channel_factors([first, second], limit=100.0).tolist() == [1.0, 2.0, 2.0]
