"""Latency and memory side by side in one run, for all five systems: eager, naive export, our forms, INT8.

    python tools/bench.py [--sizes 320x480] [--networks mallenet-s,acda-dncnn] [--ffdnet ffdnet_color.pth]
                          [--out FILE.json] [PATTERN ...]
    python tools/bench.py --networks mallenet-s "*INT8*"

A network that cannot be exported unchanged has no naive row; the record gives the reason. Networks with a
recipe ``*.phone.int8.fused`` also run with fused kernels, in float32 and INT8. Every variant runs in a
process of its own, in turn, on the same two CPUs, for several rounds; the figures are medians over all runs
of all rounds, with the spread of the rounds' medians. Ratios are against PyTorch eager of the same network
and size; FFDNet is the peer. ``ratios`` are those of two variants that have a limit. Memory is the growth of
the peak resident set from before loading to after running. The input is a noisy photo, for masks and routes
depend on it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import measurement
import numpy as np
import typer
import yaml
from rich.console import Console
from rich.progress import track
from rich.table import Table

from edgedyn.bench.process import status_bytes
from edgedyn.targets.quiet import quiet_libraries

ROOT = Path(__file__).parents[1]
THREADS = 2
app = typer.Typer(add_completion=False)


_MALLENET, _DYNCONV = "mallenet-s, ExecuTorch", "dynconv-denoiser, ExecuTorch"
# size, variant, yardstick, limit
RATIOS = (
    ("320x480", f"{_MALLENET} INT8 fused", f"{_MALLENET} INT8", 0.35),
    ("320x480", f"{_MALLENET} INT8 fused", f"{_MALLENET} float32 fused", 0.6),
    ("320x480", f"{_MALLENET} INT8 fused", "ffdnet, ExecuTorch INT8", 0.75),
    ("1024x1024", f"{_MALLENET} INT8 fused", f"{_MALLENET} float32", 0.32),
    ("320x480", f"{_DYNCONV} INT8 fused", f"{_DYNCONV} float32", 0.3),
)
NETWORKS = ("mallenet-s", "slimmable-dncnn", "acda-dncnn", "ddf-denoiser", "dynconv-denoiser")


@app.command()
def bench(
    patterns: Annotated[list[str] | None, typer.Argument(help="variants, * matches any part")] = None,
    sizes: Annotated[str, typer.Option(help="comma-separated HxW")] = "320x480",
    networks: Annotated[str, typer.Option(help="comma-separated, of denoising recipes")] = ",".join(NETWORKS),
    ffdnet: Annotated[
        Path | None, typer.Option(help="published ffdnet_color.pth; without it FFDNet is left out")
    ] = None,
    folder: Annotated[
        Path | None, typer.Option(help="keep the lowered programs here, and reuse them")
    ] = None,
    rounds: int = 3,
    runs: int = 10,
    out: Annotated[Path | None, typer.Option(help="JSON file, for docs/measurements/")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON on stdout")] = False,
) -> None:
    """Build every variant, run them in turn, print the table."""
    rows, ratios, refused = [], [], {}
    cpus = measurement.pin(THREADS)

    def is_selected(variant: str) -> bool:
        return any(fnmatch.fnmatch(variant, pattern) for pattern in patterns or ["*"])

    with tempfile.TemporaryDirectory(prefix="edgedyn-bench-") as temporary:
        kept = folder or Path(temporary)
        for size in sizes.split(","):
            height, width = map(int, size.split("x"))
            with quiet_libraries():
                jobs = {}
                for name in networks.split(","):
                    made, reason = prepare(kept / size / name, name, [1, 3, height, width], is_selected)
                    jobs |= made
                    refused |= {name: reason} if reason else {}
                if ffdnet is not None:
                    shape = [1, 3, height, width]
                    jobs |= prepare_ffdnet(kept / size / "ffdnet", ffdnet, shape, is_selected)
            measured: dict[str, list[dict[str, Any]]] = {name: [] for name in jobs}
            order = [name for _ in range(rounds) for name in jobs]
            for name in track(order, f"run {size}", disable=not sys.stderr.isatty()):
                measured[name].append(spawn(jobs[name], runs))
            rows += summarize(size, measured)
            ratios += compare(size, measured)
    record = {
        "rows": rows,
        "ratios": ratios,
        "no_naive_export": refused,
        "samples": f"{rounds} rounds of {runs} runs after 2 warm-ups, a process each; "
        f"{THREADS} threads, {cpus}",
    }
    measurement.write(out, record)
    if as_json:
        sys.stdout.write(json.dumps({**record, **measurement.provenance()}, indent=1) + "\n")
        return
    for table in filter(None, (rows, ratios)):
        show(table)
    for name, reason in refused.items():
        print(f"{name} has no naive export: {reason}")


def prepare(
    folder: Path, name: str, shape: list[int], is_selected: Callable[[str], bool]
) -> tuple[dict[str, list[str]], str]:
    """Lower the selected variants of a network; return the workers' arguments, and why none is naive."""
    folder.mkdir(parents=True, exist_ok=True)
    size = f"input.shape={shape}"
    jobs, reason = {}, ""
    if is_selected(f"{name}, PyTorch eager"):
        jobs[f"{name}, PyTorch eager"] = ["eager", name]
    if is_selected(f"{name}, naive export"):
        try:
            jobs[f"{name}, naive export"] = ["naive", str(lower_naive(folder, name, shape))]
        except Exception as error:  # any error that a user without edgedyn would get
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    variants = {"float32": "phone.fp32", "INT8": "phone.int8"}
    if (ROOT / f"recipes/{name}.phone.int8.fused.yaml").is_file():
        variants |= {"float32 fused": "phone.fp32", "INT8 fused": "phone.int8.fused"}
    for label, kind in variants.items():
        variant, made = f"{name}, ExecuTorch {label}", folder / label.replace(" ", "-")
        if is_selected(variant):
            kernels = "fused" if "fused" in label else "stock"
            overrides = [size, f"kernels={kernels}", *(quick(folder) if "INT8" in label else [])]
            lower_ours(made, f"{name}.{kind}", overrides)
            jobs[variant] = ["lowered", str(made)]
    return with_photo(jobs, folder, f"{name}.phone.fp32", [size]), reason


def prepare_ffdnet(
    folder: Path, weights: Path, shape: list[int], is_selected: Callable[[str], bool]
) -> dict[str, list[str]]:
    """Lower the selected variants of FFDNet, the static peer; return the workers' arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    overrides = [f"model.weights={weights}", f"input.shape={shape}"]
    jobs = {}
    if is_selected("ffdnet, PyTorch eager"):
        jobs["ffdnet, PyTorch eager"] = ["eager", str(weights)]
    for precision, label, more in (("fp32", "float32", []), ("int8", "INT8", quick(folder))):
        if is_selected(f"ffdnet, ExecuTorch {label}"):
            recipe = "ffdnet-color.phone.fp32"
            lower_ours(folder / precision, recipe, [*overrides, f"precision={precision}", *more])
            jobs[f"ffdnet, ExecuTorch {label}"] = ["lowered", str(folder / precision)]
    return with_photo(jobs, folder, "ffdnet-color.phone.fp32", overrides)


def with_photo(
    jobs: dict[str, list[str]], folder: Path, name: str, overrides: list[str]
) -> dict[str, list[str]]:
    """Return the arguments with a file that holds the first validation sample of a recipe."""
    from edgedyn import pipeline
    from edgedyn.recipe.recipe import load_recipe

    path = folder / "photo.npy"
    if jobs and not path.is_file():
        _, samples = pipeline.load_sets(load_recipe(ROOT / f"recipes/{name}.yaml", overrides))
        np.save(path, samples[0].inputs[0])
    return {variant: [*job, str(path)] for variant, job in jobs.items()}


def quick(folder: Path) -> list[str]:
    """Return overrides for a quick calibration: neither ranges nor rounding change the time of a run."""
    manifest = yaml.safe_load((ROOT / "calib/skimage.yaml").read_text())
    path = folder / "calibration.yaml"
    path.write_text(yaml.safe_dump({**manifest, "samples": 1}))
    values = ("rounding=nearest", "color_augmented=0", "coverage.samples=0")
    return [f"calibration={path}", *(f"quantize.{value}" for value in values)]


def lower_ours(folder: Path, name: str, overrides: list[str]) -> None:
    """Lower a recipe into a folder, unless it is there already."""
    from lowering import INDEX, lower_recipe

    from edgedyn.recipe.recipe import load_recipe

    if not (folder / INDEX).is_file():
        lower_recipe(load_recipe(ROOT / f"recipes/{name}.yaml", overrides), folder, trust=True)


def lower_naive(folder: Path, name: str, shape: list[int]) -> Path:
    """Export the reference network as it is, as a user without edgedyn would."""
    import torch
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    path = folder / "naive.pte"
    if path.is_file():
        return path
    with contextlib.redirect_stderr(io.StringIO()):  # torch prints the graph that it cannot follow
        program = torch.export.export(reference(name), (torch.rand(shape),))
    edge = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    path.write_bytes(edge.to_executorch().buffer)
    load("naive", str(path))(np.zeros(shape, np.float32))  # lowering that succeeds proves nothing
    return path


def reference(name: str):
    """Return a network in PyTorch: a recipe's, or FFDNet from a file."""
    from edgedyn import pipeline
    from edgedyn.conversion.image_sets import draw, to_tensors
    from edgedyn.conversion.reference import load_reference
    from edgedyn.recipe.recipe import load_recipe

    if Path(name).suffix:
        recipe = load_recipe(ROOT / "recipes/ffdnet-color.phone.fp32.yaml", [f"model.weights={name}"])
        return recipe.load_model(trust=True)
    recipe = load_recipe(ROOT / f"recipes/{name}.phone.fp32.yaml", ["input.shape=[1, 3, 128, 128]"])
    calibration, _ = pipeline.load_sets(recipe)
    return load_reference(recipe, [to_tensors(sample) for sample in draw(recipe, calibration)])


def spawn(job: list[str], runs: int) -> dict[str, Any]:
    """Run one variant in a new process."""
    command = [sys.executable, __file__, "worker", *job, str(runs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(job)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@app.command(hidden=True)
def worker(kind: str, source: str, photo: Path, runs: int) -> None:
    """Load one variant, run it, print times and memory."""
    import torch

    torch.set_num_threads(THREADS)
    if kind != "eager":  # its own pool, as large as the machine
        from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

        _unsafe_reset_threadpool(THREADS)
    x = np.load(photo)
    before = status_bytes("VmRSS")
    run = load(kind, source)
    times = []
    for index in range(2 + runs):
        start = time.perf_counter()
        run(x)
        if index >= 2:
            times.append((time.perf_counter() - start) * 1e3)
    print(json.dumps({"times_ms": times, "memory_mb": (status_bytes("VmHWM") - before) / 2**20}))


def load(kind: str, source: str) -> Callable[[np.ndarray], object]:
    """Return a function that runs one variant; ``source`` is a recipe, weights, a program or a folder."""
    import torch

    if kind == "eager":
        model = reference(source)

        def eager(x: np.ndarray) -> object:
            with torch.no_grad():
                return model(torch.from_numpy(x))

        return eager
    if kind == "naive":
        from edgedyn import targets

        return targets.load("executorch").load(Path(source))
    from lowering import load_lowered

    return load_lowered(Path(source))


def summarize(size: str, measured: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return one row per variant."""
    rows: list[dict[str, Any]] = []
    for name, results in measured.items():
        times = [t for result in results for t in result["times_ms"]]
        medians = [float(np.median(result["times_ms"])) for result in results]
        rows.append(
            {
                "size": size,
                "what": name,
                "median_ms": round(float(np.median(times)), 1),
                "p95_ms": round(float(np.percentile(times, 95)), 1),
                "spread": round((max(medians) - min(medians)) / min(medians), 3),
                "memory_mb": round(float(np.median([r["memory_mb"] for r in results])), 1),
            }
        )
    for row in rows:
        network = row["what"].split(",")[0]
        eager = [r["median_ms"] for r in rows if r["what"] == f"{network}, PyTorch eager"]
        row["ratio_to_eager"] = round(row["median_ms"] / eager[0], 3) if eager else None
    return rows


def compare(size: str, measured: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return the ratios of variants that have a limit, as far as both were measured."""
    rows = []
    for limited, ours, yardstick, limit in RATIOS:
        if limited != size or not {ours, yardstick} <= set(measured):
            continue
        a, b = ([r["times_ms"] for r in measured[name]] for name in (ours, yardstick))
        rounds = [float(np.median(x) / np.median(y)) for x, y in zip(a, b, strict=True)]
        rows.append(
            {
                "size": size,
                "what": f"{ours} : {yardstick}",
                "ratio": round(float(np.median(a) / np.median(b)), 3),
                "limit": limit,
                "spread": round(max(rounds) - min(rounds), 3),
            }
        )
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table(box=None)
    for column in rows[0]:
        table.add_column(
            column.replace("_", "\n"), justify="left" if column == "what" else "right", no_wrap=True
        )
    for row in rows:
        table.add_row(*("" if value is None else str(value) for value in row.values()))
    Console(width=130).print(table)


if __name__ == "__main__":
    if len(sys.argv) > 1 and sys.argv[1] in ("worker", "bench"):
        app()
    else:
        sys.argv.insert(1, "bench")
        app()
