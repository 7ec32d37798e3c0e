"""Benchmark of a bundle on this machine: latency, memory, and each layer in INT8 against float32.

    latency, memory   a process of its own runs the bundle's programs on its first vector
    layers            the bundle's program beside its float32 counterpart, in turns: ``bench/speed.py``

The counterpart is lowered here from the network of the bundle's recipe, with initial weights: no time depends
on the value of a weight, and the weights file may be elsewhere. The exception is a fused ``masked_conv2d``,
whose time depends on its mask. BatchNorm statistics and input range come from the bundle's own vectors.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedyn import targets
from edgedyn.bench.speed import Comparison, Trace, attribute, compare, machine, run_in_turns
from edgedyn.bundle.arrays import read_array
from edgedyn.bundle.bundle import Bundle, add_files, open_bundle
from edgedyn.children import python_command, run_tool
from edgedyn.device import session
from edgedyn.errors import BundleError, CheckFailedError, TargetMissingError, UsageError
from edgedyn.files import refuse_unwritable, staging_folder, to_json
from edgedyn.report import insert_layers
from edgedyn.report.rows import Row
from edgedyn.report.stored import read_values

if TYPE_CHECKING:
    from torch import Tensor

    from edgedyn.recipe.recipe import Recipe

FILE = "bench.json"
_REPORT = ("report.html", "report.json")
Progress = Callable[[str, int, int], None]  # (phase, steps done, steps in all)


def measure(bundle: Path, *, runs: int) -> dict[str, Any]:
    """Time a bundle's programs on its first vector, in a process of its own.

    Returns:
        ``programs``: ``forward`` or variant -> ``latency_ms`` {median, p95, runs} of one tile, with its
        router, and ``megapixels_per_second``; ``memory_bytes``: ``peak`` of the process, with Python and the
        runtime's libraries, and ``running``, its rise after loading; None where the system does not report
        both; ``runtime``, ``tile`` and ``machine``: where and on which size of image it was measured.

    Raises:
        EdgedynError: as ``session.open_session``.
        BundleError: for a bundle without validation vectors.
        CheckFailedError: when the process ends badly.
    """
    opened = session.open_session(bundle)  # refuses here, with its own error
    if not opened.bundle.vectors:
        raise BundleError(f"bundle {bundle} has no vectors; expected one to run. Build it again.")
    done = run_tool(python_command("edgedyn.bench.process", bundle, runs))
    if done.returncode:
        raise CheckFailedError(
            f"bundle {bundle}: the process that runs it ended with {done.returncode}: "
            f"{done.stderr.strip()[-300:]}. Run edgedyn check on it."
        )
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    tile = " x ".join(map(str, opened.bundle.inputs[0].shape[2:])) + " pixels"
    return {**measured, "tile": tile, "machine": machine()}


def compare_with_float(
    path: Path,
    *,
    runs: int,
    trust: bool = False,
    progress: Progress = lambda phase, done, total: None,
) -> Comparison:
    """Compare an INT8 bundle with its float32 counterpart, layer by layer, for ``write_comparison``.

    Args:
        path: the bundle. Its recipe names the counterpart's network: one of edgedyn, unless ``trust``.
        runs: counted runs of each program.
        trust: run the code of a network from anywhere.
        progress: called with (phase, steps done, steps in all).

    Raises:
        UsageError: for a bundle of another precision, or one that cannot be written.
        RecipeError: for a network that is not trusted.
        TargetMissingError: for a target without times by layer, or one that is not installed here.
        BundleError: when the bundle does not map its operators to layers.
    """
    bundle = session.open_verified(path)
    refuse_unwritable(path, is_folder=True)
    if bundle.precision != "int8":
        raise UsageError(
            f"bundle {path} is {bundle.precision}; expected int8, whose layers are compared with float32. "
            "Build the recipe with precision: int8."
        )
    target = targets.load(bundle.target)
    if target.profile is None:
        raise TargetMissingError(
            f"target {bundle.target!r} has no times by layer here. On a Jetson: trtexec "
            "--loadEngine=model.engine --dumpProfile; times of a host's layers say nothing about a Jetson."
        )
    if reason := target.missing():
        raise TargetMissingError(f"bundle {path} needs the target {bundle.target!r}: {reason}")
    traces: dict[str, Trace] = bundle.manifest["facts"].get("operators", {})
    if set(traces) != set(bundle.programs):
        raise BundleError(
            f"bundle {path} does not map its operators to layers; found {sorted(traces)}, expected "
            f"{sorted(bundle.programs)}. Build it again with this version."
        )
    session.open_tried(path)  # its programs run in this process
    with tempfile.TemporaryDirectory() as folder:
        inputs, lowered = lower_in_float(bundle, Path(folder), progress, trust=trust)
        pairs = {
            name: (
                target.profile(Path(folder) / lowered.programs[name], name),
                target.profile(path / bundle.programs[name], name),
            )
            for name in traces
        }
        jobs = [(program, inputs[name]) for name, pair in pairs.items() for program in pair]
        events = run_in_turns(jobs, runs=runs, progress=lambda done, total: progress("run", done, total))
    float_traces: Any = lowered.facts["operators"]
    float32 = {name: attribute(events[2 * i], float_traces[name]) for i, name in enumerate(pairs)}
    int8 = {name: attribute(events[2 * i + 1], traces[name]) for i, name in enumerate(pairs)}
    return compare(float32, int8, traces)


def lower_in_float(
    bundle: Bundle, folder: Path, progress: Progress, *, trust: bool = False
) -> tuple[dict[str, list[np.ndarray]], targets.Artifact]:
    """Lower the float32 counterpart of an INT8 bundle; return the inputs of each program and the artifact."""
    from edgedyn import ops, quantize
    from edgedyn.conversion.capture import capture
    from edgedyn.conversion.network import decompose_part
    from edgedyn.conversion.reference import load_reference, rewrite
    from edgedyn.graph.provenance import shared_provenance
    from edgedyn.layers import float32_classes, part_inputs, parts

    recipe, samples = stored_recipe(bundle), stored_inputs(bundle)
    target = targets.load(recipe.target, recipe.kernels, recipe.forms)
    with shared_provenance():
        progress("float32", 0, 1)
        reference = load_reference(recipe, samples, trust=trust)
        canonical = rewrite(reference, bundle.manifest["facts"].get("capacities"))
        inputs = part_inputs(canonical, samples[0])
        programs = {}
        for name, module in parts(canonical).items():
            captured = capture(module, inputs[name])
            forms, decomposed = decompose_part(captured, target, recipe)
            folded = quantize.to_float(decomposed, inputs[name], "fp32", float32_classes())
            programs[name] = ops.decompose(folded.program, forms, "after_quantize")
        artifact = target.lower(programs, folder, "fp32")
        progress("float32", 1, 1)
    return {name: [x.numpy() for x in tensors] for name, tensors in inputs.items()}, artifact


def stored_recipe(bundle: Bundle) -> Recipe:
    """Return the recipe that a bundle holds, with initial weights."""
    from edgedyn.recipe.recipe import load_recipe

    return load_recipe(bundle.path / "recipe.yaml", ["model.weights=null", "model.sha256=null"])


def stored_inputs(bundle: Bundle) -> list[tuple[Tensor, ...]]:
    """Return the inputs of a bundle's vectors."""
    import torch

    return [
        tuple(
            torch.from_numpy(read_array(bundle.path, name, spec).copy())
            for name, spec in zip(vector.inputs, bundle.inputs, strict=True)
        )
        for vector in bundle.vectors
    ]


def write_comparison(path: Path, comparison: Comparison) -> None:
    """Write a comparison into its bundle: ``bench.json``, a row of ``report.json``, a section of the page.

    It replaces an earlier comparison.

    Raises:
        BundleError: if the bundle does not verify.
        UsageError: if it cannot be written.
    """
    bundle = open_bundle(path)
    row = Row("int8:float", "slower_layers", len(comparison.slower), {}, len(comparison.int8_layers))
    report = read_values(path, "report.json")
    rows = [entry for entry in report["rows"] if entry["between"] != row.between]
    values = {**comparison.to_json(), "machine": machine()}
    page = insert_layers((path / "report.html").read_text(encoding="utf-8"), values, row.to_json())
    with staging_folder(path.resolve()) as staging:
        (staging / FILE).write_text(to_json(values), encoding="utf-8")
        (staging / "report.json").write_text(
            to_json({**report, "rows": [*rows, row.to_json()]}), encoding="utf-8"
        )
        (staging / "report.html").write_text(page, encoding="utf-8")
        add_files(bundle, [staging / name for name in (FILE, *_REPORT)])
