"""MalleNet: its size, its padding, and any image size in, the same out."""

from __future__ import annotations

import importlib

import numpy as np
import pytest
import torch

from edgedyn import models
from edgedyn.errors import ModelError
from edgedyn.models.mallenet import PAD_MULTIPLE, WIDTHS, MalleNet, pad_reflect


def make_net(**arguments) -> MalleNet:
    torch.manual_seed(1)
    net = MalleNet(4, **arguments).eval()
    for module in net.modules():
        if hasattr(module, "gate"):
            module.gate.data.fill_(0.5)  # as trained: at 0 the dynamic layers would do nothing
    return net


def ramp(height: int, width: int, channels: int = 3) -> torch.Tensor:
    """Return an image whose every value occurs once."""
    return torch.arange(2 * channels * height * width, dtype=torch.float64).view(2, channels, height, width)


@pytest.mark.parametrize(("size", "million"), [("s", 0.66), ("m", 2.17), ("l", 4.53), ("xl", 7.74)])
def test_parameter_count_is_the_stated_one(size, million):
    with torch.device("meta"):
        count = sum(p.numel() for p in MalleNet(size).parameters())
        same = sum(p.numel() for p in MalleNet(WIDTHS[size]).parameters())
    assert round(count / 1e6, 2) == million
    assert same == count


@pytest.mark.parametrize("colors", [1, 3])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (33, 47), (32, 64)], ids=lambda s: f"{s[0]}x{s[1]}")
def test_output_has_the_size_of_the_input(size, colors):
    net = make_net(colors=colors)
    x = torch.rand(2, colors, *size)
    with torch.no_grad():
        y = net(x)
    assert y.shape == x.shape
    assert y.isfinite().all()
    assert not torch.equal(y, x)


def test_image_is_padded_by_reflection_and_cut_again():
    net = make_net()
    x = torch.rand(1, 3, 33, 47)
    padded = torch.from_numpy(np.pad(x.numpy(), ((0, 0), (0, 0), (0, 31), (0, 17)), mode="reflect"))
    with torch.no_grad():
        assert torch.equal(net(x), net(padded)[:, :, :33, :47])


def test_image_of_whole_multiples_is_not_padded():
    x = ramp(PAD_MULTIPLE, 2 * PAD_MULTIPLE)
    assert pad_reflect(x, PAD_MULTIPLE) is x


@pytest.mark.parametrize("size", [(33, 47), (17, 64), (31, 2), (2, 3), (5, 1), (1, 5), (1, 1)], ids=str)
def test_padding_equals_numpy_reflection(size):
    """Also where one reflection does not reach far enough, and where an axis of one pixel is repeated."""
    x = ramp(*size)
    bottom, right = -size[0] % 32, -size[1] % 32
    expected = np.pad(x.numpy(), ((0, 0), (0, 0), (0, bottom), (0, right)), mode="reflect")
    np.testing.assert_array_equal(pad_reflect(x, 32).numpy(), expected)


def test_network_removes_what_its_tail_says():
    net = make_net()
    with torch.no_grad():
        net.tail.weight.zero_()
        net.tail.bias.copy_(torch.tensor([0.5, 0.25, 0.125]))
        x = torch.rand(2, 3, 32, 64)
        assert torch.equal(net(x), x - net.tail.bias.view(1, 3, 1, 1))


@pytest.mark.parametrize("width", ["huge", 0, -4, ""])
def test_unknown_width_is_refused_with_the_known_ones(width):
    with pytest.raises(ModelError, match=rf"width={width!r}; expected .*\['l', 'm', 's', 'xl'\]") as caught:
        MalleNet(width)
    assert caught.value.exit_code == 4


def test_networks_are_found_by_file_name():
    assert "mallenet" in models.names()
    for name in models.names():
        assert callable(importlib.import_module(f"edgedyn.models.{name}").NETWORK)
