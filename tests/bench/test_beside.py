"""A build beside its counterparts: in float32, and with the other kernels, timed in turns in one build."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from edgedyn import pipeline
from edgedyn.bench.speed import time_beside
from edgedyn.bundle.bundle import open_bundle
from edgedyn.cli.app import app
from edgedyn.conversion.convert import Converted
from edgedyn.conversion.counterparts import load_counterparts
from edgedyn.conversion.image_sets import draw, open_sets
from edgedyn.errors import TargetMissingError
from edgedyn.quantize.table.entries import Precision
from edgedyn.recipe.recipe import Recipe, load_recipe
from edgedyn.report.beside import describe_beside, latency_rows
from edgedyn.report.stored import rewrite_report
from edgedyn.targets import Target
from edgedyn.targets.executorch import kernels

ROOT = Path(__file__).parents[2]
COUNTERPARTS = ("float32", "fused kernels")
HINT = "; --set kernels=fused; docs/kernels.md says how an app links them"


def small(network: str, *overrides: str) -> list[str]:
    return [
        f"model.network={network}",
        "model.arguments={}",
        "model.weights=null",
        "input.shape=[1, 3, 64, 64]",
        "tile.overlap=16",
        *overrides,
    ]


INT8 = ["precision=int8", "quantize.rounding=nearest", "quantize.keep_float=[]", "quantize.dynamic=[]"]


def small_recipe(network: str, *overrides: str) -> Recipe:
    base = "int8" if "precision=int8" in overrides else "fp32"
    return load_recipe(ROOT / f"recipes/mallenet-s.phone.{base}.yaml", small(network, *overrides))


def build(out: Path, network: str, *overrides: str, **options) -> pipeline.Build:
    return pipeline.build(small_recipe(network, *overrides), out, trust=True, **options)


def convert(recipe: Recipe) -> tuple[Converted, Target]:
    """Return the programs of a recipe that are not lowered yet."""
    target = pipeline.load_target(recipe)
    calibration, validation = open_sets(recipe, None)
    network = pipeline.rewrite_network(recipe, target, trust=True)
    sample = draw(network.recipe, validation)[0]
    return pipeline.convert(network, target, calibration, sample), target


class Text(HTMLParser):
    """The text of a page, spaces joined."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.feed(html)

    def handle_data(self, data: str) -> None:
        self.words += data.split()


def text_of(page: Path) -> str:
    return " ".join(Text(page.read_text(encoding="utf-8")).words)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], ["fused kernels"]),
        ([*INT8, "kernels=fused"], ["float32", "stock kernels"]),
    ],
    ids=["fp32", "int8-fused"],
)
def test_build_is_timed_beside_float_and_the_other_kernels(library, tmp_path, overrides, names):
    built = build(tmp_path / "bundle", "small_blocks:block_net", *overrides)
    beside = built.latency_beside
    assert list(beside) == names
    assert all(0 < ms < 1000 for ms in beside.values())
    printed = json.loads(json.dumps(built.to_json()))
    assert printed["latency_beside"] == beside
    manifest = open_bundle(tmp_path / "bundle").manifest
    assert manifest["facts"]["latency_beside"] == beside
    rows = {row["metric"]: row for row in printed["rows"] if row["between"] == "latency"}
    own = {"this build": built.latency_ms["median"]}
    assert {name: row["value"] for name, row in rows.items()} == {
        f"latency_ms[{name}]": ms for name, ms in {**own, **beside}.items()
    }
    assert all(row["limit"] == {} and row["samples"] == 10 for row in rows.values())
    page = text_of(tmp_path / "bundle/report.html")
    for name, sentence in describe_beside(built.latency_ms, beside).items():
        assert f"Latency, {name}" in page
        assert sentence in page
    assert rewrite_report(tmp_path / "bundle")
    assert text_of(tmp_path / "bundle/report.html") == page
    # nothing of the counterparts is shipped
    assert sorted(set(manifest["programs"].values())) == ["model.pte"]
    assert [file for file in manifest["files"] if file.endswith(".pte")] == ["model.pte"]


def test_command_ends_with_what_fused_kernels_bring(library, tmp_path):
    overrides = [word for item in small("small_blocks:block_net") for word in ("--set", item)]
    recipe = str(ROOT / "recipes/mallenet-s.phone.fp32.yaml")
    command = ["build", recipe, "-o", str(tmp_path / "a"), "--trust", *overrides]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    beside = open_bundle(tmp_path / "a").manifest["facts"]
    sentence = describe_beside(beside["latency_ms"], beside["latency_beside"])["fused kernels"]
    assert done.stdout.strip().splitlines()[-1] == f"fused kernels: {sentence}"
    command[3] = str(tmp_path / "b")
    done = CliRunner().invoke(app, [*command, "--no-compare"], catch_exceptions=False)
    assert done.stdout.strip().splitlines()[-1].startswith("report: ")
    assert "latency_beside" not in open_bundle(tmp_path / "b").manifest["facts"]


def test_counterparts_are_of_their_kernels_and_precision_and_keep_the_layers_of_the_search(library, tmp_path):
    converted, target = convert(small_recipe("small_blocks:block_net", *INT8))
    (tmp_path / "first").mkdir()
    assert list(load_counterparts(converted, target, tmp_path / "first")) == ["float32", "fused kernels"]
    float32, fused = ((tmp_path / "first" / name / "model.pte").read_bytes() for name in COUNTERPARTS)
    assert b"edgedyn::" not in float32
    assert len(float32) > 1.5 * len(fused)  # weights of four bytes
    assert b"edgedyn::inverted_residual_int8" in fused
    part = converted.parts["forward"]
    searched = replace(part.quantized.calibrated, precision=Precision((), (), kept=("1.expand",)))
    parts = {"forward": replace(part, quantized=replace(part.quantized, calibrated=searched))}
    (tmp_path / "second").mkdir()
    load_counterparts(replace(converted, parts=parts), target, tmp_path / "second")
    kept = (tmp_path / "second/fused kernels/model.pte").read_bytes()
    assert b"edgedyn::inverted_residual_int8" not in kept
    assert b"edgedyn::inverted_residual" in kept
    # a runtime that stands in for the device's has no times to compare
    assert load_counterparts(converted, replace(target, profile=None), tmp_path) == {}


def test_without_blocks_and_ops_of_ours_no_kernels_are_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(kernels, "build", lambda: pytest.fail("kernels are compiled for nothing"))
    assert list(build(tmp_path / "out", "small_networks:wide_convolutions", *INT8).latency_beside) == [
        "float32"
    ]


def test_without_a_compiler_a_build_is_ok_and_compares_no_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    kernels.load.cache_clear()
    built = build(tmp_path / "out", "small_blocks:block_net")
    assert built.latency_beside == {}
    assert built.report.rows
    assert not [row for row in built.report.rows if row.between == "latency"]
    assert "Latency, " not in text_of(tmp_path / "out/report.html")
    assert not list((tmp_path / "cache").rglob("*.so"))
    with pytest.raises(TargetMissingError, match="cannot be built here"):
        kernels.load()


def test_library_that_the_system_does_not_load_fails_no_build(tmp_path, monkeypatch):
    broken = tmp_path / "libbroken.so"
    broken.write_text("no library")
    monkeypatch.setattr(kernels, "build", lambda: broken)
    kernels.load.cache_clear()
    with pytest.raises(TargetMissingError, match=r"fused kernels cannot be loaded: .*libbroken"):
        kernels.load()
    assert build(tmp_path / "out", "small_blocks:block_net").latency_beside == {}


def test_routed_network_is_compared_with_nothing(tmp_path):
    assert build(tmp_path / "out", "small_decisions:routed_denoiser").latency_beside == {}


def test_form_that_only_one_runtime_has_leaves_the_counterpart_out(library, tmp_path):
    forms = "forms={inverted_residual: three_convolutions}"
    assert build(tmp_path / "out", "small_blocks:block_net", forms).latency_beside == {}


def test_programs_are_timed_in_turns_with_a_pause_in_front_of_each(monkeypatch):
    order: list[str] = []
    monkeypatch.setattr("time.sleep", lambda seconds: order.append(f"{seconds:g}"))

    def run(name: str):
        return lambda x: order.append(f"{name}{x}")

    own, beside = time_beside(run("a"), {"b": run("b"), "c": run("c")}, [np.int64(7)], turns=2)
    turn = ["0.1", "a7", "a7", "a7", "0.1", "b7", "b7", "b7", "0.1", "c7", "c7", "c7"]
    assert order == turn * 2
    assert own["runs"] == 4
    assert list(beside) == ["b", "c"]


def test_program_alone_is_timed_without_pauses(monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("a pause"))
    own, beside = time_beside(lambda: None, {}, [])
    assert (own["runs"], beside) == (10, {})


def test_sentence_names_the_setting_only_where_fused_kernels_are_faster():
    beside = {"float32": 191.23, "fused kernels": 41.04}
    assert describe_beside({"median": 180.2}, beside) == {
        "float32": "191 ms instead of 180 per tile",
        "fused kernels": f"41 ms instead of 180 per tile{HINT}",
    }
    slower = describe_beside({"median": 40.0}, {"fused kernels": 41.04})
    assert slower == {"fused kernels": "41 ms instead of 40 per tile"}
    assert describe_beside({"median": 40.0}, {"stock kernels": 4.0}) == {
        "stock kernels": "4 ms instead of 40 per tile"
    }


def test_rows_stand_only_beside_a_counterpart():
    assert latency_rows({"median": 2.0, "runs": 10}, {}) == []
    rows = latency_rows({"median": 2.0, "runs": 10}, {"float32": 3.0})
    assert [(row.metric, row.value, row.samples) for row in rows] == [
        ("latency_ms[this build]", 2.0, 10),
        ("latency_ms[float32]", 3.0, 10),
    ]
    assert all(row.passed for row in rows)
