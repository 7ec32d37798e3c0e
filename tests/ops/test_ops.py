"""Every primitive: its definition, its forms, its registrations, its refusals."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from edgedyn import ops, targets
from edgedyn.errors import ModelError, NoFormError, RecipeError
from edgedyn.ops import shifting
from edgedyn.ops.sliced_depthwise2d import banded, oracle, sliced_depthwise2d

OPS = ops.load_all()
CASES = {f"{name}-{k}": (op, args) for name, op in OPS.items() for k, args in enumerate(op.examples())}
FORMS = {f"{name}-{form.name}": (op, form) for name, op in OPS.items() for form in op.forms}
ORDINARY = [
    pytest.param(op, form, args, id=f"{form.name}-{case}")
    for case, (op, args) in CASES.items()
    for form in op.forms
    if form.fn is not None
]
EXECUTORCH = targets.load("executorch")
OP = OPS["sliced_depthwise2d"]


def every_case(function):
    return pytest.mark.parametrize(("op", "args"), CASES.values(), ids=list(CASES))(function)


def cases_of(name):
    cases = {case: values for case, values in CASES.items() if values[0].name == name}
    return pytest.mark.parametrize(("op", "args"), cases.values(), ids=list(cases))


def to_double(args):
    return tuple(a.double() if isinstance(a, Tensor) else a for a in args)


class Call(nn.Module):
    """One call of an op with everything but its tensors fixed."""

    def __init__(self, op, args):
        super().__init__()
        self.op, self.args = op, args

    def forward(self, *tensors):
        left = list(tensors)
        return self.op.overload(*[left.pop(0) if isinstance(a, Tensor) else a for a in self.args])


def capture(op, args):
    tensors = tuple(a for a in args if isinstance(a, Tensor))
    return torch.export.export(Call(op, args), tensors), tensors


def test_every_op_has_forms_and_examples():
    assert OPS
    for name, op in OPS.items():
        assert op.name == name
        assert op.forms
        assert list(op.examples()), f"{name} has no examples"
        assert any(not form.requires for form in op.forms), f"{name} has no form for a target without kernels"


@pytest.mark.parametrize(("op", "args"), [(op, next(iter(op.examples()))) for op in OPS.values()], ids=OPS)
def test_op_and_its_forms_take_an_empty_batch(op, args):
    names = [argument.name for argument in op.overload._schema.arguments]
    varies = {"x", *op.generated}
    empty = tuple(a[:0] if n in varies and a is not None else a for n, a in zip(names, args, strict=False))
    expected = (0, *op.overload(*args).shape[1:])
    assert op.overload(*empty).shape == expected
    assert capture(op, empty)[0].graph_signature.user_outputs
    for form in op.forms:
        if form.fn is not None:
            assert form.fn(*empty).shape == expected, form.name


@every_case
def test_example_discriminates(op, args):
    tensors = [a for a in args if isinstance(a, Tensor)]
    batch = tensors[0].shape[0]
    assert batch >= 2
    for tensor in (t for t in tensors if t.dim() == 4 and t.shape[0] == batch):  # weights are square
        small = tensor.shape[2:] == (1, 1)
        assert small or tensor.shape[2] != tensor.shape[3], "a square tensor hides a transposition"
        is_mask = set(tensor.unique().tolist()) == {0, 1}
        assert is_mask or tensor.unique().numel() > 0.99 * tensor.numel(), "equal values hide a wrong index"


@cases_of("sliced_depthwise2d")
def test_oracle_equals_the_formula_at_single_pixels(op, args):
    """The docstring's formula, one scalar loop a pixel, at the corners and in the middle."""
    x, grid, offset, side, dilation, align = to_double(args)
    y = op.overload(x, grid, offset, side, dilation, align)
    (b, c, h, w), (gh, gw), filters = x.shape, grid.shape[2:], grid.shape[1] // side**2

    def lerp(cells, p, size, count):
        position = p * (count - 1) / (size - 1) if align else max((p + 0.5) * count / size - 0.5, 0)
        low = min(int(position), count - 1)
        weight = position - low
        return [(low, 1 - weight), (min(low + 1, count - 1), weight)]

    def sliced(cells, py, px):
        rows, columns = lerp(cells, py, h, gh), lerp(cells, px, w, gw)
        return sum(wy * wx * cells[i, j].item() for i, wy in rows for j, wx in columns)

    for bi, ci, py, px in [
        (0, 0, 0, 0),
        (b - 1, c - 1, h - 1, w - 1),
        (0, c - 1, h // 2, 0),
        (1, 1, 1, w - 2),
    ]:
        share = c // filters
        total = 0.0
        for tap in range(side**2):
            qy = py + dilation * (tap // side - side // 2)
            qx = px + dilation * (tap % side - side // 2)
            if 0 <= qy < h and 0 <= qx < w:
                total += sliced(grid[bi, tap * filters + ci // share], py, px) * x[bi, ci, qy, qx].item()
        if offset is not None:
            total += sliced(offset[bi, ci // share], py, px)
        # 25 taps of 4 terms and a position each: about 200 roundings of 1.1e-16
        assert y[bi, ci, py, px].item() == pytest.approx(total, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize(("op", "form", "args"), ORDINARY)
def test_form_equals_op_in_float64(op, form, args):
    args = to_double(args)
    torch.testing.assert_close(form.fn(*args), op.overload(*args), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("channels", [1, 7, 9, 32])
def test_channels_are_cut_once_each_into_few_runs(channels):
    for elements in (1, shifting.RUN_ELEMENTS // 3, 2 * shifting.RUN_ELEMENTS):
        runs = shifting.cut(channels, elements)
        assert [c for run in runs for c in run] == list(range(channels))
        assert len(runs) <= shifting.MOST_RUNS
    blocks = shifting.cut(2 * channels, 2 * shifting.RUN_ELEMENTS, within=channels)
    assert [c for run in blocks for c in run] == list(range(2 * channels))
    assert all(run[0] // channels == run[-1] // channels for run in blocks)


@pytest.mark.parametrize(("band", "most_runs"), [(1, 1), (3, 2), (4, 5), (32, 8)])
@pytest.mark.parametrize(
    ("op", "form", "args"), [case for case in ORDINARY if "in_order" in case.values[1].requires]
)
def test_form_equals_op_however_it_is_cut(op, form, args, band, most_runs, monkeypatch):
    """The examples are too small to be cut as a feature map is: into bands of rows, and runs of channels."""
    monkeypatch.setattr(banded, "BAND", band)
    monkeypatch.setattr(shifting, "RUN_ELEMENTS", 1)
    monkeypatch.setattr(shifting, "MOST_RUNS", most_runs)
    args = to_double(args)
    torch.testing.assert_close(form.fn(*args), op.overload(*args), rtol=1e-12, atol=1e-12)


@every_case
def test_fake_has_the_shape_and_dtype_of_eager(op, args):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for values in (args, to_double(args)):
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in values]
            fake = op.overload(*fakes)
        y = op.overload(*values)
        assert (fake.shape, fake.dtype, fake.stride()) == (y.shape, y.dtype, y.stride())


@every_case
def test_out_variant_writes_what_the_op_returns(op, args):
    out = torch.full((1,), torch.nan)
    returned = getattr(torch.ops.edgedyn, op.name).out(*args, out=out)
    assert returned is out
    assert torch.equal(out, op.overload(*args))


@every_case
def test_registration_passes_opcheck(op, args):
    """Schema and fake; there is no autograd formula: references are trained, canonical modules deployed."""
    torch.library.opcheck(op.overload, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("op", "form", "args"), ORDINARY)
def test_expand_leaves_no_node_of_ours_and_keeps_the_numbers(op, form, args):
    args = to_double(args)
    program, tensors = capture(op, args)
    assert op.overload in {node.target for node in program.graph.nodes}
    decomposed = ops.decompose(program, {op: form}, form.decompose)
    assert not [node for node in decomposed.graph.nodes if "edgedyn" in str(node.target)]
    torch.testing.assert_close(decomposed.module()(*tensors), op.overload(*args), rtol=1e-12, atol=1e-12)


def test_defaults_of_the_wrapper_are_those_of_the_schema():
    x, grid = torch.randn(2, 2, 5, 6), torch.randn(2, 18, 2, 3)
    assert torch.equal(sliced_depthwise2d(x, grid, None, 3), oracle(x, grid, None, 3, 1, False))


X, GRID, OFFSET = torch.zeros(2, 6, 5, 7), torch.zeros(2, 27, 2, 3), torch.zeros(2, 3, 2, 3)


@pytest.mark.parametrize(
    ("args", "found", "expected"),
    [
        ((X, GRID, None, 2), "kernel_size=2", "odd kernel_size"),
        ((X, GRID, None, 0), "kernel_size=0", "odd kernel_size"),
        ((X, GRID, None, 3, 0), "dilation=0", "dilation >= 1"),
        ((X[0], GRID, None, 3), r"x \(6, 5, 7\)", "Reshape the grid tap-major"),
        ((X, GRID[0], None, 3), r"grid \(27, 2, 3\)", "Reshape the grid tap-major"),
        ((X, GRID[:1], None, 3), r"grid \(1, 27, 2, 3\)", "the same batch B"),
        ((X, GRID[:, :26], None, 3), "26 channels for 9 taps", "F divides the channels"),
        ((X, GRID[:, :0], None, 3), "0 channels for 9 taps", "F divides the channels"),
        ((X[:, :4], GRID, None, 3), "x of 4 channels", "F divides the channels"),
        ((X, GRID, OFFSET[:, :2], 3), r"offset \(2, 2, 2, 3\)", r"expected \(2, 3, 2, 3\)"),
        ((X, GRID, OFFSET[:, :, :1], 3), r"offset \(2, 3, 1, 3\)", "one offset per filter"),
    ],
    ids=lambda v: v.replace(" ", "_") if isinstance(v, str) else "",
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_precondition_is_refused_with_what_was_found(args, found, expected, device):
    args = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    with pytest.raises(ModelError, match=f"{found}.*{expected}") as caught:
        OP.overload(*args)
    assert caught.value.exit_code == 4


def test_first_form_that_the_target_can_run_is_chosen():
    kernels = replace(EXECUTORCH, capabilities=EXECUTORCH.kernels)
    assert ops.choose_form(OP, EXECUTORCH).name == "banded_shift_mac"
    assert ops.choose_form(OP, replace(EXECUTORCH, capabilities=frozenset())).name == "resize_shift_mac"
    assert ops.choose_form(OP, kernels).name == OP.forms[0].name == "fused"
    assert ops.choose_form(OP, kernels, "resize_shift_mac").name == "resize_shift_mac"
    behind = replace(OP, forms=tuple(reversed(OP.forms)))
    assert ops.choose_form(behind, kernels).name == "resize_shift_mac"
    assert ops.choose_form(behind, EXECUTORCH).name == "resize_shift_mac"


def test_form_that_the_target_lacks_names_every_form_and_its_needs():
    with pytest.raises(NoFormError) as caught:
        ops.choose_form(OP, EXECUTORCH, "fused")
    text = str(caught.value)
    assert caught.value.exit_code == 4
    assert "target 'executorch' cannot run op 'sliced_depthwise2d' as fused: it has ['in_order']" in text
    assert "resize_shift_mac needs []" in text
    assert "fused needs ['edgedyn_kernels']" in text
    assert "forms.sliced_depthwise2d" in text


def test_op_without_any_possible_form_is_refused():
    only = replace(OP, forms=tuple(form for form in OP.forms if form.requires - EXECUTORCH.capabilities))
    with pytest.raises(NoFormError, match=r"as any form: .*fused needs \['edgedyn_kernels'\]"):
        ops.choose_form(only, EXECUTORCH)


def test_unknown_form_lists_the_known_ones():
    with pytest.raises(
        RecipeError, match=r"'melted'.*found forms: fused, banded_shift_mac, resize_shift_mac\. Fix forms\."
    ):
        ops.choose_form(OP, EXECUTORCH, "melted")


def test_unknown_op_lists_the_known_ones():
    program, _ = capture(OP, next(iter(OP.examples())))
    with pytest.raises(
        RecipeError,
        match=r"unknown op 'mixed_conv2d'; did you mean 'masked_conv2d'\? found ops: .*sliced_depthwise2d",
    ):
        ops.choose_forms(program, EXECUTORCH, {"mixed_conv2d": "x"})


def test_only_ops_that_the_program_calls_get_a_form():
    program, _ = capture(OP, next(iter(OP.examples())))
    chosen = ops.choose_forms(program, EXECUTORCH, {})
    assert {op.name: form.name for op, form in chosen.items()} == {"sliced_depthwise2d": "banded_shift_mac"}
    plain = torch.export.export(nn.Conv2d(3, 3, 1), (torch.zeros(1, 3, 2, 4),))
    assert ops.choose_forms(plain, EXECUTORCH, {}) == {}
    assert ops.decompose(plain, {}, "before_quantize") is plain
