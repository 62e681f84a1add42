"""Reads the tensor data of several checkpoints as one reader does."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from ..tensors.raw_tensor import RawTensor
from .reader import ElementRange, Reader, ReadSchedule

if TYPE_CHECKING:
    import numpy as np

__all__ = ["JoinedReader"]


class JoinedReader:
    """A `Reader` of several checkpoints.

    Args:
        readers: The reader of each, by the number that `RawTensor.checkpoint` has.
    """

    def __init__(self, readers: Mapping[int, Reader]) -> None:
        self._readers = readers

    def read(
        self, tensor: RawTensor, first: int, shape: tuple[int, ...]
    ) -> AbstractContextManager[np.ndarray[Any, Any]]:
        """Read elements of a tensor (see `Reader.read`)."""
        return self._readers[tensor.checkpoint].read(tensor, first, shape)

    def set_schedule(self, schedule: ReadSchedule, stop: threading.Event) -> None:
        """Give each reader its part of the schedule (see `Reader.set_schedule`)."""
        for number, reader in self._readers.items():
            reader.set_schedule(_part(schedule, number), stop)

    def begin_step(self, step: int) -> None:
        """Begin a step (see `Reader.begin_step`)."""
        for reader in self._readers.values():
            reader.begin_step(step)

    def end_step(self, step: int) -> None:
        """End a step (see `Reader.end_step`)."""
        for reader in self._readers.values():
            reader.end_step(step)

    def check_unchanged(self) -> None:
        """Check that no file has changed since it was opened (see `Reader.check_unchanged`)."""
        for reader in self._readers.values():
            reader.check_unchanged()


def _part(schedule: ReadSchedule, number: int) -> ReadSchedule:
    """Return what a schedule reads of one checkpoint."""

    def element_ranges(step: int) -> Iterator[ElementRange]:
        return (one for one in schedule.element_ranges(step) if one.raw.checkpoint == number)

    return ReadSchedule(schedule.num_steps, element_ranges)
