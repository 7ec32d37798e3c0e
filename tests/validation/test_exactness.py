"""Exactness of the rewrite in float64: passed by exact programs, failed by a billionth."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from small_networks import LAYERS
from torch import nn

from edgedyn import ops
from edgedyn.graph.dtypes import to_float64_like
from edgedyn.images.sample import Sample
from edgedyn.layers import canonicalize
from edgedyn.targets import load
from edgedyn.validation import exactness
from edgedyn.validation.runs import in_torch


def test_rounding_is_the_largest_relative_distance_of_float32_from_float64():
    exact = [np.array([[1.0, -4.0]]), np.array([[2.0, 1.0]])]
    row = exactness.rounding_row(exact, [np.array([[1.0, -4.1]]), np.array([[2.1, 1.0]])])
    assert (row.value, row.limit, row.samples) == (pytest.approx(0.05), {}, 2)


@pytest.fixture(scope="module")
def rewritten():
    """Return a layer in float64, its canonical counterpart, the decomposed program and two samples."""
    torch.manual_seed(0)
    layer = LAYERS["kernels"]().eval()
    x = torch.rand(1, 8, 16, 16)
    captured = torch.export.export(canonicalize(layer), (x,))
    forms = ops.choose_forms(captured, load("onnxruntime"), {})
    decomposed = ops.decompose(captured, forms, "before_quantize")
    float64 = copy.deepcopy(layer).double()
    noisy = [np.random.default_rng(k).random((1, 8, 16, 16), dtype=np.float32) for k in range(2)]
    return float64, canonicalize(float64), decomposed, [Sample((n,), n, 0.0, "a") for n in noisy]


def rewrite_rows(float64, canonical, decomposed, samples):
    programs = (float64, canonical, to_float64_like(decomposed, canonical))
    reference, *rewritten = [in_torch(p, torch.float64) for p in programs]
    return exactness.rewrite_rows(exactness.run_float64(reference, samples), *rewritten, samples, 1e-12)


def test_exact_rewrite_passes_in_float64_on_every_sample(rewritten):
    rows = rewrite_rows(*rewritten)
    assert [row.between for row in rows] == ["canonical:reference", "decomposed:canonical"]
    assert all(row.passed and row.samples == 2 for row in rows)


def test_rewrite_that_moves_one_weight_by_a_billionth_fails(rewritten):
    float64, canonical, decomposed, samples = rewritten
    moved = copy.deepcopy(canonical)
    with torch.no_grad():
        next(p for p in moved.parameters() if p.ndim == 4).flatten()[0].add_(1e-9)
    rows = rewrite_rows(float64, moved, decomposed, samples)
    assert [row.passed for row in rows] == [False, True]  # the decomposed program takes the moved weight


def test_decomposition_that_computes_something_else_fails(rewritten):
    class Shifted(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) + 1e-9 * (x[0, 0, 0, 0] > threshold)  # one of the two samples

    float64, canonical, decomposed, samples = rewritten
    threshold = np.mean([sample.noisy[0, 0, 0, 0] for sample in samples]).item()
    x = torch.from_numpy(samples[0].noisy).double()
    # different in the graph, not in a weight: the comparison copies the weights
    other = torch.export.export(Shifted(copy.deepcopy(decomposed.module()).double()), (x,))
    rows = rewrite_rows(float64, canonical, other, samples)
    assert [row.passed for row in rows] == [True, False]


def test_comparison_in_float64_leaves_the_program_as_it_was(rewritten):
    decomposed, x = rewritten[2], torch.from_numpy(rewritten[3][0].noisy)
    before = decomposed.module()(x)
    rewrite_rows(*rewritten)
    assert torch.equal(decomposed.module()(x), before)
