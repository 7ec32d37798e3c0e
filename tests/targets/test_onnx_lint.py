"""What TensorRT would refuse or misread in an ONNX file is found before the device, node by node."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import save_model

from edgedyn.targets.onnx_export import lint_for_tensorrt


def initializer(name: str, value: np.ndarray) -> onnx.TensorProto:
    return numpy_helper.from_array(value, name)


def quantized_model(
    *, zero: np.ndarray | None, constant: np.ndarray | None = None, dims: tuple[int | str, ...] = (1, 2)
) -> onnx.ModelProto:
    """Quantize and dequantize ``x``, or a constant, with one scale and one zero point."""
    initializers = [initializer("scale", np.float32(0.5))]
    names = ["scale"]
    if zero is not None:
        initializers.append(initializer("zero", zero))
        names.append("zero")
    source = "x"
    if constant is not None:
        initializers.append(initializer("constant", constant))
        source = "constant"
    nodes = [helper.make_node("DequantizeLinear", ["q", *names], ["y"], name="dequantize")]
    if constant is not None and constant.dtype != np.float32:
        nodes[0].input[0] = source
    else:
        nodes.insert(0, helper.make_node("QuantizeLinear", [source, *names], ["q"], name="quantize"))
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "hand_made",
        [value("x", TensorProto.FLOAT, dims)],
        [value("y", TensorProto.FLOAT, dims)],
        initializer=initializers,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


PAIR = np.zeros((1, 2))


@pytest.mark.parametrize(
    ("model", "findings"),
    [
        pytest.param(quantized_model(zero=np.int8(0)), [], id="symmetric"),
        pytest.param(
            quantized_model(zero=np.uint8(0)),
            [
                "QuantizeLinear 'quantize' has zero point 'zero' of type UINT8",
                "DequantizeLinear 'dequantize'",
            ],
            id="uint8",
        ),
        pytest.param(
            quantized_model(zero=np.int8(3)),
            ["of type INT8, values [3]; expected INT8 zeros"] * 2,
            id="shifted",
        ),
        pytest.param(quantized_model(zero=None), ["no constant zero point"] * 2, id="no_zero_point"),
        pytest.param(
            quantized_model(zero=np.int32(0), constant=PAIR.astype(np.int32)),
            ["reads 'constant' of type INT32; expected INT8. Leave biases in float", "zero point 'zero'"],
            id="int32_bias",
        ),
        pytest.param(
            quantized_model(zero=np.int8(0), constant=PAIR.astype(np.float32)),
            ["quantizes the constant 'constant'; expected weights stored as INT8"],
            id="float_weights",
        ),
        pytest.param(
            quantized_model(zero=np.int8(0), dims=("B", 2)),
            ["tensor 'x' has shape ['B', 2]; expected fixed sizes", "tensor 'y'"],
            id="dynamic_shape",
        ),
    ],
)
def test_lint_names_each_node_and_reason(model, findings):
    found = lint_for_tensorrt(model)
    assert len(found) == len(findings), found
    for sentence, expected in zip(found, findings, strict=True):
        assert expected in sentence


def test_lint_refuses_other_domains_and_invalid_models(tmp_path):
    nodes = [
        helper.make_node("Gelu", ["x"], ["z"], name="foreign", domain="com.microsoft"),
        helper.make_node("Own", ["z"], ["y"], name="plugin", domain="edgedyn"),
    ]
    found = lint_for_tensorrt(onnx.load(save_model(tmp_path / "m.onnx", nodes)))
    assert "Gelu 'foreign' is in domain 'com.microsoft'; expected ONNX's own or 'edgedyn'" in found[0]
    assert "the ONNX checker refuses the model" in found[1]  # the domain has no opset import
    assert len(found) == 2
