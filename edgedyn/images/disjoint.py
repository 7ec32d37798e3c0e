"""Rules between two image sets, of which one calibrates or trains a network and the other validates it."""

from __future__ import annotations

from edgedyn.errors import CalibrationError
from edgedyn.images.image_set import CalibrationSet, digest_pixels
from edgedyn.images.pixels import read_pixels


def refuse_overlap(calibration: CalibrationSet, validation: CalibrationSet) -> None:
    """Refuse sets that share an image: numbers measured on calibration images prove nothing.

    Raises:
        CalibrationError: naming the shared files.
    """
    seen = {digest: path for path, digest in calibration.files}
    digests = list(validation.files)
    if any(image.pixels is not None for image in calibration.images):  # their digests are of pixels
        digests += [(path, digest_pixels(read_pixels(path, validation.raw))) for path, _ in validation.files]
    shared = [f"{path.name} ({seen[digest].name})" for path, digest in digests if digest in seen]
    if shared:
        raise CalibrationError(
            f"calibration set {calibration.name!r} and validation set {validation.name!r} share "
            f"{len(shared)} files (by content): {', '.join(shared[:5])}. Take them out of one set."
        )


def refuse_other_clipping(calibration: CalibrationSet, validation: CalibrationSet) -> None:
    """Refuse a set that clips its noise beside one that does not: a network is trained for one of the two.

    Raises:
        CalibrationError: naming both rules.
    """
    rules = [(s.name, s.noise.clip) for s in (calibration, validation) if s.noise.is_added]
    if len({clip for _, clip in rules}) > 1:
        one, other = (f"{name!r} has clip: {str(clip).lower()}" for name, clip in rules)
        raise CalibrationError(
            f"calibration set {one}, and validation set {other}; expected the same for both, as in the "
            "network's training. Fix a manifest, or set noise: in the recipe, for both."
        )
