"""Constants of a captured program: added, replaced, copied for each call, computed once."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn
from torch.export import ExportedProgram

from edgedyn.graph.constants import add_constant, fold_constants, frozen, set_constant, unshare_constants
from edgedyn.graph.nodes import bias_of, constant_of, weight_of


def capture(model: nn.Module, *inputs) -> ExportedProgram:
    return torch.export.export(model.eval(), inputs)


def called(program: ExportedProgram) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "call_function"]


class Kernels(nn.Module):
    """A convolution whose weights are rows of a constant; the constant itself is read, too."""

    def __init__(self):
        super().__init__()
        self.register_buffer("rows", torch.randn(2, 9))
        self.gain = nn.Parameter(torch.randn(3, 1, 1))

    def forward(self, x):
        first, second = torch.split(self.rows, 1)
        y = torch.conv2d(x, first.reshape(1, 1, 3, 3).expand(3, 1, 3, 3), padding=1, groups=3)
        return y * second.sum() + self.gain * self.rows[0, 0]


def test_what_reads_constants_only_is_stored_and_the_numbers_stay():
    torch.manual_seed(3)
    model, x = Kernels().double(), torch.randn(2, 3, 5, 7, dtype=torch.float64)
    folded = fold_constants(capture(model, x))
    assert called(folded) == ["aten.conv2d.default", "aten.mul.Tensor", "aten.add.Tensor"]
    with torch.no_grad():
        assert torch.equal(folded.module()(x), model(x))


def test_program_without_such_values_is_returned_as_it_is():
    program = capture(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), torch.zeros(1, 3, 5, 7))
    assert fold_constants(program) is program


def test_constant_made_of_nothing_is_computed_with_what_reads_it():
    class Ramp(nn.Module):
        def forward(self, x):
            return x * (torch.arange(4, dtype=x.dtype) + 0.5).clamp(max=2)

    folded = fold_constants(capture(Ramp(), torch.zeros(3, 4)))
    assert called(folded) == ["aten.mul.Tensor"]
    assert torch.equal(folded.module()(torch.ones(3, 4)), torch.tensor([0.5, 1.5, 2, 2]).expand(3, 4))


def test_weight_made_of_nothing_is_stored():
    class Box(nn.Module):
        def forward(self, x):
            return torch.conv2d(x, torch.full((3, 1, 3, 3), 1 / 9), padding=1, groups=3)

    folded = fold_constants(capture(Box(), torch.zeros(1, 3, 5, 7)))
    assert called(folded) == ["aten.conv2d.default"]
    x = torch.randn(1, 3, 5, 7)
    assert torch.equal(folded.module()(x), Box()(x))


def test_path_of_the_layer_is_kept():
    folded = fold_constants(capture(nn.Sequential(nn.Identity(), Kernels()), torch.zeros(1, 3, 5, 7)))
    (conv,) = [node for node in folded.graph.nodes if node.target is torch.ops.aten.conv2d.default]
    assert [path for path, _ in conv.meta["nn_module_stack"].values()][-1] == "1"


def test_quantized_weight_keeps_its_dequantize():
    import torchao.quantization.pt2e  # noqa: F401 registers the operators

    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("weight", torch.ones(4, 3, dtype=torch.int8))

        def forward(self, x):
            weight = torch.ops.quantized_decomposed.dequantize_per_tensor(
                self.weight, 0.5, 0, -128, 127, torch.int8
            )
            return x @ weight.t()

    folded = fold_constants(capture(Quantized(), torch.zeros(2, 3)))
    assert any("dequantize" in target for target in called(folded))


def test_random_numbers_are_drawn_at_run_time():
    class Noise(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("level", torch.ones(3))

        def forward(self, x):
            return x + torch.bernoulli(self.level * 0.5)

    folded = fold_constants(capture(Noise(), torch.zeros(2, 3)))
    assert [node for node in folded.graph.nodes if "bernoulli" in str(node.target) and node.users]


def folded_pair() -> fx.GraphModule:
    layer = nn.Conv2d(3, 3, 1, bias=False)
    program = capture(nn.Sequential(layer, layer), torch.zeros(1, 3, 5, 7))
    module = program.module(check_guards=False)
    unshare_constants(module, {torch.ops.aten.conv2d.default})
    return module


def test_layer_that_is_called_twice_gets_a_weight_for_each_call():
    module = folded_pair()
    first, second = (n for n in module.graph.nodes if n.target is torch.ops.aten.conv2d.default)
    assert first.args[1].target != second.args[1].target
    assert torch.equal(weight_of(module, first), weight_of(module, second))
    set_constant(module, second, 1, torch.zeros(3, 3, 1, 1))
    assert weight_of(module, first).abs().min() > 0


def test_weights_and_missing_biases_are_set_again_and_again():
    module = folded_pair()
    (first, _) = (n for n in module.graph.nodes if n.target is torch.ops.aten.conv2d.default)
    old = str(first.args[1].target)
    assert bias_of(module, first) is None
    for value in (1.0, 2.0):
        set_constant(module, first, 1, torch.full((3, 3, 1, 1), value))
        set_constant(module, first, 2, torch.full((3,), value))
        module.recompile()
        assert torch.equal(weight_of(module, first), torch.full((3, 3, 1, 1), value))
        assert torch.equal(bias_of(module, first), torch.full((3,), value))
    with pytest.raises(AttributeError):
        module.get_parameter(old)
    x = torch.ones(1, 3, 5, 7)
    second = next(n for n in module.graph.nodes if n.args and n.args[0] is first)
    torch.testing.assert_close(module(x), torch.conv2d(8 * x, weight_of(module, second)))


@pytest.mark.parametrize(
    ("value", "kind"), [(frozen(torch.ones(3)), "parameters"), (torch.ones(3), "buffers")]
)
def test_added_constant_is_read_where_it_is_inserted(value, kind):
    module = capture(nn.ReLU(), torch.zeros(2, 3)).module(check_guards=False)
    (relu,) = (node for node in module.graph.nodes if node.op == "call_function")
    node = add_constant(module, relu, "three_ones", value, {"val": value})
    assert relu.prev is node
    assert torch.equal(constant_of(module, node), torch.ones(3))
    assert "three_ones" in dict(getattr(module, f"named_{kind}")())


class InPlace(nn.Module):
    """A constant is read, changed in place and read again; where a view shows it, or it is a buffer."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.register_buffer("level", torch.arange(3.0) + 1)

    def forward(self, x):
        level = self.level if self.kind == "buffer" else self.level * 2
        y = x * level
        shown = level.view(3, 1) if self.kind == "view" else None
        (level.split([1, 2])[1] if self.kind == "list of views" else level).add_(1)
        return y + level if shown is None else y + shown[:, 0]


@pytest.mark.parametrize("kind", ["value", "view", "list of views", "buffer"])
def test_value_that_is_changed_in_place_is_folded_where_nothing_else_sees_it(kind):
    x = torch.ones(3)
    expected, folded = InPlace(kind), fold_constants(capture(InPlace(kind), x)).module()
    for _ in range(2):  # a stored constant must not change from call to call
        assert torch.equal(folded(x), expected(x))
    names = [str(node.target) for node in folded.graph.nodes]
    assert ("aten.add_.Tensor" in names) is (kind != "value")
