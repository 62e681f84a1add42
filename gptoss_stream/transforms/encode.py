"""Makes rows of MXFP4 of floats: the blocks and the scales of a row, both in one pass.

`materialize_rows` calls it for a segment with an encoding, and keeps one of the two. A writer that
needs both calls it itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..checkpoint.reader import Reader
from ..errors import TensorError
from ..tensors.cast import STORAGE, cast
from ..tensors.dtypes import BLOCK_NBYTES, BLOCK_VALUES, DType
from ..tensors.encoding_loss import EncodingLoss
from ..tensors.mxfp4 import NAN_SCALE, decode
from ..tensors.mxfp4_encoder import encode
from .mxfp4_operand import Packed
from .operands import raw_tensors, row_parts
from .output_tensor import Segment
from .row_encoding import BLOCKS, RowEncoding
from .tiles import TargetRows, load_rows, row_intervals, transposed_tiles

__all__ = ["encode_rows"]

_Array = np.ndarray[Any, Any]

_TILE_NBYTES = 2 << 20
"""The most bytes of floats that are encoded at a time. With fewer, calls cost more."""
_REFERENCE_NBYTES = 4 << 20
"""The most bytes of a reference's blocks that a thread has in memory."""
_COMPARED_ROWS = 512
"""Rows that are compared with the reference at a time, in little memory."""


@dataclass(frozen=True, slots=True)
class _EncodedRows:
    """Rows that are being encoded."""

    target: TargetRows
    blocks: _Array
    """[rows, groups, 16] uint8."""
    scales: _Array
    """[rows, groups] uint8."""
    reference: Packed | None
    """The same rows of the reference."""

    def some(self, rows: slice, first: int) -> _EncodedRows:
        """Return some of these rows, numbered from `first` on."""
        target = TargetRows(first, self.target.out[rows], self.target.begins)
        reference = self.reference
        if reference is not None:
            reference = reference[0][rows], reference[1][rows]
        return _EncodedRows(target, self.blocks[rows], self.scales[rows], reference)

    def encode(
        self, rows: slice, first_column: int, values: _Array, rule: str, loss: EncodingLoss | None
    ) -> None:
        """Encode some rows and columns of these.

        Args:
            rows: The rows, counted from the first one of these.
            first_column: The first column, a multiple of 32.
            values: The bits of bfloat16 values.
            rule: The name of the rule.
            loss: What is lost is added to it.
        """
        first_group = first_column // BLOCK_VALUES
        place = rows, slice(first_group, first_group + values.shape[1] // BLOCK_VALUES)
        loss = loss if self.target.begins else None
        encode(
            values, rule, self.blocks[place], self.scales[place], loss,
            self.target.first + rows.start,
        )  # fmt: skip
        if self.reference is not None:
            for first in range(0, len(values), _COMPARED_ROWS):
                some = slice(first, min(first + _COMPARED_ROWS, len(values)))
                self._keep(slice(rows.start + some.start, rows.start + some.stop), place[1],
                           values[some], loss)  # fmt: skip

    def _keep(self, rows: slice, groups: slice, values: _Array, loss: EncodingLoss | None) -> None:
        """Put in the reference's blocks where they decode to the values."""
        assert self.reference is not None
        blocks, scales = (component[rows, groups] for component in self.reference)
        kept = _is_equal(blocks, scales, values)
        np.copyto(self.blocks[rows, groups], blocks, where=kept[..., None])
        np.copyto(self.scales[rows, groups], scales, where=kept)
        if loss is not None:
            loss.kept += int(np.count_nonzero(kept))


def encode_rows(
    segment: Segment,
    targets: list[TargetRows],
    reader: Reader,
    loss: EncodingLoss | None = None,
) -> list[_Array]:
    """Make rows of a segment's blocks or scales (see `MakeRows`), and of the other component.

    Args:
        segment: A segment with an encoding.
        targets: The rows to make.
        reader: Reads the operand and the reference.
        loss: What is lost is added to it. Rows that do not begin in the targets are not counted.

    Returns:
        For each target, the other component's rows: of blocks the scales, [rows, groups].

    Raises:
        TensorError: If a value is infinite or NaN, or too large.
    """
    encoding = segment.encoding
    assert encoding is not None
    others = [_other_component(target, encoding) for target in targets]
    pairs = list(zip(targets, others, strict=True))
    # All at once, so that the operand is read once; with a reference, as few as memory allows.
    batches = (
        [pairs] if encoding.reference is None else [[p] for pair in pairs for p in _cut(*pair)]
    )
    try:
        for batch in batches:
            _encode_batch(segment, batch, encoding, reader, loss)
    except ValueError:
        raws = list(raw_tensors(segment.operand))
        names = " or ".join(repr(raw.name) for raw in raws)
        raise TensorError(
            f"{raws[0].shard}: tensor {names} has values that are NaN, infinite or so large "
            "that MXFP4 cannot hold them in bfloat16; correct the program that saved it"
        ) from None
    return others


def _other_component(target: TargetRows, encoding: RowEncoding) -> _Array:
    """Return memory for the other component of target rows, [rows, bytes] uint8."""
    rows, width = target.out.shape
    is_blocks = encoding.component == BLOCKS
    return np.empty((rows, width // BLOCK_NBYTES if is_blocks else width * BLOCK_NBYTES), np.uint8)


def _cut(target: TargetRows, other: _Array) -> Iterator[tuple[TargetRows, _Array]]:
    """Cut target rows and the other component into pieces with few bytes of blocks."""
    rows = max(1, _REFERENCE_NBYTES // max(target.out.shape[1], other.shape[1]))
    for begin in range(0, len(other), rows):
        out = target.out[begin : begin + rows]
        begins = target.begins or begin > 0
        yield TargetRows(target.first + begin, out, begins), other[begin : begin + rows]


def _encode_batch(
    segment: Segment,
    batch: list[tuple[TargetRows, _Array]],
    encoding: RowEncoding,
    reader: Reader,
    loss: EncodingLoss | None,
) -> None:
    """Encode target rows, each with memory for the other component."""
    with ExitStack() as stack:
        encoded = [_start(target, other, encoding, reader, stack) for target, other in batch]
        if segment.rearrangement.transposes:
            _encode_transposed(segment, encoded, reader, loss)
            return
        for one in encoded:
            _encode_in_order(segment, one, reader, loss)


def _start(
    target: TargetRows,
    other: _Array,
    encoding: RowEncoding,
    reader: Reader,
    stack: ExitStack,
) -> _EncodedRows:
    """Return target rows with memory for both components, and load the reference's."""
    blocks, scales = (target.out, other) if encoding.component == BLOCKS else (other, target.out)
    reference = None
    if encoding.reference is not None:
        reference = stack.enter_context(
            encoding.reference.load_packed(reader, (target.first, target.end))
        )
    return _EncodedRows(target, blocks.reshape(*scales.shape, BLOCK_NBYTES), scales, reference)


def _encode_transposed(
    segment: Segment, encoded: list[_EncodedRows], reader: Reader, loss: EncodingLoss | None
) -> None:
    """Encode rows that are columns of the operand."""
    assert segment.encoding is not None
    first, end = encoded[0].target.first, encoded[-1].target.end
    operand_rows = 0, segment.operand.shape[0]
    for (column, _), tile, dtype in transposed_tiles(
        segment, (first, end), operand_rows, DType.BF16, reader
    ):
        values = _as_bfloat16(tile.T, dtype).T  # the encoder takes such a layout fastest
        for one in encoded:
            rows = slice(one.target.first - first, one.target.end - first)
            one.encode(slice(0, len(one.scales)), column, values[rows], segment.encoding.rule, loss)


def _encode_in_order(
    segment: Segment, encoded: _EncodedRows, reader: Reader, loss: EncodingLoss | None
) -> None:
    """Encode rows that are rows of the operand."""
    assert segment.encoding is not None
    target = encoded.target
    for operand, (first, _), place in row_parts(segment.operand, (target.first, target.end)):
        part, some = replace(segment, operand=operand), encoded.some(place, first)
        for begin, end in row_intervals(part, some.target, DType.BF16, _TILE_NBYTES):
            with load_rows(part, (begin, end), DType.BF16, reader) as (tile, dtype):
                values = _as_bfloat16(tile, dtype)
                rows = slice(begin - first, end - first)
                some.encode(rows, 0, values, segment.encoding.rule, loss)


def _as_bfloat16(array: _Array, dtype: DType) -> _Array:
    """Return floats as bits of bfloat16; those that are too large become infinite."""
    if dtype is DType.BF16:
        return array
    out = np.empty(array.shape, STORAGE[DType.BF16])
    cast(array, dtype, out, DType.BF16, overflow="infinity")
    return out


def _is_equal(blocks: _Array, scales: _Array, values: _Array) -> _Array:
    """Return which blocks, [rows, groups] bool, decode to the values; zeros have no sign here.

    Programs that add 0 to weights turn -0 into 0, and most blocks hold a -0.
    """
    decoded = np.empty(values.shape, STORAGE[DType.BF16])
    decode(blocks, scales, decoded, DType.BF16)
    decoded ^= values
    differs = (decoded != 0).reshape(*scales.shape, BLOCK_VALUES)
    if differs.any():
        # The sign bit alone, of a zero, is no difference.
        differs &= ((values << np.uint16(1)) != 0).reshape(differs.shape) | (
            decoded != 0x8000
        ).reshape(differs.shape)
    found: _Array = ~differs.any(axis=2) & (scales != NAN_SCALE)
    return found
