"""Engines are compiled in a process of its own: a runtime that ends it costs an error message, no more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_bundles import make_manifest, onnx_model, tensor

from edgedyn.bundle.bundle import open_bundle, write_bundle
from edgedyn.files import staging_folder

TARGET = """
import ctypes, os
from pathlib import Path
from edgedyn.errors import ModelError
from edgedyn.targets import Int8Scheme, Target, deferred

def compile(source, engine, *, workspace_bytes, progress):
    print("a library's own line")
    progress("tactics", 1, 2)
    how = os.environ["HOW"]
    if how == "dies":
        ctypes.string_at(0)
    if how == "refuses":
        raise ModelError("Upsample 'n4': no such operator")
    engine.write_bytes(source.read_bytes())
    return {"process": os.getpid(), "workspace": workspace_bytes}

TARGET = Target(
    name="engines", summary="a target that compiles", capabilities=frozenset(), kernels=frozenset(),
    precisions=frozenset({"fp32"}), int8=Int8Scheme(symmetric=True, outputs=False),
    lower=deferred("x", "x"), preview=deferred("x", "x"), load=deferred("x", "x"), missing=lambda: None,
    compile=compile,
)
"""
CALL = """
import json, os, sys, edgedyn
steps = []
facts = edgedyn.compile_bundle(sys.argv[1], workspace_bytes=7, progress=lambda *step: steps.append(step))
print(json.dumps([steps, facts, os.getpid()]))
"""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "extension/targets/engines"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text(TARGET)
    manifest = make_manifest("small", [tensor("x")], [tensor("y")], 2)
    manifest |= {"target": "engines", "vectors": []}
    with staging_folder(tmp_path / "out") as staging:
        (staging / "model.onnx").write_bytes(onnx_model())
        write_bundle(tmp_path / "out", staging, manifest)
    return tmp_path / "out"


def start(bundle: Path, how: str, *command: object) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "EDGEDYN_EXTENSIONS": str(bundle.parent / "extension"), "HOW": how}
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=environ, check=False
    )


def test_engine_and_facts_and_progress_come_from_another_process(bundle: Path):
    done = start(bundle, "works", "-c", CALL, bundle)
    steps, facts, parent = json.loads(done.stdout)
    assert steps == [["tactics", 1, 2]]
    assert facts["model.engine"]["workspace"] == 7
    assert facts["model.engine"]["process"] != parent
    assert "model.engine" in open_bundle(bundle).manifest["files"]


@pytest.mark.parametrize(
    ("how", "words"),
    [("dies", "ModelError: the process that compiled"), ("refuses", "ModelError: Upsample 'n4': no such")],
)
def test_a_compiler_that_fails_leaves_the_bundle_as_it_was(bundle: Path, how: str, words: str):
    before = sorted(bundle.parent.rglob("*"))
    done = start(bundle, how, "-m", "edgedyn", "compile", bundle)
    assert (done.returncode, "Traceback" in done.stderr) == (4, False)
    assert words in done.stderr
    assert ("was ended by SIGSEGV" in done.stderr) == (how == "dies")
    assert [x for x in sorted(bundle.parent.rglob("*")) if "__pycache__" not in str(x)] == before
    open_bundle(bundle)
