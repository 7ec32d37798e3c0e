"""``edgedyn ops build`` and ``edgedyn plugin build``: compile fused kernels on the machine that runs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from edgedyn.cli.options import AsJson, Verbosity
from edgedyn.cli.terminal import print_json, progress_bars, result

ops = typer.Typer(help="Fused kernels for ExecuTorch.", no_args_is_help=True)
plugin = typer.Typer(help="Fused kernels as TensorRT plugins.", no_args_is_help=True)


@ops.command(name="build")
def build_kernels(as_json: AsJson = False, verbose: Verbosity = None) -> None:
    """Compile the fused kernels for ExecuTorch on this machine; returns at once if nothing changed."""
    from edgedyn.targets.executorch import kernels

    _build(kernels.build, as_json)


@plugin.command(name="build")
def build_plugins(as_json: AsJson = False, verbose: Verbosity = None) -> None:
    """Compile the TensorRT plugins on this machine; trtexec loads them with --dynamicPlugins=LIBRARY."""
    from edgedyn.targets.tensorrt import plugin_library

    _build(plugin_library.build, as_json)


def _build(make: Callable[[], Path], as_json: bool) -> None:
    with progress_bars() as advance:
        advance("compile", 0, 1)
        library = make()
        advance("compile", 1, 1)
    if as_json:
        print_json({"ok": True, "library": str(library)})
    else:
        result(str(library))
