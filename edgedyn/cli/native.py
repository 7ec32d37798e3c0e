"""Commands that compile our own kernels where they run: ``edgedyn ops build``, ``edgedyn plugin build``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import typer

from edgedyn.cli.terminal import OUT, AsJson, print_json, progress_bars

ops = typer.Typer(help="Our own kernels for ExecuTorch.", no_args_is_help=True)
plugin = typer.Typer(help="Our own kernels as TensorRT plugins.", no_args_is_help=True)


@ops.command(name="build")
def build_kernels(as_json: AsJson = False) -> None:
    """Compile our own kernels for ExecuTorch on this machine; done at once where nothing changed."""
    from edgedyn.targets.executorch import kernels

    _build(kernels.build, as_json)


@plugin.command(name="build")
def build_plugins(as_json: AsJson = False) -> None:
    """Compile the TensorRT plugins on this machine; for trtexec: --dynamicPlugins=LIBRARY."""
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
        OUT.print(str(library), soft_wrap=True)
