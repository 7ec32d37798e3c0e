"""The layers of a block that a kernel computes: where they are quantized, and that they stay together."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from small_blocks import Block, Masked, dilated, export
from small_int8 import quantize_program
from torch import nn

from edgedyn import quantize, targets
from edgedyn.errors import RecipeError
from edgedyn.graph.blocks import find_blocks
from edgedyn.layers.malleconv import ResConvBlock
from edgedyn.quantize.accounting import KEPT_BY_RECIPE, KEPT_FOR_QUALITY, KEPT_IN_BLOCK
from edgedyn.quantize.plan import Int8Method, blocks_of, find_quantizable_layers, make_plan
from edgedyn.quantize.rescale.output_rescale import RESCALE
from edgedyn.quantize.rescale.passes import find_places
from edgedyn.quantize.search.precision import EvaluationSet
from edgedyn.recipe.keys import QuantizeSection

FUSED, STOCK = targets.load("executorch", "fused").int8, targets.load("executorch").int8
SHAPE = (1, 4, 10, 8)


def same(mask):
    return mask


def sample(seed: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)),)


SAMPLES = [sample(seed) for seed in range(2, 6)]


class Net(nn.Module):
    """A dense convolution, two blocks, a dense convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.tail = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.body = nn.Sequential(ResConvBlock(4), ResConvBlock(4))

    def forward(self, x):
        return self.tail(self.body(self.head(x)))


NET = Net()
LAYERS = [f"body.0.body.{k}" for k in (0, 3, 6)]


def folded(network=NET):
    return quantize.fold(export(network, *SHAPE))


def quantized(network=NET, scheme=FUSED, **options):
    section = QuantizeSection(**options.pop("section", {}))
    program = export(network, *SHAPE)
    return quantize_program(program, SAMPLES[0], scheme=scheme, section=section, samples=SAMPLES, **options)


def int8_blocks(program):
    module = program.module()
    return [block for block in find_blocks(module)[0] if block.qparams is not None]


def test_outputs_of_a_block_lie_behind_activation_and_mask():
    module = folded(Masked(dilated(3), same, same))
    layers = find_quantizable_layers(module, blocks_of(module, FUSED))
    names = {layer.name: layer.output_node.target for layer in layers}
    assert names["expand"] == names["depthwise"] == names["project"] == torch.ops.aten.mul.Tensor
    assert [layer.input for layer in layers if layer.name in ("depthwise", "project")] == [
        "expand.output",
        "depthwise.output",
    ]
    assert blocks_of(module, STOCK) == ()


def test_the_last_layer_of_a_block_writes_float():
    plan = make_plan(folded(), scheme=FUSED)
    assert [layer.name for layer in plan.quantized_outputs(FUSED)] == [
        "head",
        *(f"body.{k}.body.{i}" for k in (0, 1) for i in (0, 3)),
        "tail",
    ]
    assert len(make_plan(folded(), scheme=STOCK).quantized_outputs(STOCK)) == 8


@pytest.mark.parametrize("kept", LAYERS)
def test_one_layer_kept_float_keeps_its_block_and_no_other(kept):
    done = quantized(section={"keep_float": [kept]})
    assert [block.path for block in int8_blocks(done.program)] == ["body.1.body"]
    reasons = {row["node"]: row["reason"] for row in done.float_nodes}
    assert {name: reasons[name] for name in LAYERS} == {
        name: KEPT_BY_RECIPE if name == kept else KEPT_IN_BLOCK for name in LAYERS
    }
    assert 0 < done.int8_mac_share < quantized().int8_mac_share == 1


def test_layers_of_a_block_are_never_dynamic():
    plan = make_plan(folded(), scheme=FUSED, dynamic=["*"])
    assert [node.name for node in plan.dynamic] != []
    assert {layer.name for layer in plan.layers if layer.node in plan.dynamic} == {"head", "tail"}
    assert len(quantized(section={"dynamic": ["*"]}).dynamic) == 2


def test_generated_kernels_that_a_block_writes_are_float_anyway():
    plan = make_plan(folded(), scheme=FUSED, generated=["body.1.body.6.output", "body.0.body.0.output"])
    assert "body.1.body.6" in [layer.name for layer in plan.layers]
    assert "body.0.body.0" not in [layer.name for layer in plan.layers]


def test_no_operator_of_an_int8_block_counts_as_float():
    listed = {row["node"] for row in quantized().float_nodes}
    assert listed == set()
    assert {"prelu", "add"} <= {row["node"] for row in quantized(scheme=STOCK).float_nodes}


def test_nothing_is_rescaled_inside_of_a_block():
    module = folded(Block(activations=("prelu", "relu6", "prelu")))
    section = QuantizeSection(equalize=False, equalize_inputs=True, equalize_outputs=True)
    inside = {node for block in blocks_of(module, FUSED) for node in block.nodes}
    places = find_places(module, section, blocks=blocks_of(module, FUSED))
    assert not inside.intersection(node for _, place in places for node in place.activations)
    others = find_places(module, section)
    assert inside.intersection(node for _, place in others for node in place.activations)


def test_channels_of_hidden_maps_are_brought_to_one_range_through_activation_and_mask():
    network = Masked(dilated(3), same, same, activations=("prelu", "relu", "none"), hidden=8)
    program = export(network, *SHAPE)
    with torch.no_grad():
        state = dict(program.named_parameters())
        state["expand.weight"][0] *= 20
        state["expand.bias"][0] *= 20
        state["depthwise.weight"][0] /= 20
    fitted = {}
    for equalize in (True, False):
        method = Int8Method(FUSED, QuantizeSection(equalize=equalize, rounding="nearest"))
        calibrated = quantize.calibrate(program, quantize.CalibrationInputs(SAMPLES), method)
        done = quantize.apply(program, SAMPLES[0], calibrated, method)
        assert not [n for n in done.program.graph.nodes if RESCALE in n.meta]
        assert len(int8_blocks(done.program)) == 1
        expected, y = program.module()(*SAMPLES[0]), done.program.module()(*SAMPLES[0])
        fitted[equalize] = float((y - expected).square().mean())
    assert fitted[True] < fitted[False] / 2


def test_the_search_takes_a_block_as_one_and_keeps_it_whole():
    network = folded(NET)
    rng = np.random.default_rng(3)
    outputs = [network(*x).detach().numpy() for x in SAMPLES]
    truths = [y + 0.003 * rng.standard_normal(y.shape).astype(np.float32) for y in outputs]
    evaluation = EvaluationSet(SAMPLES, truths, ["sigma=15"] * len(SAMPLES))
    precision = quantized(evaluation=evaluation).calibrated.precision
    rows = {row.layer: row for row in precision.layers}
    assert set(rows) == {"head", "body.0.body.0", "body.1.body.0", "tail"}
    assert sum(row.share for row in precision.layers) == pytest.approx(1)
    limit = min(point.drop_db for point in precision.curve if point.layers) + 1e-6
    chosen = quantized(evaluation=replace(evaluation, limit_db=max(limit, 1e-6)))
    kept = chosen.calibrated.precision.kept
    assert kept
    reasons = {row["node"]: row["reason"] for row in chosen.float_nodes}
    for first in kept:
        assert reasons[first] == KEPT_FOR_QUALITY
        if first.startswith("body"):
            assert reasons[f"{first[:-1]}6"] == KEPT_IN_BLOCK
    assert chosen.int8_mac_share == pytest.approx(1 - sum(rows[name].share for name in kept))


def test_the_path_of_a_module_names_its_layers():
    module = folded()
    plan = make_plan(module, scheme=STOCK, keep_float=["body.0", "head"])
    assert [layer.name for layer in plan.layers] == [f"body.1.body.{k}" for k in (0, 3, 6)] + ["tail"]
    quantize.refuse_unknown_layers([module], "keep_float", ["body.0", "bod?.1"])
    with pytest.raises(RecipeError, match=r"'body\.2' matches no layer"):
        quantize.refuse_unknown_layers([module], "keep_float", ["body.2"])
