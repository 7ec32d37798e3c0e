"""The command line: verb first, recipe or bundle first. Results on stdout, progress on stderr.

Exit codes: 0 ok, 1 a check failed, 2 wrong recipe or usage, 3 target or dependency not available here,
4 model or layer not supported, 5 calibration refused, 130 interrupted.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from edgedyn import cli_bench, cli_calibrate, cli_native
from edgedyn.cli_options import BundlePath, Force, RecipePath, Seed, Set, Trust
from edgedyn.errors import EdgedynError, TargetMissingError, UsageError
from edgedyn.memory import keep_freed_memory
from edgedyn.terminal import ERR, OUT, AsJson, print_json, progress_bars, quiet_libraries

if TYPE_CHECKING:
    from edgedyn.validate import Row

app = typer.Typer(
    help="Deploy PyTorch networks with dynamic layers to phones (ExecuTorch) and Jetsons (TensorRT).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(cli_native.ops, name="ops")
app.add_typer(cli_native.plugin, name="plugin")
app.command()(cli_calibrate.calibrate)
app.command()(cli_bench.bench)

_INTERRUPTED = 130


def main() -> None:
    """Run the command line; every refusal becomes one message and its exit code."""
    keep_freed_memory()
    sys.path.append(str(Path.cwd()))  # model.network may name a module that lies here
    try:
        app()
    except EdgedynError as error:
        ERR.print(f"error {type(error).__name__}: ", style="bold red", end="")
        ERR.print(str(error), soft_wrap=True)
        sys.exit(error.exit_code)
    except SystemExit as leaving:
        if leaving.code == _INTERRUPTED:  # what typer makes of Ctrl-C
            ERR.print("interrupted: every file that stands is whole; the same command starts again")
        raise


@app.command()
def build(
    recipe: RecipePath,
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="the bundle's directory")],
    overrides: Set = None,
    as_json: AsJson = False,
    force: Force = False,
    trust: Trust = False,
    seed: Seed = 0,
) -> None:
    """Build a bundle and its report; exit 1 if a check fails."""
    from edgedyn.recipe import load_recipe

    parsed = load_recipe(recipe, overrides or [])
    with quiet_libraries(), progress_bars() as advance:
        import torch

        from edgedyn import pipeline

        torch.manual_seed(seed)
        built = pipeline.build(parsed, out, force=force, trust=trust, progress=advance)
    misfit = built.bundle.manifest["facts"].get("calibration", {}).get("forced")
    if misfit:
        ERR.print(f"warning: by --force: the calibration table {misfit}", style="yellow", soft_wrap=True)
    if as_json:
        print_json(built.to_json())
    else:
        _print_rows(list(built.report.rows))
        latency = built.latency_ms
        OUT.print(
            f"\n{'ok' if built.report.ok else 'FAILED'}: {out}  "
            f"({built.bundle.precision}, {built.bundle.target})"
        )
        OUT.print(
            f"one tile on this machine: {latency['median']:.1f} ms median of {latency['runs']:.0f} runs"
        )
        if not built.bundle.manifest["facts"]["dynamic_layers"]:
            OUT.print("the network has no dynamic layer: it was deployed as a static one")
        if not parsed.is_trained:
            OUT.print("no trained weights: picture and decisions are reported, not judged")
        OUT.print(f"report: {out / 'report.html'}", soft_wrap=True)
    _exit_unless(built.report.ok)


@app.command()
def inspect(
    what: Annotated[
        str, typer.Argument(metavar="RECIPE|MODULE:FUNCTION", help="a recipe, or a function giving a network")
    ],
    overrides: Set = None,
    shape: Annotated[str, typer.Option(help="B,C,H,W of the network's input; a recipe has its own")] = "",
    as_json: AsJson = False,
    trust: Trust = False,
) -> None:
    """Dry run: each dynamic layer, its form on each target, what it costs; nothing is written."""
    with quiet_libraries():
        from edgedyn import inspection

        if Path(what).suffix in (".yaml", ".yml") or ":" not in what:
            from edgedyn.recipe import load_recipe

            found = inspection.inspect(load_recipe(Path(what), overrides or []), trust=trust)
        else:
            found = inspection.inspect_model(inspection.load_network(what), _zeros(shape or "1,3,256,256"))
    if as_json:
        print_json(found)
    else:
        _print_inspection(what, found)


def _zeros(shape: str) -> tuple[Any, ...]:
    """Return the one input of a shape ``B,C,H,W``."""
    import torch

    sizes = shape.split(",")
    if len(sizes) != 4 or not all(size.strip().isdigit() and int(size) for size in sizes):
        raise UsageError(f"--shape {shape!r}: expected four sizes from 1, for instance 1,3,256,256.")
    return (torch.zeros([int(size) for size in sizes]),)


def _print_inspection(what: str, found: dict[str, Any]) -> None:
    layers = len(found["layers"])
    OUT.print(f"{what}: {layers} dynamic layer{'' if layers == 1 else 's'}", style="bold", soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("layer", "class", "primitive"):
        table.add_column(column, overflow="fold")
    # multiply-adds of generator and apply, parameters of both, bytes of what is generated
    for column in ("gen MMAC", "apply", "K par", "KB"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer in found["layers"]:
        values = layer["generator_parameters"] + layer["apply_parameters"]
        table.add_row(
            layer["path"] or "(the network)",
            layer["class"],
            layer["primitive"],
            f"{layer['generator_macs'] / 1e6:.1f}",
            f"{layer['apply_macs'] / 1e6:.2f}",
            f"{values / 1e3:.1f}",
            f"{layer['kernel_bytes'] / 1024:.1f}",
        )
    if layers:
        OUT.print(table)
    for target, preview in found["targets"].items():
        OUT.print(f"\n{target}", style="bold")
        forms = {(x["primitive"], *x["forms"][target].values()) for x in found["layers"]}
        for primitive, form, why in sorted(forms):
            OUT.print(f"  {primitive}: {form or 'no form'} ({why})", soft_wrap=True)
        for problem in ("missing", "refused"):
            if problem in preview:
                OUT.print(f"  {problem}: {preview[problem]}", soft_wrap=True)
        if "delegated" in preview:
            OUT.print(f"  {preview['delegated']:.1%} of the operators delegated")
        for kind in ("portable", "unsupported"):
            if preview.get(kind):
                listed = ", ".join(f"{name} x {count}" for name, count in preview[kind].items())
                OUT.print(f"  {kind}: {listed}", soft_wrap=True)
    none = "no dynamic layer: it deploys like any static network. " if not found["layers"] else ""
    OUT.print(
        f"\n{none}{found['parameters']:,} parameters, {found['static_parameters']:,} "
        f"static; {found['macs'] / 1e6:,.1f} MMAC a tile of {found['shape'][0]}, "
        f"{found['generator_share']:.0%} of them generate kernels"
    )


@app.command()
def check(bundle: BundlePath, as_json: AsJson = False) -> None:
    """Verify every hash, then run the validation vectors where it stands."""
    from edgedyn import session

    with quiet_libraries():
        opened = session.open_session(bundle)
        report = session.check(opened)
    runtime = session.runtime_name(opened.bundle)
    if as_json:
        rows = [row.to_json() for row in report.rows]
        print_json({"ok": report.ok, "bundle": str(bundle), "runtime": runtime, "rows": rows})
    else:
        _print_rows(list(report.rows))
        OUT.print(
            f"\n{'ok' if report.ok else 'FAILED'}: {len(opened.bundle.manifest['files'])} files verified"
        )
        OUT.print(f"ran with {runtime}", soft_wrap=True)
    _exit_unless(report.ok)


@app.command()
def run(
    bundle: BundlePath,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="PNG, JPEG or TIFF, any size")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="folder for the results")],
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Denoise images of any size, in tiles without seams."""
    from edgedyn import session

    with quiet_libraries(), progress_bars() as advance:
        opened = session.open_session(bundle)
        if not opened.bundle.ok:
            ERR.print(f"warning: checks of {bundle} failed when it was built; see its report.html")
        written = session.denoise_files(
            opened,
            images,
            out,
            force=force,
            progress=lambda image, done, total: advance(image.name, done, total),
        )
    if as_json:
        print_json({"ok": True, "files": [str(path) for path in written]})
    else:
        for path in written:
            OUT.print(str(path), soft_wrap=True)


@app.command(name="compile")
def compile_bundle(
    bundle: BundlePath,
    workspace_mb: Annotated[
        int, typer.Option("--workspace", help="builder's scratch limit, MB; 0 is none")
    ] = 0,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """On the Jetson: build a TensorRT engine beside each ONNX file of the bundle."""
    from edgedyn import bundle as bundles
    from edgedyn.targets.tensorrt.compile import compile_engine

    opened = bundles.open_bundle(bundle, rebuilt=bundles.engine_names(bundle))
    if opened.target != "tensorrt":
        raise UsageError(
            f"bundle {bundle} is for the target {opened.target!r}; only tensorrt bundles are compiled. "
            "Use it as it is: edgedyn run."
        )
    sources = sorted(set(opened.programs.values()))
    engines = [Path(name).with_suffix(".engine").name for name in sources]
    if (here := [name for name in engines if (bundle / name).exists()]) and not force:
        raise UsageError(f"{bundle / here[0]} exists already; use --force to build it again on this machine.")
    with bundles.staging_folder(bundle) as staging, progress_bars() as advance:
        facts = {
            engine: compile_engine(
                bundle / source,
                staging / engine,
                workspace_bytes=workspace_mb * 2**20 or None,
                progress=advance,
            )
            for source, engine in zip(sources, engines, strict=True)
        }
        bundles.add_files(opened, [staging / name for name in engines])
    if as_json:
        print_json({"ok": True, "engines": {str(bundle / name): values for name, values in facts.items()}})
        return
    for name, values in facts.items():
        OUT.print(str(bundle / name), soft_wrap=True)
        for fact, value in values.items():
            OUT.print(f"  {fact:<20} {value}")


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed, what each target lacks, and the command that mends it."""
    from edgedyn import doctor as examiner

    findings = examiner.examine()
    broken = [f for f in findings if not f.ok and not f.optional]
    if as_json:
        print_json({"ok": not broken, "findings": [asdict(f) for f in findings]})
    else:
        table = Table(box=None)
        for column in ("", "what", "found", "needed for", "mend"):
            table.add_column(column, overflow="fold")
        for f in findings:
            here = f.ok and f.found is not None
            mark = "ok" if here else ("-" if f.optional else "MISSING")
            table.add_row(mark, f.name, f.found or "", f.needed_for, "" if here else f.mend)
        OUT.print(table)
    if broken:
        raise TargetMissingError(
            f"{len(broken)} needed things are missing: {', '.join(f.name for f in broken)}."
        )


@app.command(name="list")
def list_things(
    what: Annotated[str, typer.Argument(metavar="layers|authors|ops|targets|networks|metrics|recipes")],
    as_json: AsJson = False,
) -> None:
    """List layers, authors' classes, ops, targets, networks, metrics or recipes."""
    from edgedyn.catalogue import LISTS

    if what not in LISTS:
        raise UsageError(f"cannot list {what!r}; expected one of {', '.join(LISTS)}.")
    rows = LISTS[what]()
    if as_json:
        print_json(rows)
        return
    table = Table(box=None)
    for key in rows[0] if rows else ["nothing found"]:
        table.add_column(key, overflow="fold")
    for row in rows:
        table.add_row(*map(str, row.values()))
    OUT.print(table)


def _print_rows(rows: list[Row]) -> None:
    """Print one line a row; the longest fits 80 columns."""
    signs = {"at_most": "<=", "at_least": ">="}
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("between", "metric", "value", "limit", "of", ""):
        table.add_column(column, overflow="fold", justify="right" if column in ("value", "of") else "left")
    for row in rows:
        limit = " ".join(f"{signs[key]} {value:.4g}" for key, value in row.limit.items())
        word = "FAILED" if not row.passed else "passed" if row.limit else "reported"
        table.add_row(row.between, row.metric, f"{row.value:.4g}", limit, str(row.samples), word)
    OUT.print(table)


def _exit_unless(ok: bool) -> None:
    if not ok:
        raise typer.Exit(1)


if __name__ == "__main__":
    main()
