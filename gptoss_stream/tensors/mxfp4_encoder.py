"""Encodes floats to MXFP4 blocks and scales, by one of the rules in `mxfp4_rules`.

How it works: the bits of a bfloat16 magnitude are an integer of the same order, so the largest
magnitude of a block is an integer maximum. The bits of a magnitude minus those of a quarter of the
scale are a *distance*, 128 for each power of two, and the value's code is the number of midpoints
that the distance exceeds. Blocks are handled side by side, so that each operation works on long
runs of memory: arrays of a tile have the axes [groups, 32, rows].
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
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

_MAGNITUDE = np.uint16(0x7FFF)
_LARGEST_SCALE = largest_scale(DType.BF16)
_VANISHING = (np.ldexp(np.float32(1), np.arange(256) - 277).view(np.uint32) >> 16).astype(np.uint16)
"""By scale byte, the bits of the largest magnitude that is zero when it is divided by the scale in
float32, as nvidia-modelopt does."""
_LINEAR_SCALE = 3
"""The smallest scale byte with which a quarter of the scale is a normal number: below it, bits are
not linear in the exponent."""
_LINEAR = (_LINEAR_SCALE + 2) << 7
"""The bits of the smallest maximum with such a scale, whatever the rule."""

_TILE_GROUPS, _TILE_ROWS = 6, 960
"""Blocks that are encoded at a time. Arrays of this size stay in a processor's cache, and are large
enough that calls cost little. The number of rows is no power of two: the lines of such arrays fall
on the same places in the cache when they are transposed."""

_memory = threading.local()


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

    @property
    def relative_error(self) -> float:
        """The norm of the errors relative to that of the values."""
        return sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


class _Scratch:
    """Memory for a tile that a thread uses again: new pages would cost more than the arithmetic."""

    def __init__(self) -> None:
        size = _TILE_GROUPS * BLOCK_VALUES * _TILE_ROWS
        self._wide = np.empty(size, np.uint16)
        self._narrow = [np.empty(size, np.uint8) for _ in range(2)]

    def arrays(self, shape: tuple[int, ...]) -> tuple[_Array, _Array, _Array]:
        """Return an array of uint16 and two of uint8, of a shape."""
        size, (codes, flags) = prod(shape), self._narrow
        wide = self._wide[:size].reshape(shape)
        return wide, codes[:size].reshape(shape), flags[:size].reshape(shape)


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
    values: _Array,
    rule: Rule,
    blocks: _Array,
    scales: _Array,
    loss: EncodingLoss | None,
    first_row: int,
) -> None:
    """Encode values [groups, 32, rows] (see `encode`)."""
    wide, codes, flags = _memory.scratch.arrays(values.shape)
    is_set = flags.view(bool)
    np.bitwise_and(values, _MAGNITUDE, out=wide)
    largest = np.maximum.reduce(wide, axis=1)  # [groups, rows]
    are_linear = int(largest.min()) >= _LINEAR
    scale = _scale(largest, rule, are_linear=are_linear)
    if loss is not None:
        loss.flushed += int(np.count_nonzero(wide))
    quarter = (scale if are_linear else np.maximum(scale, _LINEAR_SCALE)) - np.uint16(2)
    quarter <<= np.uint16(7)
    np.subtract(wide, quarter[:, None], out=wide)
    if not are_linear:
        _measure_tiny(values, scale, largest, wide)
    # Signed: values below a quarter of their scale have a negative distance.
    distances = wide.view(np.int16)
    np.greater(distances, np.int16(rule.midpoints[0]), out=codes.view(bool))
    if loss is not None:
        loss.flushed -= int(np.count_nonzero(codes.view(bool)))
    for midpoint in rule.midpoints[1:]:
        np.greater(distances, np.int16(midpoint), out=is_set)
        np.add(codes, flags, out=codes)
    if loss is not None:
        if rule.clips:
            np.greater(distances, np.int16(_LARGEST), out=is_set)
            loss.clipped += int(np.count_nonzero(is_set))
        loss.blocks += scale.size
        for run in _measured_runs(first_row, loss.step, scale.shape[1]):
            _add_error(loss, values[..., run], scale[:, None, run], codes[..., run])
    np.greater(values, _MAGNITUDE, out=is_set)
    if rule.zero_is_negative:
        np.bitwise_and(values, _MAGNITUDE, out=wide)
        is_set |= wide <= _VANISHING[scale][:, None]
    np.multiply(flags, np.uint8(8), out=flags)
    np.bitwise_or(codes, flags, out=codes)
    # The second value of two is in the high nibble.
    packed = codes[:, 1::2] * np.uint8(16)
    packed |= codes[:, ::2]
    blocks[...] = packed.transpose(2, 0, 1)
    scales[...] = scale.T


def _measured_runs(first_row: int, step: int, rows: int) -> Iterator[slice]:
    """Yield the rows of a tile on which the error is measured.

    Args:
        first_row: The number of the tile's first row.
        step: See `EncodingLoss`.
        rows: The number of rows of the tile.
    """
    if step == 1:
        yield slice(0, rows)
        return
    period = _MEASURED_RUN * step
    for begin in range(-(first_row % period), rows, period):
        if begin + _MEASURED_RUN > 0:
            yield slice(max(begin, 0), min(begin + _MEASURED_RUN, rows))


def _scale(largest: _Array, rule: Rule, *, are_linear: bool) -> _Array:
    """Return the scale bytes of blocks, [groups, rows] uint16.

    Args:
        largest: The bits of the largest magnitude of each block, [groups, rows] uint16.
        rule: The rule.
        are_linear: Whether all of them are at least `_LINEAR`.

    Raises:
        ValueError: If a value is infinite or NaN, or a code would be infinite in bfloat16.
    """
    if (int(largest.max()) + rule.carry >> 7) - 2 > _LARGEST_SCALE:
        raise ValueError("values that are infinite or NaN, or codes that are infinite in bfloat16")
    exponents = largest + np.uint16(rule.carry)
    exponents >>= np.uint16(7)
    if are_linear:
        exponents -= np.uint16(2)
        return exponents
    scale: _Array = np.maximum(exponents, 2) - np.uint16(2)
    return np.maximum(scale, (largest > 0) * np.uint16(rule.smallest_scale))


def _measure_tiny(values: _Array, scale: _Array, largest: _Array, distances: _Array) -> None:
    """Correct the distances in blocks with scales so small that bits are not linear.

    Args:
        values: The bits of the values, [groups, 32, rows] uint16.
        scale: The scale bytes, [groups, rows] uint16.
        largest: The bits of the largest magnitude of each block, [groups, rows] uint16.
        distances: The distances as bits of int16, [groups, 32, rows] uint16.
    """
    group, row = np.nonzero((scale < _LINEAR_SCALE) & (largest > 0))
    exponents = 129 - scale[group, row].astype(int)[:, None]
    relative = np.ldexp(_magnitudes(values[group, :, row]), exponents)
    mantissa, exponent = np.frexp(np.maximum(relative, 1.0))  # mantissas from 0.5 to 1
    distances[group, :, row] = 128 * (exponent + 2 * mantissa - 2)


def _magnitudes(values: _Array) -> _Array:
    """Return the magnitudes of bfloat16 bits as float64."""
    bits = (values & _MAGNITUDE).astype(np.uint32) << np.uint32(16)
    return bits.view(np.float32).astype(np.float64)


def _add_error(loss: EncodingLoss, values: _Array, scale: _Array, codes: _Array) -> None:
    """Add the error of values to a loss.

    Args:
        loss: The loss.
        values: The bits of the values, [groups, 32, rows] uint16.
        scale: The scale bytes, [groups, 1, rows] uint16.
        codes: The codes without sign, [groups, 32, rows] uint8.
    """
    exact = _magnitudes(values)
    error = exact - _MAGNITUDES[codes] * np.ldexp(1.0, scale.astype(int) - 127)
    loss.squared_error += loss.step * float(np.vdot(error, error))
    loss.squared_norm += loss.step * float(np.vdot(exact, exact))
