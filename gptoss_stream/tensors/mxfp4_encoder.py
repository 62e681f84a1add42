"""Encodes floats to MXFP4 blocks and scales, by one of the rules in `mxfp4_rules`.

How it works: the bits of a bfloat16 magnitude are an integer of the same order, so the largest
magnitude of a block is an integer maximum. The bits of a magnitude minus those of a quarter of the
scale are a *distance*, 128 for each power of two, and the value's code is the number of midpoints
that the distance exceeds. Blocks are handled side by side, so that each operation works on long
runs of memory: arrays of a tile have the axes [groups, 32, rows].
"""

from __future__ import annotations

import threading
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np

from . import compiled, compiled_encoder
from .compiled_encoder import Distances
from .dtypes import BLOCK_VALUES, DType
from .encoding_loss import MAGNITUDE, EncodingLoss, magnitudes
from .mxfp4 import largest_scale
from .mxfp4_rules import RULES, Rule

__all__ = ["encode"]

_Array = np.ndarray[Any, Any]

_LARGEST = 576
"""The largest code's magnitude, 6, as a distance."""

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


class _Scratch:
    """Memory for a tile that a thread uses again: new pages would cost more than the arithmetic."""

    def __init__(self) -> None:
        size = _TILE_GROUPS * BLOCK_VALUES * _TILE_ROWS
        self._wide = np.empty(size, np.uint16)
        self._narrow = [np.empty(size, np.uint8) for _ in range(2)]

    def arrays(self, shape: tuple[int, ...]) -> tuple[_Array, _Array, _Array]:
        """Return an array of uint16 and two of uint8, of a shape."""
        size, (codes, flags) = prod(shape), self._narrow
        return self.planes(shape), codes[:size].reshape(shape), flags[:size].reshape(shape)

    def planes(self, shape: tuple[int, ...]) -> _Array:
        """Return an array of uint16 of a shape."""
        if prod(shape) > len(self._wide):
            self._wide = np.empty(prod(shape), np.uint16)
        return self._wide[: prod(shape)].reshape(shape)


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
    counted = EncodingLoss() if loss is None else loss
    counted.blocks += scales.size
    # All at once, if possible: threads wait for each other between calls.
    is_done = _encode_compiled(planes, RULES[rule], blocks, scales, counted)
    if not is_done:
        _encode_tiles(planes, RULES[rule], blocks, scales, counted)
    if loss is not None:
        loss.measure(planes, blocks, scales, first_row)


def _encode_tiles(
    planes: _Array, rule: Rule, blocks: _Array, scales: _Array, loss: EncodingLoss
) -> None:
    """Encode values [groups, 32, rows], some groups and rows at a time."""
    rows, groups = scales.shape
    for first_group in range(0, groups, _TILE_GROUPS):
        some_groups = slice(first_group, first_group + _TILE_GROUPS)
        for row in range(0, rows, _TILE_ROWS):
            some_rows = slice(row, row + _TILE_ROWS)
            tile = planes[some_groups, :, some_rows], rule, blocks[some_rows, some_groups]
            if not _encode_compiled(*tile, scales[some_rows, some_groups], loss):
                _encode_by_numpy(*tile, scales[some_rows, some_groups], loss)


def _encode_compiled(
    values: _Array, rule: Rule, blocks: _Array, scales: _Array, loss: EncodingLoss
) -> bool:
    """Encode values by compiled code, if it is enabled.

    Returns:
        Whether they are encoded: not if a block is zero, tiny, NaN, infinite or too large.
    """
    if not compiled.is_enabled():
        return False
    groups, length, rows = values.shape
    if values.strides[2] != values.itemsize:
        planes = _memory.scratch.planes(values.shape)
        matrix = values.transpose(2, 0, 1).reshape(rows, groups * length)
        if not compiled_encoder.copy_transposed(matrix, planes.reshape(groups * length, rows)):
            planes[...] = values
        values = planes
    limits = _LINEAR, ((_LARGEST_SCALE + 3) << 7) - rule.carry - 1
    if not compiled_encoder.find_scales(values, rule.carry, limits, scales):
        return False
    flushed, clipped = compiled_encoder.encode_planes(values, scales, _distances(rule), blocks)
    loss.flushed += flushed
    loss.clipped += clipped
    return True


@lru_cache
def _distances(rule: Rule) -> Distances:
    """Return what compiled code must know of a rule."""
    zeros = _VANISHING if rule.zero_is_negative else np.full(256, -1)
    midpoints = np.array([*rule.midpoints, _LARGEST], np.int16)
    return Distances(midpoints, zeros.astype(np.int16))


def _encode_by_numpy(
    values: _Array, rule: Rule, blocks: _Array, scales: _Array, loss: EncodingLoss
) -> None:
    """Encode any values.

    Raises:
        ValueError: See `encode`.
    """
    wide, codes, flags = _memory.scratch.arrays(values.shape)
    is_set = flags.view(bool)
    np.bitwise_and(values, MAGNITUDE, out=wide)
    largest = np.maximum.reduce(wide, axis=1)  # [groups, rows]
    are_linear = int(largest.min()) >= _LINEAR
    scale = _scale(largest, rule, are_linear=are_linear)
    loss.flushed += int(np.count_nonzero(wide))
    quarter = (scale if are_linear else np.maximum(scale, _LINEAR_SCALE)) - np.uint16(2)
    quarter <<= np.uint16(7)
    np.subtract(wide, quarter[:, None], out=wide)
    if not are_linear:
        _measure_tiny(values, scale, largest, wide)
    # Signed: values below a quarter of their scale have a negative distance.
    distances = wide.view(np.int16)
    np.greater(distances, np.int16(rule.midpoints[0]), out=codes.view(bool))
    loss.flushed -= int(np.count_nonzero(codes.view(bool)))
    for midpoint in rule.midpoints[1:]:
        np.greater(distances, np.int16(midpoint), out=is_set)
        np.add(codes, flags, out=codes)
    if rule.clips:
        np.greater(distances, np.int16(_LARGEST), out=is_set)
        loss.clipped += int(np.count_nonzero(is_set))
    np.greater(values, MAGNITUDE, out=is_set)
    if rule.zero_is_negative:
        np.bitwise_and(values, MAGNITUDE, out=wide)
        is_set |= wide <= _VANISHING[scale][:, None]
    np.multiply(flags, np.uint8(8), out=flags)
    np.bitwise_or(codes, flags, out=codes)
    # The second value of two is in the high nibble.
    packed = codes[:, 1::2] * np.uint8(16)
    packed |= codes[:, ::2]
    blocks[...] = packed.transpose(2, 0, 1)
    scales[...] = scale.T


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
    relative = np.ldexp(magnitudes(values[group, :, row]), exponents)
    mantissa, exponent = np.frexp(np.maximum(relative, 1.0))  # mantissas from 0.5 to 1
    distances[group, :, row] = 128 * (exponent + 2 * mantissa - 2)
