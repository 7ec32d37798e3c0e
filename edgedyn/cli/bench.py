"""``edgedyn bench``: how fast a bundle is on this machine, whole and by layer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from edgedyn.cli.terminal import OUT, AsJson, print_json, progress_bars
from edgedyn.report.text import megabytes
from edgedyn.targets.quiet import quiet_libraries

if TYPE_CHECKING:
    from edgedyn.bench.speed import Comparison


def bench(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="directory made by edgedyn build")],
    per_layer: Annotated[
        bool,
        typer.Option("--per-layer", help="each INT8 layer against float32; goes into the bundle's report"),
    ] = False,
    runs: Annotated[int, typer.Option(min=1, help="that count, after two that do not")] = 20,
    as_json: AsJson = False,
) -> None:
    """Measure latency and memory on this machine."""
    from edgedyn.bench.benchmark import compare_with_float, measure, write_comparison

    with quiet_libraries(), progress_bars() as advance:
        advance("run whole", 0, 1)
        found = {"bundle": str(bundle), **measure(bundle, runs=runs)}
        advance("run whole", 1, 1)
        comparison = None
        if per_layer:
            comparison = compare_with_float(bundle, runs=runs, progress=advance)
            write_comparison(bundle, comparison)
    if as_json:
        print_json({**found, **({"per_layer": comparison.to_json()} if comparison else {})})
        return
    print_whole(found)
    if comparison:
        print_layers(comparison)
        OUT.print(f"report: {bundle / 'report.html'}", soft_wrap=True)


def print_whole(found: dict[str, Any]) -> None:
    """Print what ``benchmark.measure`` found."""
    for name, program in found["programs"].items():
        latency = program["latency_ms"]
        OUT.print(
            f"{name}: {latency['median']:.2f} ms median, {latency['p95']:.2f} ms p95 of {latency['runs']} "
            f"runs of one tile, {program['megapixels_per_second']:.2f} megapixels/s"
        )
    if memory := found["memory_bytes"]:
        OUT.print(
            f"memory: {megabytes(memory['peak'])} at the peak, Python and the runtime's libraries included; "
            f"{megabytes(memory['running'])} of it while running",
            soft_wrap=True,
        )
    OUT.print(f"ran with {found['runtime']}", soft_wrap=True)


def print_layers(comparison: Comparison) -> None:
    """Print the layers that INT8 is a choice of, in the order in which they run."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("INT8 layer", overflow="fold")
    for column in ("output", "MMAC", "float ms", "INT8 ms", "ratio", ""):
        table.add_column(column, justify="right", no_wrap=True)
    several = len(comparison.int8_ms) > 1
    for row in comparison.int8_layers:
        table.add_row(
            f"{row.program}: {row.layer}" if several else row.layer,
            "x".join(map(str, row.shape[1:])),
            f"{row.multiply_adds / 1e6:.2f}",
            f"{row.float_ms:.3f}",
            f"{row.int8_ms:.3f}",
            f"{row.int8_ms / row.float_ms:.2f}" if row.float_ms else "",
            "slower" if row.is_slower else "",
        )
    OUT.print(table)
    layers = comparison.int8_layers
    together, converting = sum(row.int8_ms for row in layers), sum(row.conversion_ms for row in layers)
    OUT.print(
        f"together {sum(row.float_ms for row in layers):.2f} ms in float32, {together:.2f} ms in INT8, "
        f"{converting:.2f} ms of it conversions"
    )
    for name, int8 in comparison.int8_ms.items():
        OUT.print(
            f"{name}: {comparison.float_ms[name]:.2f} ms in float32, {int8:.2f} ms in INT8, in turns, "
            f"median of {comparison.runs}"
        )
    OUT.print(f"{len(comparison.slower)} of {len(layers)} layers are slower in INT8 than in float32")
    if comparison.keep_float:
        OUT.print(f"quantize.keep_float, to add: [{', '.join(comparison.keep_float)}]", soft_wrap=True)
