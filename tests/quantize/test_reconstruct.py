"""Reconstruction: the rounded layer computes what the float layer did, better than with nearest weights."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, fx, nn

from edgedyn.graph.nodes import MULTIPLY_ADD_OPS
from edgedyn.quantize.rounding import reconstruct as rounding
from edgedyn.quantize.rounding.reconstruct import Moments, measure_moments, reconstruct


def node_of(layer: nn.Module, x: Tensor) -> fx.Node:
    (node,) = (n for n in torch.export.export(layer, (x,)).graph.nodes if n.target in MULTIPLY_ADD_OPS)
    return node


def correlated(*shape: int, seed: int = 0) -> Tensor:
    """Return maps whose channels depend on each other, with a mean, as features have."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.einsum(
        "oc,bchw->bohw",
        torch.randn(shape[1], shape[1], generator=generator),
        torch.randn(shape, generator=generator),
    )
    return nn.functional.avg_pool2d(mixed, 3, 1, 1) + 1


LAYERS = {
    "plain": nn.Conv2d(6, 8, 3, padding=1),
    "strided": nn.Conv2d(6, 8, 3, stride=2, padding=2, dilation=2),
    "grouped": nn.Conv2d(6, 8, 3, groups=2),
    "depthwise": nn.Conv2d(6, 12, 5, padding=2, groups=6),
    "uneven": nn.Conv2d(6, 4, (1, 3), padding=(0, 1), stride=(2, 1), bias=False),
}


def exact_moments(layer: nn.Conv2d, x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return covariances and means over all positions, from the definition."""
    columns = nn.functional.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    columns, wanted = columns.transpose(0, 1).flatten(1).double(), y.transpose(0, 1).flatten(1).double()
    found = []
    for u, v in zip(columns.chunk(layer.groups), wanted.chunk(layer.groups), strict=True):
        a, b = u - u.mean(1, keepdim=True), v - v.mean(1, keepdim=True)
        n = u.shape[1]
        found.append((a @ a.t() / n, b @ a.t() / n, u.mean(1), v.mean(1)))
    return found


@pytest.mark.parametrize("name", LAYERS)
def test_moments_are_those_of_what_the_layer_reads(name):
    torch.manual_seed(1)
    layer, x = LAYERS[name], correlated(2, 6, 11, 14)
    with torch.no_grad():
        y = layer(x)
    found = measure_moments(node_of(layer, x[:1]), x.split(1), y.split(1), layer.groups)
    for moments, expected in zip(found, exact_moments(layer, x, y), strict=True):
        for a, b in zip((moments.h, moments.c, moments.x, moments.y), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=300 * 1.2e-7 * float(b.abs().max() + 9))


@pytest.mark.parametrize("name", LAYERS)
def test_a_mean_does_not_drown_the_spread_of_many_positions(name):
    layer, x = LAYERS[name], 10 + 1e-2 * correlated(1, 6, 300, 400)
    with torch.no_grad():
        y = layer(x)
    found = measure_moments(node_of(layer, x), [x], [y], layer.groups)
    for moments, (h, *_) in zip(found, exact_moments(layer, x, y), strict=True):
        torch.testing.assert_close(moments.h, h, rtol=0, atol=float(x.square().mean()) * 1.2e-7)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(6, 8, 3, padding=1),
        nn.Conv2d(6, 8, 3),
        nn.Conv2d(6, 4, (1, 3), padding=(0, 2)),
        nn.Conv2d(6, 4, (4, 2), padding=(3, 0), dilation=(1, 2)),
        nn.Conv2d(6, 2, 5, padding=4, dilation=2),
    ],
    ids=["same", "valid", "row", "even", "dilated"],
)
@pytest.mark.parametrize("size", [(11, 14), (9, 9)])
def test_sums_of_shifts_are_those_of_the_definition(layer, size):
    """In float64, and on maps that are hardly larger than the kernel, where most of it is border."""
    torch.manual_seed(2)
    layer, x = layer.double(), correlated(2, 6, *size).double()
    with torch.no_grad():
        y = layer(x)
    (expected,) = exact_moments(layer, x, y)
    for batch in (1, 2):
        (m,) = measure_moments(node_of(layer, x[:1]), x.split(batch), y.split(batch), 1)
        for a, b in zip((m.h, m.c, m.x, m.y), expected, strict=True):
            # sums of at most 400 products, of which two are subtracted from one another
            torch.testing.assert_close(a, b, rtol=0, atol=1000 * 2.3e-16 * float(b.abs().max() + 9))


def test_moments_of_a_linear_layer_take_every_row():
    torch.manual_seed(3)
    layer, x = nn.Linear(5, 4), torch.randn(3, 7, 5) + 1
    with torch.no_grad():
        y = layer(x)
    (m,) = measure_moments(node_of(layer, x[:1]), x.split(1), y.split(1), 1)
    rows = x.reshape(-1, 5).double()
    torch.testing.assert_close(m.h, torch.cov(rows.t(), correction=0), rtol=0, atol=1e-5)
    torch.testing.assert_close(m.x, rows.mean(0), rtol=0, atol=1e-6)


def loss(quantized: Tensor, scales: Tensor, w: Tensor, h: Tensor) -> Tensor:
    error = quantized * scales[:, None] - w
    return ((error @ h) * error).sum()


def test_reconstruction_is_near_the_best_of_all_roundings():
    """Six weights, each up or down: 64 combinations are tried one by one."""
    gaps = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(1, 6, generator=generator, dtype=torch.float64)
        a = torch.randn(6, 40, generator=generator, dtype=torch.float64)
        mix = torch.randn(6, 6, generator=generator, dtype=torch.float64)
        h = torch.cov(mix @ a)
        scales = w.abs().amax(1) / 3  # coarse, so that rounding matters
        moments = Moments(h, w @ h, torch.zeros(6).double(), torch.zeros(1).double())
        quantized, _ = reconstruct(w, scales, [moments])
        down = torch.floor(w / scales[:, None])
        corners = [down + torch.tensor([bits]) for bits in itertools.product((0.0, 1.0), repeat=6)]
        best = min(loss(c.double(), scales, w, h) for c in corners)
        nearest = loss(torch.round(w / scales[:, None]), scales, w, h)
        found = loss(quantized, scales, w, h)
        gaps.append((float(found / best), float(nearest / best)))
    ours, plain = (sorted(gap)[10] for gap in zip(*gaps, strict=True))
    assert 1 <= ours < 1.6 < plain, "greedy, column by column: near the best, not the best"


@pytest.mark.parametrize("name", LAYERS)
def test_layer_keeps_its_outputs_and_their_mean_from_inputs_that_are_off(name):
    torch.manual_seed(4)
    layer, x = LAYERS[name], correlated(4, 6, 24, 26, seed=5)
    off = 1.02 * x + 0.05 + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(6))
    with torch.no_grad():
        y = layer(x)
        node = node_of(layer, x[:1])
        scales = layer.weight.flatten(1).abs().amax(1) / 15  # 4 bits and a half: rounding is seen
        quantized, bias = reconstruct(
            layer.weight, scales, measure_moments(node, off.split(1), y.split(1), layer.groups)
        )
        column = scales[:, None, None, None]
        assert quantized.abs().max() <= 127
        assert torch.equal(quantized, quantized.round())
        nearest = torch.round(layer.weight / column) * column
        errors = {}
        for kind, weight, b in (
            ("ours", quantized.float() * column, bias.float()),
            ("nearest", nearest, layer.bias),
        ):
            given = (layer.stride, layer.padding, layer.dilation, layer.groups)
            errors[kind] = nn.functional.conv2d(off, weight, b, *given) - y
    assert errors["ours"].square().mean() < 0.5 * errors["nearest"].square().mean()
    assert errors["ours"].mean((0, 2, 3)).abs().max() < 0.2 * errors["nearest"].mean((0, 2, 3)).abs().max()


def test_blocks_of_columns_change_nothing(monkeypatch):
    torch.manual_seed(7)
    w, a = torch.randn(4, 30).double(), torch.randn(30, 200).double()
    moments = Moments(torch.cov(a), w @ torch.cov(a), torch.zeros(30).double(), torch.zeros(4).double())
    scales = w.abs().amax(1) / 7
    results = []
    for block in (1, 7, 64):
        monkeypatch.setattr(rounding, "_BLOCK", block)
        results.append(reconstruct(w, scales, [moments])[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_inputs_that_never_change_leave_the_weights_as_they_are():
    w = torch.tensor([[0.5, -1.0, 0.25]]).double()
    moments = Moments(
        torch.zeros(3, 3).double(), torch.zeros(1, 3).double(), torch.ones(3).double(), torch.ones(1).double()
    )
    quantized, bias = reconstruct(w, torch.tensor([1 / 127]).double(), [moments])
    assert quantized.tolist() == [[64, -127, 32]]
    assert bias.item() == pytest.approx(1 - (64 - 127 + 32) / 127)


def test_constant_maps_round_to_the_nearest_weights():
    """As behind a mask that is never active: float32 products would leave an H of either sign."""
    torch.manual_seed(0)
    layer, sparse = nn.Conv2d(192, 32, 1), torch.rand(192, 1, 1) * (torch.rand(192, 1, 1) < 0.1)
    x = sparse.expand(1, 192, 64, 64).contiguous()
    with torch.no_grad():
        y = layer(x)
    (moments,) = measure_moments(node_of(layer, x), [x] * 3, [y] * 3, 1)
    scales = layer.weight.detach().abs().amax((1, 2, 3)) / 127
    quantized, _ = reconstruct(layer.weight.detach(), scales, [moments])
    assert torch.equal(
        quantized, torch.round(layer.weight.detach().double() / scales.double().view(-1, 1, 1, 1))
    )
