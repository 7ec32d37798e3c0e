"""A bundle in use where it stands: opened, run on images of any size in tiles, checked.

    y[p] = sum_i w_i[p] * program(x[tile_i])[p],  sum_i w_i[p] = 1,  w_i[row, column] = u_i[row] * v_i[column]

Along each axis neighbouring tiles share at least ``overlap`` pixels. The weight passes from one tile to the
next linearly over overlap / 2 pixels around the middle of the shared ones. So the outer overlap / 4 pixels of
a tile, where a program sees zero padding instead of the picture, never count. A program whose receptive field
reaches at most overlap / 4 pixels gives exactly its output on the whole image.

Device side: numpy and the target's ``run.py``; Pillow and tifffile only where files are read.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from edgedyn import targets
from edgedyn.bundle.arrays import read_array
from edgedyn.bundle.bundle import Bundle, open_bundle
from edgedyn.bundle.dispatch import Run
from edgedyn.bundle.tensors import CONSTANT, NOISE_LEVEL, TensorSpec
from edgedyn.device import programs
from edgedyn.device.tiling import padded, tiles
from edgedyn.errors import (
    BundleError,
    CheckFailedError,
    ImageError,
    RecipeError,
    TargetMissingError,
    UsageError,
)
from edgedyn.report.rows import Row, ValidationReport

Progress = Callable[[int, int], None]


def silent(done: int, total: int) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class Session:
    """An open bundle and its program.

    Attributes:
        bundle: verified.
        run: ``run(*arrays)`` returns the list of outputs; a router decides first.
        noise_level: of the images, for a program that takes it, see ``with_noise_level``.
    """

    bundle: Bundle
    run: Run
    noise_level: float | None = None

    def __repr__(self) -> str:
        """Return one line: the bundle and the sizes of input and output."""
        shapes = [tuple(spec.shape) for spec in (self.bundle.inputs[0], self.bundle.outputs[0])]
        return f"Session({self.bundle.summary}, {shapes[0]} -> {shapes[1]})"

    def process(
        self, pixels: np.ndarray, *, noise_level: float | None = None, progress: Progress = silent
    ) -> np.ndarray:
        """Run an image of any size through the program, denoising or enlarging it, tile by tile.

        Args:
            pixels: (H, W, C) floating-point, 0 black, 1 white, R, G, B; the values that the program takes are
                made of them. A program of 3 channels gets a gray image (C = 1) as three equal channels, and
                the result is their mean. A program of 1 channel runs on each channel of a colour image. A
                program of 4 channels takes packed Bayer images of 4.
            noise_level: standard deviation of the image's noise, 0..255 scale, for a program that takes it.
            progress: called with (tiles done, tiles in all) after each tile.

        Returns:
            (H, W, C) float32, 0 black, 1 white, not clipped; s times as high and wide for a program that
            enlarges s times. Of a program with several outputs, the first.

        Raises:
            ImageError: for another array, values that are not finite, or a program that takes no image.
            UsageError: for a noise level that is missing, not from 0, or not taken by the program.
            CheckFailedError: if the program returns another shape, or values that are not finite.
        """
        spec, scale = _image_spec(self.bundle)
        _check_pixels(pixels, spec)
        height, width, colours = pixels.shape
        result = np.empty((height * scale, width * scale, colours), np.float32)
        session = self if noise_level is None else self.with_noise_level(noise_level)

        def read(top: int, bottom: int, left: int, right: int) -> np.ndarray:
            return pixels[top:bottom, left:right]

        for top, rows in session.strips(pixels.shape, read, progress=progress):
            result[top : top + len(rows)] = rows
        return result

    @property
    def scale(self) -> int:
        """How many times as high and wide as its input the program's output is.

        Raises:
            ImageError: for a program that takes no image.
        """
        return _image_spec(self.bundle)[1]

    def strips(
        self,
        shape: tuple[int, ...],
        read: Callable[[int, int, int, int], np.ndarray],
        *,
        progress: Progress = silent,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the output of ``process`` from top to bottom, in strips, so that few rows are in memory.

        Rows of the image above the next tiles are not read again: with a scale of 1 the result may take
        their place while this runs.

        Args:
            shape: H, W and C of the image, C 1 or 3; 4 for packed Bayer.
            read: ``read(top, bottom, left, right)`` returns this part, (rows, columns, C), finite.
            progress: called with (tiles done, tiles in all) after each tile.

        Yields:
            The first row of a strip, and the strip, (rows, s * W, C) float32, valid until the next one.

        Raises:
            ImageError: as ``process``.
            UsageError: as ``process``.
            CheckFailedError: as ``process``.
        """
        spec, scale = _image_spec(self.bundle)
        _check_channels(shape, spec)
        self.further_inputs()  # refuses before the first row is read
        channels, tile_h, tile_w = spec.shape[1:]
        height, width, colours = shape
        grid = tiles(height, width, tile_h, tile_w, self.bundle.overlap)
        tops = sorted({tile.top for tile in grid})
        planes = 1 if colours <= channels else colours
        done, total = 0, len(grid) * planes
        blended = np.zeros((planes, channels, tile_h * scale, max(width, tile_w) * scale), np.float32)
        for top, following in zip(tops, [*tops[1:], height], strict=True):
            for tile in (tile for tile in grid if tile.top == top):
                right = min(tile.left + tile_w, width)
                pixels = read(top, min(top + tile_h, height), tile.left, right)
                there = np.s_[:, :, tile.left * scale : (tile.left + tile_w) * scale]
                weight = tile.rows.repeat(scale)[:, None] * tile.columns.repeat(scale)
                for plane, result in zip(_planes(pixels, channels), blended, strict=True):
                    result[there] += weight * self._run_tile(padded(plane, tile_h, tile_w), scale)
                    done += 1
                    progress(done, total)
            ready = (following - top) * scale
            joined = blended[:, :, :ready, : width * scale].reshape(-1, ready, width * scale)
            rows = joined.transpose(1, 2, 0)
            yield top * scale, rows.mean(axis=2, keepdims=True) if colours < channels else rows
            blended[:, :, :-ready] = blended[:, :, ready:]
            blended[:, :, -ready:] = 0

    def with_noise_level(self, noise_level: float) -> Session:
        """Return the session for images of a noise level.

        Args:
            noise_level: standard deviation of the images' noise, 0..255 scale.

        Raises:
            UsageError: for another number, or a program that takes no noise level.
        """
        takes = any(spec.role == NOISE_LEVEL for spec in self.bundle.inputs)
        if not takes or not 0 <= noise_level <= 255:
            expected = "a number from 0 to 255" if takes else "none: its program takes no noise level"
            raise UsageError(
                f"bundle {self.bundle.path}: found the noise level {noise_level:g}, expected {expected}. Fix "
                "--noise-level."
            )
        return replace(self, noise_level=noise_level)

    def make_inputs(self, pixels: np.ndarray) -> list[np.ndarray]:
        """Return the inputs of the program for one picture of its size.

        Args:
            pixels: (1, C, H, W) floating-point, 0 black, 1 white, R, G, B.

        Raises:
            UsageError: as ``further_inputs``.
        """
        first = self.bundle.inputs[0]
        encoded = np.ascontiguousarray(first.encode(pixels), dtype=first.dtype)
        return [encoded, *self.further_inputs()]

    def further_inputs(self) -> list[np.ndarray]:
        """Return the inputs after the picture: constants, and the noise level.

        Raises:
            UsageError: for a program that takes the noise level, where none is stated.
        """
        others = self.bundle.inputs[1:]
        takes = [spec.name for spec in others if spec.role == NOISE_LEVEL]
        if takes and self.noise_level is None:
            raise UsageError(
                f"bundle {self.bundle.path} takes the noise level of the image ({takes[0]}); found none. "
                "State its standard deviation on the scale of 0 to 255: --noise-level 25, or noise_level=25 "
                "in Python."
            )
        return [spec.filled(self.noise_level or 0.0).astype(spec.dtype) for spec in others]

    def _run_tile(self, tile: np.ndarray, scale: int) -> np.ndarray:
        y, spec = np.asarray(self.run(*self.make_inputs(tile[None]))[0]), self.bundle.inputs[0]
        h, w = spec.shape[2:]
        expected = (*spec.shape[:2], h * scale, w * scale)
        if y.shape != expected or not np.isfinite(y).all():
            actual = f"{y.shape}, {int((~np.isfinite(y)).sum())} values not finite"
            raise CheckFailedError(
                f"bundle {self.bundle.path}: the program's output: found {actual}, expected {expected}. "
                "Run edgedyn check on it."
            )
        return self.bundle.outputs[0].decode(y[0].astype(np.float32, copy=False))


def open_session(path: str | Path) -> Session:
    """Verify the bundle in ``path``, try its programs in a child, and load them with their target's runtime.

    Example:
        session = edgedyn.open_session("out")
        denoised = session.process(pixels)  # (H, W, C) float32, any size

    Raises:
        BundleError: if the bundle does not verify, names a target that this edgedyn does not have, or its
            runtime cannot run it.
        TargetMissingError: if the target's runtime is not installed here.
        UsageError: if the program is not compiled yet.
    """
    bundle = open_tried(path)
    return Session(bundle, programs.load(bundle, targets.load(bundle.target)))


def open_verified(path: str | Path, *, rebuilt: Collection[str] = ()) -> Bundle:
    """Verify the bundle in ``path``, its target and the formats of its files; nothing is loaded.

    Raises:
        BundleError, TargetMissingError: as ``open_session``.
    """
    path = Path(path)
    bundle = open_bundle(path, rebuilt=rebuilt)
    try:
        target = targets.load(bundle.target)
    except RecipeError as error:
        raise BundleError(f"bundle {path}: {error} Or use the edgedyn that wrote the bundle.") from error
    if reason := target.missing():
        raise TargetMissingError(f"bundle {path} needs the target {bundle.target!r}: {reason}")
    programs.identify(bundle, rebuilt=rebuilt)
    return bundle


def open_tried(path: str | Path) -> Bundle:
    """Verify the bundle in ``path`` and try its programs in a child; nothing is loaded here.

    Raises:
        EdgedynError: as ``open_session``.
    """
    bundle = open_verified(path)
    if lacks := sorted(set(bundle.programs.values()) - set(bundle.manifest["files"])):
        raise UsageError(f"bundle {path} has no {lacks[0]} yet. Make it here: edgedyn compile {path}")
    programs.try_in_child(bundle, runtime_name(bundle))
    return bundle


def check(bundle: Session | str | Path) -> ValidationReport:
    """Run a bundle's validation vectors on this machine.

    Example:
        assert edgedyn.check("out").ok

    Args:
        bundle: an open session, or the path of a bundle, whose files are verified first.

    Returns:
        Two rows per vector and output, ``device:vectors``, with the largest and the root mean square
        difference from the expected output, and one row with the verdict of the build. A bundle without
        vectors is not ok.

    Raises:
        BundleError: if a vector is no array of the shape and dtype that the manifest gives.
        CheckFailedError: if the program returns another shape, or another number of outputs.
        EdgedynError: as ``open_session``, where ``bundle`` is a path.
    """
    session = bundle if isinstance(bundle, Session) else open_session(bundle)
    vectors = session.bundle.vectors
    failures = 0.0 if session.bundle.ok else 1.0
    rows = [Row("build:report", "failed_builds", failures, {"at_most": 0}, len(vectors))]
    for vector in vectors:
        specs = zip(vector.inputs, session.bundle.inputs, strict=True)
        arrays = [read_array(session.bundle.path, name, spec) for name, spec in specs]
        returned = [np.asarray(y) for y in session.run(*arrays)]
        outputs = zip(vector.outputs, session.bundle.outputs, strict=True)
        expected = [read_array(session.bundle.path, name, spec) for name, spec in outputs]
        shapes = [[y.shape for y in ys] for ys in (returned, expected)]
        if shapes[0] != shapes[1]:
            where = f"bundle {session.bundle.path}, {vector.inputs[0]}"
            raise CheckFailedError(f"{where}: found {shapes[0]}, expected {shapes[1]}. Build it again.")
        for index, (y, reference) in enumerate(zip(returned, expected, strict=True)):
            error = np.abs(y.astype(np.float64) - reference.astype(np.float64))
            worst, rms = float(error.max()), float(np.sqrt(np.mean(error**2)))
            name = vector.inputs[0] if len(expected) == 1 else vector.outputs[index]
            rows += [
                Row("device:vectors", f"max_abs[{name}]", worst, {"at_most": vector.max_abs[index]}, 1),
                Row("device:vectors", f"rms[{name}]", rms, {"at_most": vector.rms[index]}, 1),
            ]
    return ValidationReport(tuple(rows))


def _image_spec(bundle: Bundle) -> tuple[TensorSpec, int]:
    """Return the input of an image-to-image bundle, and how many times larger its output is."""
    spec, output = bundle.inputs[0], bundle.outputs[0]
    others = [other.role for other in bundle.inputs[1:]]
    shapes = [s.shape for s in bundle.inputs + bundle.outputs]
    pictured = len(spec.shape) == 4 and spec.shape[:2] in ((1, 1), (1, 3), (1, 4))
    if pictured and set(others) <= {CONSTANT, NOISE_LEVEL}:
        scale = output.shape[2] // spec.shape[2] if len(output.shape) == 4 else 0
        if scale and output.shape == (*spec.shape[:2], spec.shape[2] * scale, spec.shape[3] * scale):
            return spec, scale
    raise ImageError(
        f"bundle {bundle.path} takes and returns {shapes}; expected one (1, C, H, W) image, C 1, 3 or 4, and "
        "an image of a whole multiple of its size. Call its program through Session.run."
    )


def _check_pixels(pixels: np.ndarray, spec: TensorSpec) -> None:
    if pixels.ndim != 3 or not pixels.size or pixels.dtype.kind != "f":
        raise ImageError(
            f"found pixels {pixels.dtype} {pixels.shape}, expected floating-point (H, W, C), C 1, 3 or 4. "
            "Read the file with edgedyn.images.photo.read_image."
        )
    _check_channels(pixels.shape, spec)
    if not np.isfinite(pixels).all():
        count = int((~np.isfinite(pixels)).sum())
        raise ImageError(f"found {count} pixel values that are not finite, expected none. Fix the image.")


def _check_channels(shape: tuple[int, ...], spec: TensorSpec) -> None:
    if shape[2] in ((4,) if spec.shape[1] == 4 else (1, 3)):
        return
    expected, fix = (
        ("C 4, packed Bayer", "Save raw frames, read by edgedyn.images.bayer.read_packed_bayer, as .npy")
        if spec.shape[1] == 4
        else ("C 1 or 3", "Read the file with edgedyn.images.photo.read_image")
    )
    raise ImageError(f"found an image {shape}, expected (H, W, C), {expected}. {fix}.")


def _planes(pixels: np.ndarray, channels: int) -> list[np.ndarray]:
    """Return the inputs of the program, each (channels, H, W) float32."""
    bands = pixels.transpose(2, 0, 1).astype(np.float32)
    if len(bands) == channels:
        return [bands]
    return [np.repeat(band[None], channels, axis=0) for band in bands]


def runtime_name(bundle: Bundle) -> str:
    """Return the runtime that runs the bundle here, so that nobody takes a host's check for a device's."""
    module = importlib.import_module(f"edgedyn.targets.{bundle.target}.run")
    names = {module.runtime_name(bundle.path / file) for file in bundle.programs.values()}
    return ", ".join(sorted(names))
