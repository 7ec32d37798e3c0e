"""Calls of ops for the drivers: arguments, exact results, and the errors of a driver's results."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import block_check
import numpy as np
import torch
from drivers import Job, Result
from kernel_check import UNIT, rounding
from torch import Tensor

from edgedyn import ops

OPS = ops.load_all()


@dataclass(frozen=True)
class Quantization:
    """Affine INT8 of x and of y: real = (stored - zero_point) * scale."""

    x_scale: float
    x_zero_point: int
    y_scale: float
    y_zero_point: int


@dataclass(frozen=True, eq=False)
class OpCall:
    """An op with all its arguments; the values of x are integers where they are INT8."""

    op: ops.Op
    args: tuple[Any, ...]
    int8: Quantization | None = None
    shift: int = 0

    @property
    def is_int8(self) -> bool:
        """Whether it calls the INT8 variant."""
        return self.int8 is not None

    def kernel_job(self) -> Job:
        """Return the call of the op's kernel."""
        x, *rest = self.args
        y = torch.full(self.exact.shape, 77, dtype=torch.int8 if self.int8 else torch.float32)
        if self.int8 is None:
            return Job(f"edgedyn::{self.op.name}.out", (x, *rest, y), self.shift)
        q = self.int8
        values = (x.to(torch.int8), q.x_scale, q.x_zero_point, *rest, q.y_scale, q.y_zero_point, y)
        return Job(f"edgedyn::{self.op.name}_int8.out", values, self.shift)

    def formula_job(self) -> Job:
        """Return the call of the op's formula."""
        return Job(self.op.name, (*self.args, torch.full(self.exact.shape, 77.0)), self.shift)

    @functools.cached_property
    def exact(self) -> np.ndarray:
        """The result of the op's definition in float64."""
        return self.op.overload(*self._real_args()).numpy()

    @functools.cached_property
    def rounding(self) -> np.ndarray:
        """The largest error of float32 against ``exact``, at every output."""
        return rounding(self.op, self._real_args()).numpy()

    def discrepancy(self, result: Result) -> str:
        """Describe the error of a result; the empty string for a right one."""
        if result.y is None:
            return result.message or "failed without a word"
        if result.y.shape != self.exact.shape:
            return f"shape {result.y.shape}, expected {self.exact.shape}"
        with np.errstate(invalid="ignore", over="ignore"):
            wrong = self._wrong(result.y)
        if not wrong.any():
            return ""
        at = tuple(map(int, np.argwhere(wrong)[0]))
        return (
            f"{result.y[at]} at {at} of {self.exact.shape}, expected {self._expected(at)}; "
            f"{wrong.sum()} are wrong"
        )

    def _expected(self, at: tuple[int, ...]) -> str:
        return f"{(self._steps() if self.int8 else self.exact)[at]:.9g}"

    def _wrong(self, y: np.ndarray) -> np.ndarray:
        if self.int8:
            return self._wrong_int8(y)
        is_finite = np.isfinite(self.exact)
        same = (y == self.exact) | (np.isnan(y) & np.isnan(self.exact))
        return ~np.where(is_finite, np.abs(y - self.exact) <= self.rounding, same)

    def _steps(self) -> np.ndarray:
        assert self.int8 is not None
        return np.clip(self.exact / self.int8.y_scale + self.int8.y_zero_point, -128, 127)

    def _wrong_int8(self, y: np.ndarray) -> np.ndarray:
        """Allow half a step, the real value's rounding, and two roundings of a value of up to 256 steps."""
        assert self.int8 is not None
        allowed = 0.5 + self.rounding / self.int8.y_scale + 4 * UNIT * 256
        # NaN has no INT8
        return np.where(np.isnan(self.exact), False, ~(np.abs(y - self._steps()) <= allowed))

    def _real_args(self) -> tuple[Any, ...]:
        x, *rest = (a.double() if isinstance(a, Tensor) else a for a in self.args)
        if self.int8 is not None:
            x = (x - self.int8.x_zero_point) * self.int8.x_scale
        return (x, *rest)


class BlockInt8Call(OpCall):
    """A call of ``inverted_residual_int8`` with all its arguments; x and y are float."""

    @property
    def is_int8(self) -> bool:
        """Whether it calls the INT8 variant: it does."""
        return True

    def kernel_job(self) -> Job:
        """Return the call of the op's kernel."""
        y = torch.full(self.exact.shape, 77.0)
        return Job("edgedyn::inverted_residual_int8.out", (*self.args, y), self.shift)

    @functools.cached_property
    def exact(self) -> np.ndarray:
        """The middle of ``bounds``."""
        return sum(self.bounds) / 2

    @functools.cached_property
    def bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """The least and the largest result at every output."""
        low, high = block_check.int8_bounds(self.args)
        return low.numpy(), high.numpy()

    def _expected(self, at: tuple[int, ...]) -> str:
        return " to ".join(f"{bound[at]:.9g}" for bound in self.bounds)

    def _wrong(self, y: np.ndarray) -> np.ndarray:
        low, high = self.bounds
        # NaN has no INT8
        return np.where(np.isnan(self.exact), False, ~((low <= y) & (y <= high)))


def to_int8(call: OpCall, zero_points: tuple[int, int] = (11, -50), steps: float = 90) -> OpCall:
    """Return a float call as INT8; the largest x is 100 quantization steps, the largest y ``steps``.

    The y of an inverted residual is float: there ``steps`` are of both hidden maps.
    """
    if block_check.is_block(call.op):
        return BlockInt8Call(call.op, block_check.int8_args(call.args, zero_points, steps), None, call.shift)
    x, *rest = call.args
    y = np.abs(call.exact[np.isfinite(call.exact)]).max(initial=0)
    x_scale = float(x.abs().max()) / 100 if x.numel() else 1.0
    stored = ((x / x_scale).round() + zero_points[0]).clamp(-128, 127)
    q = Quantization(x_scale, zero_points[0], float(y) / steps or 1.0, zero_points[1])
    return OpCall(call.op, (stored, *rest), q, call.shift)
