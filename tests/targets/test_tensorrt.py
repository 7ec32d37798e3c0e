"""The tensorrt target: lint, check build, host oracle, and the device side up to the need of a GPU."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from small_models import run_with_blocked, save_model
from small_networks import (
    ConvInputs,
    capture,
    make_input,
    make_net,
    make_program,
    quantize,
    sum_of_terms,
)

from edgedyn import targets
from edgedyn.errors import BundleError, EdgedynError, ModelError, TargetMissingError, UsageError
from edgedyn.targets.onnx_export import export_onnx
from edgedyn.targets.tensorrt import check, compile, run
from edgedyn.targets.tensorrt.lower import check_rows

TARGET = targets.load("tensorrt")


def lower(program, folder, precision):
    return TARGET.lower({"forward": program}, folder, precision)


def why_no_engine() -> str | None:
    try:
        run.require_tensorrt()
    except TargetMissingError as error:
        return str(error)
    return None


def needs_rtx(test: Callable[..., None]) -> Callable[..., None]:
    absent = importlib.util.find_spec("tensorrt_rtx") is None
    reason = "tensorrt_rtx is not installed: pip install 'edgedyn[tensorrt-check]'"
    return pytest.mark.tensorrt_rtx(pytest.mark.skipif(absent, reason=reason)(test))


def needs_engine(test: Callable[..., None]) -> Callable[..., None]:
    reason = why_no_engine()
    return pytest.mark.gpu(
        pytest.mark.tensorrt(pytest.mark.skipif(reason is not None, reason=reason or "")(test))
    )


without_engine = pytest.mark.skipif(why_no_engine() is None, reason="TensorRT and a GPU are here")


@pytest.fixture(params=["fp32", "fp16", "int8"])
def lowered(request, tmp_path):
    program, x = make_program(request.param)
    return lower(program, tmp_path, request.param), tmp_path / "model.onnx", x


def test_asymmetric_program_is_refused_with_its_nodes(tmp_path):
    program = quantize(make_net(), make_input(), ConvInputs(torch.per_tensor_affine))
    with pytest.raises(ModelError, match=r"6 findings:\n  QuantizeLinear .* expected INT8 zeros"):
        lower(program, tmp_path, "int8")


def test_host_oracle_equals_the_onnxruntime_target(lowered):
    artifact, path, x = lowered
    assert artifact.programs == {"forward": "model.onnx"}
    (y,) = TARGET.load(path)(x.numpy())
    np.testing.assert_array_equal(y, targets.load("onnxruntime").load(path)(x.numpy())[0])
    assert run.runtime_name(path).endswith("unoptimized (no TensorRT engine here)")


@without_engine
def test_engine_that_cannot_run_here_is_said(lowered):
    _, path, x = lowered
    engine = path.with_suffix(".engine")
    engine.write_bytes(b"of another machine")
    assert len(TARGET.load(path)(x.numpy())) == 1
    assert "unoptimized (an engine is here, but an engine needs TensorRT and pycuda" in run.runtime_name(path)
    for refused in (TARGET.load, run.runtime_name):
        with pytest.raises(TargetMissingError, match="JetPack"):
            refused(engine)


@needs_rtx
def test_check_build_passes_with_its_figures(lowered):
    artifact, path, _ = lowered
    facts = artifact.facts["check_build"]
    assert facts["passed"] is True
    assert facts["messages"] == []
    assert facts["layers"] >= len(onnx.load(path).graph.node)  # constants are layers too
    assert facts["engine_bytes"] > facts["weights_bytes"] > 0
    assert facts["scratch_bytes"] > 0


@needs_rtx
def test_half_weights_take_half_the_memory(tmp_path):
    net, x = make_net(64), make_input()
    in_float32 = lower(capture(net, x), tmp_path, "fp32").facts["check_build"]["weights_bytes"]
    in_float16 = lower(capture(net.half(), x.half()), tmp_path, "fp16").facts["check_build"]["weights_bytes"]
    stored = sum(parameter.numel() for parameter in net.parameters()) * 4
    assert stored <= in_float32 <= 1.05 * stored  # the builder pads channels
    assert in_float16 == pytest.approx(in_float32 / 2, rel=0.05)


@needs_rtx
def test_scratch_grows_with_the_image(tmp_path):
    scratch = []
    for height in (256, 512):
        folder = tmp_path / str(height)
        folder.mkdir()
        artifact = TARGET.lower(
            {"forward": capture(make_net(32), make_input((1, 3, height, 256)))}, folder, "fp32"
        )
        scratch.append(artifact.facts["check_build"]["scratch_bytes"])
    feature_map = 32 * 256 * 256 * 4
    assert scratch[1] - scratch[0] >= feature_map


@needs_rtx
def test_parser_errors_name_operator_and_node(tmp_path):
    path = save_model(
        tmp_path / "m.onnx", [helper.make_node("Twice", ["x"], ["y"], "the_node", domain="edgedyn")]
    )
    facts = check.check_build(path)
    assert facts["passed"] is False
    assert "cannot parse m.onnx, 1 errors:" in facts["messages"][0]
    assert facts["messages"][1].startswith("Twice 'the_node': ")
    assert "Plugin not found" in facts["messages"][1]
    assert facts["engine_bytes"] is facts["scratch_bytes"] is facts["weights_bytes"] is None


@needs_rtx
def test_failed_check_build_is_a_fact_and_not_an_exception(tmp_path):
    class Determinant(torch.nn.Module):  # ONNX Runtime computes it, TensorRT does not
        def forward(self, x):
            squares = x[..., :4, :4]
            det = torch.onnx.ops.symbolic("Det", (squares,), dtype=x.dtype, shape=x.shape[:2], version=11)
            return x + det[..., None, None]

    artifact = lower(capture(Determinant(), make_input()), tmp_path, "fp32")
    assert artifact.facts["check_build"]["passed"] is False


def test_check_build_without_tensorrt_rtx_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    facts = check.check_build(tmp_path / "m.onnx")
    assert set(facts) == {"missing"}
    assert "pip install 'edgedyn[tensorrt-check]'" in facts["missing"]
    (row,) = check_rows(facts)
    assert (row.metric, row.samples, row.passed) == ("check_build_failures", 0, False)


def build_with_rtx(path: Path, *, capability: str = "SM86", monitor: object = None) -> tuple[object, object]:
    """Parse, configure and build as ``compile_engine`` does."""
    import tensorrt_rtx as trt

    log = compile.create_logger(trt)
    builder = trt.Builder(log)
    network = compile.parse_network(trt, builder, log, path)
    config = compile.create_config(trt, builder)
    config.progress_monitor = monitor
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    return compile.build_plan(builder, network, config, log), config


@pytest.fixture
def model_path(tmp_path):
    path = tmp_path / "model.onnx"
    export_onnx(capture(make_net(), make_input()), path, input_names=["x"], output_names=["y"])
    return path


@needs_rtx
def test_builder_keeps_float32_and_reports_progress(model_path):
    import tensorrt_rtx as trt

    seen = []
    monitor = compile.create_monitor(trt, lambda phase, done, steps: seen.append((phase, done, steps)))
    plan, config = build_with_rtx(model_path, monitor=monitor)
    assert plan.nbytes > 0
    assert not config.get_flag(trt.BuilderFlag.TF32)
    assert seen
    assert all(phase and 1 <= done <= steps for phase, done, steps in seen)


@needs_rtx
@without_engine
def test_builder_that_cannot_build_gives_its_reason(model_path):
    with pytest.raises(ModelError, match=r"could not build it:\n.*(?i:cuda)"):
        build_with_rtx(model_path, capability="CURRENT")  # for the GPU of this machine: there is none


@pytest.mark.parametrize("returned", [(None, True), (object(), False)], ids=["not_made", "not_attached"])
def test_refused_timing_cache_is_an_error(tmp_path, returned):
    """A stand-in configuration: TensorRT-RTX takes any bytes for a timing cache, TensorRT does not."""
    config = types.SimpleNamespace(
        create_timing_cache=lambda content: returned[0],
        set_timing_cache=lambda cache, ignore: returned[1],
    )
    with pytest.raises(UsageError, match=r"TensorRT refuses the timing cache .*timings;.* Delete the file\."):
        compile.attach_timings(config, tmp_path / "timings")


@needs_rtx
def test_new_timing_cache_is_attached_and_stored(tmp_path):
    import tensorrt_rtx as trt

    builder = trt.Builder(compile.create_logger(trt))
    timings = compile.attach_timings(compile.create_config(trt, builder), tmp_path / "timings")
    compile.replace_file(tmp_path / "timings", timings.serialize())
    assert (tmp_path / "timings").stat().st_size > 0


@needs_rtx
def test_missing_onnx_file_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"no ONNX file .*absent\.onnx"):
        build_with_rtx(tmp_path / "absent.onnx")


@needs_rtx
def test_every_interface_of_the_device_side_exists():
    """TensorRT-RTX 1.7 has the Python interface of TensorRT 11; the names that engines need are there."""
    import tensorrt_rtx as trt

    assert hasattr(trt.ICudaEngine, "device_memory_size_v2")
    for name in (
        "num_io_tensors",
        "get_tensor_name",
        "get_tensor_mode",
        "get_tensor_shape",
        "get_tensor_dtype",
    ):
        assert hasattr(trt.ICudaEngine, name)
    for name in ("set_tensor_address", "execute_async_v3"):
        assert hasattr(trt.IExecutionContext, name)
    assert np.dtype(trt.nptype(trt.DataType.HALF)) == np.float16
    assert trt.TensorIOMode.INPUT != trt.TensorIOMode.OUTPUT
    assert hasattr(trt.MemoryPoolType, "WORKSPACE")


@without_engine
def test_compile_without_tensorrt_says_what_to_install(tmp_path):
    with pytest.raises(
        EdgedynError, match=r"needs TensorRT and pycuda.*JetPack 6\.1.*edgedyn\[jetson\]"
    ) as raised:
        compile.compile_engine(tmp_path / "model.onnx", tmp_path / "model.engine")
    assert raised.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


class CudaError(Exception):
    """What pycuda raises where there is no driver."""


def refuse_to_start() -> None:
    raise CudaError("cuInit failed: no CUDA-capable device is detected")


@pytest.mark.parametrize(
    ("version", "start", "count", "message"),
    [
        ("8.6.2.3", refuse_to_start, 1, r"found TensorRT 8\.6\.2\.3; expected 10\.1 or newer"),
        ("10.0.1", refuse_to_start, 1, r"found TensorRT 10\.0\.1; expected 10\.1"),
        ("10.3.0.30", refuse_to_start, 1, "CUDA cannot start: cuInit failed"),
        ("11.4.1", lambda: None, 0, "CUDA finds no GPU"),
    ],
)
def test_device_that_cannot_run_engines_is_refused(monkeypatch, version, start, count, message):
    """Stand-ins for modules that this machine cannot have: only their versions and devices."""
    driver = types.SimpleNamespace(
        init=start, Error=CudaError, Device=types.SimpleNamespace(count=lambda: count)
    )
    monkeypatch.setitem(sys.modules, "tensorrt", types.SimpleNamespace(__version__=version))
    monkeypatch.setitem(sys.modules, "pycuda", types.SimpleNamespace(driver=driver))
    monkeypatch.setitem(sys.modules, "pycuda.driver", driver)
    with pytest.raises(TargetMissingError, match=message):
        run.require_tensorrt()


def test_device_side_imports_without_torch_onnx_and_tensorrt():
    blocked = ["torch", "onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt_rtx", "pycuda"]
    code = """
from edgedyn import targets
from edgedyn.targets.tensorrt import compile, run
print(targets.load("tensorrt").missing())
"""
    assert "pip install onnxruntime on a host" in run_with_blocked(blocked, code)


def test_nothing_is_missing_where_the_oracle_or_the_engine_runs(monkeypatch):
    assert TARGET.missing() is None
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    if why_no_engine():
        assert "edgedyn[jetson]" in TARGET.missing()


@needs_engine
def test_engine_computes_what_the_oracle_computes(lowered):
    _, path, x = lowered
    (expected,) = TARGET.load(path)(x.numpy())
    phases = []
    facts = compile.compile_engine(
        path,
        path.with_suffix(".engine"),
        workspace_bytes=2**28,
        timing_cache=path.with_name("timings"),
        progress=lambda *step: phases.append(step),
    )
    assert facts["engine_bytes"] == path.with_suffix(".engine").stat().st_size
    assert 0 < facts["latency_ms"]["median"] <= facts["latency_ms"]["p95"]
    assert facts["device_memory_bytes"] > 0
    assert phases
    assert path.with_name("timings").stat().st_size > 0
    assert run.runtime_name(path).startswith("TensorRT")
    (y,) = TARGET.load(path)(x.numpy())
    unit = {"float32": 2.0**-24, "float16": 2.0**-11}[str(y.dtype)]
    # at most one rounding a product and a sum of a pixel: 2 * (27 + 72 + 8) and 6 elementwise steps
    allowed = 220 * unit * sum_of_terms(make_net(), x).numpy()
    scales = [t for t in onnx.load(path).graph.initializer if t.data_type == TensorProto.FLOAT and not t.dims]
    if scales:  # INT8: a tie may fall to the neighbouring step, in the last quantizer or before it
        weight = make_net().tail.weight.detach().flatten(1).abs().sum(1).max().item()
        allowed += 2 * max(float(numpy_helper.to_array(t)) for t in scales) * weight
    assert (np.abs(y.astype(np.float64) - expected) <= allowed).all()
