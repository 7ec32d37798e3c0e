"""Our ops as ONNX nodes of TensorRT plugins: attributes, and decomposition where there is no plugin."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from kernel_check import INT8_LIMIT, exact_int8, int8_call
from small_builds import NEEDS_RTX
from small_int8 import quantize_program
from small_networks import LAYERS, FilterBetween
from small_plugins import OPS
from torch import Tensor, nn

from edgedyn import ops, pipeline, targets
from edgedyn.conversion import inspection
from edgedyn.device import session
from edgedyn.errors import ModelError
from edgedyn.recipe.keys import QuantizeSection
from edgedyn.recipe.recipe import load_recipe
from edgedyn.targets.onnx_export import lint_for_tensorrt, translate, write_onnx
from edgedyn.targets.tensorrt import nodes, signatures
from edgedyn.targets.tensorrt.run import decomposed_path, host_path, load, runtime_name
from edgedyn.targets.tensorrt.signatures import SIGNATURES, node_type

CENTRED = (0, 0)  # the zero points that TensorRT takes
ROOT = Path(__file__).parents[2]
EQUIPPED = targets.load("tensorrt", "fused")
CASES = [
    pytest.param(op, args, id=f"{name}-{k}")
    for name, op in OPS.items()
    for k, args in enumerate(op.examples())
]
every_case = pytest.mark.parametrize(("op", "args"), CASES)
# 5 x 5 taps are as many operators and take the exporter 10 s
LIGHT = [case for case in CASES if isinstance(case.values[1][3], Tensor) or case.values[1][3] <= 3]
FIRST = [pytest.param(op, next(iter(op.examples())), id=name) for name, op in OPS.items()]
first_case = pytest.mark.parametrize(("op", "args"), FIRST)  # exporting takes a second
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


class Call(nn.Module):
    """One call of an op; its tensors are inputs but for those of ``stored``, which are constants."""

    def __init__(self, overload: Any, args: tuple[Any, ...], stored: tuple[int, ...] = ()) -> None:
        super().__init__()
        self.overload, self.args = overload, list(args)
        for k in stored:
            self.register_buffer(f"constant_{k}", args[k])

    def forward(self, *tensors: Tensor) -> Tensor:
        left, stored = iter(tensors), dict(self.named_buffers())
        values = [stored.get(f"constant_{k}", a) for k, a in enumerate(self.args)]
        return self.overload(
            *(
                next(left) if v is a and isinstance(a, Tensor) else v
                for v, a in zip(values, self.args, strict=True)
            )
        )


def export_call(overload: Any, args: tuple[Any, ...], stored: tuple[int, ...] = ()) -> onnx.ModelProto:
    """Export one call as a model with its node; tensors are inputs ``in_<index of the argument>``."""
    given = {f"in_{k}": a for k, a in enumerate(args) if isinstance(a, Tensor) and k not in stored}
    program = torch.export.export(Call(overload, args, stored), tuple(given.values()))
    return translate(nodes.with_nodes(program), list(given), ["y"])


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


@every_op
def test_signature_says_what_the_schema_says(op):
    signature, arguments = SIGNATURES[op.name], op.overload._schema.arguments
    tensors = [a for a in arguments if "Tensor" in str(a.type)]
    assert list(signature.inputs) == [a.name + "?" * ("Optional" in str(a.type)) for a in tensors]
    assert list(signature.attributes) == [a.name for a in arguments if a not in tensors]
    for argument in arguments[len(tensors) :]:
        choices = signature.attributes[argument.name]
        assert bool(choices) == (str(argument.type) == "str")
        assert not choices or argument.default_value == choices[0]
    assert len(tensors) <= 4  # the places of a Call in cuda.h
    assert len(signature.attributes) <= 8


def test_every_op_with_a_plugin_has_a_signature():
    assert SIGNATURES.keys() == OPS.keys()


@every_op
def test_choices_of_a_signature_are_those_that_the_op_takes(op):
    given = dict(zip((a.name for a in op.overload._schema.arguments), next(iter(op.examples())), strict=True))
    for name, choices in SIGNATURES[op.name].attributes.items():
        results = [op.overload(**{**given, name: choice}).sum().item() for choice in choices]
        assert len(set(results)) == len(choices)  # accepted, and they differ


@every_case
def test_output_of_a_signature_has_the_shape_of_the_op(op, args):
    signature = SIGNATURES[op.name]
    shapes = [None if a is None else tuple(a.shape) for a in args[: len(signature.inputs)]]
    assert signature.output(*shapes) == tuple(op.overload(*args).shape)


@first_case
@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
def test_node_carries_inputs_attributes_and_types(op, args, kind):
    overload, given = op.overload, args
    if kind == "int8":
        overload, given = int8_call(op, args, CENTRED)
    elif kind == "float16":
        given = tuple(a.half() if isinstance(a, Tensor) else a for a in args)
    model = export_call(overload, given)
    assert lint_for_tensorrt(model) == []
    (node,) = model.graph.node
    assert (node.domain, node.op_type) == ("edgedyn", node_type(op.name))
    places = [k for k, a in enumerate(given) if isinstance(a, Tensor)]
    if op.name == "masked_conv2d" and args[2] is not None:
        places = [places[0], places[1], places[3], places[2]]  # the bias is optional: it stands last
    assert list(node.input) == [f"in_{k}" for k in places]
    found = attributes_of(node)
    assert (found.pop("plugin_version"), found.pop("plugin_namespace")) == (b"1", b"edgedyn")
    scales = {name: found.pop(name) for name in signatures.SCALES if name in found}
    assert list(scales.values()) == ([np.float32(given[1]), np.float32(given[-2])] if kind == "int8" else [])
    values = dict(zip((a.name for a in op.overload._schema.arguments), args, strict=False))
    orders = {"combine": ["mul", "add"], "activation": ["none", "relu", "relu6"]}
    expected = {n: v for n, v in values.items() if isinstance(v, int | str)}
    assert found == {n: orders[n].index(v) if n in orders else int(v) for n, v in expected.items()}
    (y,) = model.graph.output
    assert [d.dim_value for d in y.type.tensor_type.shape.dim] == list(op.overload(*args).shape)
    assert onnx.helper.tensor_dtype_to_np_dtype(y.type.tensor_type.elem_type).name == kind


def run_decomposed(model: onnx.ModelProto, args: tuple[Any, ...], folder: Path) -> np.ndarray:
    """Run a model where there is no plugin, as a bundle does."""
    path = folder / "model.onnx"
    write_onnx(model, path)
    write_onnx(nodes.decompose_nodes(model), decomposed_path(path))
    assert host_path(path) == folder / "model.decomposed.onnx"
    names = {value.name for value in model.graph.input}
    (y,) = load(path)(*(a.numpy() for k, a in enumerate(args) if f"in_{k}" in names))
    assert "plugin nodes decomposed" in runtime_name(path)
    return y


@pytest.mark.parametrize(("op", "args"), LIGHT)
def test_decomposed_node_computes_the_op(op, args, tmp_path):
    stored = (1,) if args[0].shape[1] % 2 else ()  # a constant of the network, or an input
    model = export_call(op.overload, args, stored)
    decomposed = nodes.decompose_nodes(model)
    onnx.checker.check_model(decomposed, full_check=True)
    assert not {node.domain for node in decomposed.graph.node} - {"", "ai.onnx"}
    y = run_decomposed(model, args, tmp_path)
    double = tuple(a.double() if isinstance(a, Tensor) else a for a in args)
    exact = op.overload(*double).numpy()
    sizes = (a.abs() if isinstance(a, Tensor) else "none" if a in ("relu", "relu6") else a for a in double)
    # 3 factors a term and up to 600 sums of them, whose roundings add up like their square root
    assert (np.abs(y - exact) <= 32 * 2.0**-23 * op.overload(*sizes).numpy() + 1e-30).all()


@first_case
def test_decomposed_int8_node_rounds_what_the_op_rounds(op, args, tmp_path):
    variant, given = int8_call(op, args, CENTRED)
    model = export_call(variant, given)
    kinds = Counter(node.op_type for node in nodes.decompose_nodes(model).graph.node)
    assert (kinds["DequantizeLinear"], kinds["QuantizeLinear"]) == (1, 1)
    y = run_decomposed(model, given, tmp_path)
    assert y.dtype == np.int8
    assert np.abs(y - exact_int8(op, given).numpy()).max() <= INT8_LIMIT
    assert len(np.unique(y)) > min(10, y.size // 2)


@pytest.mark.parametrize("is_read_twice", [False, True])
def test_filter_is_int8_where_all_that_reads_it_is(is_read_twice, tmp_path):
    torch.manual_seed(4)
    network = FilterBetween(is_read_twice=is_read_twice).eval()
    inputs = torch.rand(1, 3, 12, 14), torch.randn(1, 36, 3, 4)
    program = quantize_program(
        torch.export.export(network, inputs),
        inputs,
        scheme=EQUIPPED.int8,
        section=QuantizeSection(),
        samples=[inputs],
        kernels={OPS["sliced_depthwise2d"].overload},
    ).program
    artifact = EQUIPPED.lower({"forward": program}, tmp_path, "int8")
    model = onnx.load(tmp_path / artifact.programs["forward"])
    (node,) = (n for n in model.graph.node if n.domain == "edgedyn")
    makers = {name: n.op_type for n in model.graph.node for name in n.output}
    readers = {n.op_type for n in model.graph.node if node.output[0] in n.input}
    if is_read_twice:  # a plugin between DQ and Q would be refused: x is not quantized at all
        assert (makers[node.input[0]], readers) == ("Conv", {"QuantizeLinear", "Add"})
        assert "x_scale" not in attributes_of(node)
    else:
        assert (makers[node.input[0]], readers) == ("QuantizeLinear", {"DequantizeLinear"})
    expected = program.module()(*inputs).detach().numpy()
    y = load(tmp_path / "model.onnx")(*(x.numpy() for x in inputs))[0]
    # a rounding of float32 may tip a tie: one scale of the second convolution's input, times its weights
    step = max(n.args[1] for n in program.graph.nodes if "quantize_per_tensor" in str(n.target))
    allowed = step * network.second.weight.abs().sum((1, 2, 3)).max().item()
    assert np.abs(y - expected).max() <= allowed


def test_program_without_ops_of_ours_has_no_counterpart(tmp_path):
    program = torch.export.export(nn.Conv2d(3, 3, 1), (torch.rand(1, 3, 4, 6),))
    EQUIPPED.lower({"forward": program}, tmp_path, "fp32")
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert nodes.with_nodes(program) is program


def test_op_without_a_plugin_is_refused(monkeypatch):
    monkeypatch.delitem(SIGNATURES, "atom_depthwise2d")
    op = OPS["atom_depthwise2d"]
    with pytest.raises(
        ModelError, match=r"'atom_depthwise2d' has no plugin; found plugins for decoupled.*row"
    ):
        export_call(op.overload, next(iter(op.examples())))


@every_op
def test_node_is_taken_with_our_kernels_and_never_by_a_stock_recipe(op):
    assert ops.choose_form(op, EQUIPPED).name == "fused"
    assert not ops.choose_form(op, targets.load("tensorrt")).requires


def test_inspect_counts_the_nodes():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), LAYERS["kernels"]()).eval()
    found = inspection.inspect_model(network, (torch.rand(1, 3, 16, 16),), instead=EQUIPPED)
    assert found["layers"][0]["forms"]["tensorrt"]["form"] == "fused"
    assert found["targets"]["tensorrt"]["operators"]["SlicedDepthwise2d"] == 1
    assert found["targets"]["tensorrt"]["unsupported"] == {}


@pytest.mark.parametrize("precision", [pytest.param(p, marks=NEEDS_RTX) for p in ("fp16", "int8")])
def test_recipe_with_fused_kernels_builds_runs_and_says_so(precision, tmp_path):
    smaller = ["input.shape=[1, 3, 64, 64]", "tile.overlap=16", "model.arguments={colors: 3, depth: 4}"]
    path = ROOT / f"recipes/acda-dncnn.jetson.{precision}.yaml"
    built = pipeline.build(load_recipe(path, ["kernels=fused", *smaller]), tmp_path / "bundle")
    rows = built.to_json()["rows"]
    assert [row for row in rows if not row["passed"]] == []
    assert {row["between"].split(":")[1] for row in rows if "rtx" in row["between"]} == {
        "onnx, nodes decomposed"
    }
    assert built.to_json()["forms"] == {"atom_depthwise2d": "fused"}
    assert {"model.onnx", "model.decomposed.onnx"} < built.to_json()["files"].keys()
    model = onnx.load(tmp_path / "bundle/model.onnx")
    found = [attributes_of(node) for node in model.graph.node if node.domain == "edgedyn"]
    assert [("x_scale" in attributes) for attributes in found] == 2 * [precision == "int8"]
    checked = session.check(session.open_session(tmp_path / "bundle"))
    assert checked.ok
