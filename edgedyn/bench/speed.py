"""Times of each layer in INT8 and in float32, inside the whole program, and the layers better left in float.

    INT8 time of a layer = its operator + the conversions between float and INT8 made for it

Both programs run in turns, and the runtime reports the time of each operator. A conversion that several
layers share counts for each in equal parts. A layer counts as slower only where its first quartile in INT8 is
above its third quartile in float32. Device side: numpy only.
"""

from __future__ import annotations

import os
import platform
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from edgedyn.errors import BundleError
from edgedyn.targets import Events

Trace = Sequence[Mapping[str, Any]]  # the layer of each operator: ``operators`` of the facts
_PAUSE = 0.1  # seconds: the threads of ExecuTorch's pool spin behind a run, and slow the next program
_WORTH = 1e-4  # share of a program's time that leaving a layer in float must save to be suggested


@dataclass(frozen=True)
class Times:
    """Times of one program; milliseconds, (runs,) each.

    Attributes:
        whole: of the program.
        layers: by layer.
        conversions: to and from INT8, by the layer that needs them.
    """

    whole: np.ndarray
    layers: dict[str, np.ndarray]
    conversions: dict[str, np.ndarray]

    def of(self, layer: str) -> np.ndarray:
        """Return the time of a layer with its conversions, (runs,)."""
        return self.layers[layer] + self.conversions.get(layer, 0.0)


@dataclass(frozen=True)
class LayerTime:
    """One layer in both programs; medians in milliseconds.

    Attributes:
        program: name of the program.
        layer: dotted path of the layer; its second call ends in ``#2``.
        shape: shape of the layer's output.
        multiply_adds: multiply-adds of one run.
        float_ms: time in the float32 program.
        int8_ms: time in the INT8 program, conversions included.
        conversion_ms: time of these conversions alone.
        is_int8: whether the layer is INT8 in the INT8 program.
        is_slower: whether it is INT8 and its first quartile is above the third quartile in float32.
    """

    program: str
    layer: str
    shape: tuple[int, ...]
    multiply_adds: int
    float_ms: float
    int8_ms: float
    conversion_ms: float
    is_int8: bool
    is_slower: bool

    @property
    def path(self) -> str:
        """The layer's path, as ``quantize.keep_float`` takes it."""
        return self.layer.partition("#")[0]


@dataclass(frozen=True)
class Comparison:
    """An INT8 bundle against the same network in float32, on one machine.

    Attributes:
        layers: in the order in which they run.
        float_ms: median time of each whole program in float32, by name.
        int8_ms: median time of each whole program in INT8, by name.
        runs: number of timed runs of each program.
    """

    layers: tuple[LayerTime, ...]
    float_ms: dict[str, float]
    int8_ms: dict[str, float]
    runs: int

    def __repr__(self) -> str:
        """Return one line: both times of each program, and the number of slower layers."""
        times = ", ".join(
            f"{name} {self.float_ms[name]:.2f} ms in float32, {int8:.2f} ms in INT8"
            for name, int8 in self.int8_ms.items()
        )
        return f"Comparison({times}; {len(self.slower)} of {len(self.int8_layers)} INT8 layers slower)"

    @property
    def int8_layers(self) -> list[LayerTime]:
        """The layers that are INT8."""
        return [row for row in self.layers if row.is_int8]

    @property
    def slower(self) -> list[LayerTime]:
        """The layers that INT8 makes slower, the most expensive first."""
        slower = [row for row in self.layers if row.is_slower]
        return sorted(slower, key=lambda row: row.float_ms - row.int8_ms)

    @property
    def keep_float(self) -> list[str]:
        """Additions to ``quantize.keep_float``: paths whose calls together are faster in float.

        A recipe names a layer for all its calls and all variants at once.
        """
        saved: defaultdict[str, float] = defaultdict(float)
        for row in self.layers:
            saved[row.path] += row.int8_ms - row.float_ms
        least = _WORTH * max(self.int8_ms.values())
        candidates = dict.fromkeys(row.path for row in self.slower)
        return [path for path in candidates if saved[path] >= least]

    def to_json(self) -> dict[str, Any]:
        """Return JSON values, the layers in order."""
        return {
            "runs": self.runs,
            "float_ms": self.float_ms,
            "int8_ms": self.int8_ms,
            "keep_float": self.keep_float,
            "layers": [{**asdict(row), "shape": list(row.shape)} for row in self.layers],
        }


def attribute(events: Sequence[Events], trace: Trace) -> Times:
    """Attribute the times of every run to layers.

    Between two layers the runtime may compute several conversions as one operator, or no conversion at all:
    XNNPACK turns ``dequantize -> tanh -> quantize`` into a table. The conversions then share the time evenly.

    Args:
        events: of each run, in the runtime's order.
        trace: their layers.

    Raises:
        BundleError: when the runtime ran other layers than the lowered program has.
    """
    layers = [entry["layer"] for entry in trace if "layer" in entry]
    made_for = _between_layers([None if "layer" in entry else entry["conversion"] for entry in trace])
    taken = {name: np.zeros(len(events)) for name in layers}
    converted = {name: np.zeros(len(events)) for gap in made_for for names in gap for name in names}
    for index, run in enumerate(events):
        times = [ms for kind, ms in run.operators if kind == "layer"]
        if len(times) != len(layers):
            raise BundleError(
                f"the runtime reports {len(times)} layers; expected {len(layers)}, those of the lowered "
                "program. Build the bundle again with this runtime's version."
            )
        for name, ms in zip(layers, times, strict=True):
            taken[name][index] = ms
        gaps = _between_layers([None if kind == "layer" else ms for kind, ms in run.operators])
        for gap, measured in zip(made_for, gaps, strict=True):
            shares = measured if len(measured) == len(gap) else [sum(measured) / len(gap) for _ in gap]
            for names, ms in zip(gap, shares, strict=True):
                for name in names:
                    converted[name][index] += ms / len(names)
    return Times(np.array([run.whole for run in events]), taken, converted)


def _between_layers(entries: Sequence[Any]) -> list[list[Any]]:
    """Split a list at the layers, which are None."""
    gaps: list[list[Any]] = [[]]
    for entry in entries:
        if entry is None:
            gaps.append([])
        else:
            gaps[-1].append(entry)
    return gaps


def compare(
    float32: Mapping[str, Times], int8: Mapping[str, Times], traces: Mapping[str, Trace]
) -> Comparison:
    """Compare programs layer by layer.

    Args:
        float32: times by program.
        int8: the same programs in INT8.
        traces: of the INT8 programs.

    Raises:
        BundleError: when two programs of a name do not have the same layers.
    """
    rows = []
    for name, trace in traces.items():
        if odd := sorted(set(float32[name].layers) ^ set(int8[name].layers)):
            raise BundleError(
                f"program {name!r} and its float32 counterpart differ in the layers {odd[:5]}; expected one "
                "network in two precisions. Build the bundle again with this version."
            )
        layers = [entry for entry in trace if "layer" in entry]
        rows += [_row(name, layer, float32[name], int8[name]) for layer in layers]
    return Comparison(
        tuple(rows),
        {name: float(np.median(times.whole)) for name, times in float32.items()},
        {name: float(np.median(times.whole)) for name, times in int8.items()},
        min(len(times.whole) for times in int8.values()),
    )


def _row(program: str, layer: Mapping[str, Any], float32: Times, int8: Times) -> LayerTime:
    name = layer["layer"]
    slow, fast = int8.of(name), float32.of(name)
    converted = int8.conversions.get(name, np.zeros(1))
    is_slower = layer["int8"] and np.percentile(slow, 25) > np.percentile(fast, 75)
    return LayerTime(
        program,
        name,
        tuple(layer["shape"]),
        layer["multiply_adds"],
        float(np.median(fast)),
        float(np.median(slow)),
        float(np.median(converted)),
        layer["int8"],
        bool(is_slower),
    )


def run_in_turns(
    programs: Sequence[tuple[Any, Sequence[np.ndarray]]],
    *,
    runs: int,
    warm_up: int = 2,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Events]]:
    """Run profiled programs in turns, so that disturbances of the machine hit all of them.

    Args:
        programs: each as loaded by ``Target.profile``, with its inputs.
        runs: counted runs, after ``warm_up``.
        warm_up: runs that do not count.
        progress: called with (turns done, turns in all).

    Returns:
        The events of every counted run, by program.
    """
    for turn in range(warm_up + runs):
        for program, arrays in programs:
            program.run(*arrays)
        progress(turn + 1, warm_up + runs)
    return [program.read()[-runs:] for program, _ in programs]


def time_runs(
    run: Callable[..., object], inputs: Sequence[np.ndarray], *, runs: int = 10, warm_up: int = 2
) -> dict[str, float]:
    """Time the program on one input on this machine; milliseconds."""
    return _summary(_times(run, inputs, runs, warm_up))


def time_beside(
    run: Callable[..., object],
    others: Mapping[str, Callable[..., object]],
    inputs: Sequence[np.ndarray],
    *,
    turns: int = 5,
) -> tuple[dict[str, float], dict[str, float]]:
    """Time a program beside others on one input, in turns, so that disturbances hit all of them.

    Args:
        run: the program.
        others: by name, programs of the same inputs.
        inputs: of all of them.
        turns: of each program, two counted runs in each.

    Returns:
        The times of the program, as ``time_runs`` has them; the median of each other one, milliseconds.
    """
    if not others:
        return time_runs(run, inputs), {}
    programs = [run, *others.values()]
    times: list[list[float]] = [[] for _ in programs]
    for _ in range(turns):
        for program, measured in zip(programs, times, strict=True):
            time.sleep(_PAUSE)
            measured += _times(program, inputs, runs=2, warm_up=1)
    own, *rest = map(_summary, times)
    return own, {name: found["median"] for name, found in zip(others, rest, strict=True)}


def _times(run: Callable[..., object], inputs: Sequence[np.ndarray], runs: int, warm_up: int) -> list[float]:
    times = []
    for index in range(warm_up + runs):
        start = time.perf_counter()
        run(*inputs)
        if index >= warm_up:
            times.append((time.perf_counter() - start) * 1e3)
    return times


def _summary(times: Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(times)), "p95": float(np.percentile(times, 95)), "runs": len(times)}


def machine() -> str:
    """Return the name of this machine, for readers of the numbers elsewhere."""
    return f"{platform.machine()}, {platform.processor() or platform.system()}, {os.cpu_count()} CPUs"
