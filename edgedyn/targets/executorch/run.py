"""Run a ``.pte`` in the real ExecuTorch runtime on this machine. Its Python binding takes torch tensors."""

from __future__ import annotations

import contextlib
import io
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedyn.bundle.manifest import FORWARD
from edgedyn.errors import BundleError
from edgedyn.targets.executorch import kernels

if TYPE_CHECKING:
    from edgedyn.targets import Run


_NOISE = "[cpuinfo_utils.cpp"  # about the CPU that the runtime detects
SHOWN = 4  # lines of a refusal; the first names the cause


@contextlib.contextmanager
def runtime_log() -> Iterator[list[str]]:
    """Hide the runtime's messages on standard error; behind the block the list holds those of refusals.

    The Python binding writes them to ``sys.stderr``, and libraries below it to the file descriptor.
    """
    lines: list[str] = []
    text = io.StringIO()
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            with contextlib.redirect_stderr(text):
                yield lines
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            written = text.getvalue() + file.read().decode(errors="replace")
            lines += refusal_lines(map(_printable, written.splitlines()))


def refusal_lines(lines: Iterable[str]) -> list[str]:
    """Return the runtime's lines without those about the machine."""
    return [line for line in lines if line and not line.startswith(_NOISE)]


def _printable(line: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in line).strip()


def find_refusal(path: Path, program: str, arrays: Sequence[np.ndarray]) -> str:
    """Load a program and run it once; return the runtime's own lines where it refuses, else an empty string.

    Args:
        path: a ``.pte``.
        program: name of the method.
        arrays: its inputs.
    """
    failure = ""
    with runtime_log() as lines:
        try:
            attempt(path, program, arrays)
        except RuntimeError as error:
            failure = _printable(str(error))
    return "; ".join([*lines[:SHOWN], failure]) if failure else ""


def attempt(path: Path, program: str, arrays: Sequence[np.ndarray]) -> None:
    """Load a program and run it once; the runtime's exceptions and messages pass, or end the process.

    Args:
        path, program, arrays: as for ``find_refusal``.
    """
    kept = _open(path, program)
    kept[2](to_tensors(arrays))


def load(path: Path, program: str = FORWARD) -> Run:
    """Load the method of a ``.pte`` that has the program's name.

    Returns:
        ``run(*arrays) -> [arrays]``, which owns the buffer, the program and the method: the runtime keeps
        none of them alive, and the process dies without them (executorch 1.5.1).

    Raises:
        BundleError: when the runtime refuses the program, with the runtime's message; from ``run``, when it
            cannot run the program on these arrays.
    """
    kept = open_method(path, program)

    def run(*arrays: np.ndarray) -> list[np.ndarray]:
        try:
            return [y.numpy().copy() for y in kept[2](to_tensors(arrays))]
        except RuntimeError as error:
            shapes = [array.shape for array in arrays]
            raise BundleError(
                f"ExecuTorch cannot run {path.name} on inputs {shapes}: "
                f"{find_refusal(path, program, arrays) or error}. Expected the shapes of its build; if these "
                "are, build it again with other layers in quantize.keep_float or quantize.dynamic."
            ) from error

    return run


def open_method(path: Path, program: str, *, is_traced: bool = False) -> tuple[bytes, Any, Any]:
    """Return the buffer, the program and the method; the caller must keep all three.

    Args:
        path: a ``.pte``.
        program: name of the method.
        is_traced: whether the runtime records the time of each operator.

    Raises:
        BundleError: when the runtime refuses the program, with the runtime's message.
    """
    lines: list[str] = []
    try:
        with runtime_log() as lines:
            return _open(path, program, is_traced=is_traced)
    except RuntimeError as error:
        raise BundleError(
            f"ExecuTorch {version('executorch')} refuses {program!r} of {path.name} "
            f"({path.stat().st_size} bytes): {'; '.join([*lines[:SHOWN], _printable(str(error))])}. "
            "Expected a program built for this runtime version; build the bundle again, `edgedyn doctor` "
            "prints the versions."
        ) from error


def _open(path: Path, program: str, *, is_traced: bool = False) -> tuple[bytes, Any, Any]:
    import torch  # noqa: F401 - loads the libraries that the binding is linked with
    from executorch.extension.pybindings import _C

    data = path.read_bytes()
    if b"edgedyn::" in data:  # a program names the operators that it calls
        kernels.load()
    # the binding itself: executorch.runtime imports the whole exporter, 139 MB (executorch 1.5.1)
    loaded = _C._load_program_from_buffer(
        data,
        enable_etdump=is_traced,
        debug_buffer_size=0,
        program_verification=_C.Verification.InternalConsistency,
        data_path=None,
    )
    return data, loaded, loaded.load_method(program)


def to_tensors(arrays: Sequence[np.ndarray]) -> list[Any]:
    """Return arrays as contiguous torch tensors, the runtime's input type."""
    import torch

    # contiguous: the runtime reads a channels-last tensor as if its axes were in order (executorch 1.5.1)
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    # numpy gives an empty array strides of 0, and the runtime then ends the process (executorch 1.5.1)
    return [x if x.numel() else x.new_empty(x.shape) for x in tensors]


def runtime_name(path: Path) -> str:
    """Return the runtime of ``load(path)`` for people: ``ExecuTorch 1.5.1, stock runtime``."""
    return f"ExecuTorch {version('executorch')}, stock runtime"
