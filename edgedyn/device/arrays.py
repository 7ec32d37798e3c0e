"""Pictures in ``.npy`` files through a bundle: packed Bayer (H, W, 4), and float pictures of 1 or 3 channels.

An array holds pixels, 0 black, 1 white, as ``Session.process`` takes them; so does the result, in float32.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from edgedyn.device.session import Progress, Session
from edgedyn.errors import ImageError
from edgedyn.files import replace_file
from edgedyn.reading import MAX_FILE_BYTES, open_regular

SUFFIX = ".npy"


def run_array(session: Session, image: Path, result: Path, progress: Progress) -> None:
    """Run the picture in one array file, and write the result into another.

    Raises:
        ImageError: for a file that is no such array, or a result of another suffix.
        EdgedynError: as ``Session.process``.
    """
    if result.suffix.lower() != SUFFIX:
        raise ImageError(f"result {result}: found suffix {result.suffix!r}, expected {SUFFIX} for an array.")
    try:
        with open_regular(image) as file:
            pixels = np.load(io.BytesIO(file.read(MAX_FILE_BYTES)), allow_pickle=False)
    except Exception as error:  # numpy, tokenize and the system raise all kinds
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise ImageError(
            f"image {image}: found no array ({first}), expected .npy of (H, W, C). Save it again."
        ) from error
    if not isinstance(pixels, np.ndarray):
        raise ImageError(f"image {image}: found an archive, expected one array. Save it with numpy.save.")
    stream = io.BytesIO()
    np.save(stream, session.process(pixels, progress=progress))
    replace_file(result, stream.getvalue())
