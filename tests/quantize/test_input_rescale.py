"""Input channels of layers behind float operators: scaled by a Mul, scaled back in the weights."""

from __future__ import annotations

import pytest
import torch
from small_int8 import quantize_program
from torch import Tensor, nn

from edgedyn import quantize, targets
from edgedyn.quantize.accounting import KEPT_INPUT_RESCALE
from edgedyn.quantize.fold import fold
from edgedyn.quantize.observe.statistics import channel_maxima
from edgedyn.quantize.rescale.input_rescale import drop_input_rescales
from edgedyn.quantize.rescale.output_rescale import RESCALE
from edgedyn.quantize.rescale.passes import find_places, rescale_channels
from edgedyn.recipe.keys import QuantizeSection

SCHEME = targets.load("tensorrt").int8
INPUT = torch.rand(1, 3, 10, 14, generator=torch.Generator().manual_seed(1))


class Masked(nn.Module):
    """An inverted bottleneck with a mask: ``project`` reads channels of very unequal ranges."""

    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.head, self.mask = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 1, 1)
        self.project = nn.Conv2d(8, 8, 3, padding=1, groups=groups)
        with torch.no_grad():
            self.head.weight *= torch.logspace(0, 1.2, 8)[:, None, None, None]
            self.project.weight /= (
                torch.logspace(0, 1.2, 8)
                .reshape(groups, -1)
                .repeat_interleave(8 // groups, 0)[..., None, None]
            )

    def forward(self, x: Tensor) -> Tensor:
        return self.project(nn.functional.relu6(self.head(x)) * torch.sigmoid(self.mask(x)))


class Rows(nn.Module):
    """The same with a linear layer on the positions, as layers of gathered positions are."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Masked()
        self.linear = nn.Linear(8, 4)
        with torch.no_grad():
            self.linear.weight /= torch.logspace(0, 1.2, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.relu6(self.net.head(x)) * torch.sigmoid(self.net.mask(x))
        return self.linear(y.permute(0, 2, 3, 1).flatten(0, 2))


def seeded(make) -> nn.Module:
    torch.manual_seed(2)
    return make().eval()


NETWORKS = {
    "dense": lambda: Masked(),
    "grouped": lambda: Masked(groups=2),
    "depthwise": lambda: Masked(groups=8),
    "rows": Rows,
}


@pytest.fixture(params=NETWORKS)
def net(request) -> nn.Module:
    return seeded(NETWORKS[request.param])


def make(net, *, calibrated=None, keep_float=(), equalize_inputs=True) -> quantize.Quantized:
    section = QuantizeSection(
        rounding="nearest", equalize_inputs=equalize_inputs, keep_float=list(keep_float)
    )
    program, samples = torch.export.export(net, (INPUT,)), [] if calibrated else [(INPUT,)]
    return quantize_program(
        program, (INPUT,), scheme=SCHEME, section=section, samples=samples, calibrated=calibrated
    )


def error(net, made: quantize.Quantized) -> float:
    with torch.no_grad():
        return float((made.program.module()(INPUT) - net(INPUT)).square().mean().sqrt())


def rescales(made: quantize.Quantized) -> int:
    return sum(row["count"] for row in made.float_nodes if row["reason"] == KEPT_INPUT_RESCALE)


def scale_all(net: nn.Module, x: Tensor):
    module = fold(torch.export.export(net, (x,)))
    section = QuantizeSection(equalize=False, equalize_outputs=False, equalize_inputs=True)
    places = find_places(module, section)
    nodes = {node for _, place in places for node in place.activations}
    factors, _ = rescale_channels(module, places, channel_maxima(module, nodes, [(x,)]))
    return module, factors


def test_network_computes_the_same_and_channels_have_one_range(net):
    wide, x = net.double(), INPUT.double()
    module, factors = scale_all(wide, x)
    (reader,) = factors
    assert reader in ("project.input", "linear.input")
    (rescale,) = [node for node in module.graph.nodes if RESCALE in node.meta]
    largest = channel_maxima(module, [rescale], [(x,)])[rescale]
    torch.testing.assert_close(largest, largest.max().expand(8))
    with torch.no_grad():
        torch.testing.assert_close(module(x), wide(x), rtol=0, atol=1e-12)
        drop_input_rescales(module, int8=())
        torch.testing.assert_close(module(x), wide(x), rtol=0, atol=1e-12)
    assert not any(RESCALE in node.meta for node in module.graph.nodes)


def test_int8_reads_every_channel_finely(net):
    plain, scaled = make(net, equalize_inputs=False), make(net)
    assert (rescales(plain), rescales(scaled)) == (0, 1)
    assert error(net, scaled) < 0.8 * error(net, plain)


def test_layer_that_stays_float_has_no_rescale_mul_and_its_own_weight(net):
    reader = "linear" if isinstance(net, Rows) else "project"
    made = make(net, keep_float=[reader])
    assert rescales(made) == 0
    plain = make(net, keep_float=[reader], equalize_inputs=False)
    assert error(net, made) == pytest.approx(error(net, plain), rel=1e-3)


def test_program_from_the_table_is_the_same(net):
    first = make(net)
    again = make(net, calibrated=first.calibrated)
    assert rescales(again) == 1
    assert again.program.graph_module.code == first.program.graph_module.code
    with torch.no_grad():
        assert torch.equal(again.program.module()(INPUT), first.program.module()(INPUT))


class Reading(nn.Module):
    """An activation that several layers may read, or one layer as a whole."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.net, self.how, self.gate, self.other = Masked(), how, nn.Conv2d(8, 1, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = nn.functional.relu6(self.net.head(x))
        if self.how == "written by a layer":
            return (self.net.project(nn.functional.pad(y, (1, 1, 1, 1))),)
        y = y * torch.sigmoid(self.net.mask(x))
        if self.how == "one position":
            return (self.other(y.mean((2, 3), keepdim=True)),)
        if self.how == "two layers":
            return self.net.project(y), self.other(y)
        return self.net.project(y), (self.gate(y) > 0).float()  # a decision


@pytest.mark.parametrize(
    ("how", "readers"),
    [
        ("written by a layer", []),
        ("one position", []),
        ("two layers", ["net.project", "other"]),
        ("a decision", ["net.project"]),
    ],
)
def test_who_reads_scaled_channels(how, readers):
    module, factors = scale_all(seeded(lambda: Reading(how)), INPUT)
    muls = [node for node in module.graph.nodes if RESCALE in node.meta]
    names = {layer.node: layer.name for layer in quantize.plan.find_quantizable_layers(module)}
    assert [names[reader] for mul in muls for reader in mul.users] == readers
    assert len(factors) == len(muls)


def test_activations_of_nearly_equal_channels_are_left_alone():
    even = seeded(Masked)
    with torch.no_grad():
        even.head.weight[:], even.head.bias[:] = even.head.weight[:1].clone(), even.head.bias[:1].clone()
    assert scale_all(even, INPUT)[1] == {}
