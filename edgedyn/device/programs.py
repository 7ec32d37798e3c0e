"""The programs of a bundle, which somebody else may have written, on their way into this process.

    identify   each file has the format of its ending
    try        a child loads and runs each program once: a runtime that aborts ends the child alone
    load       here; whatever the runtime raises becomes a BundleError with its own words

The runtimes check a damaged program only in part: ExecuTorch ends the process, ONNX Runtime raises exceptions
of ten classes. This user's cache notes each trial that passed, by the digests of programs and vectors. A
build has run its programs and counts as a trial. Device side: numpy and the target's runtime.
"""

from __future__ import annotations

import hashlib
import json
import platform
import signal
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgedyn import targets
from edgedyn.bundle.arrays import read_array
from edgedyn.bundle.bundle import Bundle, open_bundle
from edgedyn.bundle.dispatch import Decision, Dispatcher, load_programs
from edgedyn.cache import cache, private_folder
from edgedyn.children import python_command, run_tool
from edgedyn.errors import BundleError, EdgedynError, UsageError
from edgedyn.targets.quiet import quiet_libraries

if TYPE_CHECKING:
    from edgedyn.targets import Target

TRIAL_SECONDS = 300.0  # imports, a build of our kernels on a slow device, and a run per vector
_MAX_FIELDS = 10_000  # of an ONNX file at its top level; graph, metadata and functions are a few hundred


def identify(bundle: Bundle, *, rebuilt: Collection[str] = ()) -> None:
    """Refuse files that are not of the format of their ending.

    Args:
        bundle: verified.
        rebuilt: names of files that are not looked at.

    Raises:
        BundleError: for the first one.
    """
    for name in set(bundle.manifest["files"]) - set(rebuilt):
        kind, is_kind = _FORMATS.get(Path(name).suffix, ("", None))
        if is_kind is not None and not is_kind((bundle.path / name).read_bytes()):
            raise BundleError(
                f"bundle {bundle.path}, {name}: found no {kind}, expected one by its name. Build it again."
            )


def try_in_child(bundle: Bundle, runtime: str) -> None:
    """Load and run every program in a process of its own, unless this was done before.

    Args:
        bundle: verified and identified.
        runtime: name of the runtime with its version, ``session.runtime_name``.

    Raises:
        BundleError: if that process ends badly or takes longer than ``TRIAL_SECONDS``.
    """
    record = _record(bundle, runtime)
    if record is not None and record.exists():
        return
    try:
        done = run_tool(python_command(__name__, bundle.path), seconds=TRIAL_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise _failed_trial(bundle, runtime, f"did not end within {TRIAL_SECONDS:.0f} s", "") from error
    if done.returncode:
        ended = f"ended with status {done.returncode}"
        if done.returncode < 0:
            ended = f"was ended by {signal.Signals(-done.returncode).name}"
        raise _failed_trial(bundle, runtime, ended, done.stderr)
    remember(bundle, runtime)


def remember(bundle: Bundle, runtime: str) -> None:
    """Note that this runtime has run the bundle's programs; where there is no cache, nothing is noted."""
    if (record := _record(bundle, runtime)) is not None:
        with suppress(OSError):
            record.touch(mode=0o600)


def load(bundle: Bundle, target: Target) -> Dispatcher:
    """Load the programs into this process.

    Raises:
        BundleError: with the runtime's own words, if it refuses one; from a run, if it cannot run it.
        EdgedynError: as ``target.load``.
    """
    with _border(bundle):
        loaded = load_programs(target.load, bundle.path, bundle.programs, bundle.routing)
    return _Bordered(bundle, loaded)


class _Bordered(Dispatcher):
    """The programs of a bundle; the exceptions of their runtime do not leave it."""

    def __init__(self, bundle: Bundle, loaded: Dispatcher) -> None:
        super().__init__(loaded.runs, loaded.routing)
        self._bundle = bundle

    def run(self, *arrays: np.ndarray, forced: int | None = None) -> tuple[list[np.ndarray], Decision | None]:
        """Return the outputs and the decision, as ``Dispatcher.run``.

        Raises:
            BundleError: also if the runtime fails, or gives no arrays of numbers.
        """
        with _border(self._bundle):
            outputs, decision = super().run(*arrays, forced=forced)
            kinds = [np.asarray(y).dtype.kind for y in outputs]
        if not kinds or not set(kinds) <= set("fiub"):
            raise BundleError(
                f"bundle {self._bundle.path}: its program returns {len(kinds)} values of kinds {kinds}; "
                "expected arrays of numbers. Build it again."
            )
        return outputs, decision


@contextmanager
def _border(bundle: Bundle) -> Iterator[None]:
    try:
        yield
    except EdgedynError:
        raise
    except Exception as error:  # each runtime has classes of its own
        raise BundleError(
            f"bundle {bundle.path}: its runtime cannot run it: {type(error).__name__}: "
            f"{_one_line(str(error))}. Build it again with this runtime's version: edgedyn doctor prints it."
        ) from error


def _failed_trial(bundle: Bundle, runtime: str, ended: str, stderr: str) -> BundleError:
    lines = [line for line in stderr.splitlines() if line.strip()]
    words = f"; its last words: {_one_line(lines[-1])}" if lines else ""
    return BundleError(
        f"bundle {bundle.path}: the process that tried its programs in {runtime} {ended}{words}. Expected "
        "programs that this runtime can load and run. Do not use this bundle; build it again."
    )


def _one_line(text: str) -> str:
    """Return a text of a runtime as one printable line of at most 300 characters."""
    line = " ".join(text.split())[:300]
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in line)


def _record(bundle: Bundle, runtime: str) -> Path | None:
    """Return the empty file that stands for a passed trial; None where this user has no cache."""
    files = bundle.manifest["files"]
    read = {name: files[name] for name in files if Path(name).suffix in (*_FORMATS, ".engine", ".npy")}
    used = {key: bundle.manifest[key] for key in ("programs", "routing", "inputs", "outputs", "vectors")}
    facts = [runtime, platform.platform(), sys.executable, read, used]
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    try:
        return private_folder(cache() / "tried") / name
    except UsageError:
        return None


def _is_pte(data: bytes) -> bool:
    return data[4:6] == b"ET" and data[6:8].isdigit()  # a FlatBuffer's identifier


def _is_onnx(data: bytes) -> bool:
    """Tell whether data is a protobuf, to its last byte, with ONNX's fields ``ir_version`` and ``graph``."""
    fields: list[int] = []
    at = 0
    try:
        while at < len(data) and len(fields) < _MAX_FIELDS:
            key, at = _varint(data, at)
            size = {1: 8, 5: 4}.get(key & 7, 0)
            if key & 7 in (0, 2):
                value, at = _varint(data, at)
                size = value if key & 7 == 2 else 0
            elif not size:
                return False
            fields.append(key >> 3)
            at += size
    except IndexError:
        return False
    return at == len(data) and {1, 7} <= set(fields)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        value, at = value | (byte & 127) << shift, at + 1
        if byte < 128:
            return value, at
    raise IndexError("a number of more than 64 bits")


_FORMATS = {".pte": ("ExecuTorch program", _is_pte), ".onnx": ("ONNX model", _is_onnx)}


def _try_here(path: Path) -> None:
    """Run every program on every vector, or on zeros."""
    bundle = open_bundle(path)
    run = load(bundle, targets.load(bundle.target))
    for arrays in _inputs(bundle):
        for forced in range(len(run.routing.variants)) if run.routing else [None]:
            run.run(*arrays, forced=forced)


def _inputs(bundle: Bundle) -> list[Sequence[np.ndarray]]:
    read: list[Sequence[np.ndarray]] = []
    for vector in bundle.vectors:
        with suppress(BundleError):  # a check will refuse this vector; zeros do
            pairs = zip(vector.inputs, bundle.inputs, strict=True)
            read.append([read_array(bundle.path, name, spec) for name, spec in pairs])
    return [*read, [np.zeros(spec.shape, spec.dtype) for spec in bundle.inputs]]


if __name__ == "__main__":
    with suppress(EdgedynError), quiet_libraries():  # the caller meets the same refusal itself
        _try_here(Path(sys.argv[1]))
