"""Layers whose weight is a mix of constants become static layers, whatever the spelling; others stay."""

from __future__ import annotations

import pytest
import strangers
import torch
from strangers import FLOAT, MIXES, C, K

from edgedyn.conversion.capture import capture
from edgedyn.graph.mixes import dynamic_layers, find_mix
from edgedyn.graph.nodes import COUNTED_OPS, module_path


def captured(net, x):
    module = capture(net, (x,)).module(check_guards=False)
    layers = [node for node in module.graph.nodes if node.target in COUNTED_OPS]
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    return module, layers, dynamic_layers(module.graph, inputs)


def network(kind):
    torch.manual_seed(4)
    return strangers.dynamic(kind).double().eval()


@pytest.mark.parametrize("kind", MIXES)
def test_mix_becomes_static_layers_exactly(kind):
    net, x = network(kind), torch.rand(1, 3, 12, 10, dtype=torch.float64)
    module, layers, dynamic = captured(net, x)
    assert dynamic == []
    assert all(layer.args[1].op == "get_attr" for layer in layers)
    mixed = [layer for layer in layers if module_path(layer) == "body.2"]
    assert len(mixed) == K + (kind == "by_einsum")  # the static kernel beside them
    other = torch.rand_like(x) * 3 - 1  # the mix holds for every image, not only for the captured one
    with torch.no_grad():
        for image in (x, other):
            torch.testing.assert_close(module(image), net(image), rtol=1e-12, atol=1e-13)
    names = {name for name, _ in module.named_parameters()} | {name for name, _ in module.named_buffers()}
    assert "body.2.weight" not in names  # the mixed kernels are not stored twice


@pytest.mark.parametrize("kind", FLOAT)
def test_weight_that_is_no_mix_stays_as_it_is(kind):
    net, x = network(kind), torch.rand(1, 3, 12, 10, dtype=torch.float64)
    module, _, dynamic = captured(net, x)
    assert [module_path(layer) for layer in dynamic] == ["body.2"]
    with torch.no_grad():
        torch.testing.assert_close(module(x), net(x), rtol=1e-12, atol=1e-13)
    assert not [node for node in module.graph.nodes if node.target is torch.ops.aten.batch_norm.default]


def test_samples_of_a_batch_keep_their_own_kernels():
    net, x = network("by_sample"), torch.rand(2, 3, 12, 10, dtype=torch.float64)
    module, layers, dynamic = captured(net, x)
    assert dynamic == []
    assert len(layers) == 3 + 2 * K  # route and the two ends; K kernels for each sample
    with torch.no_grad():
        torch.testing.assert_close(module(x), net(x), rtol=1e-12, atol=1e-13)


class Weights(torch.nn.Module):
    """Weights that look affine, and are not."""

    def __init__(self, weigh):
        super().__init__()
        self.weigh, self.bank = weigh, torch.nn.Parameter(torch.randn(2, C, C, 1, 1))

    def forward(self, x):
        a = x.mean((0, 2, 3))[:2].view(2, 1, 1, 1, 1)
        return torch.conv2d(x, self.weigh(a, self.bank).sum(0))


@pytest.mark.parametrize(
    ("weigh", "affine"),
    [
        (lambda a, w: a * w, True),
        (lambda a, w: w - a / 3, True),
        (lambda a, w: (a * w).mul_(2), True),
        (lambda a, w: a * a * w, True),  # the squares are the numbers
        (lambda a, w: (a * w) * (a * w), False),
        (lambda a, w: w / (a * w + 9), False),
        (lambda a, w: torch.div(a * w, 0.1, rounding_mode="floor"), False),
        (lambda a, w: (a * w).abs(), False),
    ],
    ids=["product", "quotient", "in place", "square", "square of all", "divisor", "floor", "abs"],
)
def test_only_affine_weights_are_mixes(weigh, affine):
    torch.manual_seed(0)
    net, x = Weights(weigh).double(), torch.rand(1, C, 4, 5, dtype=torch.float64)
    module, layers, dynamic = captured(net, x)
    assert bool(dynamic) is not affine
    assert (len(layers) > 1) is affine
    y = torch.rand_like(x)
    with torch.no_grad():
        torch.testing.assert_close(module(y), net(y), rtol=1e-12, atol=1e-13)


def test_fewest_numbers_are_chosen():
    program = torch.export.export(network("condconv"), (torch.rand(1, 3, 12, 10, dtype=torch.float64),))
    module = program.module(check_guards=False)
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    (layer,) = dynamic_layers(module.graph, inputs)
    data = {node for node in module.graph.nodes if node.op != "get_attr"}
    (numbers,) = find_mix(layer.args[1], data)
    assert numbers.meta["val"].numel() == K


class Changed(torch.nn.Module):
    """A mix of values that are changed in place: at once, through a view, or after they were read."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.fc, self.gain = kind, torch.nn.Linear(C, 2), torch.nn.Linear(C, 1)
        self.bank, self.one = (torch.nn.Parameter(torch.randn(n, C * C)) for n in (2, 1))

    def forward(self, x):
        pooled = x.mean((2, 3))
        gain, a = self.gain(pooled).expand(1, C * C) * 2, self.fc(pooled).sigmoid()
        if self.kind == "numbers":
            a += 1
        w = a @ self.bank
        if self.kind == "read before":
            before = w * self.one
            w += 1
            w = w + before
        w = w + gain * self.one
        w = w.view(C, C, 1, 1)
        if self.kind == "view":
            w[:, 0] = 0
            w[:, 1] *= a[0, 0]
        return torch.conv2d(x, w)


@pytest.mark.parametrize(
    ("kind", "is_mix"), [("nothing", True), ("numbers", True), ("read before", True), ("view", False)]
)
def test_values_that_are_changed_in_place_count_as_they_are_read(kind, is_mix):
    torch.manual_seed(0)
    net, x = Changed(kind).double(), torch.rand(1, C, 4, 5, dtype=torch.float64)
    module, _, dynamic = captured(net, x)
    assert bool(dynamic) is not is_mix
    with torch.no_grad():
        torch.testing.assert_close(module(x), net(x), rtol=1e-12, atol=1e-13)


class Stacked(torch.nn.Module):
    """Two mixes; the numbers of the second are a linear function of the first one's output."""

    def __init__(self, bank):
        super().__init__()
        self.bank, self.fc = torch.nn.Parameter(bank), torch.nn.Linear(C, 2)

    def forward(self, x):
        for _ in range(2):
            w = self.fc(x.mean((2, 3))) @ self.bank
            x = torch.conv2d(x, w.view(C, C, 1, 1))
        return x


@pytest.mark.parametrize("bank", [torch.randn(2, C * C), torch.zeros(2, C * C)], ids=["random", "zero"])
def test_mix_behind_a_mix_is_one_too(bank):
    net, x = Stacked(bank).double(), torch.rand(1, C, 4, 5, dtype=torch.float64)
    module, _, dynamic = captured(net, x)
    assert dynamic == []
    with torch.no_grad():
        torch.testing.assert_close(module(x), net(x), rtol=1e-12, atol=1e-13)
