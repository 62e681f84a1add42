"""The interface of the readers of tensor data.

A reader returns ranges of elements of raw tensors. A run is divided into steps. Before the first
step the reader gets a schedule of what each step reads, so that it can read ahead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from ..tensors.raw_tensor import RawTensor

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ElementRange", "RandomAccessReader", "ReadSchedule", "Reader", "StoppedError"]


class StoppedError(Exception):
    """The run has ended by an error or a signal, which is reported elsewhere."""


@dataclass(frozen=True, slots=True)
class ElementRange:
    """Elements `first` to `first + count` (exclusive) of a raw tensor.

    Example: of a BF16 tensor at offset 1000, three elements from element 10 on have the
    `byte_range` (1020, 6).
    """

    raw: RawTensor
    first: int
    count: int

    @property
    def byte_range(self) -> tuple[int, int]:
        """The first byte of the elements in the file, and their size in bytes."""
        itemsize = self.raw.dtype.itemsize
        return self.raw.offset + self.first * itemsize, self.count * itemsize


@dataclass(frozen=True, slots=True)
class ReadSchedule:
    """What each step of a run reads. Steps have numbers, in the order in which they begin."""

    num_steps: int
    element_ranges: Callable[[int], Iterable[ElementRange]]
    """Called with the number of a step; returns what the step reads."""


class Reader(Protocol):
    """Reads elements of raw tensors, from any thread."""

    def read(
        self, tensor: RawTensor, first: int, shape: tuple[int, ...]
    ) -> AbstractContextManager[np.ndarray[Any, Any]]:
        """Read `prod(shape)` elements of a tensor, from element `first` on.

        Returns:
            A context manager that gives an array of that shape in the `STORAGE` of the tensor's
            dtype (BF16 as its bits, uint16). The array is only valid within the context, and is
            read-only if it is not the caller's own.
        """
        ...

    def set_schedule(self, schedule: ReadSchedule, stop: threading.Event) -> None:
        """Begin a run, before anything is read.

        Args:
            schedule: What each step reads.
            stop: When this is set, all waiting and reading ends early.
        """
        return

    def begin_step(self, step: int) -> None:
        """Begin a step: what it reads is needed now."""
        return

    def end_step(self, step: int) -> None:
        """End a step, which has read everything: its memory can be freed."""
        return

    def check_unchanged(self) -> None:
        """Check that no file has changed since it was opened.

        Raises:
            CheckpointError: If a file has changed.
        """
        return


class RandomAccessReader(Reader, Protocol):
    """A reader that needs no schedule, and can be told what will be read soon."""

    def prefetch(self, ranges: Iterable[ElementRange]) -> AbstractContextManager[object]:
        """Begin to read what is needed soon, in this order and in the background.

        Returns:
            A context manager, at whose end what has not been read yet may be given up. It need not
            be used as one, if all is needed.
        """
        ...

    def forget(self, ranges: Iterable[ElementRange]) -> None:
        """Tell the system that it need not keep what was read in its cache."""
