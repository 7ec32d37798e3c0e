"""The public functions: each takes paths as text, is imported on first use, and is listed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import edgedyn
from edgedyn.errors import UsageError

ROOT = Path(__file__).parents[1]
RECIPE = """
model: {network: "boundary_net:make"}
input: {shape: [1, 3, 32, 48]}
target: onnxruntime
precision: int8
calibration: %(root)s/calib/skimage.yaml
validation: %(root)s/calib/skimage-validation.yaml
quantize: {samples: 2, rounding: nearest}
tile: {overlap: 8}
limits: {int8_share: 0}
"""
NETWORK = """
from torch import nn
from edgedyn.layers.malleconv import AffineMalleConv

def make():
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1),
                         AffineMalleConv(3, 3, 2))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("public")
    (folder / "boundary_net.py").write_text(NETWORK)
    (folder / "mine.yaml").write_text(RECIPE % {"root": ROOT})
    sys.path.append(str(folder))
    yield folder
    sys.path.remove(str(folder))
    sys.modules.pop("boundary_net", None)


@pytest.fixture(scope="module")
def recipe(folder):
    return str(folder / "mine.yaml")


@pytest.fixture(scope="module")
def bundle(recipe, folder):
    built = edgedyn.build(recipe, str(folder / "bundle"))
    assert built.report.rows
    return str(folder / "bundle")


def test_recipe_is_read_by_its_path(recipe):
    loaded = edgedyn.load_recipe(recipe)
    assert isinstance(loaded, edgedyn.Recipe)
    assert loaded.name == "mine"


def test_calibrate_writes_a_table(recipe, folder):
    table = edgedyn.calibrate(recipe, str(folder / "table.json"))
    assert table.images["samples"] == 2
    assert (folder / "table.json").is_file()


def test_lower_writes_the_programs_of_the_bundle_and_nothing_else(recipe, bundle, folder):
    artifact = edgedyn.lower(recipe, str(folder / "programs"))
    assert sorted(path.name for path in (folder / "programs").iterdir()) == sorted(artifact.programs.values())
    for file in artifact.programs.values():
        assert (folder / "programs" / file).read_bytes() == Path(bundle, file).read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        edgedyn.lower(recipe, str(folder / "programs"))


def test_inspect_takes_a_recipe_or_a_network(recipe):
    import boundary_net

    shape = (1, 3, 32, 48)
    for found in (
        edgedyn.inspect(recipe),
        edgedyn.inspect(boundary_net.make().eval(), shape=shape),
    ):
        assert [layer["path"] for layer in found["layers"]] == ["3"]
        assert found["shape"] == [list(shape)]


def test_bundle_is_opened_checked_and_run_by_its_path(bundle, folder):
    assert edgedyn.open_bundle(bundle).target == "onnxruntime"
    session = edgedyn.open_session(bundle)
    report = edgedyn.check(bundle)
    assert report.rows == edgedyn.check(session).rows
    assert all(row.passed for row in report.rows if row.between == "device:vectors")
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    image = str(folder / "a.png")
    assert edgedyn.run(bundle, image, str(folder / "one")) == [folder / "one/a.png"]
    assert edgedyn.run(session, [image], folder / "two") == [folder / "two/a.png"]
    assert (folder / "one/a.png").read_bytes() == (folder / "two/a.png").read_bytes()


def test_only_bundles_of_a_target_with_engines_are_compiled(bundle):
    with pytest.raises(UsageError, match="only tensorrt bundles are compiled"):
        edgedyn.compile_bundle(bundle)


def test_names_are_listed_and_imported_on_first_use():
    assert set(edgedyn.__all__) < set(dir(edgedyn))
    assert edgedyn.__all__ == sorted(edgedyn.__all__)
    for name in edgedyn.__all__:
        assert getattr(edgedyn, name).__doc__
    with pytest.raises(AttributeError, match="it has CalibrationSet"):
        edgedyn.nothing_of_this_name  # noqa: B018
    code = "import edgedyn, sys; dir(edgedyn); print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False False"
