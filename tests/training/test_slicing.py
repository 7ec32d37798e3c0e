"""The MalleConv for training against the reference: values, gradients, keys."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from edgedyn.layers.malleconv import MalleConv
from edgedyn.training.slicing import FastMalleConv, speed_up

CASES = [
    (MalleConv(8, 12), (2, 8, 16, 24)),
    (MalleConv(8, 8, groups=2, scale=2, num_blocks=2), (2, 8, 21, 14)),
]


def make_layer(layer: MalleConv) -> MalleConv:
    torch.manual_seed(4)
    layer = copy.deepcopy(layer).double()
    for p in layer.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return layer


@pytest.mark.parametrize(("layer", "shape"), CASES)
def test_values_and_gradients_are_those_of_the_reference(layer, shape):
    reference = make_layer(layer)
    fast = FastMalleConv(copy.deepcopy(reference))
    results = []
    for module in (reference, fast):
        x = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        y = module(x.requires_grad_())
        (y * torch.linspace(0, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
        results.append([y, x.grad, *(p.grad for p in module.parameters())])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_parameters_keys_and_mode_of_a_network_stay():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), MalleConv(8, 8)).train()
    before = dict(net.named_parameters())
    fast = speed_up(net)
    assert isinstance(fast[1], FastMalleConv)
    assert fast.training
    assert fast[1].training
    assert dict(fast.named_parameters()).keys() == before.keys()
    assert all(p is before[name] for name, p in fast.named_parameters())
