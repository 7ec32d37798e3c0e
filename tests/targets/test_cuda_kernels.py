"""The CUDA kernels: run on the host as they are, against the oracles, and compiled for the GPUs that matter.

``cuda_on_host/`` stands in for CUDA: g++ compiles the very same files, and a block's threads run as fibers.
"""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import gpu_check
import numpy as np
import pytest
import torch
from guarded_memory import PLACES, Guarded
from kernel_check import TYPES, Case, make_case, random_calls, to_double
from torch import Tensor

from edgedyn import ops
from edgedyn.errors import ModelError, TargetMissingError
from edgedyn.targets import native
from edgedyn.targets.tensorrt import cuda_kernels
from edgedyn.targets.tensorrt.cuda_kernels import Affine, Array

ON_HOST = Path(__file__).parents[1] / "cuda_on_host"
OPS = {path.parent.name: ops.load_all()[path.parent.name] for path in cuda_kernels.sources()}
CASES = [
    pytest.param(op, args, id=f"{name}-{k}")
    for name, op in OPS.items()
    for k, args in enumerate(op.examples())
]
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)
every_case = pytest.mark.parametrize(("op", "args"), CASES)
every_type = pytest.mark.parametrize("dtype", TYPES)


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> Path:
    """Compile the kernels for the host."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++: sudo apt-get install g++")
    path = tmp_path_factory.mktemp("cuda") / "libhost.so"
    command = [
        "g++",
        "-std=c++17",
        "-O1",
        "-shared",
        "-fPIC",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unknown-pragmas",
    ]
    folders = ["-I", ON_HOST, "-I", native.SOURCES]
    sources = ["-x", "c++", ON_HOST / "run.cpp", *cuda_kernels.sources()]
    subprocess.run([*command, *folders, *sources, "-o", path], check=True)
    return path


def run(library: Path, op: ops.Op, case: Case, place: str = "begin") -> np.ndarray:
    """Call a kernel on guarded memory; y holds NaN (in INT8: -1) before."""
    memory = [None if t is None else Guarded(t.contiguous().numpy(), place) for t in case.inputs]
    y = Guarded(np.frombuffer(b"\xff" * case.exact.numel() * case.inputs[0].itemsize, case.dtype), place)
    arrays = [
        None if m is None else Array(m.pointer, t.shape) for m, t in zip(memory, case.inputs, strict=True)
    ]
    affines = {"of_x": Affine(*case.of_x), "of_y": Affine(*case.of_y)}
    cuda_kernels.call(
        library, op.name, case.dtype, inputs=arrays, attributes=case.attributes, output=y.pointer, **affines
    )
    return y.read().reshape(case.exact.shape)


def assert_within(y: np.ndarray, case: Case) -> None:
    error = np.abs(y.astype(np.float64) - case.exact.numpy())
    shapes = [None if t is None else tuple(t.shape) for t in case.inputs]
    assert (error <= case.limit.numpy()).all(), (case.dtype, shapes, case.attributes)  # not so for a NaN


@every_type
@every_case
def test_kernel_equals_the_oracle_up_to_rounding_wherever_its_tensors_lie(op, args, dtype, library):
    case = make_case(op, args, dtype)
    results = [run(library, op, case, place) for place in PLACES]
    assert_within(results[0], case)
    assert all(np.array_equal(results[0], y) for y in results[1:])


@every_op
def test_kernel_equals_the_oracle_for_random_shapes(op, library):
    for k, args in enumerate(random_calls(op, 40)):
        case = make_case(op, args, TYPES[k % 3])
        y = run(library, op, case, PLACES[k // 3 % 3])
        shapes = [None if t is None else tuple(t.shape) for t in case.inputs]
        assert (np.abs(y - case.exact.numpy()) <= case.limit.numpy()).all(), (
            case.dtype,
            shapes,
            case.attributes,
        )


@every_type
@every_op
def test_empty_batch_launches_nothing(op, dtype, library):
    args = next(iter(op.examples()))
    names = [a.name for a in op.overload._schema.arguments]
    emptied = {"x", *op.generated}
    empty = [
        a[:0] if name in emptied and isinstance(a, Tensor) else a
        for name, a in zip(names, args, strict=False)
    ]
    case = make_case(op, tuple(empty), dtype)
    assert case.exact.numel() == 0
    assert run(library, op, case).size == 0


def test_check_on_a_gpu_tells_right_results_from_wrong_ones(library):
    op, here = OPS["decoupled_depthwise2d"], torch.device("cpu")
    assert gpu_check.check(library, op, "float16", 3, here)["passed"]
    case = make_case(op, next(iter(op.examples())), "float16")
    off = case.exact.clone()
    off[-1, -1, -1, -1] += 3 * case.limit[-1, -1, -1, -1]
    assert gpu_check.worst_error(library, op, case._replace(exact=off), here) > 1
    off[0, 0, 0, 0] = np.nan
    assert gpu_check.worst_error(library, op, case._replace(exact=off), here) == np.inf


def spoil(case: Case, place: int, value: float) -> Case:
    """Put one value into an input; outputs are only compared in class."""
    inputs = [None if t is None else t.clone() for t in case.inputs]
    inputs[place].flatten()[inputs[place].numel() // 3] = value
    return case._replace(inputs=tuple(inputs))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@every_case
def test_special_values_arrive_where_the_oracle_has_them(op, args, dtype, library):
    case = make_case(op, args, dtype)
    names = [a.name for a in op.overload._schema.arguments]
    places = [k for k, t in enumerate(case.inputs) if t is not None and names[k] != "mask"]
    for place, value in itertools.product(places, (np.nan, np.inf, -np.inf)):
        spoiled = spoil(case, place, value)
        exact = op.overload(*to_double((*spoiled.inputs, *case.attributes))).numpy()
        y = run(library, op, spoiled)
        assert np.array_equal(np.isnan(y), np.isnan(exact)), (place, value)
        assert np.array_equal(y[np.isinf(exact)], exact[np.isinf(exact)]), (place, value)
        assert np.array_equal(np.isfinite(y), np.isfinite(exact)), (place, value)


WRONG: dict[str, dict[int, Any]] = {  # position of an attribute: a value that the op refuses
    "sliced_depthwise2d": {0: 2, 1: 0},
    "decoupled_depthwise2d": {0: 4, 1: 0, 2: 0, 3: 4, 4: 2},
    "atom_depthwise2d": {0: 2, 1: 0},
    "masked_conv2d": {0: 0, 1: 9, 2: 0, 3: 2, 4: 3},
}
REFUSED = [(OPS[name], k, value) for name, wrong in WRONG.items() for k, value in wrong.items()]


@pytest.mark.parametrize(("op", "position", "value"), REFUSED, ids=lambda v: getattr(v, "name", v))
def test_attribute_that_the_op_refuses_is_refused(op, position, value, library):
    case = make_case(op, next(iter(op.examples())), "float32")
    attributes = list(case.attributes)
    attributes[position] = value
    with pytest.raises(ModelError, match=f"kernel of {op.name} does not take shapes"):
        run(library, op, case._replace(attributes=tuple(attributes)))


@every_op
def test_shapes_that_the_op_refuses_are_refused(op, library):
    case, refused = make_case(op, next(iter(op.examples())), "float32"), 0
    for k, axis in ((k, axis) for k, t in enumerate(case.inputs) if t is not None for axis in range(t.dim())):
        inputs = list(case.inputs)
        inputs[k] = inputs[k].narrow(axis, 0, inputs[k].shape[axis] - 1).contiguous()
        try:
            op.overload(*(None if t is None else t.to("meta") for t in inputs), *case.attributes)
        except ModelError:
            refused += 1
            with pytest.raises(ModelError, match="Compare them with the op"):
                run(library, op, case._replace(inputs=tuple(inputs)))
    assert refused >= 4


@pytest.mark.parametrize("of_y", [(0.0, 0), (0.1, 128), (float("nan"), 0)])
def test_int8_without_scale_or_zero_point_is_refused(of_y, library):
    op = OPS["sliced_depthwise2d"]
    case = make_case(op, next(iter(op.examples())), "int8")
    with pytest.raises(ModelError):
        run(library, op, case._replace(of_y=of_y))


GPUS = {"sm_87": "Jetson Orin", "sm_90": "H200", "sm_110": "Jetson Thor"}


@pytest.fixture(scope="module")
def nvcc() -> str:
    try:
        found = cuda_kernels.find_nvcc()
    except TargetMissingError as error:
        pytest.skip(str(error))
    known = subprocess.run(
        [found, "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    missing = sorted(set(GPUS) - set(known))
    if missing:
        pytest.skip(f"{found} does not know {', '.join(missing)}; nvcc 13 does")
    return found


@every_op
def test_nvcc_compiles_the_kernel_without_warning_or_spill(op, nvcc, tmp_path):
    codes = [f"-gencode=arch={gpu.replace('sm', 'compute')},code={gpu}" for gpu in GPUS]
    source = native.SOURCES / op.name / "kernel_cuda.cu"
    made = tmp_path / "kernel.o"
    options = [*cuda_kernels.COMPILE, *codes, "--threads=2", "-Xptxas=-v", "-c", "-o", made, source]
    done = subprocess.run([nvcc, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = done.stdout + done.stderr  # ptxas tells each kernel's use of the GPU
    compiled = re.findall(r"Compiling entry function '\w+' for '(sm_\d+)'", words)
    spilled = re.findall(
        r"properties for (\w+)\n +\d+ bytes stack frame, (\d+) bytes spill stores, (\d+) b", words
    )
    assert set(compiled) == set(GPUS)
    assert len(spilled) >= len(compiled)
    assert [use for use in spilled if use[1:] != ("0", "0")] == []
    assert max(int(n) for n in [*re.findall(r"(\d+) bytes smem", words), 0]) <= 48 * 1024


def test_without_nvcc_the_error_names_it(monkeypatch):
    monkeypatch.setattr(cuda_kernels.shutil, "which", lambda *a, **k: None)
    with pytest.raises(TargetMissingError, match=r"there is no nvcc.*CUDA toolkit .* on PATH"):
        cuda_kernels.build("sm_90")


def test_compiler_that_fails_is_quoted(nvcc, monkeypatch, tmp_path):
    (tmp_path / "op").mkdir()
    (tmp_path / "op/kernel_cuda.cu").write_text("#error the sun is too low\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "SOURCES", tmp_path)
    with pytest.raises(TargetMissingError, match=r"cannot be built here: .*the sun is too low"):
        cuda_kernels.build("sm_90")
    assert not list(tmp_path.rglob("*.so"))
