"""Build the engines of a bundle on the device that runs it.

    model.onnx --target.compile--> staging/model.engine --> the bundle, listed in its manifest

The target compiles in a process of its own: a parser that aborts on a model of somebody ends that one alone.
Device side: the target's runtime only.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgedyn import errors, targets
from edgedyn.bundle.bundle import add_files, engine_names
from edgedyn.children import Child, ChildEndedError, last_words, serve
from edgedyn.device.session import open_verified
from edgedyn.errors import EdgedynError, ModelError, UsageError
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
        ModelError: if the runtime cannot parse or build a program, or its process ends.
    """
    path = Path(bundle)
    opened = open_verified(path, rebuilt=engine_names(path))
    if targets.load(opened.target).compile is None:
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
            engine: _compile(opened.target, path / source, staging / engine, workspace_bytes, progress)
            for source, engine in zip(sources, engines, strict=True)
        }
        add_files(opened, [staging / name for name in engines])
    return facts


def _compiled() -> str:
    """Name the targets that compile on the device."""
    return ", ".join(name for name in targets.names() if targets.load(name).compile)


def _compile(
    target: str,
    source: Path,
    engine: Path,
    workspace_bytes: int | None,
    progress: Callable[[str, int, int], None],
) -> dict[str, object]:
    """Return the facts of ``target.compile``, called in a process of its own."""
    child = Child(__name__)
    question = [target, str(source.absolute()), str(engine.absolute()), workspace_bytes]
    try:
        (refusal, value), _ = child.ask(question, notify=lambda step: progress(*step))
    except ChildEndedError as error:
        raise ModelError(
            f"the process that compiled {source} for {target} {error.how}{last_words(error.log)}. Expected a "
            "program that its runtime can parse and build. Use no bundle of strangers; build your own again."
        ) from error
    finally:
        child.close()
    if refusal:
        raise getattr(errors, refusal)(value)
    facts: dict[str, object] = value
    return facts


def _answer(question: Any, report: Callable[[Any], None]) -> list[Any]:
    """Return the class of a refusal, or None, with its message, or the facts."""
    target, source, engine, workspace_bytes = question
    build = targets.load(target).compile
    assert build is not None  # the parent has looked
    try:
        return [
            None,
            build(
                Path(source),
                Path(engine),
                workspace_bytes=workspace_bytes,
                progress=lambda *step: report(step),
            ),
        ]
    except EdgedynError as error:
        return [type(error).__name__, str(error)]


if __name__ == "__main__":
    serve(_answer)
