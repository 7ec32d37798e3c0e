"""Output channels of layers before float operators: scaled in INT8, scaled back by a Mul, all else equal."""

from __future__ import annotations

import copy

import pytest
import torch
from small_int8 import quantize_program
from torch import Tensor, nn

from edgedyn import quantize, targets
from edgedyn.quantize.accounting import KEPT_OUTPUT_RESCALE
from edgedyn.quantize.fold import fold
from edgedyn.quantize.observe.statistics import channel_maxima
from edgedyn.quantize.rescale.output_rescale import RESCALE
from edgedyn.quantize.rescale.passes import find_places, rescale_channels
from edgedyn.recipe.keys import QuantizeSection

SCHEMES = {name: targets.load(name).int8 for name in ("executorch", "tensorrt")}
INPUT = torch.rand(1, 3, 10, 14, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    """A residual block: ``body`` writes channels of very unequal ranges into a PReLU and a sum."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.act, self.tail = nn.PReLU(8), nn.Conv2d(8, 3, 1)
        with torch.no_grad():
            self.body.weight *= torch.logspace(0, 1.2, 8)[:, None, None, None]
            self.tail.weight /= torch.logspace(0, 1.2, 8)[:, None, None]
            self.tail.weight[1:], self.tail.bias[1:] = (
                self.tail.weight[:1].clone(),
                self.tail.bias[:1].clone(),
            )

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.head(x))
        return self.tail(y + self.act(self.body(y)))


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(2)
    return Block().eval()


def make(net, target="executorch", **values) -> quantize.Quantized:
    section = QuantizeSection(equalize=False, rounding="nearest", **values)
    program = torch.export.export(net, (INPUT,))
    return quantize_program(program, (INPUT,), scheme=SCHEMES[target], section=section, samples=[(INPUT,)])


def error(net, made: quantize.Quantized) -> float:
    with torch.no_grad():
        return float((made.program.module()(INPUT) - net(INPUT)).abs().mean())


def rescales(made: quantize.Quantized) -> int:
    return sum(row["count"] for row in made.float_nodes if row["reason"] == KEPT_OUTPUT_RESCALE)


def scale_all(module, x: Tensor) -> dict[str, Tensor]:
    places = find_places(module, QuantizeSection(equalize=False))
    nodes = {node for _, place in places for node in place.activations}
    factors, _ = rescale_channels(module, places, channel_maxima(module, nodes, [(x,)]))
    return factors


def test_network_computes_the_same_and_channels_have_one_range(net):
    wide = copy.deepcopy(net).double()
    module = fold(torch.export.export(wide, (INPUT.double(),)))
    factors = scale_all(module, INPUT.double())
    # an INT8 layer reads the output of head; the three channels of tail are alike
    assert set(factors) == {"body.output"}
    with torch.no_grad():
        torch.testing.assert_close(module(INPUT.double()), wide(INPUT.double()), rtol=0, atol=1e-12)
        y = torch.relu(wide.head(INPUT.double()))
        largest = (wide.body(y) / factors["body.output"][:, None, None]).abs().amax((0, 2, 3))
    torch.testing.assert_close(largest, largest.max().expand(8))
    assert sum(RESCALE in node.meta for node in module.graph.nodes) == 1


def test_every_channel_is_rounded_more_finely(net):
    plain, scaled = make(net, equalize_outputs=False), make(net)
    assert (rescales(plain), rescales(scaled)) == (0, 1)
    assert error(net, scaled) < 0.7 * error(net, plain)


def test_where_outputs_are_float_there_is_no_rescale_mul(net):
    made = make(net, "tensorrt")
    assert rescales(made) == 0
    plain = make(net, "tensorrt", equalize_outputs=False)
    assert error(net, made) == pytest.approx(error(net, plain), rel=0.01)


def test_layer_that_stays_float_has_no_rescale_mul(net):
    made = make(net, keep_float=["body"])
    assert rescales(made) == 0
    plain = make(net, keep_float=["body"], equalize_outputs=False)
    assert error(net, made) == pytest.approx(error(net, plain), rel=0.01)


def test_program_from_the_table_is_the_same(net):
    first = make(net)
    program = torch.export.export(net, (INPUT,))
    section = QuantizeSection(equalize=False, rounding="nearest")
    again = quantize_program(
        program, (INPUT,), scheme=SCHEMES["executorch"], section=section, calibrated=first.calibrated
    )
    assert rescales(again) == 1
    assert again.program.graph_module.code == first.program.graph_module.code
    with torch.no_grad():
        assert torch.equal(again.program.module()(INPUT), first.program.module()(INPUT))


def test_activations_of_equal_channels_are_left_alone(net):
    even = copy.deepcopy(net)
    with torch.no_grad():
        even.body.weight[:] = even.body.weight[:1].clone()
        even.body.bias[:] = even.body.bias[:1].clone()
    assert rescales(make(even)) == 0


class Rows(nn.Module):
    """``body`` as a linear layer on the positions, as layers of gathered positions are."""

    def __init__(self, net: Block) -> None:
        super().__init__()
        self.body, self.act = nn.Linear(8, 8), net.act
        self.head = net.head
        with torch.no_grad():
            self.body.weight[:], self.body.bias[:] = net.body.weight.flatten(1), net.body.bias

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.relu(self.head(x)).permute(0, 2, 3, 1).flatten(0, 2)
        return self.act(self.body(rows))


def test_channels_of_rows_are_scaled_too(net):
    rows = Rows(net).eval()
    plain, scaled = make(rows, equalize_outputs=False), make(rows)
    assert (rescales(plain), rescales(scaled)) == (0, 1)
    assert error(rows, scaled) < 0.7 * error(rows, plain)


def test_channels_of_one_position_are_left_alone(net):
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8)).eval()
    assert scale_all(fold(torch.export.export(pooled, (INPUT,))), INPUT) == {}


class Padded(nn.Module):
    """The output of ``body`` is padded for a convolution, and a sum reads it too."""

    def __init__(self, net: Block) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.net.body(torch.relu(self.net.head(x)))
        return self.net.tail(nn.functional.pad(y, (1, 1, 1, 1))), y + 1


def test_activation_that_an_int8_layer_reads_behind_its_padding_is_left_alone(net):
    module = fold(torch.export.export(Padded(net), (INPUT,)))
    assert scale_all(module, INPUT) == {}
