"""The paired run: float as the network computes it, and INT8 as the Q/DQ program computes it."""

from __future__ import annotations

import gc

import pytest
import torch
from small_int8 import quantize_program
from small_networks import make_input, make_net
from torch import Tensor, nn

from edgedyn import targets
from edgedyn.graph.nodes import bias_of, weight_of
from edgedyn.quantize.calibrated import qparams_of
from edgedyn.quantize.fake_quantize import FakeQuantizer, round_weight
from edgedyn.quantize.fold import fold
from edgedyn.quantize.observe.statistics import look
from edgedyn.quantize.plan import make_plan
from edgedyn.quantize.rounding.paired_run import PairedRun
from edgedyn.recipe.keys import QuantizeSection

PLAIN = QuantizeSection(equalize=False, equalize_outputs=False, rounding="nearest")


@pytest.mark.parametrize("dynamic", [[], ["body"]])
@pytest.mark.parametrize("target", ["executorch", "tensorrt"])
def test_one_run_is_float_and_the_other_the_quantized_program(target, dynamic):
    net, scheme = make_net(), targets.load(target).int8
    section = PLAIN.model_copy(update={"dynamic": dynamic})
    samples = [(make_input((1, 3, 10, 14)),), (make_input((1, 3, 10, 14)).flip(3),)]
    program = torch.export.export(net, samples[0])
    made = quantize_program(program, samples[0], scheme=scheme, section=section, samples=samples)
    module = fold(program)
    plan, qparams = (
        make_plan(module, scheme=scheme, dynamic=dynamic),
        qparams_of(made.calibrated.entries, scheme),
    )
    layers, ticks = [], []

    def choose(layer, inputs, outputs):
        layers.append(layer.name)
        assert len(inputs) == len(outputs) == 2
        weight = weight_of(module, layer.node)
        return round_weight(weight, qparams.weights[layer.weight]), bias_of(module, layer.node)

    outputs = PairedRun(module, plan, qparams, scheme).run(samples, choose, lambda *tick: ticks.append(tick))
    assert layers == ["head", "body", "tail"]
    assert ticks == [(1, 3), (2, 3), (3, 3)]
    with torch.no_grad():
        for sample, (float_, int8) in zip(samples, outputs, strict=True):
            assert torch.equal(float_, net(*sample))
            # the same integers; a dequantized weight may round otherwise, once
            torch.testing.assert_close(int8, made.program.module()(*sample), rtol=0, atol=1e-6)
            assert (int8 - float_).abs().max() > 1e-4


class Gated(nn.Module):
    """``body`` reads the output of ``head`` where its logits are above 0."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.logits = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 1, 1)
        self.body = nn.Conv2d(5, 5, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.head(x)
        return self.body(y * (self.logits(y) > 0))


def test_both_runs_take_the_decisions_of_float():
    torch.manual_seed(3)
    net, x, scheme = Gated().eval(), make_input((1, 3, 40, 56)), targets.load("executorch").int8
    program = torch.export.export(net, (x,))
    made = quantize_program(program, (x,), scheme=scheme, section=PLAIN, samples=[(x,)])
    module, seen = fold(program), {}

    def choose(layer, inputs, outputs):
        seen[layer.name] = inputs[0]
        weight = weight_of(module, layer.node)
        return (0.9 * weight, bias_of(module, layer.node))  # other logits, by far

    qparams = qparams_of(made.calibrated.entries, scheme)
    PairedRun(module, make_plan(module, scheme=scheme), qparams, scheme).run([(x,)], choose)
    with torch.no_grad():
        active = net.logits(net.head(x))[0, 0] > 0
    assert 0.1 < active.float().mean() < 0.9
    assert torch.equal(seen["body"][0].any(0), active)


def test_samples_are_dropped_one_by_one_where_they_are_read_for_the_last_time(monkeypatch):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 5, 1)

        def forward(self, x):
            return torch.sigmoid(torch.tanh(self.conv(x))).mean()

    count, held = 8, []
    samples = [(make_input((1, 3, 10, 14)),) for _ in range(count)]
    scheme = targets.load("tensorrt").int8
    module = fold(torch.export.export(Net(), samples[0]))
    made = quantize_program(
        torch.export.export(Net(), samples[0]), samples[0], scheme=scheme, section=PLAIN, samples=samples
    )
    compute = FakeQuantizer.compute

    def watch(self, node, args, kwargs):
        held.append(sum(isinstance(x, Tensor) and x.shape == (1, 5, 10, 14) for x in gc.get_objects()))
        return compute(self, node, args, kwargs)

    monkeypatch.setattr(FakeQuantizer, "compute", watch)
    qparams = qparams_of(made.calibrated.entries, scheme)
    paired = PairedRun(module, make_plan(module, scheme=scheme), qparams, scheme)
    paired.run(
        samples, lambda layer, inputs, outputs: (weight_of(module, layer.node), bias_of(module, layer.node))
    )
    # those before the first layer, then one feature map per sample and run, and the ones in use
    assert max(held) - held[0] <= 2 * count + 3


def test_only_the_named_nodes_are_seen_in_the_order_of_the_graph():
    net, x = make_net(), make_input((1, 3, 10, 14))
    module = fold(torch.export.export(net, (x,)))
    convolutions = [node for node in module.graph.nodes if "conv2d" in str(node.target)]
    seen = []
    look(module, convolutions[:2], (x,), lambda node, value: seen.append((node, value)))
    assert [node for node, _ in seen] == convolutions[:2]
    with torch.no_grad():
        torch.testing.assert_close(seen[0][1], net.head(x))
