"""TensorRT plugins up to the edge of a GPU: in C++ with TensorRT's headers, in Python on its real classes.

The C++ plugins are compiled where TensorRT's headers are (TENSORRT_ROOT, or a Jetson's own) with stand-ins
for the kernels that print what they are called with. The Python ones run on the binding classes of
TensorRT-RTX, which are those of TensorRT 11.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from edgedyn import cli, doctor, native, ops
from edgedyn.errors import ModelError, TargetMissingError
from edgedyn.targets.tensorrt import plugin_library
from edgedyn.targets.tensorrt.plugins import Launched, make_creators
from edgedyn.targets.tensorrt.signatures import SIGNATURES, node_type

OPS = ops.load_all()
KINDS = ("float32", "float16", "int8")
KEPT: list[np.ndarray] = []
CASES = [
    pytest.param(op, args, id=f"{name}-{k}")
    for name, op in OPS.items()
    for k, args in enumerate(op.examples())
]
every_case = pytest.mark.parametrize(("op", "args"), CASES)
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_kind = pytest.mark.parametrize("kind", KINDS)


def values_of(op: ops.Op, args: tuple[Any, ...]) -> dict[str, int]:
    """Return the attributes of an op's node: its arguments behind the tensors as numbers."""
    orders = {"combine": ["mul", "add"], "activation": ["none", "relu", "relu6"]}
    given = list(args) + [a.default_value for a in op.overload._schema.arguments[len(args) :]]
    named = zip((a.name for a in op.overload._schema.arguments), given, strict=True)
    return {
        name: orders[name].index(value) if name in orders else int(value)
        for name, value in named
        if isinstance(value, int | str)
    }


def tensors_of(op: ops.Op, args: tuple[Any, ...]) -> list[tuple[int, ...] | None]:
    """Return the shapes of the schema's tensors."""
    return [None if a is None else tuple(a.shape) for a in args if a is None or isinstance(a, Tensor)]


def node_inputs(op: ops.Op, args: tuple[Any, ...]) -> list[tuple[int, ...]]:
    """Return the shapes of a node's inputs: an optional one stands last, or not at all."""
    shapes = tensors_of(op, args)
    if op.name == "masked_conv2d":
        shapes.append(shapes.pop(2))
    return [shape for shape in shapes if shape is not None]


def find_headers() -> Path | None:
    given = os.environ.get("TENSORRT_ROOT")
    places = [Path(given) / "include"] if given else []
    places += [Path(f"/usr/include/{machine}-linux-gnu") for machine in ("aarch64", "x86_64")]
    return next((place for place in places if (place / "NvInferRuntime.h").is_file()), None)


def find_cuda() -> Path | None:
    nvcc = shutil.which("nvcc", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin")
    places = [Path(nvcc).resolve().parents[1] / "include"] if nvcc else []
    places += [Path("/usr/local/cuda/include"), Path("/usr/include")]
    return next((place for place in places if (place / "cuda_runtime_api.h").is_file()), None)


def compile_plugins(made: Path, *flags: str) -> None:
    """Compile the plugins with stand-ins for the kernels, or skip."""
    headers, cuda = find_headers(), find_cuda()
    if headers is None or cuda is None or shutil.which("g++") is None:
        pytest.skip(
            f"needs g++, TensorRT's headers (TENSORRT_ROOT, found: {headers}) and CUDA's (found: {cuda})"
        )
    sources = [Path(__file__).with_name("plugin_host.cpp"), native.SOURCES / "tensorrt/plugin.cpp"]
    sources += sorted(native.SOURCES.glob("*/plugin_tensorrt.cpp"))
    kernels = " ".join(f"KERNEL({name})" for name in OPS)
    checks = ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", f"-DKERNELS={kernels}"]
    folders = [f"-I{native.SOURCES}", "-isystem", headers, "-isystem", cuda]
    command = ["g++", "-std=c++17", "-O1", *checks, *flags, *folders, *sources, "-o", made]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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
    """Return what a stand-in prints of the ``Call`` that cuda.h describes."""
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
    import re

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


@pytest.fixture
def trt():
    module = pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-check")
    return module


@pytest.fixture
def launched() -> list[Launched]:
    return []


@pytest.fixture
def creators(trt, launched) -> dict[str, Any]:
    return {creator.name: creator for creator in make_creators(trt, launched.append)}


def make_fields(trt: Any, values: dict[str, int | float]) -> Any:
    """Return a node's attributes as TensorRT's parser gives them."""
    kinds = {"int32": trt.PluginFieldType.INT32, "float32": trt.PluginFieldType.FLOAT32}
    arrays = [np.array([v], np.float32 if isinstance(v, float) else np.int32) for v in values.values()]
    KEPT.extend(arrays)  # a field only points at its array
    named = zip(values, arrays, strict=True)
    return trt.PluginFieldCollection([trt.PluginField(n, a, kinds[a.dtype.name]) for n, a in named])


def make_plugin(trt: Any, creators: dict[str, Any], op: ops.Op, args: Any, kind: str) -> Any:
    scales = {"x_scale": 0.5, "y_scale": 0.25} if kind == "int8" else {}
    fields = make_fields(trt, values_of(op, args) | scales)
    return creators[node_type(op.name)].create_plugin("node", fields, trt.TensorRTPhase.BUILD)


def read_fields(fields: Any) -> dict[str, tuple[str, float]]:
    return {field.name: (field.type.name, np.asarray(field.data).item()) for field in fields}


@pytest.mark.tensorrt_rtx
def test_python_creators_are_registered_and_found(trt, creators):
    registry = trt.get_plugin_registry()
    for name, creator in creators.items():
        assert registry.register_creator(creator, "edgedyn")
        try:
            assert registry.get_creator(name, "1", "edgedyn") is creator
        finally:
            registry.deregister_creator(creator)
    assert creators.keys() == {node_type(name) for name in OPS}


@pytest.mark.tensorrt_rtx
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


@pytest.mark.tensorrt_rtx
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


@pytest.mark.tensorrt_rtx
@every_op
@every_kind
def test_python_plugin_takes_what_the_cpp_one_takes(op, kind, trt, creators):
    import itertools

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


@pytest.mark.tensorrt_rtx
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
    assert call == Launched(
        op.name,
        kind,
        tuple(expected.get(k) for k in range(len(SIGNATURES[op.name].inputs))),
        tuple(values_of(op, args).values()),
        200,
        (0.5, 0.25) if kind == "int8" else (),
        300,
    )


@pytest.mark.tensorrt_rtx
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


@pytest.mark.tensorrt_rtx
def test_nvidia_s_registry_loads_the_library_and_makes_its_plugins(tmp_path, trt):
    library = tmp_path / plugin_library.LIBRARY
    compile_plugins(library, "-shared", "-fPIC", "-fvisibility=hidden")
    registry = trt.get_plugin_registry()
    handle = registry.load_library(str(library))
    try:
        assert handle is not None
        for op in OPS.values():
            args = next(iter(op.examples()))
            creator = registry.get_creator(node_type(op.name), "1", "edgedyn")
            names = [field.name for field in creator.field_names]
            assert names == [*values_of(op, args), "x_scale", "y_scale"]
            kind = trt.TensorRTPhase.BUILD
            assert creator.create_plugin("n", make_fields(trt, values_of(op, args)), kind) is not None
            assert creator.create_plugin("n", make_fields(trt, {"pace": 1}), kind) is None
    finally:
        registry.deregister_library(handle)


def run_command(capsys: Any, monkeypatch: Any) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["edgedyn", "plugin", "build", "--json"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    said = capsys.readouterr()
    return int(stopped.value.code or 0), said.out, said.err


def test_plugins_that_cannot_be_built_say_what_to_install(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native.shutil, "which", lambda *a, **k: None)
    code, out, err = run_command(capsys, monkeypatch)
    assert (code, out) == (3, "")
    assert "TensorRT plugins cannot be built here: there is no cmake." in err
    assert "libnvinfer-dev" in err
    assert not list(tmp_path.rglob("*.so"))


def test_machine_without_tensorrt_s_headers_is_told_so(tmp_path, monkeypatch):
    if find_headers():
        pytest.skip("TensorRT's headers are here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(
        TargetMissingError, match=r"headers \(NvInferRuntime\.h\) are not installed.*TENSORRT_ROOT"
    ):
        plugin_library.build()


def test_plugin_library_that_is_built_is_given_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = native.cached_path(
        plugin_library.LIBRARY, os.environ.get("TENSORRT_ROOT", ""), patterns=plugin_library._SOURCES
    )
    path.parent.mkdir(parents=True)
    path.touch()
    code, out, _ = run_command(capsys, monkeypatch)
    assert (code, json.loads(out)) == (0, {"ok": True, "library": str(path)})


def test_doctor_says_whether_plugins_can_be_built():
    (finding,) = (f for f in doctor.examine() if f.name == "TensorRT headers")
    assert finding.ok
    assert finding.optional
    assert (finding.found is not None) == (find_headers() is not None)
    assert "libnvinfer-dev" in finding.mend


@pytest.mark.parametrize(
    ("lines", "version", "ok"),
    [
        ("#define NV_TENSORRT_MAJOR 10 //!< major\n#define NV_TENSORRT_MINOR 3 //!<", "10.3", True),
        ("#define TRT_MAJOR_ENTERPRISE 11\n#define TRT_MINOR_ENTERPRISE 1\n", "11.1", True),
        ("#define NV_TENSORRT_MAJOR 8 //!< major\n#define NV_TENSORRT_MINOR 6 //!<", "8.6", False),
    ],
)
def test_doctor_reads_the_version_of_the_headers(lines, version, ok, tmp_path, monkeypatch):
    (tmp_path / "include").mkdir()
    (tmp_path / "include/NvInferVersion.h").write_text(lines)
    monkeypatch.setenv("TENSORRT_ROOT", str(tmp_path))
    (finding,) = (f for f in doctor.examine() if f.name == "TensorRT headers")
    assert (finding.found, finding.ok) == (version, ok)
