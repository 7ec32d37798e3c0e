"""Every system on every target: one recipe each, on small tiles, in the real runtimes, on real photos."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from small_builds import NEEDS_RTX, STAGES

from edgedyn import pipeline
from edgedyn.bench import benchmark
from edgedyn.device import session
from edgedyn.quantize.table.table import read_table
from edgedyn.recipe.recipe import load_recipe

ROOT = Path(__file__).parents[1]
SMALL = ["input.shape=[1, 3, 64, 64]", "tile.overlap=16"]
# system -> (recipe without target and precision, what makes it small, primitive)
SYSTEMS = {
    "ddsnet": ("slimmable-dncnn", "model.arguments={colors: 3}", None),
    "acda": ("acda-dncnn", "model.arguments={colors: 3, depth: 4}", "atom_depthwise2d"),
    "ddf": ("ddf-denoiser", "model.arguments={colors: 3}", "decoupled_depthwise2d"),
    "dynconv": ("dynconv-denoiser", "model.arguments={colors: 3}", "masked_conv2d"),
}
CASES = [
    pytest.param((system, kind), marks=NEEDS_RTX if kind.startswith("jetson") else [], id=f"{system}-{kind}")
    for system in SYSTEMS
    for kind in ("phone.int8", "jetson.fp16")
]


@pytest.fixture(scope="module", params=CASES)
def built(request, tmp_path_factory):
    system, kind = request.param
    name, smaller, primitive = SYSTEMS[system]
    recipe = load_recipe(ROOT / f"recipes/{name}.{kind}.yaml", [*SMALL, smaller])
    folder = tmp_path_factory.mktemp("build")
    return system, primitive, pipeline.build(recipe, folder / "bundle", compare=False)


def test_every_stage_has_rows_with_samples_and_passes(built):
    rows = built[2].to_json()["rows"]
    assert {row["between"] for row in rows} >= STAGES
    assert all(row["samples"] > 0 for row in rows)
    assert [row for row in rows if not row["passed"]] == []
    assert built[2].to_json()["ok"] is True


def test_rewrite_is_exact_and_demanded_to_be(built):
    exact = [row for row in built[2].report.rows if row.metric == "max_relative[float64]"]
    assert [row.limit for row in exact] == [{"at_most": 1e-12}] * 2


def test_forms_name_the_primitive_of_the_system(built):
    _, primitive, build = built
    assert set(build.to_json()["forms"]) == ({primitive} if primitive else set())


def test_generated_kernels_say_how_far_they_depend_on_content(built):
    """Of every op of ours that filters with them; a mask is a decision, and a width has none."""
    system, _, build = built
    if build.bundle.precision != "int8":
        pytest.skip("float16 is not calibrated")
    found = build.bundle.manifest["facts"]["generated_kernels"]
    assert bool(found) == (system in ("acda", "ddf"))
    assert all(name.endswith(".kernel") for name in found)
    for seen in found.values():
        assert 0 < seen["between_images"] <= seen["spread"] * (1 + 1e-9) <= 1  # equal for one position
    table = read_table(build.bundle.path / "calibration.json")
    kinds = {entry.name: entry.kind for entries in table.programs.values() for entry in entries}
    assert {name for name, kind in kinds.items() if kind == "kernel"} == set(found)


def test_bundle_runs_where_it_stands_and_routes_by_its_manifest(built):
    system, _, build = built
    opened = session.open_session(build.bundle.path)
    assert session.check(opened).ok
    routing = build.bundle.routing
    assert (routing is not None) == (system == "ddsnet")
    if routing is not None:
        assert set(build.bundle.programs) == {routing.router, *routing.variants}
        assert len(set(build.bundle.programs.values())) == (1 if build.bundle.target == "executorch" else 5)


def test_session_takes_an_image_larger_than_the_tile(built):
    opened = session.open_session(built[2].bundle.path)
    image = np.random.default_rng(0).random((70, 90, 3), dtype=np.float32)
    assert opened.process(image).shape == image.shape


def test_decisions_are_measured_and_apart_from_arithmetic(built):
    system, _, build = built
    metrics = {row.metric for row in build.report.rows if row.between == "decisions"}
    if system == "ddsnet":
        assert metrics >= {"gate_agreement[quantized]", "gate_agreement[device]", "flips_cost_db[gate]"}
    int8 = build.bundle.precision == "int8"
    assert ("coverage[variant=w3]" in metrics) is (int8 and system == "ddsnet")
    assert ({"coverage[mask]", "coverage[density=0-100%]"} <= metrics) is (int8 and system == "dynconv")
    if system == "dynconv":
        assert metrics >= {"mask_flip_rate[quantized]", "mask_flip_rate[device]", "arithmetic_cost_db"}
        margins = build.bundle.manifest["facts"]["decisions"]["margins_device"]
        assert sum(margins["all"]) > sum(margins["changed"])


def test_report_says_what_weights_the_network_has(built):
    system, _, build = built
    said = (
        "trained: dynconv-denoiser.safetensors"
        if system == "dynconv"
        else "not trained: initial values of seed 0"
    )
    assert said in (build.bundle.path / "report.html").read_text()
    facts = json.loads((build.bundle.path / "manifest.json").read_text())["facts"]
    assert facts["weights"].startswith(said)


def test_every_int8_layer_is_compared_with_float_in_every_program(built):
    system, _, build = built
    if build.bundle.precision != "int8":
        pytest.skip("layers are compared where they are INT8, by the runtime of the phone")
    found = benchmark.compare_with_float(build.bundle.path, runs=1, trust=True)
    assert set(found.int8_ms) == set(build.bundle.programs)
    named = [(row.program, row.layer) for row in found.int8_layers]
    assert len(set(named)) == len(named) >= 4, system


def test_every_variant_is_timed(built):
    bundle = built[2].bundle
    variants = bundle.routing.variants if bundle.routing else ("forward",)
    assert list(benchmark.measure(bundle.path, runs=1)["programs"]) == list(variants)
