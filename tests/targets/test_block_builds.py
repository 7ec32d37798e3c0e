"""A recipe whose blocks one kernel each computes, from images to a bundle that runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_blocks import small_mobilenet

from edgedyn import pipeline, targets
from edgedyn.bench import benchmark
from edgedyn.conversion import inspection
from edgedyn.conversion.convert import load_target
from edgedyn.device import session
from edgedyn.errors import NoFormError, RecipeError
from edgedyn.recipe.recipe import load_recipe

ROOT = Path(__file__).parents[2]
SMALL = [
    "kernels=fused",
    "model.weights=null",
    "model.sha256=null",
    "model.arguments={features: 8, blocks: 3}",
    "input.shape=[1, 3, 64, 64]",
    "tile.overlap=16",
    "quantize.rounding=nearest",
    "quantize.keep_float=[body.0.depthwise]",
    "quantize.samples=4",
    'quantize.coverage.unused=["*"]',
    "limits={drop_db: 100, int8_share: 0}",
]


def small(*overrides: str):
    return load_recipe(ROOT / "recipes/dynconv-denoiser.phone.int8.yaml", [*SMALL, *overrides])


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    return pipeline.build(small(), tmp_path_factory.mktemp("blocks") / "bundle")


def test_masked_blocks_run_as_single_nodes_and_pass_every_stage(built):
    values = built.to_json()
    assert [row for row in values["rows"] if not row["passed"]] == []
    assert values["forms"] == {"inverted_residual": "fused"}
    portable = built.bundle.manifest["facts"]["portable"]
    assert portable == {"edgedyn.inverted_residual.default": 1, "edgedyn.inverted_residual_int8.default": 2}
    assert session.check(session.open_session(built.bundle.path)).ok


def test_times_by_layer_name_each_block_once(built):
    compared = benchmark.compare_with_float(built.bundle.path, runs=2, trust=True)
    blocks = [row for row in compared.layers if row.layer in ("body.0", "body.1", "body.2")]
    assert [row.is_int8 for row in blocks] == [False, True, True]
    pixels, channels, hidden = 32 * 32, 8, 48
    assert {row.multiply_adds for row in blocks} == {pixels * hidden * (2 * channels + 9)}
    assert all(row.int8_ms > 0 for row in blocks)


def test_a_form_of_the_recipe_leaves_the_blocks_as_they_are():
    target = load_target(small("forms={inverted_residual: three_convolutions}"))
    network = pipeline.rewrite_network(small("forms={inverted_residual: three_convolutions}"), target)
    forms, program = network.decomposed["forward"]
    assert {op.name: form.name for op, form in forms.items()} == {"masked_conv2d": "fused"}
    assert sum("masked_conv2d" in str(node.target) for node in program.graph.nodes) == 9


def test_a_form_that_does_not_exist_or_cannot_run_is_refused():
    with pytest.raises(RecipeError, match="form 'three' of op 'inverted_residual' is unknown"):
        load_target(small("forms={inverted_residual: three}"))
    with pytest.raises(NoFormError, match="cannot run op 'inverted_residual' as fused"):
        load_target(small("kernels=stock", "forms={inverted_residual: fused}"))


def test_a_preview_counts_the_kernel_of_each_block():
    equipped = targets.load("executorch", "fused")
    found = inspection.inspect_model(small_mobilenet().eval(), (torch.zeros(1, 3, 16, 16),), instead=equipped)
    preview = found["targets"]["executorch"]
    assert preview["portable"] == {"edgedyn.inverted_residual.default": len(found["blocks"])}
    assert preview["unsupported"] == {}
