"""Programs whose blocks are one node each compute the same as before."""

from __future__ import annotations

import pytest
import torch
from small_blocks import ACTIVATIONS, Block, Masked, MobileNetV2, dilated, export
from small_int8 import quantize_program
from torch import nn

from edgedyn import targets
from edgedyn.graph.blocks import find_blocks
from edgedyn.graph.nodes import module_path
from edgedyn.layers.malleconv import ResConvBlock
from edgedyn.quantize.quantized import to_float
from edgedyn.recipe.keys import QuantizeSection
from edgedyn.targets.fuse_blocks import fuse_blocks


def same(mask):
    return mask


class IntoX(Block):
    """The sum is written into x, which a later sum reads."""

    def forward(self, x):
        x = x * 2
        y = x
        x += self.branch(x)
        return x + y


def fused_nodes(program):
    return [n for n in program.graph.nodes if getattr(n.target, "namespace", "") == "edgedyn"]


def left(program):
    return [n for n in program.graph.nodes if n.target is torch.ops.aten.conv2d.default]


FLOAT = {
    **{f"act {name}": Block(activations=(name, name, name)) for name in ACTIVATIONS},
    "5x5": Block(side=5),
    "stride 2": Block(stride=2, residual=False, outputs=6),
    "5x5 stride 2": Block(stride=2, side=5, residual=False),
    "no bias": Block(bias=False),
    "no sum": Block(residual=False),
    "masked": Masked(dilated(3), same, same),
    "masked behind": Masked(None, None, same),
    "masked 5x5": Masked(dilated(5), None, same, side=5),
    "sum into x": IntoX(),
    "chain": nn.Sequential(*[ResConvBlock(4) for _ in range(3)]),
}


@pytest.mark.parametrize("name", FLOAT)
def test_float_blocks_compute_the_same(name):
    network = FLOAT[name]
    x = torch.randn(2, 4, 9, 7, generator=torch.Generator().manual_seed(1))
    program = to_float(export(network), (x,), "fp32").program
    before = len(left(program))
    fused = fuse_blocks(program)
    nodes = fused_nodes(fused)
    assert len(nodes) == (3 if name == "chain" else 1)
    assert len(left(fused)) == before - 3 * len(nodes)
    torch.testing.assert_close(fused.module()(x), program.module()(x), rtol=1e-5, atol=1e-5)


def test_a_mobilenet_keeps_its_logits_and_its_first_block():
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    program = to_float(export(MobileNetV2(), 1, 3, 64, 64), (x,), "fp32").program
    fused = fuse_blocks(program)
    assert len(fused_nodes(fused)) == 16
    assert [module_path(node) for node in fused_nodes(fused)[:2]] == ["features.2.conv", "features.3.conv"]
    assert len(left(fused)) == 4  # stem, the block without expansion, head
    expected = program.module()(x)
    torch.testing.assert_close(
        fused.module()(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max())
    )


def test_a_program_without_blocks_is_the_same_object():
    program = export(nn.Conv2d(4, 4, 1))
    assert fuse_blocks(program) is program


SCHEME = targets.load("executorch", "fused").int8


def sample(seed: int, *shape: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(shape or (2, 4, 9, 7), generator=torch.Generator().manual_seed(seed)),)


def quantized(network, *shape, **section):
    return quantize_program(
        export(network, *shape),
        sample(1, *shape),
        scheme=SCHEME,
        section=QuantizeSection(**section),
        samples=[sample(seed, *shape) for seed in range(2, 6)],
    )


class Headed(nn.Module):
    """A dense convolution in front, whose output a block and a sum read, and one behind."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Conv2d(4, 4, 3, padding=1), FLOAT["chain"]
        self.tail = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        y = self.head(x)
        return self.tail(self.body(y)) + y


@pytest.mark.parametrize("name", [*FLOAT, "headed"])
@pytest.mark.parametrize(
    "section", [{}, {"equalize": False, "rounding": "nearest"}], ids=["default", "plain"]
)
def test_int8_blocks_compute_the_same(name, section):
    done = quantized({**FLOAT, "headed": Headed()}[name], **section)
    fused = fuse_blocks(done.program)
    nodes = fused_nodes(fused)
    assert [node.target for node in nodes] == [torch.ops.edgedyn.inverted_residual_int8.default] * (
        3 if name in ("chain", "headed") else 1
    )
    for seed in (2, 7):
        (x,) = sample(seed)
        torch.testing.assert_close(fused.module()(x), done.program.module()(x), rtol=1e-4, atol=1e-4)
    assert done.int8_mac_share == pytest.approx(1.0, abs=0.05)  # a mask's head decides in float


def test_a_node_has_the_path_of_its_block_or_else_of_its_depthwise_layer():
    layers = [
        nn.Sequential(*(getattr(b, k) for k in ("expand", "depthwise", "project")))
        for b in (Block(), Block())
    ]
    for network, expected in (
        (nn.Sequential(*layers), ["0", "1"]),
        (nn.Sequential(*layers[0], *layers[1]), ["1", "4"]),
        (nn.Sequential(nn.Sequential(*layers[0], *layers[1])), ["0.1", "0.4"]),
        (nn.Sequential(layers[0]), ["0"]),
        (layers[0], ["1"]),
    ):
        fused = fuse_blocks(to_float(export(network), sample(1), "fp32").program)
        assert [module_path(node) for node in fused_nodes(fused)] == expected


def arguments(node):
    return dict(zip((a.name for a in node.target._schema.arguments), node.args, strict=True))


@pytest.mark.parametrize("name", ["chain", "headed"])
def test_int8_blocks_add_x_as_it_came(name):
    fused = fuse_blocks(quantized({**FLOAT, "headed": Headed()}[name]).program)
    calls = [arguments(node) for node in fused_nodes(fused)]
    assert [call["residual"] for call in calls] == [True, True, True]
    # the first reads what the layer in front wrote, which is INT8; others the sum of the block before
    assert ("dequantize" in calls[0]["x"].name) == (name == "headed")
    assert [call["x"] for call in calls[1:]] == fused_nodes(fused)[:2]


def test_int8_blocks_without_a_sum_pass_float_maps_on():
    network = nn.Sequential(Block(residual=False), Block(residual=False))
    fused = fuse_blocks(quantized(network).program)
    first, second = fused_nodes(fused)
    assert arguments(second)["x"] is first
    assert not [n for n in fused.graph.nodes if "quantize_per_tensor" in str(n.target)]


@pytest.mark.parametrize("between", [[], [nn.ReLU6()]], ids=["plain", "relu6"])
def test_a_block_reads_the_rounded_output_of_an_int8_layer(between, tmp_path):
    network = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), *between, Block(residual=False))
    done = quantized(network, 1, 3, 12, 18)
    (node,) = fused_nodes(fuse_blocks(done.program))
    assert "dequantize" in arguments(node)["x"].name
    # XNNPACK wants the layer's output in INT8: without its pair the program did not lower
    artifact = targets.load("executorch", "fused").lower({"forward": done.program}, tmp_path, "int8")
    assert artifact.facts["portable"] == {"edgedyn.inverted_residual_int8.default": 1}


class Branched(nn.Module):
    """Two readers of one rounded map: a block and a dense convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = Block(residual=False), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        y = x * 2
        return self.block(y) + self.other(y)


def test_a_map_that_others_read_rounded_is_rounded_once():
    done = quantized(Branched())
    fused = fuse_blocks(done.program)
    (node,) = fused_nodes(fused)
    (x,) = sample(3)
    torch.testing.assert_close(fused.module()(x), done.program.module()(x), rtol=1e-4, atol=1e-4)
    assert arguments(node)["residual"] is False
    assert "dequantize" in arguments(node)["x"].name
    (doubled,) = (n for n in fused.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
    assert len(doubled.users) == 1


def test_a_block_that_is_int8_in_part_stays_three_convolutions():
    stock = targets.load("executorch").int8
    for kept in ("expand", "depthwise", "project"):
        done = quantize_program(
            export(Block(activations=("relu", "relu", "none"))),
            sample(1),
            scheme=stock,
            section=QuantizeSection(keep_float=[kept]),
            samples=[sample(2)],
        )
        assert fuse_blocks(done.program) is done.program
        (refusal,) = find_blocks(done.program.module())[1]
        assert "only a part of it is INT8" in refusal.reason
