"""Passes for XNNPACK on Q/DQ programs: they change no number, and XNNPACK still needs them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from small_int8 import quantize_program
from small_networks import LAYERS, make_input
from torch import Tensor, fx, nn

from edgedyn import ops, targets
from edgedyn.errors import ModelError
from edgedyn.layers import canonicalize
from edgedyn.recipe.keys import QuantizeSection
from edgedyn.targets.executorch import passes

TARGET = targets.load("executorch")
SHAPE = (1, 3, 16, 24)


def to_int8(net: nn.Module, **section) -> torch.export.ExportedProgram:
    """Return the INT8 program of a network with random weights, before any pass."""
    torch.manual_seed(16)
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = make_input(SHAPE)
    program = torch.export.export(canonicalize(net.eval()), (x,), strict=False)
    forms = ops.choose_forms(program, TARGET, {})
    program = quantize_program(
        ops.decompose(program, forms, "before_quantize"),
        (x,),
        scheme=TARGET.int8,
        section=QuantizeSection(**section),
        samples=[(x,), (x.flip(3),)],
    ).program
    return ops.decompose(program, forms, "after_quantize")


def calls(program: torch.export.ExportedProgram, name: str) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.op == "call_function" and name in str(n.target)]


def assert_same_function(first: torch.export.ExportedProgram, second: torch.export.ExportedProgram) -> None:
    x = make_input(SHAPE)
    with torch.no_grad():
        assert torch.equal(first.module()(x), second.module()(x))


class PadNet(nn.Module):
    """A pad between a convolution and two consumers: a convolution and a product."""

    def __init__(self, value: float = 0.0) -> None:
        super().__init__()
        self.value, self.first, self.second = value, nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        padded = F.pad(self.first(x), (1, 2, 1, 1), value=self.value)
        return self.second(padded) * padded


class PadOnly(nn.Module):
    """A pad whose only consumer computes in float."""

    def __init__(self, sides: tuple[int, ...] = (1, 2, 0, 1)) -> None:
        super().__init__()
        self.sides, self.first, self.second = sides, nn.Conv2d(3, 4, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sigmoid(F.pad(self.first(x), self.sides)))


class Crop(nn.Module):
    """A pad with negative sides, alone."""

    def __init__(self, sides: tuple[int, ...]) -> None:
        super().__init__()
        self.sides = sides

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.sides, value=0.5)


class Around(nn.Module):
    """A residual network around one layer, which reads a convolution's output directly."""

    def __init__(self, layer: nn.Module, channels: int = 8) -> None:
        super().__init__()
        self.head, self.layer = nn.Conv2d(3, 8, 3, padding=1), layer
        self.tail = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x - self.tail(self.layer(self.head(x)))


@pytest.mark.parametrize(("value", "pairs"), [(0.0, 5), (0.5, 4)])
def test_zero_pad_of_dequantized_values_is_quantized_again_without_loss(value, pairs):
    """Four pairs by annotation; the fifth, behind a zero pad, has the parameters of the pad's input."""
    program = to_int8(PadNet(value))
    changed = passes.apply_passes(program)
    assert len(calls(program, ".quantize_per_tensor")) == 4
    assert len(calls(changed, ".quantize_per_tensor")) == pairs
    assert_same_function(program, changed)


@pytest.mark.parametrize("sides", [(-1, 2), (-1, -1, 2, -3), (0, 0, -1, 0), (-2, -1, -1, -1, 0, -1)], ids=str)
def test_negative_sides_of_a_pad_become_slices(sides):
    program = torch.export.export(Crop(sides), (make_input(SHAPE),))
    changed = passes.apply_passes(program)
    assert min(calls(program, "pad")[0].args[1]) < 0
    assert all(min(node.args[1]) >= 0 for node in calls(changed, "pad"))
    assert_same_function(program, changed)


@pytest.mark.parametrize("layer", LAYERS)
def test_every_dequantize_has_one_consumer(layer):
    program = to_int8(Around(LAYERS[layer]()))
    changed = passes.apply_passes(program)
    assert any(len(node.users) > 1 for node in calls(program, "dequantize_per_tensor"))
    assert all(len(node.users) == 1 for node in calls(changed, "dequantize_per_tensor"))
    assert_same_function(program, changed)


def test_range_of_each_image_is_found_and_used_on_one_node():
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x)
            return y * self.second(y)

    program = to_int8(Gate(), dynamic=["second"])
    changed = passes.apply_passes(program)
    (quantize,) = calls(changed, "quantize_per_tensor.tensor")[:1]
    (finder,) = calls(changed, "choose_qparams")
    assert quantize.args[0] is finder.args[0]
    assert_same_function(program, changed)


def test_float_convolutions_of_one_layer_share_a_dequantize():
    """``bases_first`` runs one convolution per basis, after quantization, on the same values."""
    from edgedyn.layers.acda import ACDAConv

    program = to_int8(Around(ACDAConv(8, 8)))
    changed = passes.apply_passes(program)
    floats = [n for n in calls(changed, "conv2d") if "dequantize" not in str(n.args[1].target)]
    shared = Counter(node.args[0] for node in floats if "dequantize" in str(node.args[0].target))
    assert list(shared.values()) == [len(floats)]
    assert len(floats) > 1
    assert_same_function(program, changed)


def test_float_program_is_returned_as_it_is():
    program = torch.export.export(PadNet().eval(), (make_input(SHAPE),))
    assert passes.apply_passes(program) is program


@pytest.mark.parametrize(
    ("left_out", "net"),
    [
        (passes.slice_negative_pads, lambda: PadOnly((-1, 2, 0, 1))),
        (passes.quantize_pads, PadOnly),
        (passes.duplicate_dequantize, lambda: Around(LAYERS["kernels"]())),
    ],
    ids=["slice_negative_pads", "quantize_pads", "duplicate_dequantize"],
)
def test_xnnpack_still_needs_each_pass(left_out, net, tmp_path, monkeypatch):
    """Where this fails with a newer ExecuTorch, the pass can go."""
    program = to_int8(net())
    TARGET.lower({"forward": program}, tmp_path, "int8")
    TARGET.load(tmp_path / "model.pte")(make_input(SHAPE).numpy())
    monkeypatch.setattr(passes, "PASSES", tuple(p for p in passes.PASSES if p is not left_out))
    with pytest.raises(ModelError, match=r"ExecuTorch \S+ refuses program 'forward': \["):
        TARGET.lower({"forward": program}, tmp_path, "int8")
