"""Comparison of the data of tensors: every byte of the output is computed again from the source.

The work is cut into steps, which threads do in bounded memory. A step compares a chunk of an output
tensor or, if the tensor is a transposition too large for that, what some rows of the source give.
Source and output are each told beforehand what a step reads, so that what is remote is read ahead,
each byte once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TypeAlias

from .._utils.thread_pool import Buffer, Step
from ..checkpoint.reader import ElementRange, Reader, ReadSchedule
from ..planning.shards import is_spilled
from ..tensors.cast import STORAGE
from ..tensors.raw_tensor import RawTensor
from ..transforms.encode import encode_rows
from ..transforms.materialize import materialize, materialize_rows
from ..transforms.output_tensor import OutputTensor, Segment, element_ranges
from ..transforms.tiles import TargetRows
from ..writing.executor import CHUNK_NBYTES
from .differences import Difference
from .tensor_copy import TensorCopy
from .values import ValueDifferences, first_unequal

__all__ = ["DataComparison"]


_Places: TypeAlias = "tuple[tuple[OutputTensor, RawTensor, int], ...]"

_OUTPUT_ROWS = 64
"""Rows of the output that are read at a time for a spilled transposition. Whole rows are read,
though only some columns are compared, so few rows keep memory small."""


def _nothing() -> Iterable[ElementRange]:
    """Return what a step reads of a checkpoint that it does not read."""
    return ()


@dataclass(frozen=True, slots=True)
class _Comparison:
    """A step of the comparison, with functions that return what it reads."""

    compare: Step
    of_source: Callable[[], Iterable[ElementRange]] = _nothing
    of_output: Callable[[], Iterable[ElementRange]] = _nothing


class DataComparison:
    """A comparison of tensors' data: the steps of it, and the differences that they find.

    Args:
        source: The source.
        output: The output.
        tensors: The output tensors to compare.
        stored: The output's stored tensors, by name, with dtypes and shapes as in `tensors`.
        on_progress: Called with the number of bytes compared since the last call, from any thread.
        copies: Where tensors of a remote output that are read many times are copied to; None for a
            local output.
    """

    def __init__(
        self,
        source: Reader,
        output: Reader,
        tensors: Iterable[OutputTensor],
        stored: Mapping[str, RawTensor],
        on_progress: Callable[[int], None],
        copies: Path | None = None,
    ) -> None:
        self.stop = threading.Event()
        """Set to end all reading."""
        self._source = source
        self._output = output
        self._on_progress = on_progress
        self._differences = ValueDifferences()
        self._copies = copies
        self._closing = ExitStack()
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
        count, steps = len(self._comparisons), self._comparisons
        source.set_schedule(ReadSchedule(count, lambda n: steps[n].of_source()), self.stop)
        output.set_schedule(ReadSchedule(count, lambda n: steps[n].of_output()), self.stop)

    def __enter__(self) -> DataComparison:
        return self

    def __exit__(self, *exception: object) -> None:
        self._closing.close()

    def steps(self) -> Iterator[Step]:
        """Yield the steps, each of which needs a buffer of `CHUNK_NBYTES`."""
        for number in range(len(self._comparisons)):
            yield partial(self._do, number)

    def differences(self) -> list[Difference]:
        """Return the first difference in each tensor, in order of the tensors' names."""
        return self._differences.in_order()

    def _do(self, number: int, buffer: Buffer) -> None:
        """Do a step."""
        for reader in (self._source, self._output):
            reader.begin_step(number)
        self._comparisons[number].compare(buffer)
        for reader in (self._source, self._output):
            reader.end_step(number)

    def _comparisons_of_chunks(self, tensor: OutputTensor, raw: RawTensor) -> Iterator[_Comparison]:
        """Yield steps that compare a tensor in chunks."""
        for begin in range(0, tensor.nbytes, CHUNK_NBYTES):
            end = min(begin + CHUNK_NBYTES, tensor.nbytes)
            yield _Comparison(
                partial(self._compare_chunk, tensor, raw, begin, end),
                partial(element_ranges, tensor, begin, end),
                partial(_elements, raw, begin, end),
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
            unequal = first_unequal(found, expected)
            if unequal is not None:
                self._differences.add(
                    tensor, raw, first + unequal, found[unequal], expected[unequal]
                )
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
                    partial(_elements_of_rows, rows[1] - begin, (width, groups), places),
                )
            first_block += num_rows * width
            first_scale += num_rows * groups

    def _compare_encoded_rows(
        self,
        segment: Segment,
        rows: tuple[int, int],
        places: _Places,
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
        are in the output. Each of these steps reads all rows of the output: of a remote one, steps
        before them make a copy.
        """
        copy: TensorCopy | None = None
        if self._copies is not None:
            copy = TensorCopy(raw, CHUNK_NBYTES, self._copies, self.stop)
            self._closing.callback(copy.close)
            for chunk in copy.chunks:
                yield _Comparison(partial(self._copy, copy, chunk), of_output=partial(_one, chunk))
        first = 0
        for segment in tensor.segments:
            num_rows = segment.rearrangement.row_shape[-1]
            row_nbytes = segment.elements * tensor.dtype.itemsize // num_rows
            step = max(1, CHUNK_NBYTES // row_nbytes)
            for begin in range(0, num_rows, step):
                rows = begin, min(begin + step, num_rows)
                yield _Comparison(
                    partial(self._compare_source_rows, tensor, raw, segment, first, rows, copy),
                    partial(segment.operand.element_ranges, rows),
                )
            first += segment.elements

    def _copy(self, copy: TensorCopy, chunk: ElementRange, buffer: Buffer) -> None:
        """Copy a chunk of a remote tensor."""
        copy.copy(chunk, self._output)

    def _compare_source_rows(
        self,
        tensor: OutputTensor,
        raw: RawTensor,
        segment: Segment,
        first: int,
        rows: tuple[int, int],
        copy: TensorCopy | None,
        buffer: Buffer,
    ) -> None:
        """Compare what rows `begin … end` of the source give, a rectangle of the output.

        Args:
            tensor: The output tensor.
            raw: The same tensor as it is stored.
            segment: The segment of it to compare.
            first: The segment's first element in the tensor.
            rows: First row of the source, and the one after the last.
            copy: The copy of the tensor to read, if the output is remote.
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
            with (copy or self._output).read(raw, first_read, (len(expected), width)) as whole_rows:
                found = whole_rows[:, begin:end]
                unequal = first_unequal(found, expected)
                if unequal is not None:
                    row, column = divmod(unequal, end - begin)
                    element = first_read + row * width + begin + column
                    values = found[row, column], expected[row, column]
                    self._differences.add(tensor, raw, element, *values)
        self._on_progress(nbytes)


def _one(chunk: ElementRange) -> Iterable[ElementRange]:
    """Return a chunk as what a step reads."""
    return (chunk,)


def _elements(raw: RawTensor, begin: int, end: int) -> Iterable[ElementRange]:
    """Return the elements in bytes `begin … end` of a stored tensor."""
    itemsize = raw.dtype.itemsize
    return (ElementRange(raw, begin // itemsize, (end - begin) // itemsize),)


def _elements_of_rows(
    num_rows: int, widths: tuple[int, int], places: _Places
) -> Iterable[ElementRange]:
    """Return the elements of some rows in two stored tensors, of blocks and of scales."""
    return [
        ElementRange(raw, first, num_rows * width)
        for width, (_, raw, first) in zip(widths, places, strict=True)
    ]
