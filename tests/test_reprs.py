"""Short representations of the values that a notebook shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from small_decisions import make_recipe

from edgedyn.bench.speed import Comparison, LayerTime
from edgedyn.bundle.bundle import Bundle
from edgedyn.bundle.tensors import TensorSpec
from edgedyn.conversion.convert import Converted, Part
from edgedyn.conversion.network import Network
from edgedyn.device.session import Session
from edgedyn.images.sample import Sample
from edgedyn.pipeline import Build
from edgedyn.quantize import Quantized
from edgedyn.report.rows import Row, ValidationReport
from edgedyn.validation.runs import Outputs

PASSED = Row("device:truth", "psnr_drop_db[sigma=25]", 0.0312, {"at_most": 0.25}, 2)
FAILED = Row("device:quantized", "noise_ratio", 2.00001, {"at_least": 0.5, "at_most": 2.0}, 4)
REPORTED = Row("device:truth", "worst_tile_psnr_db", 28.0, {}, 4)
TENSOR = TensorSpec("x", "float32", (1,), "").to_json()
BUNDLE = Bundle(
    Path("out/small"),
    {
        "ok": True,
        "name": "small.phone.int8",
        "target": "executorch",
        "precision": "int8",
        "inputs": [{**TENSOR, "shape": [1, 3, 64, 64]}],
        "outputs": [{**TENSOR, "shape": [1, 3, 128, 128]}],
    },
)


def test_row_is_a_line_with_its_limit_and_a_failed_value_never_looks_like_it():
    assert repr(PASSED) == (
        "Row(device:truth psnr_drop_db[sigma=25] = 0.0312, at most 0.25, samples 2: passed)"
    )
    assert repr(FAILED) == (
        "Row(device:quantized noise_ratio = 2.00001, at least 0.5, at most 2, samples 4: failed)"
    )
    assert repr(REPORTED) == "Row(device:truth worst_tile_psnr_db = 28, samples 4: reported)"


def test_report_counts_its_checks_and_lists_those_that_failed():
    assert repr(ValidationReport((PASSED, REPORTED))) == (
        "ValidationReport(passed: 1 checks, 0 failed; 2 rows)"
    )
    shown = repr(ValidationReport((PASSED, FAILED, REPORTED))).splitlines()
    assert shown == ["ValidationReport(failed: 2 checks, 1 failed; 3 rows)", f"  {FAILED!r}"]


def test_bundle_session_and_build_name_what_they_are_of():
    line = "small.phone.int8, executorch int8, passed"
    assert repr(BUNDLE) == f"Bundle({line}, {Path('out/small')})"
    assert repr(Session(BUNDLE, lambda x: [x])) == f"Session({line}, (1, 3, 64, 64) -> (1, 3, 128, 128))"
    report = ValidationReport((PASSED,))
    built = repr(Build(BUNDLE, report, {"median": 3.21, "p95": 4.0, "runs": 10})).splitlines()
    assert built == [f"Build({BUNDLE!r}, 3.2 ms per tile on this machine)", repr(report)]


def test_programs_and_outputs_show_shapes_and_never_their_values():
    x = torch.rand(1, 3, 8, 10)
    network = torch.nn.Conv2d(3, 3, 1).eval()
    program = torch.export.export(network, (x,))
    part = Part((x,), {}, program, Quantized(program), program)
    assert repr(part) == "Part((1, 3, 8, 10))"
    made = Converted(network, {"forward": part}, None, None, ("body.0",))
    nodes = len(program.graph.nodes)
    assert repr(made) == f"Converted(forward: {nodes} nodes; 1 dynamic layers)"
    captured = Network(make_recipe(), network, (), network, None, {"forward": (x,)}, {"forward": program}, {})
    assert repr(captured) == "Network(Conv2d: forward; 0 samples)"
    y = np.zeros((1, 3, 8, 10), np.float32)
    assert repr(Outputs([Sample((y,), y, 0.0, "a")] * 2, [y] * 2, [y] * 2, [y] * 2)) == (
        "Outputs(2 samples, (1, 3, 8, 10))"
    )


def test_comparison_shows_both_times_and_the_slower_layers():
    layer = LayerTime("forward", "tail", (1, 3, 8, 8), 100, 1.0, 2.0, 0.5, True, True)
    assert repr(Comparison((layer,), {"forward": 3.0}, {"forward": 2.5}, 20)) == (
        "Comparison(forward 3.00 ms in float32, 2.50 ms in INT8; 1 of 1 INT8 layers slower)"
    )
