"""Image files through a bundle: files, folders, patterns and standard input, each result whole or absent.

    photo file -> samples as decoded -> strips of float32 rows -> tiles -> rows, back into the samples -> file

A file that fails stops no other one. A result that exists is kept, so that an interrupted command continues
where it stopped.
"""

from __future__ import annotations

import functools
import glob
import io
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from edgedyn.device import arrays
from edgedyn.device.session import Progress, Session, open_session
from edgedyn.errors import EdgedynError, ImageError, UsageError
from edgedyn.files import refuse_unwritable
from edgedyn.reading import MAX_FILE_BYTES

STDIN = "-"
_CONVERTED = ".png"  # of formats that are only read
WRITTEN, THERE, FAILED = "written", "there already", "failed"


@dataclass(frozen=True)
class Job:
    """An image and the place of its result; ``image`` or ``result`` is ``-`` for a standard stream."""

    image: Path
    result: Path


@dataclass(frozen=True)
class Outcome:
    """One image of a batch.

    Attributes:
        state: ``written``, ``there already`` or ``failed``.
        error: the reason of a failure.
        notes: sentences on conversions that lose something.
    """

    job: Job
    state: str
    error: EdgedynError | None = None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the outcome as JSON values; ``result`` is null for a failure."""
        failed = {"type": type(self.error).__name__, "message": str(self.error)} if self.error else None
        return {
            "image": str(self.job.image),
            "result": None if failed else str(self.job.result),
            "state": self.state,
            "notes": list(self.notes),
            "error": failed,
        }


def run(
    bundle: Session | str | Path,
    images: str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    force: bool = False,
    recursive: bool = False,
    noise_level: float | None = None,
    progress: Callable[[Path, int, int], None] = lambda image, done, total: None,
) -> list[Path]:
    """Run image files through a bundle and write them, under their own names, into the folder ``out``.

    All names are checked before the first image is read. Each file appears whole or not at all. Results that
    exist are kept.

    Example:
        edgedyn.run("out", ["noisy.png"], "denoised")

    Args:
        bundle: an open session, or the path of a bundle.
        images: image files of any size, folders, or patterns such as ``photos/*.jpg``; one or several.
        out: folder for the results, made if need be; or, for one image, a file with an image's suffix.
        force: replace results that exist; never an input.
        recursive: take the folders in a folder too; results keep their places in it.
        noise_level: as ``Session.process``.
        progress: called with (image, tiles done, tiles in all) after each tile.

    Returns:
        The results, in the order of the images; those that were there already too.

    Raises:
        UsageError: for no images, two of one name, a result in place of an input, or inside the bundle.
        ImageError: for a file that is missing or has an unknown suffix; after all other images, for one that
            cannot be read or written.
        EdgedynError: as ``open_session``, where ``bundle`` is a path.
    """
    session = bundle if isinstance(bundle, Session) else open_session(bundle)
    session = session if noise_level is None else session.with_noise_level(noise_level)
    sources = [images] if isinstance(images, str | Path) else images
    jobs = plan(session, sources, out, recursive=recursive)
    outcomes = run_jobs(session, jobs, force=force, progress=lambda job, *done: progress(job.image, *done))
    if failed := [outcome for outcome in outcomes if outcome.error]:
        first = failed[0].error
        assert first is not None
        if len(failed) == 1:
            raise first
        raise type(first)(f"{len(failed)} of {len(jobs)} images failed; the first: {first}") from first
    return [outcome.job.result for outcome in outcomes]


def plan(
    session: Session, sources: Sequence[str | Path], out: str | Path, *, recursive: bool = False
) -> list[Job]:
    """Return the images that sources name, with the places of their results; nothing is read or written.

    Raises:
        UsageError: for no images, an empty name, two of one name, a result in place of an input, or inside
            the bundle.
        ImageError: for a file that is missing or has an unknown suffix.
    """
    if not str(out):
        raise UsageError("found an empty name, expected a folder for the results. Name one.")
    jobs = _place(find_images(sources, Path(out), recursive=recursive), Path(out))
    for job in jobs:
        inside = job.result.resolve().is_relative_to(session.bundle.path.resolve())
        if inside and str(job.result) != STDIN:
            raise UsageError(
                f"results in {job.result.parent} would make the bundle invalid. Choose a folder outside of "
                "it."
            )
    _refuse_doubled(jobs, Path(out))
    return jobs


def find_images(
    sources: Sequence[str | Path], out: Path, *, recursive: bool = False
) -> list[tuple[Path, Path]]:
    """Return the images that sources name, once each, with their paths relative to the output folder ``out``.

    Raises:
        UsageError: for no images, or an empty name.
        ImageError: for a file that is missing or has an unknown suffix.
    """
    found = [pair for source in sources for pair in _expand(str(source), out, recursive=recursive)]
    found = list({os.path.abspath(image): (image, name) for image, name in found}.values())
    if not found:
        raise UsageError("found no images, expected at least one. Name the files to run.")
    return found


def run_jobs(
    session: Session,
    jobs: Sequence[Job],
    *,
    force: bool = False,
    progress: Callable[[Job, int, int], None] = lambda job, done, total: None,
    finished: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run images one after the other; a failure stops no other image.

    Args:
        session: an open bundle.
        jobs: of ``plan``.
        force: replace results that exist.
        progress: called with (job, tiles done, tiles in all) after each tile.
        finished: called with the outcome of each image.

    Raises:
        UsageError: when a folder for results cannot be made or written; for a program that takes the noise
            level of the images, where none is stated.
        ImageError: for a program that takes no image.
    """
    session.scale  # noqa: B018 - a bundle that takes no image is refused once, not for each image
    session.further_inputs()  # so is a noise level that is missing
    outcomes = []
    with _folders(jobs):
        for job in jobs:
            outcomes.append(_run_one(session, job, functools.partial(progress, job), force=force))
            finished(outcomes[-1])
    return outcomes


@contextmanager
def _folders(jobs: Sequence[Job]) -> Iterator[None]:
    """Make the folders of the results, and remove those that are still empty at the end.

    Raises:
        UsageError: when one cannot be made or written.
    """
    results = {job.result.parent: job.result for job in jobs if str(job.result) != STDIN}
    absent = {p for folder in results for p in (folder, *folder.parents) if not os.path.lexists(p)}
    try:
        for folder, result in results.items():
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(
                    f"cannot make the folder {folder}: {error}. Choose another output folder."
                ) from error
            refuse_unwritable(result)
        yield
    finally:
        for folder in sorted(absent, key=lambda path: len(path.parts), reverse=True):
            with suppress(OSError):  # it holds a result
                folder.rmdir()


def _run_one(session: Session, job: Job, progress: Progress, *, force: bool) -> Outcome:
    # Here, so that checking a bundle on a device needs neither Pillow nor tifffile.
    from edgedyn.images import photo as photos

    if not force and str(job.result) != STDIN and os.path.lexists(job.result):
        return Outcome(job, THERE)
    try:
        if job.image.suffix.lower() == arrays.SUFFIX:
            arrays.run_array(session, job.image, job.result, progress)
            return Outcome(job, WRITTEN)
        data = read_stdin() if str(job.image) == STDIN else None
        photo = photos.read_image(job.image, data)
        del data
        if str(job.result) != STDIN:
            photos.check_format(photo, job.result)
        # A result of the same size takes the place of its photo row by row: strips allow it.
        result = photo if session.scale == 1 else photo.canvas(session.scale)
        for top, rows in session.strips(photo.shape, photo.read, progress=progress):
            result.write_rows(top, rows)
        if str(job.result) == STDIN:
            _write_stdout(result, job.image)
        else:
            photos.save(result, job.result)
    except EdgedynError as error:
        return Outcome(job, FAILED, error)
    except MemoryError:
        reason = f"image {job.image} needs more memory than is free. Make it smaller."
        return Outcome(job, FAILED, ImageError(reason))
    return Outcome(job, WRITTEN, notes=photo.notes)


def read_stdin() -> bytes:
    """Return the bytes of an image on standard input.

    Raises:
        ImageError: when no image stands there.
    """
    from edgedyn.images.formats import NAMES, identify

    stream: BinaryIO = sys.stdin.buffer
    start = b"" if sys.stdin.isatty() else stream.read(64)
    if not identify(start):
        actual = f"{start[:4]!r} at its start" if start else "no bytes"
        raise ImageError(f"standard input: found {actual}, expected an image, {NAMES}. Pipe a file into it.")
    data = start + stream.read(MAX_FILE_BYTES)
    if len(data) > MAX_FILE_BYTES:
        raise ImageError(
            f"standard input: found more than {MAX_FILE_BYTES} bytes, expected at most that. Make the "
            "image smaller."
        )
    return data


def _write_stdout(photo: Any, image: Path) -> None:
    from edgedyn.images import photo as photos
    from edgedyn.images.formats import FORMATS

    kind = photo.format if photo.depth in FORMATS[photo.format].depths else "PNG"
    stream = io.BytesIO()  # whole before its first byte; and TIFF's writer seeks
    photos.encode(photo, kind, stream, image)
    try:
        sys.stdout.buffer.write(stream.getbuffer())
        sys.stdout.buffer.flush()
    except OSError as error:
        raise UsageError(f"cannot write to standard output: {error}. Write to a file: -o NAME.png") from error


def _expand(source: str, out: Path, *, recursive: bool) -> list[tuple[Path, Path]]:
    """Return the images that a source names, each with its path relative to the output folder."""
    from edgedyn.images.formats import NAMES, SUFFIXES

    path = Path(source)
    if not source:
        raise UsageError("found an empty name, expected an image, a folder or a pattern. Name what to run.")
    if source == STDIN:
        return [(path, Path("stdin.png"))]
    if path.is_dir():
        files = sorted(path.rglob("*") if recursive else path.iterdir())
        results = out.resolve()
        taken = [
            (file, file.relative_to(path))
            for file in _images(files, path)
            if results == path.resolve() or results not in file.resolve().parents
        ]
        if not taken:
            more = "" if recursive else "; --recursive takes the folders in it too"
            raise ImageError(f"folder {source}: found no image, expected {NAMES}{more}. Check the path.")
        return taken
    if not path.is_file() and glob.has_magic(source):
        matched = [Path(name) for name in sorted(glob.glob(source, recursive=True))]
        if taken := [(file, Path(file.name)) for file in _images(matched)]:
            return taken
        raise ImageError(f"pattern {source}: found no image, expected {NAMES}. Check the pattern.")
    if not path.is_file():
        raise ImageError(f"image {source}: found no file, expected {NAMES}. Check the path.")
    if path.suffix.lower() not in (*SUFFIXES, arrays.SUFFIX):
        raise ImageError(
            f"image {source}: found suffix {path.suffix!r}, expected {[*SUFFIXES, arrays.SUFFIX]}. Convert "
            "the file."
        )
    return [(path, Path(path.name))]


def _images(files: list[Path], folder: Path | None = None) -> list[Path]:
    """Return the photos among files, or the arrays where there is no photo; names with a dot are hidden."""
    from edgedyn.images.formats import SUFFIXES

    def is_hidden(file: Path) -> bool:
        return any(part.startswith(".") for part in file.relative_to(folder or file.parent).parts)

    for suffixes in (tuple(SUFFIXES), (arrays.SUFFIX,)):
        if taken := [x for x in files if x.suffix.lower() in suffixes and not is_hidden(x) and x.is_file()]:
            return taken
    return []


def _place(found: list[tuple[Path, Path]], out: Path) -> list[Job]:
    from edgedyn.images.formats import FORMATS, SUFFIXES

    if str(out) == STDIN or (out.suffix.lower() in (*SUFFIXES, arrays.SUFFIX) and not out.is_dir()):
        if len(found) > 1:
            raise UsageError(
                f"found {len(found)} images for the one file {out}, expected one. Name a folder for them."
            )
        return [Job(found[0][0], out)]
    jobs = []
    for image, name in found:
        kind = SUFFIXES.get(name.suffix.lower())
        written = kind is None or bool(FORMATS[kind].depths)
        jobs.append(Job(image, out / (name if written else name.with_suffix(_CONVERTED))))
    return jobs


def _refuse_doubled(jobs: list[Job], out: Path) -> None:
    counts = Counter(str(job.result).lower() for job in jobs)
    if doubled := sorted({Path(name).name for name, count in counts.items() if count > 1}):
        raise UsageError(
            f"found images of one name, {doubled[:5]}, expected distinct ones in {out}. Run them apart."
        )
    inputs = {os.path.realpath(job.image) for job in jobs}
    for job in jobs:
        if str(job.result) != STDIN and os.path.realpath(job.result) in inputs:
            raise UsageError(f"the input {job.result} would be overwritten. Choose another output folder.")
