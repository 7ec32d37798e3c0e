"""The TensorRT plugins in Python on the binding classes of TensorRT-RTX, which are those of TensorRT 11."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from small_plugins import (
    KEPT,
    OPS,
    every_case,
    every_kind,
    every_op,
    make_fields,
    node_inputs,
    tensors_of,
    values_of,
)

from edgedyn import ops
from edgedyn.errors import ModelError
from edgedyn.targets.tensorrt.plugins import make_creators
from edgedyn.targets.tensorrt.signatures import SIGNATURES, node_type

pytestmark = pytest.mark.tensorrt_rtx


@pytest.fixture
def trt():
    module = pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-check")
    return module


@pytest.fixture
def launched() -> list[tuple[Any, ...]]:
    return []


@pytest.fixture
def creators(trt, launched) -> dict[str, Any]:
    return {creator.name: creator for creator in make_creators(trt, lambda *a, **k: launched.append((a, k)))}


def make_plugin(trt: Any, creators: dict[str, Any], op: ops.Op, args: Any, kind: str) -> Any:
    scales = {"x_scale": 0.5, "y_scale": 0.25} if kind == "int8" else {}
    fields = make_fields(trt, values_of(op, args) | scales)
    return creators[node_type(op.name)].create_plugin("node", fields, trt.TensorRTPhase.BUILD)


def read_fields(fields: Any) -> dict[str, tuple[str, float]]:
    return {field.name: (field.type.name, np.asarray(field.data).item()) for field in fields}


def test_python_creators_are_registered_and_found(trt, creators):
    registry = trt.get_plugin_registry()
    for name, creator in creators.items():
        assert registry.register_creator(creator, "edgedyn")
        try:
            assert registry.get_creator(name, "1", "edgedyn") is creator
        finally:
            registry.deregister_creator(creator)
    assert creators.keys() == {node_type(name) for name in OPS}


@every_case
@every_kind
def test_python_plugin_keeps_its_fields_through_clone_and_engine(op, args, kind, trt, creators):
    values = {name: ("INT32", value) for name, value in values_of(op, args).items()}
    values |= {"x_scale": ("FLOAT32", 0.5), "y_scale": ("FLOAT32", 0.25)} if kind == "int8" else {}
    made = make_plugin(trt, creators, op, args, kind)
    names = [field.name for field in creators[node_type(op.name)].field_names]
    assert names == [*values_of(op, args), "x_scale", "y_scale"]
    for plugin in (made, made.clone(), made.attach_to_context(None)):
        assert (plugin.plugin_name, plugin.plugin_version) == (node_type(op.name), "1")
        assert (plugin.plugin_namespace, plugin.num_outputs) == ("edgedyn", 1)
        assert plugin.get_capability_interface(trt.PluginCapabilityType.RUNTIME) is plugin
        fields = plugin.get_fields_to_serialize()
        assert read_fields(fields) == values
        again = creators[plugin.plugin_name].create_plugin("node", fields, trt.TensorRTPhase.RUNTIME)
        assert read_fields(again.get_fields_to_serialize()) == values


@every_case
def test_python_plugin_gives_the_shape_of_the_op(op, args, trt):
    """Expressions are numbers here: only TensorRT can make its own, in a network."""

    class Classes:
        DimsExprs = list

        def __getattr__(self, name: str) -> Any:
            return getattr(trt, name)

    class Builder:
        def operation(self, what: Any, a: int, b: int) -> int:
            assert what in (trt.DimensionOperation.PROD, trt.DimensionOperation.FLOOR_DIV)
            return a * b if what == trt.DimensionOperation.PROD else a // b

    creators = {creator.name: creator for creator in make_creators(Classes(), KEPT.append)}
    plugin = make_plugin(trt, creators, op, args, "float32")
    assert plugin.get_output_shapes(node_inputs(op, args), [], Builder()) == [list(op.overload(*args).shape)]


@every_op
@every_kind
def test_python_plugin_takes_what_the_cpp_one_takes(op, kind, trt, creators):
    args = next(iter(op.examples()))
    plugin = make_plugin(trt, creators, op, args, kind)
    count = len(node_inputs(op, args))
    tensors = [trt.DynamicPluginTensorDesc() for _ in range(count + 1)]

    def takes(types: Any, layout: Any) -> bool:
        for tensor, kind in zip(tensors, types, strict=True):
            described = tensor.desc
            described.type, described.format = kind, layout
            tensor.desc = described
        places = range(count + 1)
        return all(plugin.supports_format_combination(k, tensors, count) for k in places)

    data = trt.DataType
    kinds = (data.FLOAT, data.HALF, data.INT8, data.INT32)
    taken = {t for t in itertools.product(kinds, repeat=count + 1) if takes(t, trt.TensorFormat.LINEAR)}
    same = {(k,) * (count + 1) for k in (data.FLOAT, data.HALF)}
    assert taken == ({(data.INT8, *[data.FLOAT] * (count - 1), data.INT8)} if kind == "int8" else same)
    assert not any(takes(t, trt.TensorFormat.CHW4) for t in taken)
    for types in taken:
        assert plugin.get_output_data_types(list(types[:-1])) == [types[-1]]


@every_case
@every_kind
def test_python_plugin_launches_the_kernel_with_the_schema_s_arguments(
    op, args, kind, trt, creators, launched
):
    shapes, data = node_inputs(op, args), trt.DataType
    x = {"float32": data.FLOAT, "float16": data.HALF, "int8": data.INT8}[kind]
    described = [trt.PluginTensorDesc() for _ in shapes]
    for k, shape in enumerate(shapes):
        described[k].type = x if k == 0 or kind != "int8" else data.FLOAT
        described[k].dims = trt.Dims(list(shape))
    plugin = make_plugin(trt, creators, op, args, kind)
    pointers = list(range(100, 100 + len(shapes)))
    plugin.enqueue(described, [trt.PluginTensorDesc()], pointers, [200], 0, 300)
    (call,) = launched
    order = [k for k in SIGNATURES[op.name].node_order() if tensors_of(op, args)[k] is not None]
    expected = dict(zip(order, zip(pointers, shapes, strict=True), strict=True))
    x_scale, y_scale = (0.5, 0.25) if kind == "int8" else (1.0, 1.0)
    assert call == (
        (op.name, kind),
        {
            "inputs": [expected.get(k) for k in range(len(SIGNATURES[op.name].inputs))],
            "attributes": tuple(values_of(op, args).values()),
            "output": 200,
            "of_x": (x_scale, 0),
            "of_y": (y_scale, 0),
            "stream": 300,
        },
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel_size": 3}, r"AtomDepthwise2d got no attribute stride, only \['kernel_size'\]; expected"),
        (
            {"kernel_size": 3, "stride": 2.0},
            "attribute stride of type FLOAT32, 1 values; expected 1 of type INT",
        ),
        ({"kernel_size": 3, "stride": 2, "x_scale": 0.5}, "got no attribute y_scale"),
        (
            {"kernel_size": 3, "stride": 2, "x_scale": 0.5, "y_scale": 0.0},
            r"scales \(0.5, 0.0\); expected both",
        ),
    ],
)
def test_python_plugin_says_which_attribute_is_wrong(fields, message, trt, creators):
    with pytest.raises(ModelError, match=message):
        creators["AtomDepthwise2d"].create_plugin("n", make_fields(trt, fields), trt.TensorRTPhase.BUILD)
