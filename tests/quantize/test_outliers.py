"""Channels far larger than the others, and moments that rounding cannot use: calibration copes, or tells."""

from __future__ import annotations

import pytest
import torch
from odd_networks import C, Residual, conv, scaled_channel, shifted_features
from torch import Tensor, nn

from edgedyn import quantize, targets
from edgedyn.quantize import CalibrationInputs, Int8Method
from edgedyn.quantize.rescale.place import channel_factors, find_outliers, rounding_error
from edgedyn.quantize.rounding import reconstruct as rounding
from edgedyn.quantize.rounding.reconstruct import Moments, reconstruct
from edgedyn.quantize.table.entries import Entry
from edgedyn.recipe.keys import QuantizeSection

SHAPE = (1, 3, 24, 24)
BOTH = pytest.mark.parametrize("target", ["executorch", "tensorrt"])


def make_input(seed: int = 1) -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed))


def calibrate(net: nn.Module, target: str, **section) -> tuple[quantize.Quantized, float]:
    """Return the INT8 program, and the SQNR of what it adds to the input, dB."""
    program = torch.export.export(net.eval(), (make_input(),))
    method = Int8Method(targets.load(target).int8, QuantizeSection(**section))
    inputs = CalibrationInputs([(make_input(seed),) for seed in (2, 3)])
    result = quantize.apply(program, (make_input(),), quantize.calibrate(program, inputs, method), method)
    with torch.no_grad():
        expected, y = net(make_input()), result.program.module()(make_input())
    power = (expected - make_input()).square().mean()
    return result, 10 * float(torch.log10(power / (y - expected).square().mean()))


def notes(result: quantize.Quantized) -> dict[str, str]:
    return {entry.name: entry.note for entry in result.calibrated.entries if entry.note}


@BOTH
@pytest.mark.parametrize("between", [nn.ReLU, nn.PReLU, nn.GELU, nn.Identity])
def test_outlier_channel_costs_no_quality(between, target):
    torch.manual_seed(1)
    without = calibrate(scaled_channel(1, between()), target)[1]
    torch.manual_seed(1)
    result, with_outlier = calibrate(scaled_channel(1000, between()), target)
    # GELU is close to ReLU for large values, so that the network itself is another one
    assert with_outlier > without - (3 if between is nn.GELU else 1)
    assert not notes(result)


@BOTH
def test_strong_channel_keeps_its_reader_precise(target):
    """Its reader does not divide it again: moving it would cost the reader's other weights their values."""
    torch.manual_seed(1)
    net = scaled_channel(1000)
    with torch.no_grad():
        net.body[-1].weight[:, 5] *= 1000
    assert calibrate(net, target)[1] > 35


@BOTH
def test_outlier_that_no_pass_may_move_is_noted_with_the_setting(target):
    torch.manual_seed(1)
    result, _ = calibrate(scaled_channel(1000), target, equalize=False, equalize_outputs=False)
    (note,) = notes(result).values()
    assert note.startswith("outlier channels (5): up to ")
    assert "quantize.equalize: true mends that" in note
    name = next(iter(notes(result)))
    assert name.startswith("body.2.output") or name.startswith("body.4.input")


class TwoReaders(nn.Module):
    """Two layers that read a channel 1000 times as large as the others, which no pass may move."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right, self.last = (
            conv(i, o) for i, o in ((3, C), (C, C), (C, C), (C, 3))
        )
        with torch.no_grad():
            self.first.weight[2] *= 1000
            for reader in (self.left, self.right):
                reader.weight[:, 2] /= 1000

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        return x - self.last(torch.relu(self.left(y) + self.right(y)))


def test_setting_of_a_note_names_every_layer_of_the_tensor_and_mends_the_drop():
    torch.manual_seed(1)
    net = TwoReaders()
    result, sqnr = calibrate(net, "executorch")
    (note,) = notes(result).values()
    assert "quantize.keep_float: [first, left, right] mends that" in note
    assert calibrate(net, "executorch", keep_float=["first", "left", "right"])[1] > sqnr + 10


def test_program_without_outliers_is_as_before(monkeypatch):
    torch.manual_seed(1)
    net = Residual(conv(3, C), nn.ReLU(), conv(C, C), nn.GELU(), conv(C, 3))
    now, _ = calibrate(net, "executorch")
    monkeypatch.setattr("edgedyn.quantize.rescale.place.OUTLIER", float("inf"))
    before, _ = calibrate(net, "executorch")
    entries = ([entry.to_json() for entry in x.calibrated.entries] for x in (now, before))
    assert next(entries) == next(entries)
    assert all((now.calibrated.constants[k] == v).all() for k, v in before.calibrated.constants.items())
    with torch.no_grad():
        assert torch.equal(now.program.module()(make_input()), before.program.module()(make_input()))


def test_limit_counts_from_the_largest_channel_that_is_no_outlier():
    largest = torch.tensor([1000.0, 2.0, 1.0, 0.001, 0.0])
    assert find_outliers(largest).tolist() == [True, False, False, False, False]
    assert channel_factors([largest], 4.0).tolist() == [1, 4, 4, 4, 4]
    apart = channel_factors([largest], 4.0, outliers_count=False)
    assert apart.tolist() == [1, 500, 1000, 2000, 2000]


def test_rounding_error_is_that_of_int8():
    generator = torch.Generator().manual_seed(3)
    largest = torch.tensor([8.0, 1.0, 1.0, 1.0])
    x = (
        (torch.rand(20000, 4, generator=generator) * 2 - 1) * largest * 3**0.5 / 4 * 2.309
    )  # power 1/16 peak^2
    weight = torch.randn(6, 4, generator=generator)
    steps = weight.abs().amax(1, keepdim=True) / 127
    coarse = largest.max() / 255 * 2
    y = (x / coarse).round() * coarse @ ((weight / steps).round() * steps).t()
    measured = (y - x @ weight.t()).square().mean(0).sum()
    expected = rounding_error(weight, torch.ones(4), largest) / 12
    assert 0.2 < float(measured) / expected < 5


@BOTH
def test_features_of_large_mean_are_calibrated(target):
    torch.manual_seed(2)
    assert calibrate(shifted_features(), target)[1] > 20


def moments_of(h: Tensor, c: Tensor | None = None) -> Moments:
    size = len(h)
    return Moments(
        h,
        torch.eye(size).double() if c is None else c,
        torch.ones(size).double() * 0,
        torch.zeros(size).double(),
    )


W = torch.eye(4) * 0.5
SCALES = torch.full((4,), 1 / 127)


def test_indefinite_moments_get_a_larger_ridge():
    """An eigenvalue of -2e-3 of the mean diagonal: the first ridge is 1e-3 of it, the second 1e-2."""
    h = torch.diag(torch.tensor([1.0, 1.0, 1.0, -6e-3])).double()
    fitted = reconstruct(W, SCALES, [moments_of(h, W.double() @ h)])
    assert fitted is not None
    assert (fitted[0] - W * 127).abs().max() <= 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -100.0])
def test_moments_that_no_ridge_mends_are_given_up(bad):
    h = torch.diag(torch.tensor([1.0, 1.0, 1.0, bad])).double()
    assert reconstruct(W, SCALES, [moments_of(h)]) is None


@BOTH
def test_layer_with_such_moments_is_rounded_to_nearest_and_noted(target, monkeypatch):
    torch.manual_seed(2)
    net = Residual(conv(3, C), nn.ReLU(), conv(C, C), nn.ReLU(), conv(C, 3))
    real = rounding._round_group
    calls = []

    def fail_once(*arguments):
        calls.append(arguments)
        return None if len(calls) == 2 else real(*arguments)

    monkeypatch.setattr(rounding, "_round_group", fail_once)
    result, sqnr_db = calibrate(net, target)
    assert list(notes(result)) == ["body.2.weight"]
    assert "rounded to the nearest INT8 values" in notes(result)["body.2.weight"]
    assert sqnr_db > 25


@BOTH
@pytest.mark.parametrize("kind", ["dead", "constant", "huge", "one position"])
def test_degenerate_features_are_calibrated(kind, target):
    torch.manual_seed(2)
    net = Residual(conv(3, C), nn.ReLU(), conv(C, C), nn.ReLU(), conv(C, 3))
    with torch.no_grad():
        if kind == "dead":
            net.body[0].bias.fill_(-100)
        if kind == "constant":
            net.body[0].weight.zero_()
            net.body[0].bias.fill_(3)
        if kind == "huge":
            net.body[0].weight *= 1e12
            net.body[2].weight *= 1e-12
    if kind == "one position":
        net = nn.Sequential(nn.AdaptiveAvgPool2d(1), *net.body, nn.Upsample(SHAPE[2:]))
    result, sqnr_db = calibrate(net, target)
    assert sqnr_db > 20 or kind == "one position"
    assert result.int8_mac_share == 1


def test_note_is_kept_in_a_table():
    torch.manual_seed(1)
    result, _ = calibrate(scaled_channel(1000), "executorch", equalize=False, equalize_outputs=False)
    for entry in result.calibrated.entries:
        assert Entry.from_json(entry.to_json()).to_json() == entry.to_json()
        assert ("note" in entry.to_json()) == bool(entry.note)
