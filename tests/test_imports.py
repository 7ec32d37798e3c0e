"""What may import what: the device side needs numpy alone, and arrows between our files run one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import edgedyn

ROOT = Path(edgedyn.__file__).parent
HEAVY = [
    "torch",
    "torchao",
    "nncf",
    "executorch",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "pycuda",
    "safetensors",
    "pydantic",
]
DEVICE_SIDE = [
    "edgedyn",
    "edgedyn.bench.process",
    "edgedyn.bundle.bundle",
    "edgedyn.errors",
    "edgedyn.files",
    "edgedyn.images.photo",
    "edgedyn.bundle.manifest",
    "edgedyn.images.metrics",
    "edgedyn.targets.native",
    "edgedyn.device.session",
    "edgedyn.bench.speed",
    "edgedyn.targets",
    "edgedyn.targets.executorch",
    "edgedyn.targets.executorch.run",
    "edgedyn.targets.onnxruntime",
    "edgedyn.targets.onnxruntime.run",
    "edgedyn.targets.tensorrt",
    "edgedyn.targets.tensorrt.plugin_library",
    "edgedyn.targets.tensorrt.plugins",
    "edgedyn.targets.tensorrt.run",
    "edgedyn.targets.tensorrt.signatures",
    "edgedyn.bundle.tensors",
    "edgedyn.validation.stages",
]
BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HEAVY}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.parametrize("module", DEVICE_SIDE)
def test_device_side_imports_without_torch_and_runtimes(module):
    result = subprocess.run(
        [sys.executable, "-c", f"{BLOCK}\nimport {module}"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_the_block_blocks():
    result = subprocess.run(
        [sys.executable, "-c", f"{BLOCK}\nimport edgedyn.ops"], capture_output=True, text=True, check=False
    )
    assert "torch is blocked" in result.stderr


def test_every_target_can_be_loaded_and_says_what_is_missing():
    code = (
        f"{BLOCK}\nfrom edgedyn import targets\nprint([targets.load(name).name for name in targets.names()])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "['executorch', 'onnxruntime', 'tensorrt']", result.stderr


def module_name(path: Path) -> str:
    parts = ("edgedyn", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(path: Path, *, nested: bool = False) -> set[str]:
    """Return our files that a file imports at its top level, or anywhere; never under TYPE_CHECKING."""
    found: set[str] = set()
    statements: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while statements:
        node = statements.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            statements += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from package import file` needs the file; the package alone where the name is no file
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
        elif nested or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            statements += ast.iter_child_nodes(node)
    return found & FILES.keys()


GRAPH = {name: imports(path) for name, path in FILES.items()}


def test_the_graph_is_read():
    assert "edgedyn.ops" in GRAPH["edgedyn.layers.malleconv"] | GRAPH["edgedyn.ops.sliced_depthwise2d"]
    assert "edgedyn.errors" in GRAPH["edgedyn.quantize.calibrated"]
    assert sum(len(found) for found in GRAPH.values()) > 30


def test_no_two_files_import_each_other_in_a_circle():
    done: set[str] = set()

    def visit(name: str, trail: list[str]) -> None:
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            for found in sorted(GRAPH[name]):
                visit(found, [*trail, name])
            done.add(name)

    for name in GRAPH:
        visit(name, [])


# package or file -> what it may not import, at any depth of its code
FORBIDDEN = {
    "edgedyn.layers": (
        "edgedyn.pipeline",
        "edgedyn.quantize",
        "edgedyn.targets",
        "edgedyn.cli",
        "edgedyn.validation.stages",
    ),
    "edgedyn.ops": (
        "edgedyn.pipeline",
        "edgedyn.quantize",
        "edgedyn.targets",
        "edgedyn.cli",
        "edgedyn.validation.stages",
        "edgedyn.layers",
    ),
    "edgedyn.models": ("edgedyn.pipeline", "edgedyn.quantize", "edgedyn.targets", "edgedyn.cli"),
    "edgedyn.targets": ("edgedyn.pipeline", "edgedyn.quantize", "edgedyn.cli", "edgedyn.layers"),
    "edgedyn.quantize": ("edgedyn.pipeline", "edgedyn.cli", "edgedyn.layers"),
    "edgedyn.graph.rewrites": ("edgedyn.pipeline", "edgedyn.cli", "edgedyn.layers", "edgedyn.targets"),
    "edgedyn.contents": ("edgedyn.pipeline", "edgedyn.cli", "edgedyn.layers"),
    "edgedyn.files": ("edgedyn.bundle.bundle", "edgedyn.bundle.manifest", "edgedyn.images.photo"),
    "edgedyn.bundle.manifest": ("edgedyn.bundle.bundle",),
    "edgedyn.validation.stages": ("edgedyn.pipeline", "edgedyn.cli", "edgedyn.layers", "edgedyn.quantize"),
    "edgedyn.errors": ("edgedyn",),
    "edgedyn.bundle.tensors": ("edgedyn",),
}


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_arrow_runs_back_up(package):
    files = {name: path for name, path in FILES.items() if is_inside(name, package)}
    assert files
    for name, path in files.items():
        for found in imports(path, nested=True):
            assert not any(is_inside(found, other) for other in FORBIDDEN[package]), f"{name} imports {found}"


def test_nothing_at_the_top_of_a_target_imports_its_runtime():
    """Only run.py, lower.py and their kind may, and the command line lists targets without any of them."""
    for name in ("executorch", "onnxruntime", "tensorrt"):
        tree = ast.parse((ROOT / "targets" / name / "__init__.py").read_text(encoding="utf-8"))
        top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        top |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
        assert not {module.partition(".")[0] for module in top} & set(HEAVY)
