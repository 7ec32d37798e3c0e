"""The command line: verb first, recipe or bundle first. Results on stdout, progress on stderr.

Exit codes: 0 ok, 1 a check failed, 2 wrong recipe or usage, 3 target or dependency not available here,
4 model or layer not supported, 5 calibration refused, 130 interrupted.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from edgedyn.cli.bench import bench
from edgedyn.cli.build import build
from edgedyn.cli.calibrate import calibrate
from edgedyn.cli.doctor import doctor
from edgedyn.cli.inspect import inspect
from edgedyn.cli.lists import list_things
from edgedyn.cli.memory import keep_freed_memory
from edgedyn.cli.native import ops, plugin
from edgedyn.cli.options import BundlePath, Force
from edgedyn.cli.terminal import ERR, OUT, AsJson, exit_unless, print_json, print_rows, progress_bars
from edgedyn.errors import EdgedynError, UsageError
from edgedyn.targets.quiet import quiet_libraries

app = typer.Typer(
    help="Deploy PyTorch networks with dynamic layers to phones (ExecuTorch) and Jetsons (TensorRT).",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(ops, name="ops")
app.add_typer(plugin, name="plugin")
app.command()(build)
app.command()(inspect)
app.command()(calibrate)
app.command()(bench)
app.command()(doctor)
app.command(name="list")(list_things)

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
def check(bundle: BundlePath, as_json: AsJson = False) -> None:
    """Verify every hash, then run the validation vectors where it stands."""
    from edgedyn.device import session

    with quiet_libraries():
        opened = session.open_session(bundle)
        report = session.check(opened)
    runtime = session.runtime_name(opened.bundle)
    if as_json:
        rows = [row.to_json() for row in report.rows]
        print_json({"ok": report.ok, "bundle": str(bundle), "runtime": runtime, "rows": rows})
    else:
        print_rows(list(report.rows))
        OUT.print(
            f"\n{'ok' if report.ok else 'FAILED'}: {len(opened.bundle.manifest['files'])} files verified"
        )
        OUT.print(f"ran with {runtime}", soft_wrap=True)
    exit_unless(report.ok)


@app.command()
def run(
    bundle: BundlePath,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="PNG, JPEG or TIFF, any size")],
    out: Annotated[Path, typer.Option("-o", "--out", metavar="DIR", help="folder for the results")],
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Denoise images of any size, in tiles without seams."""
    from edgedyn.device import session

    with quiet_libraries(), progress_bars() as advance:
        opened = session.open_session(bundle)
        if not opened.bundle.ok:
            ERR.print(f"warning: checks of {bundle} failed when it was built; see its report.html")
        written = session.process_files(
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
    from edgedyn.bundle import bundle as bundles
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


if __name__ == "__main__":
    main()
