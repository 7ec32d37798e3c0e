"""atom_depthwise2d: its formula, its refusals, and its forms with constant bases."""

from __future__ import annotations

import pytest
import torch
from small_int8 import quantize_program
from torch import Tensor, nn

from edgedyn import ops, quantize, targets
from edgedyn.errors import ModelError
from edgedyn.ops.atom_depthwise2d import OP, atom_depthwise2d, oracle
from edgedyn.recipe.keys import QuantizeSection

CASES = list(OP.examples())
FORMS = {form.name: form for form in OP.forms}
ORDINARY = [name for name, form in FORMS.items() if not form.requires]


def to_double(args):
    return [a.double() if isinstance(a, Tensor) else a for a in args]


@pytest.mark.parametrize("args", CASES, ids=range(len(CASES)))
def test_oracle_equals_the_formula_at_single_pixels(args):
    """The docstring's formula, one scalar loop a pixel, at the corners and in the middle."""
    x, alpha, bases, side, stride = to_double(args)
    y = OP.overload(x, alpha, bases, side, stride)
    (b, c, height, width), (h, w), count = x.shape, alpha.shape[2:], len(bases)
    kernels = alpha.shape[1] // count
    assert y.shape == (b, kernels * c, h, w)
    for bi, m, ci, py, px in [
        (0, 0, 0, 0, 0),
        (b - 1, kernels - 1, c - 1, h - 1, w - 1),
        (0, kernels - 1, 0, h // 2, 0),
        (1, 0, c - 1, h - 1, w // 2),
        (1, kernels // 2, c // 2, 0, w - 1),
    ]:
        total = 0.0
        for tap in range(side**2):
            qy, qx = py * stride + tap // side - side // 2, px * stride + tap % side - side // 2
            if 0 <= qy < height and 0 <= qx < width:
                kernel = sum(alpha[bi, m * count + k, py, px] * bases[k, tap] for k in range(count))
                total += float(kernel * x[bi, ci, qy, qx])
        # at most 49 taps of 6 products: about 400 roundings of 1.1e-16
        assert y[bi, m * c + ci, py, px].item() == pytest.approx(total, rel=1e-12, abs=1e-12)


def test_defaults_of_the_wrapper_are_those_of_the_schema():
    x, alpha, bases, side, _ = CASES[0]
    assert torch.equal(atom_depthwise2d(x, alpha, bases, side), oracle(x, alpha, bases, side, 1))


X, ALPHA, BASES = torch.zeros(2, 4, 5, 8), torch.zeros(2, 12, 5, 8), torch.zeros(6, 9)


@pytest.mark.parametrize(
    ("args", "found", "expected"),
    [
        ((X, ALPHA, BASES, 2), "kernel_size=2", "odd kernel_size"),
        ((X, ALPHA, BASES, 0), "kernel_size=0", "odd kernel_size"),
        ((X, ALPHA, BASES, 3, 0), "stride=0", "stride >= 1"),
        ((X[0], ALPHA, BASES, 3), r"x \(4, 5, 8\)", "the same batch B"),
        ((X, ALPHA[0], BASES, 3), r"alpha \(12, 5, 8\)", "the same batch B"),
        ((X, ALPHA[:1], BASES, 3), r"alpha \(1, 12, 5, 8\)", "the same batch B"),
        ((X, ALPHA, BASES[0], 3), r"bases \(9,\)", r"expected \(K, 9\)"),
        ((X, ALPHA, BASES[:0], 3), r"bases \(0, 9\)", r"expected \(K, 9\)"),
        ((X, ALPHA, BASES, 5), r"bases \(6, 9\)", r"expected \(K, 25\)"),
        ((X, ALPHA[:, :11], BASES, 3), "alpha of 11 channels for 6 bases", r"M \* K channels"),
        ((X, ALPHA[:, :0], BASES, 3), "alpha of 0 channels for 6 bases", r"M \* K channels"),
        ((X, ALPHA, BASES, 3, 2), r"alpha of \(5, 8\) pixels .* stride=2", r"expected \(3, 4\)"),
        ((X, ALPHA[:, :, :, 1:], BASES, 3), r"alpha of \(5, 7\) pixels", r"expected \(5, 8\)"),
    ],
    ids=lambda v: v.replace(" ", "_") if isinstance(v, str) else "",
)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_precondition_is_refused_with_what_was_found(args, found, expected, device):
    args = [a.to(device) if isinstance(a, Tensor) else a for a in args]
    with pytest.raises(ModelError, match=f"{found}.*{expected}"):
        OP.overload(*args)


def test_apply_macs_count_the_cheaper_order():
    x, alpha = torch.zeros(2, 32, 10, 12, device="meta"), torch.zeros(2, 36, 5, 6, device="meta")
    bases = torch.zeros(6, 9, device="meta")
    pixels, bases_first, atoms_first = 2 * 5 * 6, 32 * 6 * 9 + 32 * 6 * 6, 6 * 6 * 9 + 32 * 6 * 9
    assert atoms_first < bases_first
    assert OP.apply_macs(x, alpha, bases, 3, 2) == pixels * atoms_first
    few = x[:, :4]
    assert OP.apply_macs(few, alpha, bases, 3, stride=2) == pixels * (4 * 6 * 9 + 4 * 6 * 6)


class Fixed(nn.Module):
    """The op with bases that are a constant of the program, as a layer has them, between two convolutions."""

    def __init__(
        self, kernel_size: int, stride: int, count: int, kernels: int = 2, channels: int = 4
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.kernel_size, self.stride = kernel_size, stride
        self.register_buffer("bases", torch.randn(count, kernel_size**2, generator=generator))
        self.head = nn.Conv2d(channels, channels, 1)
        self.alpha = nn.Conv2d(channels, kernels * count, 3, stride=stride, padding=1)
        self.tail = nn.Conv2d(kernels * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        y = atom_depthwise2d(x, self.alpha(x).tanh(), self.bases, self.kernel_size, self.stride)
        return self.tail(y)


def make_fixed(kernel_size=3, stride=1, count=6):
    torch.manual_seed(8)
    net = Fixed(kernel_size, stride, count).eval()
    x = torch.randn(1, 4, 9, 14)
    return net, x, torch.export.export(net, (x,))


@pytest.mark.parametrize("name", ORDINARY)
def test_constant_bases_become_static_weights(name):
    """A convolution whose weight is computed would be left to the portable kernels."""
    net, x, program = make_fixed()
    decomposed = ops.decompose(program, {OP: FORMS[name]}, FORMS[name].decompose)
    stored = {
        **decomposed.graph_signature.inputs_to_parameters,
        **decomposed.graph_signature.inputs_to_buffers,
    }
    convolutions = [n for n in decomposed.graph.nodes if n.target is torch.ops.aten.conv2d.default]
    assert len(convolutions) > 3
    assert all(n.args[1].name in stored for n in convolutions)
    with torch.no_grad():
        # both float32: at most 54 products of each value are added in another order
        torch.testing.assert_close(decomposed.module()(x), net(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kernel_size", "stride", "count"), [(3, 2, 3), (5, 1, 2)])
def test_first_form_is_one_delegate_and_runs(kernel_size, stride, count, tmp_path):
    net, x, program = make_fixed(kernel_size, stride, count)
    target = targets.load("executorch")
    forms = ops.choose_forms(program, target, {})
    assert [form.name for form in forms.values()] == ["bases_first"]
    program = ops.decompose(program, forms, "before_quantize")
    program = ops.decompose(quantize.to_float(program, (x,), "fp32").program, forms, "after_quantize")
    artifact = target.lower({"forward": program}, tmp_path, "fp32")
    assert (artifact.facts["delegates"], artifact.facts["portable"]) == (1, {})
    y = target.load(tmp_path / artifact.programs["forward"])(x.numpy())[0]
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(y), net(x), rtol=1e-5, atol=1e-5)


def test_fixed_bases_stay_float_in_int8():
    """Only the three convolutions around the op are quantized: one more rounding a basis would cost SQNR."""
    _, x, program = make_fixed()
    target = targets.load("executorch")
    forms = ops.choose_forms(program, target, {})
    program = ops.decompose(program, forms, "before_quantize")
    program = quantize_program(
        program, (x,), scheme=target.int8, section=QuantizeSection(), samples=[(x,), (2 * x,)]
    ).program
    program = ops.decompose(program, forms, "after_quantize")
    convolutions = [n for n in program.graph.nodes if n.target is torch.ops.aten.conv2d.default]
    quantized = [n for n in convolutions if "dequantize" in str(n.args[1].target)]
    assert (len(quantized), len(convolutions)) == (3, 3 + 6)
