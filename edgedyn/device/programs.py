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
import re
import subprocess
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgedyn import errors, targets
from edgedyn.bundle.arrays import read_array
from edgedyn.bundle.bundle import Bundle, open_bundle
from edgedyn.bundle.dispatch import Decision, Dispatcher, load_programs
from edgedyn.cache import cache, private_folder
from edgedyn.children import (
    MEMORY_SHARE,
    end_of,
    last_words,
    limit_resources,
    memory_limit,
    one_line,
    python_command,
    run_tool,
)
from edgedyn.errors import BundleError, EdgedynError, UsageError
from edgedyn.targets.quiet import quiet_libraries

if TYPE_CHECKING:
    from edgedyn.targets import Target

TRIAL_SECONDS = 300.0  # imports, a build of our kernels on a slow device, and a run per vector
_REFUSED = 3  # exit status of the child; its last line holds class and message
_MEMORY = re.compile(r"alloc|memory", re.IGNORECASE)
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
        EdgedynError: as ``load``, from that process.
    """
    record = _record(bundle, runtime)
    if record is not None and record.exists():
        return
    try:
        done = run_tool(python_command(__name__, bundle.path), seconds=TRIAL_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise _failed_trial(bundle, runtime, f"did not end within {TRIAL_SECONDS:.0f} s", "") from error
    if done.returncode == _REFUSED and (refusal := _read_refusal(done.stderr)):
        raise refusal
    if done.returncode:
        raise _failed_trial(bundle, runtime, end_of(done.returncode), done.stderr)
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
            f"{one_line(str(error))}. Build it again with this runtime's version: edgedyn doctor prints it."
        ) from error


def _failed_trial(bundle: Bundle, runtime: str, ended: str, stderr: str) -> BundleError:
    words = last_words(stderr)
    return BundleError(
        f"bundle {bundle.path}: the process that tried its programs in {runtime} {ended}{words}."
        f"{_on_memory(words)} Expected programs that this runtime can load and run. Do not use this bundle; "
        "build it again."
    )


def _read_refusal(stderr: str) -> EdgedynError | None:
    """Return the refusal that a child wrote as its last line."""
    try:
        name, message = json.loads(stderr.splitlines()[-1])
        kind = getattr(errors, name)
        return kind(message + _on_memory(message)) if issubclass(kind, EdgedynError) else None
    except (ValueError, TypeError, IndexError, AttributeError):
        return None


def _on_memory(words: str) -> str:
    if not _MEMORY.search(words):
        return ""
    return f" It may use {memory_limit() / 1e9:.1f} GB, {MEMORY_SHARE:.0%} of this machine's memory."


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
    """Run every program on every vector, and on zeros; a manifest that gives other shapes is refused."""
    bundle = open_bundle(path)
    run = load(bundle, targets.load(bundle.target))
    for arrays in _inputs(bundle):
        for forced in range(len(run.routing.variants)) if run.routing else [None]:
            try:
                outputs, _ = run.run(*arrays, forced=forced)
            except UsageError as error:  # of arrays that are as the manifest says
                raise BundleError(f"bundle {path}: its manifest does not fit its program: {error}") from error
            found, expected = [np.shape(y) for y in outputs], [spec.shape for spec in bundle.outputs]
            if found != expected:
                raise BundleError(
                    f"bundle {path}: its program returns {found}, expected {expected} by its manifest. Build "
                    "it again."
                )


def _inputs(bundle: Bundle) -> list[Sequence[np.ndarray]]:
    read: list[Sequence[np.ndarray]] = []
    for vector in bundle.vectors:
        with suppress(BundleError):  # a check will refuse this vector; zeros do
            pairs = zip(vector.inputs, bundle.inputs, strict=True)
            read.append([read_array(bundle.path, name, spec) for name, spec in pairs])
    return [*read, [np.zeros(spec.shape, spec.dtype) for spec in bundle.inputs]]


if __name__ == "__main__":
    limit_resources()
    try:
        with quiet_libraries():
            _try_here(Path(sys.argv[1]))
    except EdgedynError as error:
        print(json.dumps([type(error).__name__, str(error)]), file=sys.stderr)
        sys.exit(_REFUSED)
