"""What is lost when floats become MXFP4, as it is counted and measured."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import sqrt
from typing import Any

import numpy as np

from . import compiled
from .compiled_encoder import sum_squares
from .dtypes import BLOCK_VALUES

__all__ = ["MAGNITUDE", "EncodingLoss", "magnitudes", "measured_step"]

_Array = np.ndarray[Any, Any]

MAGNITUDE = np.uint16(0x7FFF)
"""The bits of a bfloat16 without its sign."""
_MAGNITUDES = np.array((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
"""By code without its sign."""
_MEASURED_RUN = 32
_MEASURED_STEP = 64
_MEASURED_ROWS = 1 << 14


def measured_step(rows: int) -> int:
    """Return on how many rows of a tensor the error is measured: 1 of so many.

    On all rows of a small tensor. Of a large one, 1 of 64 rows give the relative error as well, in
    a small part of the time.
    """
    return 1 if rows <= _MEASURED_ROWS else _MEASURED_STEP


@dataclass(slots=True)
class EncodingLoss:
    """What encoding loses of a tensor's values."""

    step: int = 1
    """The error is measured on 32 rows, then not on 32 * (step - 1), and so on."""
    blocks: int = 0
    """Blocks that were written."""
    kept: int = 0
    """Blocks of these with the bytes of the reference."""
    flushed: int = 0
    """Values that are not zero and became zero."""
    clipped: int = 0
    """Values larger than the largest code."""
    squared_error: float = 0.0
    """The sum of the squared errors, estimated from the rows that were measured."""
    squared_norm: float = 0.0
    """The sum of the squared values, from the same rows."""

    def add(self, other: EncodingLoss) -> None:
        """Add what was lost of other values."""
        for name in (field.name for field in fields(self) if field.name != "step"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def measure(self, values: _Array, blocks: _Array, scales: _Array, first_row: int) -> None:
        """Add the error of values, on the rows on which it is measured.

        Args:
            values: The bits of the values, [groups, 32, rows] uint16.
            blocks: Their blocks, [rows, groups, 16] uint8.
            scales: Their scale bytes, [rows, groups] uint8.
            first_row: The number of the first row.
        """
        period = _MEASURED_RUN * self.step
        runs = -(first_row % period), _MEASURED_RUN, period
        if compiled.is_enabled():
            sums = sum_squares(values, blocks, scales, _MAGNITUDES, runs)
        else:
            sums = _sum_squares(values, blocks, scales, runs)
        self.squared_error += self.step * sums[0]
        self.squared_norm += self.step * sums[1]

    @property
    def relative_error(self) -> float:
        """The norm of the errors relative to that of the values."""
        return sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


def _sum_squares(
    values: _Array, blocks: _Array, scales: _Array, runs: tuple[int, int, int]
) -> tuple[float, float]:
    """Do what `compiled_encoder.sum_squares` does."""
    squared_error = squared_norm = 0.0
    first, length, step = runs
    for begin in range(first, len(scales), step):
        run = slice(max(begin, 0), max(begin + length, 0))
        exact = magnitudes(values[..., run])
        codes = np.stack([blocks[run] & 7, blocks[run] >> 4 & 7], axis=-1)
        sizes = np.ldexp(1.0, scales[run].astype(int) - 127)[..., None]
        encoded = _MAGNITUDES[codes].reshape(*sizes.shape[:2], BLOCK_VALUES) * sizes
        error = exact - encoded.transpose(1, 2, 0)
        squared_error += float(np.vdot(error, error))
        squared_norm += float(np.vdot(exact, exact))
    return squared_error, squared_norm


def magnitudes(values: _Array) -> _Array:
    """Return the magnitudes of bfloat16 bits as float64."""
    bits = (values & MAGNITUDE).astype(np.uint32) << np.uint32(16)
    return bits.view(np.float32).astype(np.float64)
