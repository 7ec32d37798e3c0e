"""BatchNorm re-estimation: the channels of rounded layers have the mean and deviation of float again."""

from __future__ import annotations

import pytest
import torch
from small_networks import capture, make_net
from torch import Tensor, fx, nn

from edgedyn import targets
from edgedyn.graph.nodes import MULTIPLY_ADD_OPS, weight_of
from edgedyn.quantize.calibrated import Calibrated, qparams_of
from edgedyn.quantize.fold import fold
from edgedyn.quantize.observe.program import observe_program
from edgedyn.quantize.plan import Plan, QuantizableLayer, make_plan
from edgedyn.quantize.rounding.norms import reestimate
from edgedyn.quantize.rounding.paired_run import PairedRun
from edgedyn.quantize.rounding.program import round_program
from edgedyn.recipe.keys import QuantizeSection

LAYERS = {
    "plain": (nn.Conv2d(6, 8, 3, padding=1), (2, 6, 11, 14)),
    "strided": (nn.Conv2d(6, 8, 3, stride=2, padding=2, dilation=2), (2, 6, 11, 14)),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2, bias=False), (2, 6, 11, 14)),
    "linear": (nn.Linear(6, 5), (2, 9, 6)),
}


def node_of(layer: nn.Module, x: Tensor) -> fx.Node:
    (node,) = (n for n in torch.export.export(layer, (x,)).graph.nodes if n.target in MULTIPLY_ADD_OPS)
    return node


def moments(maps: list[Tensor], axis: int = 1) -> tuple[Tensor, Tensor]:
    rows = torch.cat([y.double().movedim(axis, 0).flatten(1) for y in maps], dim=1)
    return rows.mean(1), rows.std(1, correction=0)


@pytest.mark.parametrize("name", LAYERS)
def test_gain_and_bias_restore_mean_and_deviation(name):
    layer, shape = LAYERS[name]
    axis = -1 if name == "linear" else 1
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(shape, generator=generator) + 0.7 for _ in range(3)]
    off = [1.3 * x + 0.2 * torch.randn(shape, generator=generator) for x in inputs]
    with torch.no_grad():
        outputs = [layer(x) for x in inputs]
        weight = (layer.weight / 0.05).round() * 0.05
        gain, bias = reestimate(node_of(layer, inputs[0]), off, outputs, weight)
        scaled = weight * gain.float().reshape(-1, *[1] * (weight.dim() - 1))
        found = [torch.func.functional_call(layer, {"weight": scaled}, (x,)) for x in off]
        shift = bias if layer.bias is None else bias - layer.bias
    assert (gain - 1).abs().max() > 0.1
    (mean, deviation), (wanted, wanted_deviation) = moments(found, axis), moments(outputs, axis)
    # float32 convolutions of 54 terms of about one
    torch.testing.assert_close(mean + shift, wanted, rtol=0, atol=54 * 1.2e-7 * 9)
    torch.testing.assert_close(deviation, wanted_deviation, rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [0.0, 1000.0])
def test_channel_that_never_changes_keeps_its_scale_and_gets_its_mean(value):
    layer, x = nn.Conv2d(2, 2, 1), torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    x[:, 1] = value / 3
    weight = torch.tensor([[1.0, 0.0], [0.0, 3.0]])[:, :, None, None]
    wanted = torch.cat([2 * x[:, :1], 0.5 * x[:, :1]], dim=1) + 1
    gain, bias = reestimate(node_of(layer, x), [x], [wanted], weight)
    assert gain.tolist() == [pytest.approx(2, rel=1e-6), 1.0]
    assert bias[1].item() == pytest.approx(wanted[:, 1].mean().item() - value, abs=1e-3)


def calibrated(**section) -> tuple[fx.GraphModule, Plan, Calibrated, list[tuple[Tensor, ...]]]:
    """Return a float program before its calibration, its plan, and the calibration."""
    generator = torch.Generator().manual_seed(3)
    samples = [(torch.rand(1, 3, 10, 14, generator=generator) * 1.5 - 0.25,) for _ in range(4)]
    program, scheme = capture(make_net(), samples[0][0]), targets.load("executorch").int8
    made = []
    for _ in range(2):
        module = fold(program)
        made.append((module, make_plan(module, scheme=scheme, keep_float=["tail"])))
    given = QuantizeSection(equalize=False, **section)
    observed = observe_program(made[0][0], section=given, samples=samples)
    found = round_program(*made[0], observed, scheme=scheme, section=given, samples=samples)
    return *made[1], found, samples


@pytest.mark.parametrize("rounding", ["nearest", "reconstruct"])
def test_every_layer_has_its_float_moments_with_all_layers_before_it_in_int8(rounding):
    module, plan, found, samples = calibrated(rounding=rounding, bn_reestimation=True)
    scheme = targets.load("executorch").int8
    steps = qparams_of(found.entries, scheme)
    seen = []

    def change(site: QuantizableLayer, inputs: list[Tensor], outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        weight = (
            torch.from_numpy(found.constants[site.weight]) * steps.weights[site.weight][:, None, None, None]
        )
        bias = torch.from_numpy(found.constants[site.bias])
        seen.append(
            (moments([nn.functional.conv2d(x, weight, bias, 1, 1) for x in inputs]), moments(outputs))
        )
        return weight, bias

    PairedRun(module, plan, steps, scheme).run(samples, change)
    assert len(seen) == 2
    for after, wanted in seen:
        # scales and biases are float32
        torch.testing.assert_close(after[0], wanted[0], rtol=0, atol=1e-5)
        torch.testing.assert_close(after[1], wanted[1], rtol=1e-5, atol=0)


def test_quantized_weights_stay_and_scales_move_where_a_layer_is_int8():
    module, plan, found, _ = calibrated(rounding="nearest", bn_reestimation=True)
    _, _, plain, _ = calibrated(rounding="nearest")
    scales, before = ({e.name: torch.tensor(e.channels) for e in x.entries} for x in (found, plain))
    assert found.constants.keys() == {name for site in plan.layers for name in (site.weight, site.bias)}
    assert torch.equal(scales["tail.weight"], before["tail.weight"])
    for site in plan.layers:
        quantized = torch.round(weight_of(module, site.node) / before[site.weight][:, None, None, None])
        assert torch.equal(torch.from_numpy(found.constants[site.weight]).float(), quantized)
        assert not torch.equal(scales[site.weight], before[site.weight])
