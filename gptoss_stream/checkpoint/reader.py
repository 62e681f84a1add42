"""A checkpoint, opened: its configuration, its tensors' descriptions, and their bytes.

Knows places and the safetensors format, nothing of gpt-oss. Every header is validated, and held
against the index, before anything is read. Reading is by rows of a raw tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Protocol

from .._utils.failures import machine_error
from ..storage.local_folder import LocalFile
from ..storage.location import NEVER, File, changed
from .metadata import CheckpointInfo, RawTensor

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ElementRange", "LocalReader", "OpenFiles", "ReadSchedule", "Reader", "is_zero"]


_PIECE_NBYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ElementRange:
    """Elements `first … first + count` of a raw tensor."""

    raw: RawTensor
    first: int
    count: int

    @property
    def span(self) -> tuple[int, int]:
        """Where their bytes begin in the file, and how many these are."""
        size = self.raw.dtype.itemsize
        return self.raw.offset + self.first * size, self.count * size


@dataclass(frozen=True, slots=True)
class ReadSchedule:
    """What each of a run's steps reads, numbered in the order in which they are begun."""

    count: int
    element_ranges: Callable[[int], Iterable[ElementRange]]


def is_zero(info: CheckpointInfo, raw: RawTensor) -> bool:
    """Whether a tensor of floats is zero, of either sign; reads it a piece at a time."""
    import numpy as np

    bits = np.dtype(f"u{raw.dtype.itemsize}")
    try:
        with closing(info.location.open(raw.shard)) as file:
            for at in range(0, raw.nbytes, _PIECE_NBYTES):
                piece = bytearray(min(_PIECE_NBYTES, raw.nbytes - at))
                file.read_into(memoryview(piece), raw.offset + at, NEVER)
                if (np.frombuffer(piece, bits) << 1).any():  # the sign shifted out
                    return False
    except OSError as error:
        raise machine_error(error, f"reading {info.location.display_path(raw.shard)}") from error
    return True


class OpenFiles:
    """The files of a described checkpoint, opened when they are first read, by any thread.

    Raises `CheckpointError` where a file is no longer what was described.
    """

    def __init__(self, info: CheckpointInfo) -> None:
        self.info = info
        self._files: dict[str, File] = {}
        self._opening = threading.Lock()

    def close(self) -> None:
        """Close them all."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def file(self, name: str) -> File:
        """One of them."""
        file = self._files.get(name)
        if file is None:
            with self._opening:
                file = self._files.get(name) or self._open(name)
                self._files[name] = file
        return file

    def _open(self, name: str) -> File:
        described = next(shard for shard in self.info.shards if shard.name == name)
        try:
            file = self.info.location.open(name)
        except OSError as error:
            raise machine_error(
                error, f"reading {self.info.location.display_path(name)}"
            ) from error
        if file.info != described:
            file.close()
            raise changed(self.info.location.display_path(name))
        return file

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if one of them is no longer what was opened."""
        for file in list(self._files.values()):
            file.check_unchanged()


class LocalReader:
    """A described checkpoint of this machine, for reading from any number of threads.

    A context manager, and a `operands.Reader`; what the steps so many `ahead` will read is read
    ahead by the system. Each thread keeps the memory that it reads into and uses it again. Raises
    `CheckpointError` where a file is no longer what was described, `MachineError` where reading
    fails.
    """

    def __init__(self, info: CheckpointInfo, ahead: int = 0) -> None:
        self.info = info
        self._files = OpenFiles(info)
        # By thread; a threading.local that is collected within sys._current_frames, which Dask's
        # profiler calls, locks Python 3.11 up (python/cpython#106883).
        self._memory: dict[int, list[np.ndarray[Any, Any]]] = {}
        self._ahead = ahead
        self._schedule = ReadSchedule(0, lambda step: ())
        self._stop = NEVER

    def __enter__(self) -> LocalReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    @contextmanager
    def read(
        self, tensor: RawTensor, first: int, shape: tuple[int, ...]
    ) -> Iterator[np.ndarray[Any, Any]]:
        """`prod(shape)` elements of a tensor from element `first` on, as an array of that shape.

        BF16 comes as its bits (uint16). The array's memory is used again when the block ends.
        """
        import numpy as np

        from ..tensors.cast import STORAGE

        nbytes = prod(shape) * tensor.dtype.itemsize
        free = self._memory.setdefault(threading.get_ident(), [])
        memory = free.pop() if free else np.empty(0, np.uint8)
        if len(memory) < nbytes:
            memory = np.empty(nbytes, np.uint8)
        begin = tensor.offset + first * tensor.dtype.itemsize
        self._files.file(tensor.shard).read_into(memory[:nbytes].data, begin, self._stop)
        yield memory[:nbytes].view(STORAGE[tensor.dtype]).reshape(shape)
        free.append(memory)

    def set_schedule(self, schedule: ReadSchedule, stop: threading.Event) -> None:
        """Told before reading what each step will read."""
        self._schedule, self._stop = schedule, stop

    def begin_step(self, step: int) -> None:
        """Have the system read ahead what a later step needs."""
        later = step + self._ahead
        if self._ahead and later < self._schedule.count:
            for element_range in self._schedule.element_ranges(later):
                file = self._files.file(element_range.raw.shard)
                if isinstance(file, LocalFile):
                    file.prefetch(*element_range.span)

    def end_step(self, step: int) -> None:
        """Nothing is held."""

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if a file was written to since it was opened."""
        self._files.check_unchanged()


class Reader(Protocol):
    """Where operands get the elements of raw tensors (see `checkpoint.Checkpoint`)."""

    def read(
        self, tensor: RawTensor, first: int, shape: tuple[int, ...]
    ) -> AbstractContextManager[np.ndarray[Any, Any]]:
        """`prod(shape)` elements from element `first` on, for as long as the block lasts."""
        ...

    def set_schedule(self, schedule: ReadSchedule, stop: threading.Event) -> None:
        """Told once, before reading, what will be read; waiting ends when `stop` is set."""
        return

    def begin_step(self, step: int) -> None:
        """Told when a step of the schedule begins."""
        return

    def end_step(self, step: int) -> None:
        """Told when a step has read what it reads."""
        return

    def check_unchanged(self) -> None:
        """Raise if what was read so far may not have been of one state of its files."""
        return
