"""Compare the cost of dynamic and static layers: each kernel against its yardstick, side by side in one run.

    python tools/bench_ops.py [--json] [--rounds 5] [--runs 10] [--out FILE.json] [PATTERN ...]

Both run in turn through ExecuTorch with its own pool of two threads, on the same two CPUs, for several
rounds. The ratio is that of the medians over all rounds, its spread the largest minus the smallest ratio of a
round. Tensors are random, for only their shapes cost time; masks are blobs, like masks of photos. The rows
"SQNR" compare the errors of INT8 programs against PyTorch in float32.

Where valgrind is installed, it also counts the millions of instructions of one run on one thread, a figure
that repeats on a busy machine. Valgrind knows no AVX-512: both our kernels and XNNPACK's then use AVX2.
"""

from __future__ import annotations

import fnmatch
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import block_rows
import drivers
import measurement
import numpy as np
import torch
import torch.nn.functional as F
import typer
from bench_rows import Lowered, NetworkAndInputs, Row, SqnrRow, on_runtime
from lowering import load_lowered, lower_recipe
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from edgedyn.images.metrics import sqnr_db
from edgedyn.ops import Form, load_all, sliced_depthwise2d
from edgedyn.recipe.recipe import load_recipe
from edgedyn.targets.quiet import quiet_libraries

ROOT = Path(__file__).parents[1]
THREADS = 2
PAUSE = 0.1  # seconds between programs: the threads of ExecuTorch's pool wait busily after a run
load_all()  # registers the ops


class Call(nn.Module):
    """A network that is one function of its inputs."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.forward = function


def sliced(channels: int = 32, size: int = 512, cells: int = 16) -> NetworkAndInputs:
    inputs = torch.rand(1, channels, size, size), torch.randn(1, 9 * channels, cells, cells)
    return Call(lambda x, grid: torch.ops.edgedyn.sliced_depthwise2d(x, grid, None, 3)), inputs


def sliced_int8(channels: int = 32, size: int = 512, cells: int = 16) -> NetworkAndInputs:
    x = torch.randint(-128, 128, (1, channels, size, size), dtype=torch.int8)
    op = torch.ops.edgedyn.sliced_depthwise2d_int8
    call = Call(lambda x, grid: op(x, 0.01, 3, grid, None, 3, 1, False, 0.02, -5))
    return call, (x, torch.randn(1, 9 * channels, cells, cells))


def static(channels: int = 32, size: int = 512) -> NetworkAndInputs:
    return nn.Conv2d(channels, channels, 3, padding=1, groups=channels), (
        torch.rand(1, channels, size, size),
    )


class StaticInt8(nn.Module):
    """A static depthwise convolution between INT8 tensors, as PT2E expresses it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("weight", torch.randint(-127, 128, (channels, 1, 3, 3), dtype=torch.int8))
        self.register_buffer("scales", torch.rand(channels) / 100 + 0.01)
        self.register_buffer("zeros", torch.zeros(channels, dtype=torch.int64))
        self.bias = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve x (B, C, H, W)."""
        pair = torch.ops.quantized_decomposed
        real = pair.dequantize_per_tensor(x, 0.01, 3, -128, 127, torch.int8)
        weight = pair.dequantize_per_channel(self.weight, self.scales, self.zeros, 0, -127, 127, torch.int8)
        y = F.conv2d(real, weight, self.bias, padding=1, groups=self.channels)
        return pair.quantize_per_tensor(y, 0.02, -5, -128, 127, torch.int8)


def static_int8(channels: int = 32, size: int = 512) -> NetworkAndInputs:
    x = torch.randint(-128, 128, (1, channels, size, size), dtype=torch.int8)
    return StaticInt8(channels), (x,)


def decoupled(channels: int = 64, size: int = 256) -> NetworkAndInputs:
    inputs = (
        torch.rand(1, channels, size, size),
        torch.randn(1, 9 * channels, 1, 1),
        torch.randn(1, 9, size, size),
    )
    return Call(lambda *tensors: torch.ops.edgedyn.decoupled_depthwise2d(*tensors, 3)), inputs


def atoms(channels: int = 32, size: int = 256) -> NetworkAndInputs:
    bases = torch.randn(6, 9)
    op = torch.ops.edgedyn.atom_depthwise2d
    inputs = torch.rand(1, channels, size, size), torch.randn(1, 36, size, size)
    return Call(lambda x, alpha: op(x, alpha, bases, 3)), inputs


class Residual(nn.Module):
    """An InvertedResidual block, evaluated where a mask is set, or everywhere."""

    def __init__(self, *, is_sparse: bool, channels: int = 96, expansion: int = 6) -> None:
        super().__init__()
        inner = channels * expansion
        self.is_sparse = is_sparse
        self.convs = nn.ModuleList(
            [
                nn.Conv2d(channels, inner, 1),
                nn.Conv2d(inner, inner, 3, padding=1, groups=inner),
                nn.Conv2d(inner, channels, 1),
            ]
        )

    def forward(self, x: Tensor, mask: Tensor, dilated: Tensor) -> Tensor:
        """Return x + mask * F(x)."""
        y = x
        for conv, where, activation in zip(
            self.convs, (dilated, mask, mask), ("relu6", "relu6", "none"), strict=True
        ):
            if self.is_sparse:
                y = torch.ops.edgedyn.masked_conv2d(
                    y, conv.weight, conv.bias, where, 1, conv.padding[0], 1, conv.groups, activation
                )
            else:
                y = F.relu6(conv(y)) if activation == "relu6" else conv(y)
        return x + y if self.is_sparse else x + y * mask


def residual(*, is_sparse: bool, active: float, size: int = 64) -> NetworkAndInputs:
    coarse = torch.randn(1, 1, size // 8, size // 8, generator=torch.Generator().manual_seed(5))
    field = F.interpolate(coarse, size=(size, size), mode="bicubic")
    mask = (field >= field.quantile(1 - active)).float()
    dilated = F.max_pool2d(mask, 3, 1, 1)
    return Residual(is_sparse=is_sparse), (torch.rand(1, 96, size, size), mask, dilated)


def mallenet(kernels: str, *forms: Form) -> Callable[[Path], Lowered]:
    """Return a function that lowers mallenet-s for 1024 x 1024 pixels, with these forms of its op if any."""

    def make(folder: Path) -> Lowered:
        overrides = [f"kernels={kernels}", "input.shape=[1, 3, 1024, 1024]"]
        op = sliced_depthwise2d.OP
        with patch.object(sliced_depthwise2d, "OP", replace(op, forms=forms or op.forms)):
            lower_recipe(load_recipe(ROOT / "recipes/mallenet-s.phone.fp32.yaml", overrides), folder)
        run, x = load_lowered(folder), np.random.default_rng(0).random((1, 3, 1024, 1024), dtype=np.float32)
        return Lowered(next(folder.glob("*.pte")), (torch.from_numpy(x),), lambda: run(x))

    return make


MALLENET = "mallenet-s at 1024 x 1024"
# the rest of the network, as with a kernel that costs nothing
NO_OP = Form("no_op", lambda x, grid, offset, *options: x + 0 * offset.mean())
ROWS = (
    Row("sliced_depthwise2d f32 : static", 0.7, on_runtime(sliced()), on_runtime(static())),
    Row("sliced_depthwise2d int8 : static int8", 1.0, on_runtime(sliced_int8()), on_runtime(static_int8())),
    Row("sliced_depthwise2d stock form : static", 3.0, on_runtime(sliced(), "stock"), on_runtime(static())),
    Row("decoupled_depthwise2d f32 : static", 1.0, on_runtime(decoupled()), on_runtime(static(64, 256))),
    Row(
        "decoupled_depthwise2d stock form : shift_mac",
        None,
        on_runtime(decoupled(), "stock"),
        on_runtime(decoupled(), "stock", decoupled_depthwise2d="shift_mac"),
    ),
    Row("atom_depthwise2d f32 : bases_first", 0.4, on_runtime(atoms()), on_runtime(atoms(), "stock")),
    *(
        Row(
            f"masked_conv2d block, {active:.0%} active : dense",
            limit,
            on_runtime(residual(is_sparse=True, active=active)),
            on_runtime(residual(is_sparse=False, active=active), "stock"),
        )
        for active, limit in ((0.15, 0.4), (0.5, 1.0))
    ),
    # counting would take valgrind ten minutes each
    Row(f"{MALLENET}, fused : stock", 0.6, mallenet("fused"), mallenet("stock"), is_counted=False),
    Row(
        f"{MALLENET}, no op at all : stock",
        None,
        mallenet("stock", NO_OP),
        mallenet("stock"),
        is_counted=False,
    ),
    *block_rows.ROWS,
)


def main(
    patterns: Annotated[list[str] | None, typer.Argument(help="rows, * matches any part")] = None,
    rounds: int = 5,
    runs: int = 10,
    out: Annotated[Path | None, typer.Option(help="JSON file, for docs/measurements/")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON on stdout")] = False,
) -> None:
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool

    cpus = measurement.pin(THREADS)
    _unsafe_reset_threadpool(THREADS)
    torch.set_num_threads(THREADS)

    def select(rows: tuple[Any, ...]) -> list[Any]:
        return [row for row in rows if any(fnmatch.fnmatch(row.name, f"*{p}*") for p in patterns or ["*"])]

    rows: list[dict[str, Any]] = []
    sqnr: list[dict[str, Any]] = []
    steps = [(rows, partial(measure, row, rounds, runs)) for row in select(ROWS)]
    steps += [(sqnr, partial(compare_sqnr, row)) for row in select(block_rows.SQNR_ROWS)]
    with quiet_libraries():
        for results, step in track(steps, "measure", disable=not sys.stderr.isatty()):
            results.append(step())
    samples = f"{rounds} rounds of {runs} runs after 2 warm-ups, in turn; {THREADS} threads, {cpus}"
    record = {"rows": rows, "sqnr": sqnr, "samples": samples}
    measurement.write(out, record)
    if as_json:
        sys.stdout.write(json.dumps({**record, **measurement.provenance()}, indent=1) + "\n")
    else:
        show(rows)
        show_sqnr(sqnr)


def measure(row: Row, rounds: int, runs: int) -> dict[str, Any]:
    """Run both programs in turn and return their times and ratio."""
    with tempfile.TemporaryDirectory() as folder:
        programs = []
        for name, make in (("ours", row.network), ("yardstick", row.yardstick)):
            (Path(folder) / name).mkdir()
            programs.append(make(Path(folder) / name))
        times: list[list[list[float]]] = [[], []]
        for _ in range(rounds):
            for program, results in zip(programs, times, strict=True):
                time.sleep(PAUSE)
                results.append(time_runs(program.run, runs))
        counts = [count_millions(program) if row.is_counted else None for program in programs]
    ours, yardstick = (float(np.median(results)) for results in times)
    ratios = [np.median(a) / np.median(b) for a, b in zip(*times, strict=True)]
    return {
        "what": row.name,
        "ms": round(ours, 2),
        "yardstick_ms": round(yardstick, 2),
        "ratio": round(ours / yardstick, 3),
        "limit": row.limit,
        "spread": round(float(max(ratios) - min(ratios)), 3),
        "instructions": counts[0],
        "yardstick_instructions": counts[1],
    }


def compare_sqnr(row: SqnrRow) -> dict[str, Any]:
    """Run both programs once and return their SQNR against the float network in PyTorch."""
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        found = []
        for name, make in (("ours", row.ours), ("yardstick", row.yardstick)):
            (Path(folder) / name).mkdir()
            program = make(Path(folder) / name)
            (y,) = program.run()
            found.append(sqnr_db(y.numpy(), row.network(*program.inputs).numpy()))
    ours, yardstick = found
    return {
        "what": row.name,
        "db": round(ours, 2),
        "yardstick_db": round(yardstick, 2),
        "difference": round(ours - yardstick, 2),
        "limit": row.limit,
    }


def count_millions(program: Lowered) -> float | None:
    count = drivers.count_instructions(program.path, program.inputs)
    return None if count is None else round(count / 1e6, 3)


def time_runs(run: Callable[[], object], runs: int) -> list[float]:
    times = []
    for index in range(2 + runs):
        start = time.perf_counter()
        run()
        if index >= 2:
            times.append((time.perf_counter() - start) * 1e3)
    return times


def show(rows: list[dict[str, Any]]) -> None:
    """Print the table of ratios; bold above their limits."""
    columns = (
        "what",
        "ms",
        "yardstick\nms",
        "ratio",
        "limit",
        "spread",
        "million\ninstructions",
        "yardstick's",
    )
    print_table(columns, rows, [row["ratio"] > (row["limit"] or np.inf) for row in rows])


def show_sqnr(rows: list[dict[str, Any]]) -> None:
    """Print the table of SQNR; bold below their limits."""
    columns = "what", "dB", "yardstick\ndB", "difference", "at least"
    print_table(columns, rows, [row["difference"] < row["limit"] for row in rows])


def print_table(columns: tuple[str, ...], rows: list[dict[str, Any]], missed: list[bool]) -> None:
    """Print rows that are not empty, bold where they miss a limit."""
    table = Table(box=None)
    for column in columns:
        table.add_column(column, justify="left" if column == "what" else "right", no_wrap=True)
    for row, is_missed in zip(rows, missed, strict=True):
        shown = ("" if value is None else str(value) for value in row.values())
        table.add_row(*shown, style="bold" if is_missed else None)
    if rows:
        Console(width=130).print(table)


if __name__ == "__main__":
    typer.run(main)
