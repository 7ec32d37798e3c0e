"""Build the engines of a bundle on the device that runs it.

    model.onnx --target.compile--> staging/model.engine --> the bundle, listed in its manifest

Device side: the target's runtime only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from edgedyn import targets
from edgedyn.bundle.bundle import add_files, engine_names
from edgedyn.device.session import open_verified
from edgedyn.errors import UsageError
from edgedyn.files import refuse_unwritable, staging_folder


def compile_bundle(
    bundle: str | Path,
    *,
    workspace_bytes: int | None = None,
    force: bool = False,
    progress: Callable[[str, int, int], None] = lambda phase, done, total: None,
) -> dict[str, dict[str, object]]:
    """Build an engine beside each lowered file of a bundle, for the GPU of this machine.

    An engine appears whole or not at all. Takes minutes on a Jetson.

    Example:
        edgedyn.compile_bundle("out")

    Args:
        bundle: directory of a bundle whose target compiles on the device.
        workspace_bytes: most scratch memory of a layer; None sets no limit.
        force: replace the engines that are there.
        progress: called with (phase of the build, steps done, steps of this phase).

    Returns:
        Per engine, by its file name, the facts of ``target.compile``: versions, sizes, seconds, latency.

    Raises:
        UsageError: for a target that does not compile, or engines that are there, without ``force``.
        BundleError: if the bundle does not verify.
        TargetMissingError: if the runtime or its GPU is not available here.
        ModelError: if the runtime cannot parse or build a program.
    """
    path = Path(bundle)
    opened = open_verified(path, rebuilt=engine_names(path))
    build = targets.load(opened.target).compile
    if build is None:
        raise UsageError(
            f"bundle {path} is for the target {opened.target!r}; only {_compiled()} bundles are compiled. "
            "Use it as it is: edgedyn run."
        )
    sources = sorted(set(opened.programs.values()))
    engines = [Path(name).with_suffix(".engine").name for name in sources]
    if (present := [name for name in engines if (path / name).exists()]) and not force:
        raise UsageError(
            f"{path / present[0]} exists already. Pass --force to build it again on this machine."
        )
    refuse_unwritable(path, is_folder=True)
    with staging_folder(path.resolve()) as staging:
        facts = {
            engine: build(path / source, staging / engine, workspace_bytes=workspace_bytes, progress=progress)
            for source, engine in zip(sources, engines, strict=True)
        }
        add_files(opened, [staging / name for name in engines])
    return facts


def _compiled() -> str:
    """Name the targets that compile on the device."""
    return ", ".join(name for name in targets.names() if targets.load(name).compile)
