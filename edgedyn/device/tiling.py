"""Tiles that cover an image, and the weight of each of their pixels."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from edgedyn.errors import BundleError


@dataclass(frozen=True, eq=False)
class Tile:
    """One position of the program on the image, with the weights of its result.

    Attributes:
        top: first row.
        left: first column.
        rows: (tile height,) float32, the weight of each row.
        columns: (tile width,) float32, the weight of each column; a pixel's weight is the product.
    """

    top: int
    left: int
    rows: np.ndarray
    columns: np.ndarray


def tiles(height: int, width: int, tile_h: int, tile_w: int, overlap: int) -> list[Tile]:
    """Place tiles evenly over an image, the last ones ending at its borders.

    Args:
        height: rows of the image; if fewer than ``tile_h``, one tile from row 0 reaches beyond.
        width: columns of the image, likewise.
        tile_h: rows of a tile.
        tile_w: columns of a tile.
        overlap: least number of pixels that neighbours share, from 0 to less than a tile.

    Raises:
        BundleError: if the overlap is not less than a tile.
    """
    limit = min(tile_h, tile_w) - 1
    if not 0 <= overlap <= limit:
        raise BundleError(
            f"tile overlap: found {overlap}, expected 0 to {limit}. Set tile.overlap in the recipe and build "
            "again."
        )
    columns = _spans(width, tile_w, overlap)
    return [Tile(top, left, u, v) for top, u in _spans(height, tile_h, overlap) for left, v in columns]


def _spans(size: int, tile: int, overlap: int) -> list[tuple[int, np.ndarray]]:
    count = 1 if size <= tile else -(-(size - overlap) // (tile - overlap))
    starts = [i * (size - tile) // (count - 1) for i in range(count)] if count > 1 else [0]
    middles = [(left + tile + right) / 2 for left, right in pairwise(starts)]
    edges = [-np.inf, *middles, np.inf]
    # A tile's weight is the difference of two ramps that it shares with its neighbours, so that the weights
    # of a pixel sum to one however many tiles meet there. A ramp of 1 pixel is a plain cut.
    ramp = max(overlap / 2, 1.0)
    spans = []
    for start, before, after in zip(starts, edges[:-1], edges[1:], strict=True):
        centres = start + np.arange(tile) + 0.5
        rise, fall = (np.clip((centres - edge) / ramp + 0.5, 0, 1) for edge in (before, after))
        spans.append((start, (rise - fall).astype(np.float32)))
    return spans


def padded(plane: np.ndarray, tile_h: int, tile_w: int) -> np.ndarray:
    """Continue an image that is smaller than a tile by reflection, below and on the right."""
    missing = [max(0, tile - size) for tile, size in zip((tile_h, tile_w), plane.shape[1:], strict=True)]
    return np.pad(plane, ((0, 0), (0, missing[0]), (0, missing[1])), mode="reflect")
