"""Our kernels for ExecuTorch, compiled here and run by its runtime, against the oracles."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from kernel_check import int8_bounds, int8_call, rounding, to_double
from lowered_calls import EXAMPLES, OPS, Calls, lower_call, lower_calls
from small_int8 import quantize_program
from small_networks import LAYERS, FilterBetween
from torch import Tensor, nn

from edgedyn import ops, pipeline, targets
from edgedyn.cli import app as cli
from edgedyn.conversion import inspection
from edgedyn.device import session
from edgedyn.errors import ModelError, RecipeError, TargetMissingError
from edgedyn.recipe.keys import QuantizeSection
from edgedyn.recipe.recipe import load_recipe
from edgedyn.targets import native
from edgedyn.targets.executorch import TARGET as EXECUTORCH
from edgedyn.targets.executorch import kernels
from edgedyn.targets.executorch.lower import lower
from edgedyn.targets.executorch.run import load
from edgedyn.targets.fuse import fuse_int8

ROOT = Path(__file__).parents[2]
CASES = [pytest.param(op, args, id=name) for name, (op, args) in EXAMPLES.items()]
every_case = pytest.mark.parametrize(("op", "args"), CASES)
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


pytestmark = pytest.mark.usefixtures("library")


def run_kernel(overload: Any, args: tuple[Any, ...], folder: Any) -> np.ndarray:
    return lower_call(overload, args, folder)(*(a for a in args if isinstance(a, Tensor)))


def assert_within_rounding(y: np.ndarray, op: ops.Op, args: tuple[Any, ...]) -> None:
    exact = op.overload(*to_double(args)).numpy()
    assert y.shape == exact.shape
    assert (np.abs(y - exact) <= rounding(op, args).numpy()).all()


@every_case
def test_kernel_equals_the_oracle_up_to_rounding(op, args, tmp_path):
    assert_within_rounding(run_kernel(op.overload, args, tmp_path), op, args)


@every_case
def test_int8_kernel_rounds_what_the_oracle_rounds(op, args, tmp_path):
    variant, given = int8_call(op, args)
    y = run_kernel(variant, given, tmp_path)
    low, high = int8_bounds(op, given)
    assert y.dtype == variant(*given).numpy().dtype
    assert ((low.numpy() <= y) & (y <= high.numpy())).all()
    assert len(np.unique(y)) > min(10, y.size // 2)


@pytest.mark.parametrize("is_read_twice", [False, True])
def test_op_between_int8_tensors_becomes_its_int8_variant(is_read_twice, tmp_path):
    torch.manual_seed(4)
    network = FilterBetween(is_read_twice=is_read_twice).eval()
    inputs = torch.rand(1, 3, 12, 14), torch.randn(1, 36, 3, 4)
    program = torch.export.export(network, inputs)
    scheme = EXECUTORCH.int8
    done = quantize_program(
        program, inputs, scheme=scheme, section=QuantizeSection(), samples=[inputs]
    ).program
    fused = fuse_int8(done)
    called = [node.target for node in fused.graph.nodes if getattr(node.target, "namespace", "") == "edgedyn"]
    name = "sliced_depthwise2d" if is_read_twice else "sliced_depthwise2d_int8"
    assert [target._schema.name for target in called] == [f"edgedyn::{name}"]
    assert torch.equal(fused.module()(*inputs), done.module()(*inputs))
    artifact = lower({"forward": done}, tmp_path, "int8")
    y = load(tmp_path / artifact.programs["forward"])(*(x.numpy() for x in inputs))[0]
    # one step of the last convolution's output, where a rounding of float32 tips a tie
    step = max(node.args[1] for node in done.graph.nodes if "quantize_per_tensor" in str(node.target))
    assert np.abs(y - done.module()(*inputs).numpy()).max() <= 2 * step


def test_kernels_that_are_built_are_not_built_again(library):
    before = library.stat().st_mtime_ns
    assert kernels.build() == library
    assert library.stat().st_mtime_ns == before


def test_command_says_where_the_library_is(library, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["edgedyn", "ops", "build", "--json"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert json.loads(capsys.readouterr().out) == {"ok": True, "library": str(library)}


def test_without_cmake_the_error_names_it(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("shutil.which", lambda *a, **k: None)
    with pytest.raises(TargetMissingError, match=r"there is no cmake.*libhwy-dev.*kernels: stock needs none"):
        kernels.build()
    assert not list(tmp_path.rglob("*.so"))


def test_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    broken = tmp_path / "sources"
    broken.mkdir()
    (broken / "CMakeLists.txt").write_text('message(FATAL_ERROR "Highway is away")')
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "SOURCES", broken)
    with pytest.raises(TargetMissingError, match=r"cannot be built here: .*Highway is away.*libhwy-dev"):
        kernels.build()
    assert not list(tmp_path.rglob("*.so"))


def test_target_without_kernels_of_ours_refuses_fused():
    with pytest.raises(RecipeError, match="'onnxruntime' has no kernels of ours"):
        targets.load("onnxruntime", "fused")


def test_recipe_with_fused_kernels_builds_runs_and_says_so(tmp_path):
    smaller = ["input.shape=[1, 3, 64, 64]", "tile.overlap=16", "model.arguments={colors: 3, depth: 4}"]
    recipe = load_recipe(ROOT / "recipes/acda-dncnn.phone.int8.yaml", ["kernels=fused", *smaller])
    built = pipeline.build(recipe, tmp_path / "bundle", compare=False)
    assert [row for row in built.to_json()["rows"] if not row["passed"]] == []
    assert built.to_json()["forms"] == {"atom_depthwise2d": "fused"}
    assert built.bundle.manifest["facts"]["portable"] == {"edgedyn.atom_depthwise2d_int8.default": 2}
    assert session.check(session.open_session(tmp_path / "bundle")).ok


def test_inspect_names_the_kernel_of_a_target_that_has_it():
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), LAYERS["kernels"]()).eval()
    equipped = targets.load("executorch", "fused")
    found = inspection.inspect_model(network, (torch.rand(1, 3, 16, 16),), instead=equipped)
    forms = found["layers"][0]["forms"]
    assert {name: form["form"] for name, form in forms.items()} == {
        "executorch": "fused",
        "onnxruntime": "resize_shift_mac",
        "tensorrt": "resize_shift_mac",
    }
    assert found["targets"]["executorch"]["unsupported"] == {}


@pytest.mark.parametrize("form", ["channels_last", "double"])
def test_what_the_kernel_does_not_take_is_refused(form, tmp_path):
    x, grid = torch.rand(1, 4, 6, 8), torch.randn(1, 36, 3, 4)
    x = x.double() if form == "double" else x.to(memory_format=torch.channels_last)
    with pytest.raises(ModelError, match="sliced_depthwise2d: expected x as a contiguous"):
        lower_calls(Calls((torch.ops.edgedyn.sliced_depthwise2d, (x, grid, None, 3))), tmp_path)


@every_op
def test_result_does_not_depend_on_the_number_of_threads(op, tmp_path):
    from executorch.extension.pybindings.portable_lib import (
        _threadpool_get_thread_count,
        _unsafe_reset_threadpool,
    )

    args = max(op.examples(), key=lambda args: args[0].numel())
    run = lower_call(op.overload, args, tmp_path)
    tensors = [a for a in args if isinstance(a, Tensor)]
    before, results = _threadpool_get_thread_count(), []
    for threads in (1, 2, 3):
        _unsafe_reset_threadpool(threads)
        results.append(run(*tensors))
    _unsafe_reset_threadpool(before)
    assert all(np.array_equal(results[0], y) for y in results[1:])


@every_op
def test_special_values_arrive_where_the_oracle_has_them(op, tmp_path):
    """One NaN in x and one infinity in the generated tensors: elsewhere finite, of the same class."""
    args = list(next(iter(op.examples())))
    names = [a.name for a in op.overload._schema.arguments]
    generated = names.index(op.generated[0])
    run = lower_call(op.overload, tuple(args), tmp_path)
    for place, value in itertools.product((0, generated), (np.nan, np.inf)):
        if names[place] == "mask":
            continue  # a mask is 0 or 1
        spoiled = [a.clone() if isinstance(a, Tensor) else a for a in args]
        spoiled[place].flatten()[spoiled[place].numel() // 3] = value
        y = run(*(a for a in spoiled if isinstance(a, Tensor)))
        exact = op.overload(*spoiled).numpy()
        assert np.array_equal(np.isfinite(y), np.isfinite(exact)), (place, value)
        assert np.array_equal(np.isnan(y), np.isnan(exact)), (place, value)


def test_float_op_of_ours_is_counted_with_its_reason():
    network, inputs = (
        FilterBetween(is_read_twice=True).eval(),
        (torch.rand(1, 3, 12, 14), torch.randn(1, 36, 3, 4)),
    )
    program = torch.export.export(network, inputs)
    done = quantize_program(
        program, inputs, scheme=EXECUTORCH.int8, section=QuantizeSection(), samples=[inputs]
    )
    reasons = {row["node"]: row["reason"] for row in done.float_nodes}
    assert reasons["sliced_depthwise2d"] == "filters with generated kernels, which stay float"
