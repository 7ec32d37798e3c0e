"""Routed programs: each sample goes to its own variant, by argmax or by overflow."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from edgedyn.errors import ModelError
from edgedyn.layers import RoutedModel


class Scale(nn.Module):
    """Multiply by a number that identifies the variant, and record its inputs."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor
        self.calls = []

    def forward(self, *inputs):
        self.calls.append(tuple(x.shape for x in inputs))
        return inputs[0] * self.factor


class MeanGate(nn.Module):
    """Logits that are largest at 0 for means below 1, at 1 from there to 2, at 2 above."""

    def __init__(self, outputs: int = 3):
        super().__init__()
        self.outputs = outputs

    def forward(self, x):
        place = x.mean((1, 2, 3)).floor().clamp(0, 2).long()
        return nn.functional.one_hot(place, self.outputs).to(x.dtype)


class Trunk(nn.Module):
    """A gate that carries two feature maps."""

    def forward(self, x):
        return MeanGate()(x), x + 10, x[:, :, ::2]


class FirstRows(nn.Module):
    """A capacity variant that doubles the first two positive rows of an image; it has no room for more."""

    capacity = 2

    def forward(self, x):
        positive = x.amax((1, 3)) > 0
        fits = positive & (positive.cumsum(1) <= self.capacity)
        return torch.where(fits[:, None, :, None], 2 * x, x), (positive.sum(1) - self.capacity).clamp(min=0)


class EveryRow(nn.Module):
    """Double every positive row."""

    def forward(self, x):
        return torch.where(x.amax(3, keepdim=True) > 0, 2 * x, x)


def make_images(*means: float) -> torch.Tensor:
    base = torch.rand(len(means), 3, 4, 6, generator=torch.Generator().manual_seed(1)) * 0.2 - 0.1
    base = base - base.mean((1, 2, 3), keepdim=True)
    return base + torch.tensor(means).view(-1, 1, 1, 1)


def make_routed(router=None):
    return RoutedModel(router or MeanGate(), {"w0": Scale(2.0), "w1": Scale(3.0), "w2": Scale(5.0)})


def test_each_sample_runs_its_own_variant():
    x = make_images(2.5, 0.5, 1.5, 0.4)
    factors = torch.tensor([5.0, 2.0, 3.0, 2.0]).view(-1, 1, 1, 1)
    model = make_routed()
    assert model.rule == "argmax"
    assert torch.equal(model(x), x * factors)
    assert model.variants["w0"].calls == [((1, 3, 4, 6),)] * 2
    assert model.variants["w2"].calls == [((1, 3, 4, 6),)]


def test_variants_take_what_the_router_carries():
    x = make_images(0.5, 2.5)
    model = make_routed(Trunk())
    assert torch.equal(model(x), (x + 10) * torch.tensor([2.0, 5.0]).view(-1, 1, 1, 1))
    assert model.variants["w2"].calls == [((1, 3, 4, 6), (1, 3, 2, 6))]


def test_route_gives_logits_and_the_image_where_nothing_is_carried():
    x = make_images(0.5, 2.5)
    logits, carried = make_routed().route(x)
    assert logits.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert len(carried) == 1
    assert carried[0] is x


@pytest.mark.parametrize("outputs", [2, 4])
def test_logits_of_another_number_than_variants_are_refused(outputs):
    model = RoutedModel(_Fixed(outputs), {"w0": Scale(1.0), "w1": Scale(2.0), "w2": Scale(3.0)})
    message = rf"returns logits \(1, {outputs}\) for 3 variants \(w0, w1, w2\).*expected \(1, 3\).*output per"
    with pytest.raises(ModelError, match=message):
        model(make_images(0.5, 1.5))


class _Fixed(nn.Module):
    def __init__(self, outputs: int):
        super().__init__()
        self.outputs = outputs

    def forward(self, x):
        return torch.zeros(x.shape[0], self.outputs)


def test_fallback_runs_the_second_variant_only_for_samples_that_overflow():
    x = -torch.rand(3, 1, 5, 4, generator=torch.Generator().manual_seed(2))
    for sample, rows in enumerate([2, 3, 0]):
        x[sample, 0, :rows] *= -1
    model = RoutedModel(None, {"quick": FirstRows(), "dense": EveryRow()})
    dense_calls = []
    model.variants["dense"].register_forward_hook(lambda module, inputs, y: dense_calls.append(inputs[0]))
    assert model.rule == "fallback"
    assert torch.equal(model(x), EveryRow()(x))
    assert len(dense_calls) == 1
    assert torch.equal(dense_calls[0], x[1:2])
    assert not torch.equal(FirstRows()(x)[0], EveryRow()(x))


def test_fallback_has_no_router_to_ask():
    model = RoutedModel(None, {"quick": FirstRows(), "dense": EveryRow()})
    with pytest.raises(ModelError, match=r"no router; its rule is fallback"):
        model.route(torch.rand(1, 1, 5, 4))


@pytest.mark.parametrize(("router", "count"), [(True, 0), (True, 1), (False, 1), (False, 3)])
def test_wrong_number_of_variants_is_refused(router, count):
    variants = {f"w{k}": Scale(1.0) for k in range(count)}
    message = rf"got {count} variants .*at least 2, and without a router exactly 2"
    with pytest.raises(ModelError, match=message):
        RoutedModel(MeanGate() if router else None, variants)


def test_state_dict_holds_router_and_variants():
    model = RoutedModel(nn.Conv2d(3, 2, 1), {"w0": nn.Conv2d(3, 1, 1), "w1": nn.Conv2d(3, 1, 1)})
    owners = {key.rpartition(".")[0] for key in model.state_dict()}
    assert owners == {"router", "variants.w0", "variants.w1"}
