"""Holds an output against its source: every byte made again and compared. Or against its sums.

Trusts neither record nor state of the run that made the output. Headers, index, names, dtypes and
shapes first; then the data, segment by segment, in bounded memory. Writes nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from typing import Any

import numpy as np

from .._utils.thread_pool import Buffer, Step
from ..checkpoint.metadata import RawTensor
from ..checkpoint.open_reader import CheckpointReader
from ..checkpoint.reader import ElementRange, LocalReader, ReadSchedule
from ..planning.shards import is_spilled
from ..tensors.cast import STORAGE, cast
from ..tensors.dtypes import DType
from ..transforms.materialize import TargetRows, materialize, materialize_rows
from ..transforms.output_tensor import OutputTensor, Segment, element_ranges
from ..writing.executor import CHUNK_NBYTES
from .differences import Difference

__all__ = ["DataComparison"]


_ROWS_AT_A_TIME = (
    64  # rows of a large transpose compared at a time: what is read of them stays small
)


class DataComparison:
    """The comparison of the data: its steps, and what they found."""

    def __init__(
        self, source: CheckpointReader, output: LocalReader, on_bytes: Callable[[int], None]
    ) -> None:
        self.source = source
        self.output = output
        self.on_bytes = on_bytes
        self.stop = threading.Event()
        self.differences: dict[str, Difference] = {}
        self._noting = threading.Lock()
        self._steps: list[tuple[Step, Callable[[], Iterator[ElementRange]]]] = []
        """What each does, and what it reads of the source."""

    def take(self, tensors: list[OutputTensor], found: Mapping[str, RawTensor]) -> None:
        """Steps that cover every byte of the tensors."""
        for tensor in tensors:
            raw = found[tensor.name]
            if any(is_spilled(segment) for segment in tensor.segments):
                self._take_blocks(tensor, raw)
                continue
            for begin in range(0, tensor.nbytes, CHUNK_NBYTES):
                end = min(begin + CHUNK_NBYTES, tensor.nbytes)
                self._steps.append(
                    (
                        partial(self._compare_segment, tensor, raw, begin, end),
                        partial(element_ranges, tensor, begin, end),
                    )
                )
        self.source.schedule(
            ReadSchedule(len(self._steps), lambda step: self._steps[step][1]()), self.stop
        )

    def tasks(self) -> Iterator[Step]:
        """Every step, as a task."""
        for number, (task, _) in enumerate(self._steps):
            yield partial(self._do, number, task)

    def _do(self, number: int, task: Step, buffer: Buffer) -> None:
        self.source.begin(number)
        task(buffer)
        self.source.end(number)

    def _compare_segment(
        self, tensor: OutputTensor, raw: RawTensor, begin: int, end: int, buffer: Buffer
    ) -> None:
        out = buffer[: end - begin]
        materialize(tensor, begin, end, out, partial(materialize_rows, reader=self.source))
        first = begin // tensor.dtype.itemsize
        expected = out.view(STORAGE[tensor.dtype])
        with self.output.read(raw, first, expected.shape) as found:
            unequal = _first_unequal(found, expected)
            if unequal is not None:
                self._note(tensor, raw, first + unequal, found[unequal], expected[unequal])
        self.on_bytes(end - begin)

    def _take_blocks(self, tensor: OutputTensor, raw: RawTensor) -> None:
        """A large transpose in blocks of the source's rows, each read once."""
        first = 0
        for segment in tensor.segments:
            rows = segment.rearrangement.row_shape[-1]
            step = max(1, CHUNK_NBYTES * rows // (segment.elements * tensor.dtype.itemsize))
            for begin in range(0, rows, step):
                block = begin, min(begin + step, rows)
                self._steps.append(
                    (
                        partial(self._compare_block, tensor, raw, segment, first, block),
                        partial(segment.operand.element_ranges, block),
                    )
                )
            first += segment.elements

    def _compare_block(
        self,
        tensor: OutputTensor,
        raw: RawTensor,
        segment: Segment,
        first: int,
        block: tuple[int, int],
        buffer: Buffer,
    ) -> None:
        how = segment.rearrangement
        begin, end = block
        shape = (how.num_rows, *how.row_shape[:-1], end - begin)
        nbytes = prod(shape) * tensor.dtype.itemsize
        expected = buffer[:nbytes].view(STORAGE[tensor.dtype]).reshape(shape)
        materialize_rows(segment, [TargetRows(0, expected)], tensor.dtype, self.source, block)
        expected = expected.reshape(-1, end - begin)
        width = how.row_shape[-1]
        for line in range(0, len(expected), _ROWS_AT_A_TIME):
            lines = expected[line : line + _ROWS_AT_A_TIME]
            at = first + line * width
            with self.output.read(raw, at, (len(lines), width)) as whole:
                found = whole[:, begin:end]
                unequal = _first_unequal(found, lines)
                if unequal is not None:
                    row, column = divmod(unequal, end - begin)
                    element = at + row * width + begin + column
                    self._note(tensor, raw, element, found[row, column], lines[row, column])
        self.on_bytes(nbytes)

    def _note(
        self, tensor: OutputTensor, raw: RawTensor, element: int, found: Any, expected: Any
    ) -> None:
        index = tuple(int(i) for i in np.unravel_index(element, tensor.shape))
        values = _value(found, tensor.dtype), _value(expected, tensor.dtype)
        difference = Difference("value", tensor.name, raw.shard, *values, index)
        with self._noting:
            known = self.differences.get(tensor.name)
            if known is None or index < known.index:
                self.differences[tensor.name] = difference


def _first_unequal(found: Buffer, expected: Buffer) -> int | None:
    """The first element whose bits differ (equal NaNs are equal, 0.0 and -0.0 are not)."""
    integer = f"u{expected.itemsize}"
    unequal = (found.view(integer) != expected.view(integer)).reshape(-1)
    first = int(unequal.argmax())
    return first if unequal[first] else None


def _value(element: Any, dtype: DType) -> float | str:
    """A stored element as a number; what JSON has no number for as a word."""
    if dtype is DType.U8:
        return int(element)
    wide = np.empty(1, np.float32)
    cast(np.array([element], STORAGE[dtype]), dtype, wide, DType.F32)
    return float(wide[0]) if np.isfinite(wide[0]) else str(wide[0])
