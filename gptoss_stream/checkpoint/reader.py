"""How the data of a checkpoint is read: ranges of elements, by a schedule that is known before.

A run is divided into steps. Before the first step the reader learns what each step reads, so that
it can read ahead.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .._utils.failures import machine_error
from ..storage.location import NEVER_STOP, File, changed
from ..tensors.raw_tensor import RawTensor
from .metadata import CheckpointInfo

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ElementRange", "OpenFiles", "ReadSchedule", "Reader", "is_zero"]

_BLOCK_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ElementRange:
    """Elements `first … first + count` of a raw tensor."""

    raw: RawTensor
    first: int
    count: int

    @property
    def byte_range(self) -> tuple[int, int]:
        """The first byte of the elements in the file, and their number of bytes."""
        itemsize = self.raw.dtype.itemsize
        return self.raw.offset + self.first * itemsize, self.count * itemsize


@dataclass(frozen=True, slots=True)
class ReadSchedule:
    """What each step of a run reads; steps are numbered in the order in which they begin."""

    num_steps: int
    element_ranges: Callable[[int], Iterable[ElementRange]]
    """Returns what a step reads."""


class Reader(Protocol):
    """Reads elements of raw tensors, from any thread."""

    def read(
        self, tensor: RawTensor, first: int, shape: tuple[int, ...]
    ) -> AbstractContextManager[np.ndarray[Any, Any]]:
        """Read `prod(shape)` elements of a tensor, from element `first` on.

        Returns:
            A context manager that gives an array of that shape in the `STORAGE` of the tensor's
            dtype (BF16 as its bits, uint16). The array is only valid within the context.
        """
        ...

    def set_schedule(self, schedule: ReadSchedule, stop: threading.Event) -> None:
        """Take the schedule, before anything is read; `stop` ends all waiting when it is set."""
        return

    def begin_step(self, step: int) -> None:
        """Take note that a step of the schedule begins."""
        return

    def end_step(self, step: int) -> None:
        """Take note that a step of the schedule has read everything."""
        return

    def check_unchanged(self) -> None:
        """Check that the files are still the ones that were described.

        Raises:
            CheckpointError: If a file has changed.
        """
        return


def is_zero(info: CheckpointInfo, raw: RawTensor) -> bool:
    """Read a tensor of floats and return whether all its elements are zero, of either sign."""
    import numpy as np

    integer = np.dtype(f"u{raw.dtype.itemsize}")
    try:
        with closing(info.location.open(raw.shard)) as file:
            for begin in range(0, raw.nbytes, _BLOCK_NBYTES):
                block = bytearray(min(_BLOCK_NBYTES, raw.nbytes - begin))
                file.read_into(memoryview(block), raw.offset + begin, NEVER_STOP)
                if (np.frombuffer(block, integer) << 1).any():  # without the sign
                    return False
    except OSError as error:
        raise machine_error(error, f"reading {info.location.display_path(raw.shard)}") from error
    return True


class OpenFiles:
    """The shards of a checkpoint, each opened when it is first read, from any thread."""

    def __init__(self, info: CheckpointInfo) -> None:
        self.info = info
        self._files: dict[str, File] = {}
        self._opening = threading.Lock()

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def file(self, name: str) -> File:
        """Return a shard, which is opened if it is not open.

        Raises:
            CheckpointError: If the file is no longer the one that was described.
            MachineError: If it cannot be opened.
        """
        file = self._files.get(name)
        if file is None:
            with self._opening:
                file = self._files.get(name) or self._open(name)
                self._files[name] = file
        return file

    def _open(self, name: str) -> File:
        described = next(shard for shard in self.info.shards if shard.name == name)
        where = self.info.location.display_path(name)
        try:
            file = self.info.location.open(name)
        except OSError as error:
            raise machine_error(error, f"reading {where}") from error
        if file.info != described:
            file.close()
            raise changed(where)
        return file

    def check_unchanged(self) -> None:
        """Check that no file has changed since it was opened.

        Raises:
            CheckpointError: If one has.
        """
        for file in list(self._files.values()):
            file.check_unchanged()
