"""What is lost when floats become MXFP4, as it is counted and measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from math import sqrt
from typing import Any

import numpy as np

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
        for run in self._measured_runs(first_row, len(scales)):
            exact = magnitudes(values[..., run])
            codes = np.stack([blocks[run] & 7, blocks[run] >> 4 & 7], axis=-1)
            sizes = np.ldexp(1.0, scales[run].astype(int) - 127)[..., None]
            encoded = _MAGNITUDES[codes].reshape(*sizes.shape[:2], BLOCK_VALUES) * sizes
            error = exact - encoded.transpose(1, 2, 0)
            self.squared_error += self.step * float(np.vdot(error, error))
            self.squared_norm += self.step * float(np.vdot(exact, exact))

    def _measured_runs(self, first_row: int, rows: int) -> Iterator[slice]:
        """Yield the rows of these on which the error is measured."""
        if self.step == 1:
            yield slice(0, rows)
            return
        period = _MEASURED_RUN * self.step
        for begin in range(-(first_row % period), rows, period):
            if begin + _MEASURED_RUN > 0:
                yield slice(max(begin, 0), min(begin + _MEASURED_RUN, rows))

    @property
    def relative_error(self) -> float:
        """The norm of the errors relative to that of the values."""
        return sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


def magnitudes(values: _Array) -> _Array:
    """Return the magnitudes of bfloat16 bits as float64."""
    bits = (values & MAGNITUDE).astype(np.uint32) << np.uint32(16)
    return bits.view(np.float32).astype(np.float64)
