"""The TensorRT plugins in C++ up to the edge of a GPU: their interfaces, walked through by a host program.

They are compiled where TensorRT's headers are (TENSORRT_ROOT, or a Jetson's own), with stand-ins for the
kernels that print their arguments.
"""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
from small_plugins import (
    KINDS,
    OPS,
    compile_plugins,
    every_case,
    every_kind,
    every_op,
    node_inputs,
    tensors_of,
    values_of,
)

from edgedyn import ops
from edgedyn.targets.tensorrt.signatures import SIGNATURES, node_type


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """Compile the walk through the plugins: ``walk(type and fields, kind, shapes) -> code, {word: rest}``."""
    program = tmp_path_factory.mktemp("plugins") / "plugin_host"
    compile_plugins(program, "-fsanitize=address,undefined")

    def walk(node: str, kind: str, shapes: list[tuple[int, ...]]) -> tuple[int, dict[str, list[str]]]:
        words = [",".join(map(str, shape)) for shape in shapes]
        ran = subprocess.run([program, node, kind, *words], capture_output=True, text=True, check=False)
        assert not ran.stderr, ran.stderr  # of the sanitizers
        said: dict[str, list[str]] = {}
        for line in ran.stdout.replace("returned call", "call").splitlines():
            word, _, rest = line.partition(" ")
            said.setdefault(word, []).append(rest)
        return ran.returncode, said

    return walk


def node_text(op: ops.Op, args: tuple[Any, ...], kind: str) -> str:
    given = [f"{name}={value}" for name, value in values_of(op, args).items()]
    given += ["x_scale=0.5", "y_scale=0.25"] if kind == "int8" else []
    return ",".join([node_type(op.name), *given])


def call_text(op: ops.Op, args: tuple[Any, ...], kind: str) -> str:
    """Return the output of a stand-in for a ``Call`` of cuda.h."""
    shapes = tensors_of(op, args) + [None] * 4
    order = SIGNATURES[op.name].node_order()
    inputs = [0] * 4
    for pointer, place in zip(range(100, 104), [k for k in order if shapes[k] is not None], strict=False):
        inputs[place] = pointer
    sizes = [size for shape in shapes[:4] for size in [*(shape or ()), 0, 0, 0, 0][:4]]
    values = [*values_of(op, args).values(), *[0] * 8][:8]
    scales = "x 0.5 0 2 y 0.25 0 4" if kind == "int8" else "x 1 0 1 y 1 0 1"
    words = [f"call {op.name} type {KINDS.index(kind)} inputs", *inputs, "shapes", *sizes]
    words += ["attributes", *values, "output 200", scales, "stream 300"]
    return " ".join(map(str, words)).removeprefix("call ")


@every_case
def test_cpp_plugin_answers_and_calls_as_the_schema_says(op, args, host):
    kind = KINDS[args[0].shape[1] % 3]
    code, said = host(node_text(op, args, kind), kind, node_inputs(op, args))
    name, values = node_type(op.name), values_of(op, args)
    assert code == 0
    assert said["creator"] == said["plugin"] == [f"{name} 1 edgedyn"]
    assert said["names"] == [" ".join([*(f"{n}:int" for n in values), "x_scale:float y_scale:float"])]
    kept = [f"{n}:int={v}" for n, v in values.items()]
    kept += ["x_scale:float=0.5", "y_scale:float=0.25"] if kind == "int8" else []
    assert said["serialized"] == [" ".join(kept)]
    assert said["shape"] == [" ".join(map(str, op.overload(*args).shape))]
    assert said["type"] == [{"float32": "0", "float16": "1", "int8": "2"}[kind]]
    assert said["workspace"] == ["0 outputs 1"]
    assert said["call"] == 2 * [call_text(op, args, kind)]
    assert said["log"] == [f"{name}: the kernel was not launched, CUDA error 9"]


@every_op
@every_kind
def test_cpp_plugin_takes_dense_tensors_of_one_type_and_int8_beside_float32(op, kind, host):
    args = next(iter(op.examples()))
    shapes = node_inputs(op, args)
    _, said = host(node_text(op, args, kind), kind, shapes)
    same = [digit * (len(shapes) + 1) for digit in "01"]
    wanted = ["2" + "0" * (len(shapes) - 1) + "2"] if kind == "int8" else same
    assert said["formats"][0].split() == [f"0:{taken}" for taken in wanted]  # 0 is LINEAR


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("stride=", "stride=0.5"), r"got attribute stride of type 1, 1 values; expected 1 of type 5"),
        (("stride=", "pace=1"), "MaskedConv2d got no attribute stride; expected every argument of the op"),
        (("activation=", "activation=1,x_scale=0.5"), "got x_scale 0.5.* and y_scale 0.0.*; expected both"),
        (("activation=", "activation=1,x_scale=-1.0,y_scale=0.5"), "got x_scale -1.0.*expected both above 0"),
    ],
)
def test_cpp_plugin_says_which_attribute_is_wrong(change, message, host):
    op = OPS["masked_conv2d"]
    args = next(iter(op.examples()))
    start, instead = change
    words = [instead if w.startswith(start) else w for w in node_text(op, args, "float32").split(",")]
    code, said = host(",".join(words), "float32", node_inputs(op, args))
    assert code == 3
    assert re.search(message, said["log"][0])


@pytest.mark.parametrize("count", [2, 5])
def test_cpp_plugin_refuses_a_wrong_number_of_inputs(count, host):
    op = OPS["masked_conv2d"]
    args = next(iter(op.examples()))
    shapes = (node_inputs(op, args) * 2)[:count]
    code, said = host(node_text(op, args, "float32"), "float32", shapes)
    assert code == 4
    assert f"got {count} inputs; expected 3 or 4. Export" in said["log"][0]
