"""Run a ``.pte`` under the runtime's own profiler: the time of each operator inside the delegates.

The package's runtime includes ExecuTorch's event tracer and XNNPACK's counters (executorch 1.5.1); times of
operators are whole microseconds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from edgedyn.bundle.manifest import FORWARD
from edgedyn.errors import TargetMissingError
from edgedyn.targets import Events
from edgedyn.targets.executorch.run import open_method, to_tensors

_KINDS = {
    "Convolution": "layer",
    "Deconvolution": "layer",
    "Fully Connected": "layer",
    "native_call_convolution": "layer",
    "native_call_linear": "layer",
    "native_call_addmm": "layer",
    "native_call_mm": "layer",
    "edgedyn::inverted_residual": "layer",
    "Convert": "conversion",
}
_WHOLE = "Method::execute"


class Profiled:
    """A method of a ``.pte`` that records the events of its runs."""

    def __init__(self, path: Path, program: str = FORWARD) -> None:
        """Load the method.

        Raises:
            BundleError: when the runtime refuses the program.
        """
        self._opened = open_method(path, program, is_traced=True)

    def run(self, *arrays: np.ndarray) -> None:
        """Run once."""
        self._opened[2](to_tensors(arrays))

    def read(self) -> list[Events]:
        """Return the events of every run so far.

        Raises:
            TargetMissingError: where the runtime was built without its event tracer.
        """
        runs = self.read_operators()
        events = [_sort(run) for run in runs if any(name == _WHOLE for name, _ in run)]
        if not events:
            raise TargetMissingError(
                "this ExecuTorch was built without its event tracer, which times each layer; "
                "expected the package of the index: pip install 'executorch==1.5.*'"
            )
        return events

    def read_operators(self) -> list[list[tuple[str, float]]]:
        """Return (the runtime's name, milliseconds) of every operator, one list per block of events."""
        from executorch.devtools.etdump.serialize import deserialize_from_etdump_flatcc

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "events.etdp"
            self._opened[1].write_etdump_result_to_file(str(path), "")
            if not path.exists():
                return []
            written = deserialize_from_etdump_flatcc(path.read_bytes())
        return [list(_times(block.events)) for block in written.run_data]


def _times(events: object) -> Iterator[tuple[str, float]]:
    """Yield (name, milliseconds) of the operators of one run in order, and of the whole run."""
    for event in events or ():  # type: ignore[attr-defined]
        profile = event.profile_event
        if profile is not None:
            name = profile.name or profile.delegate_debug_id_str or ""
            yield name, (profile.end_time - profile.start_time) / 1e6


def _sort(run: list[tuple[str, float]]) -> Events:
    kinds = [
        (next((_KINDS[start] for start in _KINDS if name.startswith(start)), ""), ms) for name, ms in run
    ]
    whole = next(ms for name, ms in run if name == _WHOLE)
    return Events(whole, tuple((kind, ms) for kind, ms in kinds if kind))
