"""The measuring tools measure what they say."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys

import bench
import build_all
import evaluate
import measure_ablation
import measurement
import numpy as np
import pytest
import torch
import typer
from lowering import load_lowered, lower_recipe
from PIL import Image
from safetensors.torch import save_file

from edgedyn.models.acda_dncnn import ACDADnCNN
from edgedyn.recipe.recipe import load_recipe


def test_measurement_carries_machine_versions_and_command_but_no_folders_of_this_machine(
    tmp_path, monkeypatch
):
    words = [
        "recipes/a.yaml",
        "/mine/set",
        "../weights",
        "--set",
        "model.weights=/mine/w.pth",
        "--limit",
        "2",
    ]
    monkeypatch.setattr(sys, "argv", ["/somewhere/tools/evaluate.py", *words])
    measurement.write(tmp_path / "m.json", {"rows": [1]})
    written = json.loads((tmp_path / "m.json").read_text())
    assert written["rows"] == [1]
    assert written["command"] == (
        "python tools/evaluate.py recipes/a.yaml set weights --set model.weights=w.pth --limit 2"
    )
    assert written["versions"]["torch"] == torch.__version__
    assert "CPUs" in written["machine"]
    measurement.write(None, {"rows": [1]})
    assert len(list(tmp_path.iterdir())) == 1


def test_photos_are_evaluated_landscape_in_multiples_of_32(tmp_path):
    pixels = np.zeros((130, 97, 3), np.uint8)
    pixels[:, -1] = 255  # the right edge comes to lie on top
    Image.fromarray(pixels).save(tmp_path / "portrait.png")
    image = evaluate.load(tmp_path / "portrait.png")
    assert image.shape == (1, 3, 96, 128)
    assert (image[:, :, 0] == 1).all()
    assert (image[:, :, 1:] == 0).all()
    with pytest.raises(typer.BadParameter, match="has 3 channels; the recipe's input has 1"):
        evaluate.load(tmp_path / "portrait.png", colors=1)


def test_programs_are_compared_under_unclipped_noise_of_the_level():
    truths = [np.full((1, 3, 64, 64), 0.99, np.float32)] * 2
    seen = []

    def keep(x: np.ndarray) -> list[np.ndarray]:
        seen.append(x)
        return [x]

    found = evaluate.compare({"float32": keep, "zeros": lambda x: [np.zeros_like(x)]}, truths, sigma=25)
    assert found["float32"]["psnr_db"] == pytest.approx(-20 * np.log10(25 / 255), abs=0.2)
    assert found["float32"]["drop_db"] == found["float32"]["worst_drop_db"] == 0
    zeros = -20 * np.log10(0.99)
    assert found["zeros"]["psnr_db"] == pytest.approx(zeros, abs=1e-3)
    assert found["zeros"]["drop_db"] == pytest.approx(found["float32"]["psnr_db"] - zeros, abs=2e-3)
    assert seen[0].max() > 1
    assert (seen[0] != seen[1]).any()  # each image has noise of its own


def test_recipe_is_lowered_and_loaded_without_a_bundle(tmp_path):
    torch.manual_seed(2)
    network = ACDADnCNN(width=4, depth=3).eval()
    save_file(network.state_dict(), tmp_path / "small.safetensors")
    overrides = [f"model.weights={tmp_path / 'small.safetensors'}", "input.shape=[1, 3, 24, 32]"]
    overrides += ["model.arguments={width: 4, depth: 3}", "tile.overlap=0"]
    recipe = load_recipe(bench.ROOT / "recipes/acda-dncnn.phone.fp32.yaml", overrides)
    assert lower_recipe(recipe, tmp_path) == 0
    x = np.random.default_rng(3).random((1, 3, 24, 32), dtype=np.float32)
    (y,) = load_lowered(tmp_path)(x)
    with torch.no_grad():
        expected = network(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5)


def test_bench_ratios_are_against_eager_of_the_same_network():
    def results(*medians: float) -> list[dict]:
        return [{"times_ms": [m, m, 2 * m], "memory_mb": 7.0} for m in medians]

    measured = {
        "a, PyTorch eager": results(100, 110),
        "a, INT8": results(25, 25),
        "b, PyTorch eager": results(10, 10),
        "b, INT8": results(5, 5),
    }
    rows = {row["what"]: row for row in bench.summarize("8x8", measured)}
    assert rows["a, PyTorch eager"]["spread"] == pytest.approx(0.1)
    assert rows["a, INT8"]["ratio_to_eager"] == pytest.approx(25 / 110, abs=1e-3)
    assert rows["b, INT8"]["ratio_to_eager"] == 0.5
    assert bench.summarize("8x8", {"c, INT8": results(5)})[0]["ratio_to_eager"] is None
    assert (rows["b, INT8"]["p95_ms"], rows["b, INT8"]["median_ms"]) == (10.0, 5.0)


def test_bench_ratios_with_limits_are_of_one_size_and_of_measured_variants():
    size, ours, yardstick, limit = bench.RATIOS[-1]
    measured = {
        name: [{"times_ms": [t, t]} for t in times] for name, times in ((ours, (1, 3)), (yardstick, (4, 4)))
    }
    (row,) = bench.compare(size, measured)
    assert row["what"] == f"{ours} : {yardstick}"
    assert (row["ratio"], row["limit"], row["spread"]) == (0.5, limit, 0.5)
    assert bench.compare("8x8", measured) == bench.compare(size, {ours: measured[ours]}) == []


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not pin")
def test_pinned_process_runs_on_the_first_cpus_it_may_use():
    code = "import os, measurement; print(measurement.pin(1), os.sched_getaffinity(0))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=bench.ROOT / "tools", capture_output=True, text=True, check=True
    )
    first = min(os.sched_getaffinity(0))
    assert done.stdout.strip() == f"pinned to CPUs {first} {{{first}}}"


TOOLS = [path for path in sorted((bench.ROOT / "tools").glob("*.py")) if "__main__" in path.read_text()]


@pytest.mark.parametrize("path", TOOLS, ids=lambda path: path.stem)
def test_tool_starts_and_says_what_it_does(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    monkeypatch.setattr(sys, "path", list(sys.path))  # a tool may add to it
    with pytest.raises(SystemExit) as leaving:
        runpy.run_path(str(path), run_name="__main__")
    assert not leaving.value.code
    assert "usage: " in capsys.readouterr().out.lower()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_the_process_s_own():
    ballast = bytearray(300 * 2**20)  # a child must not inherit it
    code = (
        "from edgedyn.bench.process import status_bytes;"
        "before = status_bytes('VmRSS'); x = bytearray(50 * 2**20); del x;"
        "print((status_bytes('VmHWM') - before) / 2**20)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=bench.ROOT / "tools", capture_output=True, text=True, check=True
    )
    assert 45 < float(done.stdout) < 100
    assert len(ballast) > 0


def test_a_build_is_due_again_when_an_image_of_a_set_changes(tmp_path, monkeypatch):
    for name in ("recipes/weights/a.safetensors", "recipes/a.yaml", "edgedyn/a.py", "calib/photos/a.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    monkeypatch.setattr(build_all, "ROOT", tmp_path)
    before = build_all.digest("a")
    assert build_all.digest("a") == before
    (tmp_path / "calib/photos/a.png").write_bytes(b"2")
    assert build_all.digest("a") != before


def test_switches_of_several_programs_are_named_by_program():
    found = {"quick": {"equalize: false": 0.12345}, "dense": {"equalize: false": 0.5}}
    named = measure_ablation.name_drops(found)
    assert named == {"quick: equalize: false": 0.1235, "dense: equalize: false": 0.5}
    assert measure_ablation.name_drops({"forward": found["dense"]}) == {"equalize: false": 0.5}


def test_ablation_of_a_recipe_takes_the_place_of_its_own_and_of_no_other(tmp_path):
    path = tmp_path / "ablation.json"
    for name, drop in (("a", 1), ("b", 2), ("a", 3)):
        measure_ablation.add_row(path, name, {"drop_db": drop})
    assert json.loads(path.read_text()) == {"a": {"drop_db": 3}, "b": {"drop_db": 2}}
    measure_ablation.add_row(None, "c", {})
    assert len(list(tmp_path.iterdir())) == 1
