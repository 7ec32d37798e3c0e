"""TensorRT plugins where an engine is built or run: built, loaded, registered, with errors that help."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_plugins import OPS, compile_plugins, find_headers, make_fields, values_of

from edgedyn.cache import build_cached
from edgedyn.cli import app as cli
from edgedyn.cli import doctor
from edgedyn.errors import TargetMissingError
from edgedyn.targets import native
from edgedyn.targets.tensorrt import cuda_kernels, plugin_library, run
from edgedyn.targets.tensorrt.signatures import SIGNATURES, node_type


@pytest.fixture
def trt():
    module = pytest.importorskip("tensorrt_rtx", reason="needs the extra tensorrt-check")
    return module


class Driver:
    """What of pycuda.driver is asked for: there is no GPU."""

    class Device:
        def __init__(self, index: int) -> None:
            pass

        def compute_capability(self) -> tuple[int, int]:
            return 8, 7


def cached_library() -> Path:
    """Return where the plugin library of these sources would stand."""
    return plugin_library.library().path()


@pytest.mark.tensorrt_rtx
def test_nvidia_s_registry_loads_the_library_and_makes_its_plugins(tmp_path, trt, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cached_library().parent.mkdir(parents=True)
    compile_plugins(cached_library(), "-shared", "-fPIC", "-fvisibility=hidden")
    plugin_library.register.cache_clear()
    (handle,) = plugin_library.register(trt, None)
    registry = trt.get_plugin_registry()
    try:
        for op in OPS.values():
            args = next(iter(op.examples()))
            creator = registry.get_creator(node_type(op.name), "1", "edgedyn")
            names = [field.name for field in creator.field_names]
            assert names == [*values_of(op, args), "x_scale", "y_scale"]
            kind = trt.TensorRTPhase.BUILD
            assert creator.create_plugin("n", make_fields(trt, values_of(op, args)), kind) is not None
            assert creator.create_plugin("n", make_fields(trt, {"pace": 1}), kind) is None
        plugin_library.register.cache_clear()
        with pytest.raises(TargetMissingError, match=r"refuses the plugin library .*edgedyn plugin build"):
            plugin_library.register(trt, None)  # its plugins are registered already
    finally:
        registry.deregister_library(handle)


@pytest.mark.tensorrt_rtx
def test_plugins_in_python_serve_where_the_library_cannot_be_built(tmp_path, trt, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native.shutil, "which", lambda *a, **k: None)
    built: list[str] = []
    monkeypatch.setattr(cuda_kernels, "build", built.append)
    plugin_library.register.cache_clear()
    registered = plugin_library.register(trt, Driver)
    registry = trt.get_plugin_registry()
    try:
        assert [creator.op for creator in registered] == list(SIGNATURES)
        assert built == ["sm_87"]
        for creator in registered:
            assert registry.get_creator(creator.name, "1", "edgedyn") is creator
        plugin_library.register.cache_clear()
        with pytest.raises(TargetMissingError, match="refuses the plugins AtomDepthwise2d, Decoupled"):
            plugin_library.register(trt, Driver)
    finally:
        for creator in registered:
            registry.deregister_creator(creator)
        plugin_library.register.cache_clear()


@pytest.mark.parametrize("file", ["model.onnx", "model.engine"])
def test_plugins_are_registered_where_a_model_has_a_counterpart_without_them(file, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(plugin_library, "register", lambda *modules: asked.append(modules))
    run.register_plugins("trt", "cuda", tmp_path / file)
    assert asked == []
    (tmp_path / "model.decomposed.onnx").touch()
    run.register_plugins("trt", "cuda", tmp_path / file)
    assert asked == [("trt", "cuda")]


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
    assert code == 3
    assert json.loads(out)["error"]["type"] == "TargetMissingError"
    assert "TensorRT plugins cannot be built here: there is no cmake." in err
    assert "libnvinfer-dev" in err
    assert not list(tmp_path.rglob("*.so"))


def test_without_tensorrt_s_headers_the_error_says_so(tmp_path, monkeypatch):
    if find_headers():
        pytest.skip("TensorRT's headers are here")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(
        TargetMissingError, match=r"headers \(NvInferRuntime\.h\) are not installed.*TENSORRT_ROOT"
    ):
        plugin_library.build()


def make_empty(folder: Path) -> Path:
    (folder / "library").touch()
    return folder / "library"


def test_plugin_library_that_is_built_is_given_at_once(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = build_cached(cached_library(), make_empty)
    code, out, _ = run_command(capsys, monkeypatch)
    assert (code, json.loads(out)) == (0, {"ok": True, "library": str(path)})


def test_doctor_says_whether_plugins_can_be_built():
    (finding,) = (f for f in doctor.examine() if f.name == "TensorRT headers")
    assert finding.ok
    assert finding.optional
    assert (finding.found is not None) == (find_headers() is not None)
    assert "libnvinfer-dev" in finding.fix


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
