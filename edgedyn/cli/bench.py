"""``edgedyn bench``: how fast a bundle is on this machine, whole and by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from edgedyn.cli.options import AsJson, BundlePath, Trust, Verbosity
from edgedyn.cli.tables import Column, print_details
from edgedyn.cli.terminal import detail, fold, library_output, print_json, progress_bars, result
from edgedyn.report.text import megabytes

if TYPE_CHECKING:
    from edgedyn.bench.speed import Comparison


def bench(
    bundle: BundlePath,
    per_layer: Annotated[
        bool,
        typer.Option(
            "--per-layer", help="Compare each INT8 layer with float32; the report shows the comparison, too."
        ),
    ] = False,
    trust: Trust = False,
    runs: Annotated[int, typer.Option(min=1, help="Timed runs, after two warm-up runs.")] = 20,
    as_json: AsJson = False,
    verbose: Verbosity = None,
) -> None:
    """Measure latency and memory on this machine."""
    from edgedyn.bench.benchmark import compare_with_float, measure, write_comparison

    with library_output(), progress_bars() as advance:
        advance("run whole", 0, 1)
        found = {"bundle": str(bundle), **measure(bundle, runs=runs)}
        advance("run whole", 1, 1)
        comparison = None
        if per_layer:
            comparison = compare_with_float(bundle, runs=runs, trust=trust, progress=advance)
            write_comparison(bundle, comparison)
    if as_json:
        print_json({**found, **({"per_layer": comparison.to_json()} if comparison else {})})
        return
    print_whole(found)
    if comparison:
        print_layers(comparison)
        detail(f"report: {bundle / 'report.html'}")


def print_whole(measured: dict[str, Any]) -> None:
    """Print the measurements of ``benchmark.measure``."""
    for name, program in measured["programs"].items():
        latency = program["latency_ms"]
        result(
            fold(
                f"{name}: {latency['median']:.2f} ms median, {latency['p95']:.2f} ms p95 of "
                f"{latency['runs']} runs of one tile, {program['megapixels_per_second']:.2f} megapixels/s"
            )
        )
    if memory := measured["memory_bytes"]:
        result(
            fold(
                f"memory: {megabytes(memory['peak'])} at the peak, Python and the runtime's libraries "
                f"included; {megabytes(memory['running'])} of it while running"
            )
        )
    place = f"on this machine ({measured['machine']}), which may not be the device"
    detail(fold(f"ran with {measured['runtime']}, tiles of {measured['tile']}, {place}"))


_COLUMNS = (
    Column("INT8 layer"),
    *(Column(name, right=True) for name in ("output", "MMAC", "float ms", "INT8 ms", "ratio")),
    Column(""),
)


def print_layers(comparison: Comparison) -> None:
    """Print the times of the layers that run in INT8, in their order, and of the same layers in float32."""
    several = len(comparison.int8_ms) > 1
    cells = [
        (
            f"{row.program}: {row.layer}" if several else row.layer,
            "x".join(map(str, row.shape[1:])),
            f"{row.multiply_adds / 1e6:.2f}",
            f"{row.float_ms:.3f}",
            f"{row.int8_ms:.3f}",
            f"{row.int8_ms / row.float_ms:.2f}" if row.float_ms else "",
            "slower" if row.is_slower else "",
        )
        for row in comparison.int8_layers
    ]
    print_details(_COLUMNS, cells)
    layers = comparison.int8_layers
    together, converting = sum(row.int8_ms for row in layers), sum(row.conversion_ms for row in layers)
    detail(
        fold(
            f"together {sum(row.float_ms for row in layers):.2f} ms in float32, {together:.2f} ms in INT8, "
            f"{converting:.2f} ms of it conversions"
        )
    )
    for name, int8 in comparison.int8_ms.items():
        detail(
            fold(
                f"{name}: {comparison.float_ms[name]:.2f} ms in float32, {int8:.2f} ms in INT8, "
                f"medians of {comparison.runs} runs each, alternating"
            )
        )
    result(f"{len(comparison.slower)} of {len(layers)} layers are slower in INT8 than in float32")
    if comparison.keep_float:
        result(f"add to quantize.keep_float: [{', '.join(comparison.keep_float)}]")
