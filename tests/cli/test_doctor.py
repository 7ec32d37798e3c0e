"""The doctor: its findings, their state, and that its version ranges are the project's own."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from edgedyn import targets
from edgedyn.cli import doctor

PYPROJECT = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
OPTIONAL = {"nncf", "tensorrt_rtx", "tensorrt", "pycuda", "g++", "cmake", "nvcc"} | {
    "TensorRT headers",
    "CUDA device",
}


def examine_with(versions, *, tools=None):
    """Examine where only the given distributions and tools are installed."""
    found = doctor.examine(package=versions.get, tool=(tools or {}).get)
    return {finding.name: finding for finding in found}


def test_everything_installed_here_is_found_with_its_version():
    found = {finding.name: finding for finding in doctor.examine()}
    assert found["Python"].found == platform.python_version()
    for name in ("torch", "executorch", "torchao", "nncf", "onnx", "onnxruntime"):
        assert found[name].found == importlib.metadata.version(name)
        assert found[name].ok


def test_a_required_package_that_is_missing_is_not_ok_and_says_the_command():
    found = examine_with({"torch": "2.13.0"})
    assert found["torch"].ok
    for name in ("executorch", "torchao", "onnx", "onnxruntime"):
        assert not found[name].ok
        assert found[name].found is None
        assert found[name].fix.startswith(f'pip install "{name}')


@pytest.mark.parametrize("name", sorted(OPTIONAL - {"CUDA device", "TensorRT headers"}))
def test_an_optional_thing_that_is_missing_is_no_failure_but_says_how_to_get_it(name):
    finding = examine_with({})[name]
    assert finding.optional
    assert finding.ok
    assert finding.found is None
    assert "install" in finding.fix


def test_only_the_optional_things_and_targets_are_optional():
    found = examine_with({})
    assert {f.name for f in found.values() if f.optional and not f.name.startswith("target ")} == OPTIONAL


@pytest.mark.parametrize(
    ("name", "version", "ok"),
    [
        ("torch", "2.13.0+cpu", True),
        ("torch", "2.13.1", True),
        ("torch", "2.12.9", False),
        ("torch", "2.9.0", False),  # below 2.13 as numbers, above it as text
        ("torch", "2.14", False),
        ("torch", "2.14.0", False),
        ("torch", "2.14.0.dev20260101", False),
        ("torch", "3.0", False),
        ("executorch", "1.5.7", True),
        ("executorch", "1.50.0", False),
        ("executorch", "1.4.0", False),
        ("onnx", "1.20", True),
        ("onnx", "1.9.0", False),
        ("tensorrt", "10.3.0", True),
        ("tensorrt", "8.6.2", False),
        ("pycuda", "2024.1.2", True),
        ("pycuda", "unknown", False),
    ],
)
def test_a_version_is_ok_inside_the_range_only(name, version, ok):
    finding = examine_with({name: version})[name]
    assert finding.found == version
    assert finding.ok is ok


def test_a_tool_that_is_too_old_is_not_ok_though_optional():
    assert not examine_with({}, tools={"cmake": "3.25.1"})["cmake"].ok
    assert examine_with({}, tools={"cmake": "3.28.0"})["cmake"].ok
    assert examine_with({}, tools={"g++": "12.2.0"})["g++"].ok


def test_ranges_are_those_of_the_project():
    for required in doctor.PACKAGES:
        name = required.name.replace("_", "-")  # as the project spells tensorrt-rtx
        assert f'"{name}{required.versions}"' in PYPROJECT, required
    assert f'requires-python = "{doctor.PYTHON.versions}"' in PYPROJECT


def test_extras_named_by_a_fix_exist():
    extras = {e for required in doctor.PACKAGES for e in re.findall(r"edgedyn\[([\w-]+)\]", required.fix)}
    assert extras == {"nncf", "tensorrt-check", "jetson"}
    for extra in extras:
        assert re.search(rf"^{extra} = \[", PYPROJECT, re.MULTILINE)


def test_each_target_has_a_finding_that_says_what_it_lacks():
    found = {finding.name: finding for finding in doctor.examine()}
    loadable = 0
    for name in targets.names():
        finding = found[f"target {name}"]
        try:
            lacks = targets.load(name).missing()
        except (ImportError, AttributeError):
            assert not finding.ok
            continue
        loadable += 1
        assert finding.ok is (lacks is None)
        assert finding.fix == (lacks or "")
    assert loadable, "no target loads, so that nothing was compared"


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("import a_runtime_that_nobody_has", "a_runtime_that_nobody_has"),
        ("", "TARGET"),
    ],
    ids=["import fails", "no TARGET"],
)
def test_a_target_that_does_not_load_is_a_finding_and_hides_no_other(source, says, tmp_path, monkeypatch):
    folder = tmp_path / "broken_for_the_doctor"
    folder.mkdir()
    (folder / "__init__.py").write_text(source)
    monkeypatch.setattr(targets, "__path__", [*targets.__path__, str(tmp_path)])
    try:
        found = {finding.name: finding for finding in doctor.examine()}
    finally:
        sys.modules.pop("edgedyn.targets.broken_for_the_doctor", None)
    broken = found["target broken_for_the_doctor"]
    assert not broken.ok
    assert says in broken.fix
    assert {f"target {name}" for name in targets.names()} <= set(found)


def test_a_target_says_what_it_lacks_in_its_own_words(tmp_path, monkeypatch):
    folder = tmp_path / "lacking_for_the_doctor"
    folder.mkdir()
    (folder / "__init__.py").write_text(
        "from edgedyn.targets import Target\n"
        "none = frozenset()\n"
        "sets, calls = (none, none, none), (print, print, print)\n"
        "TARGET = Target('lacking_for_the_doctor', 'one line', *sets, None, *calls, lambda: 'no board')\n"
    )
    monkeypatch.setattr(targets, "__path__", [*targets.__path__, str(tmp_path)])
    try:
        found = {finding.name: finding for finding in doctor.examine()}
    finally:
        sys.modules.pop("edgedyn.targets.lacking_for_the_doctor", None)
    finding = found["target lacking_for_the_doctor"]
    assert (finding.ok, finding.found, finding.fix) == (False, None, "no board")
    assert finding.needed_for == "one line"


@pytest.mark.parametrize(
    ("line", "version"),
    [
        ("g++ (Debian 12.2.0-14+deb12u1) 12.2.0", "12.2.0"),
        ("g++ (Ubuntu 11.4.0-1ubuntu1~22.04) 11.4.0", "11.4.0"),
        ("g++ (crosstool-NG 1.25.0) 11.3.0", "11.3.0"),
        ("cmake version 3.28.3", "3.28.3"),
        ("no number", None),
    ],
)
def test_the_version_of_a_tool_is_read_from_what_it_prints(line, version, tmp_path, monkeypatch):
    script = tmp_path / "a-tool"
    script.write_text(f"#!/bin/sh\necho '{line}'\necho 'Copyright 1.2.3'\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert doctor.tool_version("a-tool") == version


def test_a_tool_that_fails_or_is_not_there_has_no_version(tmp_path, monkeypatch):
    script = tmp_path / "a-tool"
    script.write_text("#!/bin/sh\necho 1.2.3\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert doctor.tool_version("a-tool") is None
    assert doctor.tool_version("a-tool-that-nobody-has") is None


def test_no_cuda_device_is_reported_where_there_is_no_driver():
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        found = examine_with({})["CUDA device"]
        assert (found.found, found.ok) == (None, True)
        return
    pytest.skip("this machine has NVIDIA's driver")


@pytest.mark.gpu
def test_the_cuda_device_is_the_one_that_torch_sees():
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device that torch can use")
    assert doctor.cuda_device() == torch.cuda.get_device_name(0)


DRIVER = """
#include <cstring>
extern "C" int cuInit(unsigned flags) { return flags; }
extern "C" int cuDeviceGet(int* device, int ordinal) { *device = 7; return HAS_DEVICE ? ordinal : 100; }
extern "C" int cuDeviceGetName(char* name, int length, int device) {
  if (device != 7 || length < 16) return 1;
  std::strcpy(name, "Orin (of a test)");
  return 0;
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++ to build a driver library")
@pytest.mark.parametrize(("has_device", "name"), [(1, "Orin (of a test)"), (0, "None")])
def test_the_driver_is_called_as_its_interface_says(has_device, name, tmp_path):
    """No GPU needed: a library with the signatures of cuda.h stands in for the driver, in its own process."""
    source = tmp_path / "driver.cpp"
    source.write_text(DRIVER)
    command = [
        "g++",
        "-shared",
        "-fPIC",
        f"-DHAS_DEVICE={has_device}",
        "-o",
        tmp_path / "libcuda.so.1",
        source,
    ]
    subprocess.run(command, check=True)
    code = "from edgedyn.cli.doctor import cuda_device; print(cuda_device())"
    env = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert ran.stdout.strip() == name


def test_packages_and_tools_are_examined_without_importing_them():
    code = (
        "import sys; from edgedyn.cli import doctor; from edgedyn import targets; targets.names = list;"
        "doctor.examine();"
        "print(sorted({'torch', 'executorch', 'onnx', 'nncf', 'numpy'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
