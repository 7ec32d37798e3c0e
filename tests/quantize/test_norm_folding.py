"""Norms: those of constants behind a layer that they alone read are folded, all others stay float, named."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from odd_networks import NORMS, norm_between
from small_int8 import quantize_program
from torch import Tensor

from edgedyn import quantize, targets
from edgedyn.recipe.keys import QuantizeSection

SHAPE = (1, 3, 16, 16)
BY_IMAGE = "normalises by the statistics of each image"


def make_input(seed: int = 1) -> Tensor:
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed))


def make_net(name: str) -> torch.nn.Module:
    torch.manual_seed(6)
    return norm_between(NORMS[name][0]())


@functools.cache
def to_int8(name: str, target: str) -> quantize.Quantized:
    return quantize_program(
        torch.export.export(make_net(name), (make_input(),)),
        (make_input(),),
        scheme=targets.load(target).int8,
        section=QuantizeSection(rounding="nearest"),
        samples=[(make_input(seed),) for seed in (1, 2, 3)],  # the ranges cover the image that is measured
    )


def sqnr_db(y: Tensor, expected: Tensor) -> float:
    return 10 * float(torch.log10(expected.square().mean() / (y - expected).square().mean()))


@pytest.mark.parametrize("name", NORMS)
def test_folding_keeps_the_function(name):
    net = make_net(name).double()
    module = quantize.fold(torch.export.export(net, (make_input().double(),)))
    with torch.no_grad():
        torch.testing.assert_close(
            module(make_input().double()), net(make_input().double()), rtol=1e-12, atol=1e-12
        )


# 8 bits over 8 standard deviations have 10 log10(12 * 255**2 / 64) = 40.9 dB; four maps are rounded so
LIMIT_DB = 40.9 - 6.0
BOTH = ("batch, untracked", "instance, affine", "instance, tracked", "shared output", "linear")


@pytest.mark.parametrize(
    ("name", "target"), [*((name, "executorch") for name in NORMS), *((name, "tensorrt") for name in BOTH)]
)
def test_int8_program_computes_the_network(name, target):
    result = to_int8(name, target)
    with torch.no_grad():
        measured = sqnr_db(result.program.module()(make_input()), make_net(name)(make_input()))
    assert measured > LIMIT_DB
    assert result.int8_mac_share > 0.4


@pytest.mark.parametrize(
    ("name", "target"),
    [
        *((name, "executorch") for name in NORMS if "untracked" in name or name.startswith("inst")),
        *((name, "tensorrt") for name in BOTH[:3]),
    ],
)
def test_norm_by_image_stays_float_and_is_named(name, target):
    rows = [row for row in to_int8(name, target).float_nodes if "_norm" in str(row["node"])]
    by_image = NORMS[name][1]
    assert [str(row["node"]).startswith("body.1") for row in rows] == [True]
    assert (rows[0]["reason"] == BY_IMAGE) == by_image


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *(("batch", 0), ("linear", 0), ("shared norm", 0), ("transposed", 0), ("convolution 1d", 0)),
        *(("shared output", 1), ("transposed, grouped", 1), ("batch 1d", 1), ("batch, untracked", 1)),
    ],
)
def test_norms_left_after_folding(name, count):
    module = quantize.fold(torch.export.export(make_net(name), (make_input(),)))
    assert sum("batch_norm" in str(node.target) for node in module.graph.nodes) == count


@pytest.mark.parametrize("target", ["executorch", "tensorrt"])
@pytest.mark.parametrize("name", BOTH)
def test_program_runs_on_its_target(name, target, tmp_path: Path):
    result, loaded = to_int8(name, target), targets.load(target)
    artifact = loaded.lower({"forward": result.program}, tmp_path, "int8")
    (y,) = loaded.load(tmp_path / artifact.programs["forward"], "forward")(make_input().numpy())
    with torch.no_grad():
        expected = result.program.module()(make_input())
    assert sqnr_db(torch.from_numpy(np.asarray(y)), expected) > 45
