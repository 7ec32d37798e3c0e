"""``edgedyn doctor``: packages, tools and targets of this machine, and the command that adds a missing one.

Reads package metadata, asks tools for their version and the CUDA driver for its device. Imports none of the
packages, so that a broken installation can be examined.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import typer
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from edgedyn import targets
from edgedyn.cli.options import AsJson, Verbosity
from edgedyn.cli.tables import Column, print_results
from edgedyn.cli.terminal import ERR, print_json
from edgedyn.errors import EdgedynError, TargetMissingError


@dataclass(frozen=True)
class Finding:
    """A package, tool, device or target, and its state on this machine.

    Attributes:
        name: package, tool, ``CUDA device``, or ``target <name>``.
        found: its version, the device's name, ``available`` for a target; None where it is missing.
        needed_for: its purpose, one phrase.
        ok: False for a missing requirement, for a version that does not work, and for a target that lacks a
            package to lower or to run programs here. A missing optional package, tool or device is ok.
        fix: the command or the step that installs it; empty only for an available target.
        optional: edgedyn works without it. ``edgedyn doctor`` fails only where a requirement is not ok.
    """

    name: str
    found: str | None
    needed_for: str
    ok: bool
    fix: str
    optional: bool


@dataclass(frozen=True)
class Requirement:
    """A package or a tool; ``versions`` is its range in ``pyproject.toml``, empty where any version works."""

    name: str
    versions: str
    needed_for: str
    fix: str = ""
    optional: bool = False


PACKAGES = (
    Requirement("torch", ">=2.13,<2.14", "networks, export, calibration"),
    Requirement("executorch", "==1.5.*", "lowering to a phone, and running the result here"),
    Requirement("torchao", "==0.18.*", "INT8 quantization"),
    Requirement(
        "nncf",
        "==3.4.*",
        "quantize.bias_correction in recipes",
        fix='pip install "edgedyn[nncf]"',
        optional=True,
    ),
    Requirement("onnx", ">=1.20", "lowering to TensorRT and ONNX Runtime"),
    Requirement("onnxruntime", ">=1.23", "checking an ONNX program on this machine"),
    Requirement(
        "tensorrt_rtx",
        "==1.7.*",
        "checking an ONNX program with NVIDIA's own parser and builder, without a GPU",
        fix='pip install "edgedyn[tensorrt-check]"',
        optional=True,
    ),
    Requirement(
        "tensorrt",
        ">=10",
        "building and running engines on a Jetson",
        fix="comes with JetPack 6.1 or newer: sudo apt-get install python3-libnvinfer",
        optional=True,
    ),
    Requirement(
        "pycuda",
        ">=2024",
        "running engines on a Jetson",
        fix='pip install "edgedyn[jetson]"',
        optional=True,
    ),
)

_KERNELS = "building the fused kernels; the stock path needs none"
TOOLS = (
    Requirement("g++", "", _KERNELS, fix="sudo apt-get install g++", optional=True),
    # 3.25 of Debian 12 cannot read ExecuTorch's imported targets (executorch 1.5.1).
    Requirement("cmake", ">=3.28", _KERNELS, fix='pip install "cmake>=3.28"', optional=True),
    Requirement(
        "nvcc",
        ">=12",
        "building the TensorRT plugins of the fused kernels, on a Jetson",
        fix="comes with JetPack 6.1 or newer: sudo apt-get install cuda-toolkit",
        optional=True,
    ),
)

PYTHON = Requirement(
    "Python", ">=3.10", "everything", fix="install Python 3.10 or newer and a new environment"
)

Lookup = Callable[[str], str | None]


def package_version(name: str) -> str | None:
    """Return the version in the metadata of an installed distribution, or None; does not import it."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def tool_version(name: str) -> str | None:
    """Return the version that a command prints, or None where it is not on the path or does not run."""
    path = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")  # where JetPack has nvcc
    if path is None:
        return None
    try:
        ran = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    # "g++ (Debian 12.2.0-14) 12.2.0", "cmake version 3.25.1": the last number of the first line. nvcc says
    # "release 13.0" in its fourth.
    numbers = re.findall(r"\d+(?:\.\d+)+", ran.stdout.partition("\n")[0])
    numbers = numbers or re.findall(r"release (\d+(?:\.\d+)+)", ran.stdout)
    return numbers[-1] if numbers else None


def tensorrt_headers() -> str | None:
    """Return the version of TensorRT's headers, in TENSORRT_ROOT or where JetPack puts them, or None."""
    root = os.environ.get("TENSORRT_ROOT")
    folders = [Path(root, "include")] if root else []
    for folder in (*folders, *sorted(Path("/usr/include").glob("*-linux-gnu"))):
        path = folder / "NvInferVersion.h"
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            found = [re.search(rf"(?:NV_TENSORRT|TRT)_{part}\w* (\d+)", text) for part in ("MAJOR", "MINOR")]
            return ".".join(match[1] for match in found if match)
    return None


def cuda_device() -> str | None:
    """Return the name of the first CUDA device as its driver gives it, or None without driver or device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), 0):
        return None
    if driver.cuDeviceGetName(name, len(name), device):
        return None
    return name.value.decode(errors="replace")


def examine(*, package: Lookup = package_version, tool: Lookup = tool_version) -> list[Finding]:
    """Look for everything that edgedyn can use, and ask each target for its missing packages.

    Args:
        package: returns the version of an installed distribution, or None.
        tool: returns the version of a command, or None.
    """
    findings = [_finding(PYTHON, platform.python_version())]
    findings += [_finding(required, package(required.name)) for required in PACKAGES]
    findings += [_finding(required, tool(required.name)) for required in TOOLS]
    return [*findings, _headers(tensorrt_headers()), _cuda(cuda_device()), *_targets()]


def _finding(required: Requirement, version: str | None) -> Finding:
    ok = required.optional if version is None else _within(version, required.versions)
    fix = required.fix or f'pip install "{required.name}{required.versions}"'
    return Finding(required.name, version, required.needed_for, ok, fix, required.optional)


def _within(version: str, versions: str) -> bool:
    """Return whether a version lies in a range; its suffixes (``+cpu``, ``rc1``) do not count."""
    try:
        return SpecifierSet(versions).contains(Version(version).base_version)
    except InvalidVersion:
        return not versions


def _headers(version: str | None) -> Finding:
    return Finding(
        name="TensorRT headers",
        found=version,
        needed_for="edgedyn plugin build; without them the plugins run in Python",
        ok=version is None or _within(version, ">=10.3"),
        fix="sudo apt-get install libnvinfer-dev on a Jetson; elsewhere TENSORRT_ROOT=folder with include/",
        optional=True,
    )


def _cuda(name: str | None) -> Finding:
    return Finding(
        name="CUDA device",
        found=name,
        needed_for="building and running TensorRT engines; training",
        ok=True,
        fix="install NVIDIA's driver, or build the engine on the Jetson: edgedyn compile BUNDLE",
        optional=True,
    )


def _targets() -> Iterator[Finding]:
    for name in targets.names():
        # A target that does not load is a finding of its own, and hides no other.
        try:
            target = targets.load(name)
        except (ImportError, AttributeError, EdgedynError) as error:
            fix = f"edgedyn/targets/{name} does not load ({error}); reinstall edgedyn"
            yield Finding(f"target {name}", None, "unknown: it does not load", False, fix, optional=True)
            continue
        missing = target.missing()
        state = "available" if missing is None else None
        yield Finding(f"target {name}", state, target.summary, missing is None, missing or "", optional=True)


_COLUMNS = (Column(""), Column("name"), Column("found"), Column("needed for, and its fix", prose=True))


def doctor(as_json: AsJson = False, verbose: Verbosity = None) -> None:
    """Show which packages, tools and targets are installed, and the command that adds a missing one."""
    findings = examine()
    broken = [f.name for f in findings if not f.ok and not f.optional]
    if as_json:
        print_json({"ok": not broken, "findings": [asdict(f) for f in findings]})
    else:
        print_results(_COLUMNS, [_cells(finding) for finding in findings])
    if broken:
        message = f"missing, or of a wrong version: {', '.join(broken)}. Run the fix of each."
        if not as_json:
            raise TargetMissingError(message)
        ERR.print(message, soft_wrap=True)  # stdout has its one JSON value
        raise typer.Exit(TargetMissingError.exit_code)


def _cells(finding: Finding) -> tuple[str, ...]:
    is_here = finding.ok and finding.found is not None
    mark = "ok" if is_here else ("-" if finding.optional else "MISSING")
    fix = "" if is_here else f"\nfix: {finding.fix}"
    return mark, finding.name, finding.found or "", finding.needed_for + fix
