"""edgedyn bench on a real bundle: what is measured, what is written into it, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from edgedyn import pipeline
from edgedyn.bench import benchmark
from edgedyn.bench.speed import Comparison
from edgedyn.bundle.bundle import open_bundle
from edgedyn.bundle.manifest import MANIFEST, canonical, seal
from edgedyn.cli.app import app
from edgedyn.cli.bench import print_layers
from edgedyn.errors import BundleError, RecipeError, TargetMissingError, UsageError
from edgedyn.recipe.recipe import load_recipe
from edgedyn.report import insert_layers
from edgedyn.report.rows import Row
from edgedyn.report.stored import rewrite_report
from edgedyn.report.text import TIMES

ROOT = Path(__file__).parents[2]
SMALL = [
    "model.network=small_networks:make_net",
    "model.arguments={}",
    "model.weights=null",
    "input.shape=[1, 3, 64, 64]",
    "tile.overlap=16",
    "quantize.rounding=nearest",
    "quantize.keep_float=[tail]",
    "quantize.dynamic=[]",
]
INT8 = {"head", "body"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    recipe = load_recipe(ROOT / "recipes/mallenet-s.phone.int8.yaml", SMALL)
    return pipeline.build(recipe, tmp_path_factory.mktemp("bench") / "bundle", compare=False).bundle.path


@pytest.fixture(scope="module")
def compared(built):
    return benchmark.compare_with_float(built, runs=3, trust=True)


@pytest.fixture
def bundle(built, tmp_path):
    return Path(shutil.copytree(built, tmp_path / "bundle"))


def change(path: Path, **values) -> None:
    """Write other values into a manifest, sealed again."""
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_bytes(canonical(seal({**manifest, **values})))


class Text(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.feed(page)

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_endtag(self, tag: str) -> None:
        self.text += " " if tag in ("td", "th") else ""


def text_of(page: str) -> str:
    return " ".join(Text(page).text.split())


def test_latency_and_memory_are_measured_in_a_process_of_its_own(built):
    found = benchmark.measure(built, runs=3)
    latency = found["programs"]["forward"]["latency_ms"]
    assert latency["runs"] == 3
    assert 0 < latency["median"] <= latency["p95"]
    speed = found["programs"]["forward"]["megapixels_per_second"]
    assert speed == pytest.approx(64 * 64 / 1e6 / (latency["median"] / 1e3))
    if Path("/proc/self/status").exists():
        assert 0 <= found["memory_bytes"]["running"] < found["memory_bytes"]["peak"]
    assert "ExecuTorch" in found["runtime"]


def test_network_that_only_the_bundle_names_is_not_run(built):
    with pytest.raises(RecipeError, match=r"small_networks:make_net.*named by a bundle.*--trust"):
        benchmark.compare_with_float(built, runs=1)


def test_every_int8_layer_is_compared_once(compared):
    assert sorted(row.layer for row in compared.int8_layers) == sorted(INT8)
    assert all(row.float_ms >= 0 and row.int8_ms >= row.conversion_ms for row in compared.layers)
    assert compared.runs == 3
    assert compared.float_ms.keys() == compared.int8_ms.keys() == {"forward"}
    head, _, tail = compared.layers
    assert (head.shape, head.multiply_adds) == ((1, 8, 64, 64), 3 * 9 * 8 * 64 * 64)
    assert (tail.layer, tail.is_int8, tail.is_slower) == ("tail", False, False)


def test_report_that_is_written_again_keeps_the_comparison(bundle, compared):
    benchmark.write_comparison(bundle, compared)
    page = (bundle / "report.html").read_text()
    assert rewrite_report(bundle)
    assert (bundle / "report.html").read_text() == page
    (bundle / "report.html").write_text("damaged")
    assert not rewrite_report(bundle)
    section = page[page.index("<!-- layers -->") : page.index("<!-- end of layers -->")]
    assert section in (bundle / "report.html").read_text()


def test_comparison_stands_in_the_bundle_once(bundle, compared):
    benchmark.write_comparison(bundle, compared)
    page = (bundle / "report.html").read_text()
    benchmark.write_comparison(bundle, compared)
    opened = open_bundle(bundle)
    assert benchmark.FILE in opened.manifest["files"]
    written = json.loads((bundle / benchmark.FILE).read_text())
    assert {**compared.to_json(), "machine": benchmark.machine()} == written
    rows = json.loads((bundle / "report.json").read_text())["rows"]
    (row,) = [row for row in rows if row["between"] == "int8:float"]
    assert (row["metric"], row["value"], row["limit"]) == ("slower_layers", len(compared.slower), {})
    assert (row["samples"], row["passed"]) == (len(INT8), True)
    assert len(rows) > 1  # those of the build still stand
    assert (bundle / "report.html").read_text() == page


def test_report_names_the_slower_layers_and_what_to_write_into_the_recipe(built):
    shared = {"program": "forward", "shape": [1, 8, 4, 6], "multiply_adds": 2_500_000}
    values = {
        "runs": 7,
        "machine": "one <b>core</b>",
        "float_ms": {"forward": 4.0},
        "int8_ms": {"forward": 3.0},
        "keep_float": ["body.0"],
        "layers": [
            {
                **shared,
                "layer": "body.0",
                "float_ms": 1.0,
                "int8_ms": 1.5,
                "is_int8": True,
                "is_slower": True,
            },
            {**shared, "layer": "tail", "float_ms": 2.0, "int8_ms": 0.5, "is_int8": True, "is_slower": False},
        ],
    }
    row = Row("int8:float", "slower_layers", 1.0, {}, 2).to_json()
    page = insert_layers((built / "report.html").read_text(), values, row)
    text, shape = text_of(page), TIMES.join("1846")
    assert "slower_layers: 1 of 2 INT8 layers" in text
    assert "3 ms in INT8, 4 ms in float32" in text
    assert text.count(f"body.0 {shape}, 2.5 MMAC 1 1.5 1.5 slower") == 2  # by itself, and among all
    assert text.count(f"tail {shape}, 2.5 MMAC 2 0.5 0.25") == 1
    assert "keep_float: [body.0]" in text
    assert "one <b>core</b>" in text  # as text, no markup
    assert "Check" in text  # the rest of the page


def test_page_of_another_version_is_refused(compared):
    row = Row("int8:float", "slower_layers", 0.0, {}, 2).to_json()
    with pytest.raises(BundleError, match="no place"):
        insert_layers("<html></html>", compared.to_json() | {"machine": ""}, row)


def test_command_measures_and_writes_into_the_bundle(bundle):
    done = CliRunner().invoke(app, ["bench", str(bundle), "--per-layer", "--trust", "--runs", "2", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert [row["layer"] for row in found["per_layer"]["layers"]] == ["head", "body", "tail"]
    assert found["programs"]["forward"]["latency_ms"]["runs"] == 2
    written = json.loads((open_bundle(bundle).path / benchmark.FILE).read_text())
    assert found["per_layer"] == {key: written[key] for key in found["per_layer"]}


def test_command_without_the_flag_leaves_the_bundle_as_it_was(bundle):
    before = (bundle / MANIFEST).read_bytes()
    done = CliRunner().invoke(app, ["bench", str(bundle), "--runs", "1"])
    assert done.exit_code == 0, done.output
    assert "of 1 runs of one tile" in " ".join(done.stdout.split())
    assert "ran with ExecuTorch" in done.stdout
    assert " pixels, on this machine (" in done.stdout
    assert (bundle / MANIFEST).read_bytes() == before


def test_table_marks_the_slower_layers_and_says_what_to_write(compared, capsys):
    head, body, tail = compared.layers
    rows = (
        replace(head, is_slower=True, float_ms=1.0, int8_ms=1.5, conversion_ms=0.25),
        replace(body, is_slower=False, float_ms=2.0, int8_ms=0.5, conversion_ms=0.25),
        tail,
    )
    print_layers(Comparison(rows, {"forward": 4.0}, {"forward": 3.0}, 7))
    said = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert said[1:] == [
        "head 8x64x64 0.88 1.000 1.500 1.50 slower",
        "body 8x64x64 2.36 2.000 0.500 0.25",
        "together 3.00 ms in float32, 2.00 ms in INT8, 0.50 ms of it conversions",
        "forward: 4.00 ms in float32, 3.00 ms in INT8, medians of 7 runs each, alternating",
        "1 of 2 layers are slower in INT8 than in float32",
        "add to quantize.keep_float: [head]",
    ]


def test_runs_from_1(bundle):
    done = CliRunner().invoke(app, ["bench", str(bundle), "--runs", "0"])
    assert done.exit_code == 2


def test_bundle_of_another_precision_is_refused(bundle):
    change(bundle, precision="fp32")
    with pytest.raises(UsageError, match="is fp32; expected int8, whose layers"):
        benchmark.compare_with_float(bundle, runs=1)


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_target_without_times_by_layer_is_refused(bundle, target):
    change(bundle, target=target)
    with pytest.raises(TargetMissingError, match="has no times by layer here"):
        benchmark.compare_with_float(bundle, runs=1)


def test_bundle_that_does_not_name_its_operators_is_refused(bundle):
    facts = json.loads((bundle / MANIFEST).read_text())["facts"]
    del facts["operators"]
    change(bundle, facts=facts)
    with pytest.raises(BundleError, match="does not map its operators to layers"):
        benchmark.compare_with_float(bundle, runs=1)


def test_bundle_without_vectors_is_refused(bundle):
    shutil.rmtree(bundle / "vectors")
    manifest = json.loads((bundle / MANIFEST).read_text())
    files = {name: entry for name, entry in manifest["files"].items() if "/" not in name}
    change(bundle, vectors=[], files=files)
    with pytest.raises(BundleError, match="has no vectors"):
        benchmark.measure(bundle, runs=1)


def test_folder_that_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"manifest\.json"):
        benchmark.measure(tmp_path, runs=1)
