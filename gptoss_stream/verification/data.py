"""Comparison of the data of tensors: every byte of the output is computed again from the source.

The work is cut into steps, which threads do in bounded memory. A step compares a chunk of an output
tensor or, if the tensor is a transposition too large for that, what some rows of the source give.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple

import numpy as np

from .._utils.thread_pool import Buffer, Step
from ..checkpoint.local_reader import LocalReader
from ..checkpoint.reader import ElementRange, Reader, ReadSchedule
from ..planning.shards import is_spilled
from ..tensors.cast import STORAGE, cast
from ..tensors.dtypes import DType
from ..tensors.raw_tensor import RawTensor
from ..transforms.encode import encode_rows
from ..transforms.materialize import materialize, materialize_rows
from ..transforms.output_tensor import OutputTensor, Segment, element_ranges
from ..transforms.tiles import TargetRows
from ..writing.executor import CHUNK_NBYTES
from .differences import Difference

__all__ = ["DataComparison"]


_OUTPUT_ROWS = 64
"""Rows of the output that are read at a time for a spilled transposition. Whole rows are read,
though only some columns are compared, so few rows keep memory small."""


class _Comparison(NamedTuple):
    """A step of the comparison."""

    compare: Step
    element_ranges: Callable[[], Iterable[ElementRange]]
    """Return what it reads of the source."""


class DataComparison:
    """A comparison of tensors' data: the steps of it, and the differences that they find.

    Args:
        source: The source.
        output: The output.
        tensors: The output tensors to compare.
        stored: The output's stored tensors, by name, with dtypes and shapes as in `tensors`.
        on_progress: Called with the number of bytes compared since the last call, from any thread.
    """

    def __init__(
        self,
        source: Reader,
        output: LocalReader,
        tensors: Iterable[OutputTensor],
        stored: Mapping[str, RawTensor],
        on_progress: Callable[[int], None],
    ) -> None:
        self.stop = threading.Event()
        """Set to end the reading of the source."""
        self._source = source
        self._output = output
        self._on_progress = on_progress
        self._differences: dict[str, Difference] = {}
        self._differences_lock = threading.Lock()
        self._comparisons: list[_Comparison] = []
        by_name = {tensor.name: tensor for tensor in tensors}
        scales_of = {t.made_with: t for t in by_name.values() if t.made_with in by_name}
        for tensor in by_name.values():
            raw = stored[tensor.name]
            if any(is_spilled(segment) for segment in tensor.segments):
                self._comparisons += self._comparisons_of_source_rows(tensor, raw)
            elif tensor.name in scales_of:
                scales = scales_of[tensor.name]
                self._comparisons += self._comparisons_of_encoded_rows(
                    tensor, raw, scales, stored[scales.name]
                )
            elif tensor.made_with not in by_name:
                self._comparisons += self._comparisons_of_chunks(tensor, raw)
        schedule = ReadSchedule(
            len(self._comparisons), lambda number: self._comparisons[number].element_ranges()
        )
        source.set_schedule(schedule, self.stop)

    def steps(self) -> Iterator[Step]:
        """Yield the steps, each of which needs a buffer of `CHUNK_NBYTES`."""
        for number in range(len(self._comparisons)):
            yield partial(self._do, number)

    def differences(self) -> list[Difference]:
        """Return the first difference in each tensor, in order of the tensors' names."""
        return [self._differences[name] for name in sorted(self._differences)]

    def _do(self, number: int, buffer: Buffer) -> None:
        """Do a step."""
        self._source.begin_step(number)
        self._comparisons[number].compare(buffer)
        self._source.end_step(number)

    def _comparisons_of_chunks(self, tensor: OutputTensor, raw: RawTensor) -> Iterator[_Comparison]:
        """Yield steps that compare a tensor in chunks."""
        for begin in range(0, tensor.nbytes, CHUNK_NBYTES):
            end = min(begin + CHUNK_NBYTES, tensor.nbytes)
            yield _Comparison(
                partial(self._compare_chunk, tensor, raw, begin, end),
                partial(element_ranges, tensor, begin, end),
            )

    def _compare_chunk(
        self, tensor: OutputTensor, raw: RawTensor, begin: int, end: int, buffer: Buffer
    ) -> None:
        """Compare bytes `begin … end` of a tensor."""
        out = buffer[: end - begin]
        materialize(tensor, begin, end, out, partial(materialize_rows, reader=self._source))
        expected = out.view(STORAGE[tensor.dtype])
        self._compare_elements(tensor, raw, begin // tensor.dtype.itemsize, expected)

    def _compare_elements(
        self, tensor: OutputTensor, raw: RawTensor, first: int, expected: Buffer
    ) -> None:
        """Compare the elements of a tensor from `first` on."""
        with self._output.read(raw, first, expected.shape) as found:
            unequal = _first_unequal(found, expected)
            if unequal is not None:
                self._add(tensor, raw, first + unequal, found[unequal], expected[unequal])
        self._on_progress(expected.nbytes)

    def _comparisons_of_encoded_rows(
        self, blocks: OutputTensor, blocks_raw: RawTensor, scales: OutputTensor, raw: RawTensor
    ) -> Iterator[_Comparison]:
        """Yield steps that compare the blocks and the scales of some rows, made in one pass."""
        first_block, first_scale = 0, 0
        for segment, scales_segment in zip(blocks.segments, scales.segments, strict=True):
            (width,), (groups,) = segment.row_shape, scales_segment.row_shape
            num_rows = segment.rearrangement.num_rows
            step = max(1, CHUNK_NBYTES // width)
            for begin in range(0, num_rows, step):
                rows = begin, min(begin + step, num_rows)
                places = (
                    (blocks, blocks_raw, first_block + begin * width),
                    (scales, raw, first_scale + begin * groups),
                )
                yield _Comparison(
                    partial(self._compare_encoded_rows, segment, rows, places),
                    partial(segment.element_ranges, rows),
                )
            first_block += num_rows * width
            first_scale += num_rows * groups

    def _compare_encoded_rows(
        self,
        segment: Segment,
        rows: tuple[int, int],
        places: tuple[tuple[OutputTensor, RawTensor, int], ...],
        buffer: Buffer,
    ) -> None:
        """Compare the blocks and the scales of some rows.

        Args:
            segment: The segment of the blocks.
            rows: The first row, and the one after the last.
            places: For the blocks and for the scales: the output tensor, the same as it is stored,
                and the first element to compare.
            buffer: Memory for the expected blocks.
        """
        count, width = rows[1] - rows[0], *segment.row_shape
        expected = buffer[: count * width].reshape(count, width)
        (scales,) = encode_rows(segment, [TargetRows(rows[0], expected)], self._source)
        for (tensor, raw, first), made in zip(places, (expected, scales), strict=True):
            self._compare_elements(tensor, raw, first, made.reshape(-1))

    def _comparisons_of_source_rows(
        self, tensor: OutputTensor, raw: RawTensor
    ) -> Iterator[_Comparison]:
        """Yield steps that compare a tensor with spilled transpositions, in any of its segments.

        A chunk of such a tensor needs elements from every row of the source. So that each row is
        read once, a step takes some whole rows of the source, and compares the columns that they
        are in the output.
        """
        first = 0
        for segment in tensor.segments:
            num_rows = segment.rearrangement.row_shape[-1]
            row_nbytes = segment.elements * tensor.dtype.itemsize // num_rows
            step = max(1, CHUNK_NBYTES // row_nbytes)
            for begin in range(0, num_rows, step):
                rows = begin, min(begin + step, num_rows)
                yield _Comparison(
                    partial(self._compare_source_rows, tensor, raw, segment, first, rows),
                    partial(segment.operand.element_ranges, rows),
                )
            first += segment.elements

    def _compare_source_rows(
        self,
        tensor: OutputTensor,
        raw: RawTensor,
        segment: Segment,
        first: int,
        rows: tuple[int, int],
        buffer: Buffer,
    ) -> None:
        """Compare what rows `begin … end` of the source give, a rectangle of the output.

        Args:
            tensor: The output tensor.
            raw: The same tensor as it is stored.
            segment: The segment of it to compare.
            first: The segment's first element in the tensor.
            rows: First row of the source, and the one after the last.
            buffer: Memory for the expected elements.
        """
        how = segment.rearrangement
        begin, end = rows
        width = how.row_shape[-1]
        shape = (how.num_rows, *how.row_shape[:-1], end - begin)
        nbytes = prod(shape) * tensor.dtype.itemsize
        columns = buffer[:nbytes].view(STORAGE[tensor.dtype]).reshape(shape)
        materialize_rows(segment, [TargetRows(0, columns)], tensor.dtype, self._source, rows)
        columns = columns.reshape(-1, end - begin)
        for output_row in range(0, len(columns), _OUTPUT_ROWS):
            expected = columns[output_row : output_row + _OUTPUT_ROWS]
            first_read = first + output_row * width
            with self._output.read(raw, first_read, (len(expected), width)) as whole_rows:
                found = whole_rows[:, begin:end]
                unequal = _first_unequal(found, expected)
                if unequal is not None:
                    row, column = divmod(unequal, end - begin)
                    element = first_read + row * width + begin + column
                    self._add(tensor, raw, element, found[row, column], expected[row, column])
        self._on_progress(nbytes)

    def _add(
        self, tensor: OutputTensor, raw: RawTensor, element: int, found: Any, expected: Any
    ) -> None:
        """Add a difference, unless one earlier in the same tensor is known."""
        index = tuple(int(i) for i in np.unravel_index(element, tensor.shape))
        values = _number(found, tensor.dtype), _number(expected, tensor.dtype)
        difference = Difference("value", tensor.name, raw.shard, *values, index)
        with self._differences_lock:
            known = self._differences.get(tensor.name)
            if known is None or index < known.index:
                self._differences[tensor.name] = difference


def _first_unequal(found: Buffer, expected: Buffer) -> int | None:
    """Return the flat index of the first element whose bits differ, if any.

    Equal NaNs are equal; 0.0 and -0.0 are not.
    """
    integer = f"u{expected.itemsize}"
    unequal = (found.view(integer) != expected.view(integer)).reshape(-1)
    first = int(unequal.argmax())
    return first if unequal[first] else None


def _number(element: Any, dtype: DType) -> float | str:
    """Return a stored element as a number, or as text for NaN and infinity, unknown to JSON."""
    if dtype is DType.U8:
        return int(element)
    wide = np.empty(1, np.float32)
    cast(np.array([element], STORAGE[dtype]), dtype, wide, DType.F32)
    return float(wide[0]) if np.isfinite(wide[0]) else str(wide[0])
