"""Decibels of two programs that add in another order: how far apart they may lie."""

from __future__ import annotations

import math


def apart_db(change: float, rms_error: float) -> float:
    """Bound the distance of two PSNR or SQNR values whose errors differ by ``change`` per value, dB.

    |20 log10((e + d) / e)| <= 20 / ln 10 * d / (e - d) for an rms error e and a change of at most d < e.
    """
    assert change < rms_error
    return 20 / math.log(10) * change / (rms_error - change)


def rms_of_psnr(psnr_db: float) -> float:
    """Return the rms error of a PSNR with peak 1."""
    return 10.0 ** (-psnr_db / 20)
