"""Representations: one short line in a notebook, however much a value holds."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from torch import nn

from edgedyn.quantize.calibrated import Calibrated
from edgedyn.quantize.observe.histogram import Histogram
from edgedyn.quantize.observe.program import Observed
from edgedyn.quantize.quantized import Quantized
from edgedyn.quantize.table.entries import Entry, LayerCost, Point, Precision
from edgedyn.quantize.table.table import CalibrationTable

HISTOGRAM = Histogram.of(np.random.default_rng(0).standard_normal(5000))
WEIGHT = Entry("body.0.weight", "weight", HISTOGRAM, "minmax", channels=tuple(np.linspace(0.1, 1, 256)))
DECISION = Entry("gate.logits", "decision", HISTOGRAM)
PRECISION = Precision((LayerCost("head", 0.1, 30.0, 0.2),) * 50, (Point(1, 0.9, 0.1),) * 50, ("head",), 0.25)
CALIBRATED = Calibrated((WEIGHT,) * 100, {"body.0.weight": np.zeros((256, 256), np.int8)}, PRECISION)
TABLE = CalibrationTable(
    {"model": {"network": "net"}, "files": ["a"] * 100},
    {"name": "photos", "files": [{"name": "a.png"}] * 100},
    {"router": (WEIGHT,), "wide": (WEIGHT,) * 99},
    {"wide/body.0.weight": np.zeros((256, 256), np.float32)},
    {"wide": PRECISION},
)


def make_quantized() -> Quantized:
    program = torch.export.export(nn.Conv2d(3, 8, 3).eval(), (torch.zeros(1, 3, 8, 8),))
    rows = ({"node": "add", "count": 3, "reason": "residual sum"}, {"node": "mul", "count": 1, "reason": "x"})
    return Quantized(program, 0.9734, 12, rows * 50, CALIBRATED, ("head",) * 50)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (HISTOGRAM, rf"Histogram\(5000 values from -\d\.\d+ to \d\.\d+, {HISTOGRAM.counts.size} bins\)"),
        (WEIGHT, r"Entry\(body\.0\.weight: weight, minmax, 256 channels, Histogram\(.*\)\)"),
        (DECISION, r"Entry\(gate\.logits: decision, no range, Histogram\(.*\)\)"),
        (CALIBRATED, r"Calibrated\(100 tensors, 1 changed constants, 1 layers kept float\)"),
        (TABLE, r"CalibrationTable\(photos: 2 programs, 100 tensors, 1 changed constants\)"),
        (PRECISION, r"Precision\(kept=\('head',\), drop_db=0\.25\)"),
        (Observed((WEIGHT,) * 100, CALIBRATED.constants), r"Observed\(100 tensors, 1 changed constants\)"),
        (make_quantized(), r"Quantized\(97\.3% INT8 multiply-adds, 12 layers, 200 float operators\)"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_representation_is_one_short_line(value, text):
    assert re.fullmatch(text, repr(value))
    assert len(repr(value)) < 130
