"""Weights that a network computes from its parameters alone: stored, whatever torch computes them with."""

from __future__ import annotations

import pytest
import strangers
import torch
from strangers import NORMED, C
from torch import nn

from edgedyn import inspect
from edgedyn.errors import ModelError
from edgedyn.layers import canonicalize, store_weights


def trained(kind: str) -> nn.Module:
    """Return a network after steps of an optimizer: the values that hooks left behind are old."""
    torch.manual_seed(3)
    net = strangers.normed(kind)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.rand(2, 3, 9, 7)).square().mean().backward()
        optimizer.step()
    return net.eval()


@pytest.mark.parametrize("kind", NORMED)
def test_weights_are_stored_and_the_outputs_stay(kind):
    net, x = trained(kind), torch.rand(2, 3, 9, 7)
    keys = net.state_dict().keys()
    canonical = canonicalize(net)
    with torch.no_grad():
        torch.testing.assert_close(canonical(x), net(x), rtol=1e-5, atol=1e-6)
    assert net.state_dict().keys() == keys  # the model itself is not changed
    layer = canonical.body[2]
    assert type(layer) is nn.Conv2d
    assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
    assert not layer._forward_pre_hooks
    assert not list(layer.buffers())


@pytest.mark.parametrize("kind", ["custom", "weight_norm_hook"])
def test_stored_in_place_gives_a_plain_layer(kind):
    net = store_weights(trained(kind))
    assert type(net.body[2]) is nn.Conv2d
    assert isinstance(net.body[2].weight, nn.Parameter)


def test_inspect_takes_a_network_with_old_hooks():
    assert inspect(trained("weight_norm_hook"), shape=(1, 3, 16, 16))["layers"] == []


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (lambda: strangers.hooked(strangers.conv(C, C)), r"body\.2 \(Conv2d\) computes its 'weight' .* hook"),
        (
            lambda: strangers.parametrized(strangers.conv(C, C), strangers.Noisy()),
            r"body\.2\.weight .* random",
        ),
    ],
    ids=["foreign hook", "random"],
)
def test_weight_that_cannot_be_stored_is_refused_by_name(layer, message):
    net = strangers.around(layer()).eval()
    with pytest.raises(ModelError, match=message):
        canonicalize(net)


def test_parametrization_that_raises_is_refused_with_its_line():
    net = strangers.around(strangers.parametrized(strangers.conv(C, C), strangers.Doubled())).eval()

    def fail(weight):
        raise ValueError("no weight")

    net.body[2].parametrizations.weight[0].forward = fail
    with pytest.raises(ModelError, match=r'ValueError: no weight \(at .*raise ValueError\("no weight"\)\)'):
        canonicalize(net)


def test_model_that_cannot_be_copied_is_refused():
    import threading

    net = strangers.around(strangers.conv(C, C)).eval()
    net.lock = threading.Lock()
    with pytest.raises(ModelError, match="Residual cannot be copied: TypeError"):
        canonicalize(net)
