"""Imports between our files: no arrow up a floor, no circle, a device side free of the host's packages.

Imports count wherever they stand: at the top, inside a function, under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import edgedyn

ROOT = Path(edgedyn.__file__).parent
HOST_PACKAGES = [
    "torch",
    "torchao",
    "nncf",
    "executorch",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "tensorrt",
    "pycuda",
    "safetensors",
    "pydantic",
    "yaml",
]
BLOCK = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {HOST_PACKAGES}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
"""
# from the ground up; a file imports files of its own room and of the floors below
FLOORS = (
    ("errors",),
    ("reading",),
    ("files", "sections", "extensions"),
    ("cache", "children"),
    ("bundle",),
    ("images",),
    ("graph",),
    ("ops",),
    ("layers",),
    ("models",),
    ("checkpoints",),
    ("recipe",),
    ("training",),
    ("report",),
    ("targets",),
    ("quantize",),
    ("conversion",),
    ("validation",),
    ("device",),
    ("bench",),
    ("contents",),
    ("pipeline",),
    ("cli",),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FRONT = {"edgedyn", "edgedyn.__main__"}  # the public names and the entry point stand above every floor


def module_name(path: Path) -> str:
    parts = ("edgedyn", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(source: str) -> set[str]:
    """Return our files that a file imports anywhere, type-only imports included."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            # `from package import file` needs the file; the package alone where the name is no file
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in FILES else node.module for name in names}
    return found & FILES.keys()


GRAPH = {name: imports(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def room(name: str) -> str:
    return name.split(".")[1]


def arrows_up(graph: dict[str, set[str]]) -> list[str]:
    return sorted(
        f"{name} imports {other}"
        for name, others in graph.items()
        for other in others
        if name not in FRONT
        and (other in FRONT or (room(name) != room(other) and FLOOR[room(name)] <= FLOOR[room(other)]))
    )


def circles(graph: dict[str, set[str]]) -> list[str]:
    done: set[str] = set()
    found = []

    def visit(name: str, trail: list[str]) -> None:
        if name in trail:
            found.append(" -> ".join([*trail[trail.index(name) :], name]))
        elif name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, [*trail, name])
            done.add(name)

    for name in graph:
        visit(name, [])
    return found


def test_imports_of_every_kind_are_counted():
    source = """
from typing import TYPE_CHECKING
import edgedyn.files
if TYPE_CHECKING:
    from edgedyn.targets import Target
def late():
    from edgedyn.graph import nodes
"""
    assert imports(source) == {"edgedyn.files", "edgedyn.targets", "edgedyn.graph.nodes"}
    assert sum(len(found) for found in GRAPH.values()) > 300


def test_every_room_has_its_floor():
    assert {room(name) for name in FILES if name not in FRONT} == FLOOR.keys()


def test_no_arrow_runs_up():
    assert arrows_up(GRAPH) == []


def test_an_arrow_up_is_noticed():
    graph = {
        "edgedyn.ops.x": {"edgedyn.targets"},
        "edgedyn.files": {"edgedyn"},
        "edgedyn.cli.x": {"edgedyn.ops"},
    }
    assert arrows_up(graph) == ["edgedyn.files imports edgedyn", "edgedyn.ops.x imports edgedyn.targets"]


def test_no_two_files_import_each_other_in_a_circle():
    assert circles(GRAPH) == []


def test_a_circle_is_noticed():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a -> b -> c -> a"]


def run_blocked(code: str) -> subprocess.CompletedProcess[str]:
    """Run code where the host's packages cannot be imported."""
    return subprocess.run(
        [sys.executable, "-c", f"{BLOCK}\n{code}"], capture_output=True, text=True, check=False
    )


# whole folders, and of each target what runs and compiles on a device; a file added there is tested, too
DEVICE_SIDE = [
    *(name for name in FILES if name.startswith(("edgedyn.bundle", "edgedyn.device"))),
    *(name for name in FILES if name.startswith("edgedyn.targets.") and name.endswith(".run")),
    "edgedyn",
    "edgedyn.bench.process",
    "edgedyn.cache",
    "edgedyn.children",
    "edgedyn.errors",
    "edgedyn.extensions",
    "edgedyn.files",
    "edgedyn.images.formats",
    "edgedyn.images.metrics",
    "edgedyn.images.photo",
    "edgedyn.images.png16",
    "edgedyn.images.tiff",
    "edgedyn.reading",
    "edgedyn.report.rows",
    "edgedyn.targets.executorch.kernels",
    "edgedyn.targets.executorch.profile",
    "edgedyn.targets.executorch.runner",
    "edgedyn.targets.native",
    "edgedyn.targets.quiet",
    "edgedyn.targets.tensorrt.compile",
    "edgedyn.targets.tensorrt.cuda_kernels",
    "edgedyn.targets.tensorrt.plugin_library",
    "edgedyn.targets.tensorrt.plugins",
    "edgedyn.targets.tensorrt.signatures",
]


def test_the_device_side_has_a_runtime_of_every_target():
    targets = {path.parent.name for path in (ROOT / "targets").glob("*/__init__.py")}
    assert {f"edgedyn.targets.{name}.run" for name in targets} <= set(DEVICE_SIDE)


@pytest.mark.parametrize("module", DEVICE_SIDE)
def test_device_side_imports_without_the_packages_of_the_host(module):
    result = run_blocked(f"import {module}")
    assert result.returncode == 0, result.stderr


def test_the_block_blocks():
    assert "torch is blocked" in run_blocked("import edgedyn.ops").stderr


def test_every_target_can_be_loaded_and_says_what_is_missing():
    result = run_blocked(
        "from edgedyn import targets\nprint([targets.load(name).name for name in targets.names()])"
    )
    assert result.stdout.strip() == "['executorch', 'onnxruntime', 'tensorrt']", result.stderr


def test_nothing_at_the_top_of_a_target_imports_its_runtime():
    """Only run.py, lower.py and their kind may, and the command line lists targets without any of them."""
    for name in ("executorch", "onnxruntime", "tensorrt"):
        tree = ast.parse((ROOT / "targets" / name / "__init__.py").read_text(encoding="utf-8"))
        top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
        top |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom) and node.module}
        assert not {module.partition(".")[0] for module in top} & set(HOST_PACKAGES)


def functions(tree: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Count the lines of a function without its docstring."""
    whole = (function.end_lineno or 0) - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        whole -= (first.end_lineno or 0) - first.lineno + 1
    return whole


def branches(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    kinds = (ast.If, ast.For, ast.While, ast.Try, ast.With, ast.IfExp, ast.BoolOp, ast.comprehension)
    return sum(isinstance(node, kinds) for node in ast.walk(function))


@pytest.mark.parametrize("name", FILES)
def test_files_and_functions_stay_short(name):
    source = FILES[name].read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 400
    for function in functions(ast.parse(source)):
        arguments = function.args
        count = len(arguments.posonlyargs) + len(arguments.args) + len(arguments.kwonlyargs)
        assert length(function) <= 60, function.name
        assert count <= 12, function.name
        if name.startswith("edgedyn.conversion"):
            assert branches(function) < 15, function.name


def undocumented(source: str, name: str) -> list[str]:
    """Name the public functions, classes and methods of a file without a docstring."""
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) else [name]
    pending: list[tuple[str, ast.AST]] = [(name, node) for node in tree.body]
    while pending:
        owner, node = pending.pop()
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if node.name.startswith("_") or any("overload" in ast.unparse(d) for d in node.decorator_list):
            continue
        if ast.get_docstring(node) is None:
            found.append(f"{owner}.{node.name}")
        if isinstance(node, ast.ClassDef):
            pending += [(f"{owner}.{node.name}", child) for child in node.body]
    return found


def test_every_public_name_has_a_docstring():
    inherited = {"forward", "run_node"}  # torch documents these
    missing = [
        x for name, path in FILES.items() for x in undocumented(path.read_text(encoding="utf-8"), name)
    ]
    assert [x for x in missing if x.rpartition(".")[2] not in inherited] == []


def test_a_missing_docstring_is_noticed():
    assert undocumented('"""A file."""\nclass A:\n    """A."""\n    def f(self): ...\n', "m") == ["m.A.f"]
