"""The wheel, built from the source distribution and installed: recipes, weights and images come with it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

import edgedyn

pytest.importorskip("setuptools", reason="the wheel is built with setuptools")

ROOT = Path(edgedyn.__file__).parents[1]
SHIPPED = ("recipes", "calib")
MOST_BYTES = 3 * 2**20


def files(folder: Path) -> set[str]:
    """Return the files under a folder, relative to its parent, without compiled Python."""
    found = (path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    return {path.relative_to(folder.parent).as_posix() for path in found}


def run(*command: str | Path, cwd: Path) -> str:
    # PYTHONPATH may name a checkout
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The unpacked source distribution, of a copy without leftovers of earlier builds."""
    where = tmp_path_factory.mktemp("sdist")
    source = where / "source"
    for folder in ("edgedyn", *SHIPPED):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, source)
    build = "from setuptools import build_meta; build_meta.build_sdist('..')"
    run(sys.executable, "-c", build, cwd=source)
    (archive,) = where.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(where)
    return where / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def wheel(sdist) -> Path:
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", "wheels", sdist, cwd=sdist.parent)
    (found,) = (sdist.parent / "wheels").glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    """The commands of a virtual environment: edgedyn from the wheel, dependencies from this interpreter."""
    where = wheel.parents[1] / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", where, cwd=wheel.parent)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", where / "bin/python")
    run(*pip, "install", "--quiet", "--no-deps", wheel, cwd=wheel.parent)
    (packages,) = where.glob("lib/python*/site-packages")
    # a path file adds these folders alone: an editable edgedyn in them is not followed
    folders = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (packages / "dependencies.pth").write_text("\n".join(folders))
    return where / "bin"


def test_the_source_distribution_has_every_file_of_the_package_and_of_the_recipes(sdist):
    for folder in ("edgedyn", *SHIPPED):
        assert files(ROOT / folder) <= files(sdist / folder)


def test_the_wheel_has_every_file_of_the_package_and_of_the_recipes(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert files(ROOT / "edgedyn") <= names
    for folder in SHIPPED:
        assert {f"edgedyn/shipped/{name}" for name in files(ROOT / folder)} <= names


def test_the_wheel_has_no_large_file_and_one_package(wheel):
    archive = zipfile.ZipFile(wheel)
    assert max(archive.infolist(), key=lambda file: file.file_size).file_size <= MOST_BYTES
    assert {name.partition("/")[0] for name in archive.namelist()} == {"edgedyn", "edgedyn-0.1.0.dist-info"}


def test_recipes_are_listed_and_resolved_from_an_empty_folder(installed, tmp_path):
    rows = json.loads(run(installed / "edgedyn", "list", "recipes", "--json", cwd=tmp_path))
    names = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert {row["recipe"] for row in rows} == names
    code = """
from edgedyn.images.image_set import open_set
from edgedyn.recipe.recipe import load_recipe
from edgedyn.recipe.shipped import shipped_recipes
recipes = list(map(load_recipe, shipped_recipes()))
names = [(recipe, name) for recipe in recipes for name in (recipe.calibration, recipe.validation) if name]
sets = {recipe.path(name).resolve() for recipe, name in names}
assert {path.name: len(open_set(path).images) for path in sets}["photos.yaml"] == 11
for recipe in recipes:
    assert not recipe.is_trained or recipe.weights_digest() == recipe.model.sha256
load_recipe("mallenet-s.phone.int8").load_model()
import edgedyn
print(edgedyn.__file__)
"""
    where = run(installed / "python", "-c", code, cwd=tmp_path).strip()
    assert Path(where).is_relative_to(installed.parent)


def test_a_shipped_recipe_builds_from_an_empty_folder(installed, tmp_path):
    small = ("input.shape=[1, 3, 32, 32]", "tile.overlap=8", "quantize.rounding=nearest")
    settings = [word for value in small for word in ("--set", value)]
    command = ("build", "ddf-up.phone.int8", "-o", "out", *settings, "--no-compare", "--json")
    built = json.loads(run(installed / "edgedyn", *command, cwd=tmp_path))
    assert built["ok"], built["rows"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out/model.pte").stat().st_size > 0
