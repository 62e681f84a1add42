"""Encodes floats to MXFP4 blocks and scales, by one of the rules in `mxfp4_rules`.

How it works: the bits of a bfloat16 magnitude are an integer of the same order, so the largest
magnitude of a block is an integer maximum. The bits of a magnitude minus those of a quarter of the
scale are a *distance*, 128 for each power of two, and the value's code is the number of midpoints
that the distance exceeds. Blocks are handled side by side, so that each operation works on long
runs of memory: arrays of a tile have the axes [groups, 32, rows].
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, fields
from math import prod, sqrt
from typing import Any

import numpy as np

from .dtypes import BLOCK_VALUES, DType
from .mxfp4 import largest_scale
from .mxfp4_rules import RULES, Rule

__all__ = ["EncodingLoss", "encode", "measured_step"]

_Array = np.ndarray[Any, Any]

_LARGEST = 576
"""The largest code's magnitude, 6, as a distance."""
_MAGNITUDES = np.array((0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))

_INFINITY = 0x7F80
_LARGEST_SCALE = largest_scale(DType.BF16)
_VANISHING = (np.ldexp(np.float32(1), np.arange(256) - 277).view(np.uint32) >> 16).astype(np.uint16)
"""By scale byte, the bits of the largest magnitude that is zero when it is divided by the scale in
float32, as nvidia-modelopt does."""
_LINEAR_SCALE = 3
"""The smallest scale byte with which a quarter of the scale is a normal number: below it, bits are
not linear in the exponent."""

_TILE_GROUPS, _TILE_ROWS = 3, 1024
"""Blocks that are encoded at a time. Arrays of this size stay in a processor's cache, and are large
enough that calls cost little."""

_memory = threading.local()


_MEASURED_ROWS = 1 << 14
_MEASURED_STEP = 16


def measured_step(rows: int) -> int:
    """Return on how many rows of a tensor the error is measured: 1 of so many.

    On all rows of a small tensor. Of a large one, 1 of 16 rows give the relative error as well, in
    a tenth of the time.
    """
    return 1 if rows <= _MEASURED_ROWS else _MEASURED_STEP


@dataclass(slots=True)
class EncodingLoss:
    """What encoding loses of a tensor's values."""

    step: int = 1
    """The error is measured on the rows with numbers that are multiples of this."""
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

    @property
    def relative_error(self) -> float:
        """The norm of the errors relative to that of the values."""
        return sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


class _Scratch:
    """Memory for a tile that a thread uses again: new pages would cost more than the arithmetic."""

    def __init__(self) -> None:
        shape = _TILE_GROUPS * BLOCK_VALUES * _TILE_ROWS
        self._wide = [np.empty(shape, np.uint16) for _ in range(3)]
        self._narrow = [np.empty(shape, np.uint8) for _ in range(2)]

    def arrays(self, shape: tuple[int, ...]) -> list[_Array]:
        """Return three arrays of uint16 and two of uint8, of a shape."""
        memories: list[_Array] = [*self._wide, *self._narrow]
        return [memory[: prod(shape)].reshape(shape) for memory in memories]


def encode(
    values: _Array,
    rule: str,
    blocks: _Array,
    scales: _Array,
    loss: EncodingLoss | None = None,
    first_row: int = 0,
) -> None:
    """Encode rows of bfloat16 to MXFP4.

    Args:
        values: The bits of the values, [rows, groups * 32] uint16. The transpose of a C-contiguous
            array is encoded fastest.
        rule: The name of a rule, one of `RULES`.
        blocks: Memory for the blocks, [rows, groups, 16] uint8. The first value of two is in the
            low nibble.
        scales: Memory for the scales, [rows, groups] uint8.
        loss: What is lost is added to it.
        first_row: The number of the first row, for `EncodingLoss.step`.

    Raises:
        ValueError: If a value is infinite or NaN, or so large that its code would be infinite in
            bfloat16.
    """
    rows, groups = scales.shape
    planes = values.T.reshape(groups, BLOCK_VALUES, rows)
    if not hasattr(_memory, "scratch"):
        _memory.scratch = _Scratch()
    for first_group in range(0, groups, _TILE_GROUPS):
        some_groups = slice(first_group, first_group + _TILE_GROUPS)
        for row in range(0, rows, _TILE_ROWS):
            some_rows = slice(row, row + _TILE_ROWS)
            _encode_tile(
                planes[some_groups, :, some_rows],
                RULES[rule],
                blocks[some_rows, some_groups],
                scales[some_rows, some_groups],
                loss,
                first_row + row,
            )


def _encode_tile(
    source: _Array,
    rule: Rule,
    blocks: _Array,
    scales: _Array,
    loss: EncodingLoss | None,
    first_row: int,
) -> None:
    """Encode values [groups, 32, rows] (see `encode`)."""
    values, magnitudes, distances, codes, exceeds = _memory.scratch.arrays(source.shape)
    np.copyto(values, source)
    np.bitwise_and(values, np.uint16(0x7FFF), out=magnitudes)
    largest = magnitudes.max(axis=1)  # [groups, rows]
    if largest.max(initial=0) >= _INFINITY:
        raise ValueError("values that are infinite or NaN")
    exponents = (largest + np.uint16(rule.carry)) >> np.uint16(7)
    scale = np.maximum(exponents, 2) - np.uint16(2)
    np.maximum(scale, (largest > 0) * np.uint16(rule.smallest_scale), out=scale)
    if scale.max(initial=0) > _LARGEST_SCALE:
        raise ValueError("values whose codes are infinite in bfloat16")
    _measure(magnitudes, scale, largest, distances)
    first, *others = rule.midpoints
    np.greater(distances, np.uint16(first), out=codes.view(bool))
    if loss is not None:
        is_zero = np.equal(magnitudes, np.uint16(0), out=exceeds.view(bool))
        nonzero = codes.size - int(np.count_nonzero(is_zero))
        loss.flushed += nonzero - int(np.count_nonzero(codes.view(bool)))
    for midpoint in others:
        np.greater(distances, np.uint16(midpoint), out=exceeds.view(bool))
        np.add(codes, exceeds, out=codes)
    if loss is not None:
        if rule.clips:
            exceeding = np.greater(distances, np.uint16(_LARGEST), out=exceeds.view(bool))
            loss.clipped += int(np.count_nonzero(exceeding))
        loss.blocks += scale.size
        measured = slice(-first_row % loss.step, None, loss.step)
        _add_error(loss, magnitudes[..., measured], scale[:, None, measured], codes[..., measured])
    np.right_shift(values, np.uint16(12), out=values)
    np.copyto(exceeds, values, casting="unsafe")
    np.bitwise_and(exceeds, np.uint8(8), out=exceeds)
    np.bitwise_or(codes, exceeds, out=codes)
    if rule.zero_is_negative:
        np.less_equal(magnitudes, _VANISHING[scale][:, None], out=exceeds.view(bool))
        codes |= exceeds * np.uint8(8)
    # The second value of two is in the high nibble.
    packed = codes[:, 1::2] * np.uint8(16)
    packed |= codes[:, ::2]
    blocks[...] = packed.transpose(2, 0, 1)
    scales[...] = scale.T


def _measure(magnitudes: _Array, scale: _Array, largest: _Array, distances: _Array) -> None:
    """Compute the distances of values from a quarter of their scale; 0 for those below it.

    Args:
        magnitudes: The bits of the magnitudes, [groups, 32, rows] uint16.
        scale: The scale bytes, [groups, rows] uint16.
        largest: The largest magnitude of each block, [groups, rows] uint16.
        distances: Memory for the distances, [groups, 32, rows] uint16.
    """
    quarter = (np.maximum(scale, _LINEAR_SCALE) - np.uint16(2)) << np.uint16(7)
    np.maximum(magnitudes, quarter[:, None], out=distances)
    np.subtract(distances, quarter[:, None], out=distances)
    is_tiny = (scale < _LINEAR_SCALE) & (largest > 0)
    if is_tiny.any():
        group, row = np.nonzero(is_tiny)
        relative = np.ldexp(
            _as_float(magnitudes[group, :, row]), 129 - scale[group, row].astype(int)[:, None]
        )
        mantissa, exponent = np.frexp(np.maximum(relative, 1.0))  # mantissas from 0.5 to 1
        distances[group, :, row] = 128 * (exponent + 2 * mantissa - 2)


def _as_float(magnitudes: _Array) -> _Array:
    """Return bfloat16 magnitudes as float64."""
    bits = magnitudes.astype(np.uint32) << np.uint32(16)
    return bits.view(np.float32).astype(np.float64)


def _add_error(loss: EncodingLoss, magnitudes: _Array, scale: _Array, codes: _Array) -> None:
    """Add the error of values to a loss.

    Args:
        loss: The loss.
        magnitudes: The bits of the magnitudes, [groups, 32, rows] uint16.
        scale: The scale bytes, [groups, 1, rows] uint16.
        codes: The codes without sign, [groups, 32, rows] uint8.
    """
    exact = _as_float(magnitudes)
    error = exact - _MAGNITUDES[codes] * np.ldexp(1.0, scale.astype(int) - 127)
    loss.squared_error += loss.step * float(np.vdot(error, error))
    loss.squared_norm += loss.step * float(np.vdot(exact, exact))
