"""Reads the tensor data of a local checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import prod
from typing import TYPE_CHECKING, Any

from ..storage.local_folder import LocalFile
from ..storage.location import NEVER_STOP
from ..tensors.raw_tensor import RawTensor
from .metadata import CheckpointInfo
from .open_files import OpenFiles
from .reader import ElementRange, ReadSchedule

if TYPE_CHECKING:
    import numpy as np

__all__ = ["LocalReader"]


class LocalReader:
    """A `Reader` of a local checkpoint; a context manager.

    Each thread reuses the memory that it reads into. Methods raise `CheckpointError` if a file has
    changed since its header was read, and `MachineError` if reading fails.

    Args:
        info: The checkpoint.
        ahead: How many steps before it is read the system is asked to read data into its cache;
            0 for never.
    """

    def __init__(self, info: CheckpointInfo, ahead: int = 0) -> None:
        self.info = info
        self._files = OpenFiles(info)
        # By thread. Not a threading.local: if one is garbage-collected within
        # sys._current_frames, which Dask's profiler calls, Python 3.11 deadlocks
        # (python/cpython#106883).
        self._memory: dict[int, list[np.ndarray[Any, Any]]] = {}
        self._ahead = ahead
        self._schedule = ReadSchedule(0, lambda step: ())
        self._stop = NEVER_STOP

    def __enter__(self) -> LocalReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

    @contextmanager
    def read(
        self, tensor: RawTensor, first: int, shape: tuple[int, ...]
    ) -> Iterator[np.ndarray[Any, Any]]:
        """Read elements of a tensor (see `Reader.read`)."""
        import numpy as np

        from ..tensors.cast import STORAGE

        nbytes = prod(shape) * tensor.dtype.itemsize
        free = self._memory.setdefault(threading.get_ident(), [])
        # The smallest that suffices, or else the largest, to be replaced: several that are in use
        # at a time would otherwise all grow to the largest size.
        fitting = [one for one in free if len(one) >= nbytes]
        memory = (
            min(fitting, key=len) if fitting else max(free, key=len, default=np.empty(0, np.uint8))
        )
        free[:] = [one for one in free if one is not memory]
        if len(memory) < nbytes:
            memory = np.empty(nbytes, np.uint8)
        begin = tensor.offset + first * tensor.dtype.itemsize
        self._files.file(tensor.shard).read_into(memory[:nbytes].data, begin, self._stop)
        array = memory[:nbytes].view(STORAGE[tensor.dtype]).reshape(shape)
        array.flags.writeable = False
        yield array
        free.append(memory)

    def set_schedule(self, schedule: ReadSchedule, stop: threading.Event) -> None:
        """Keep the schedule (see `Reader.set_schedule`)."""
        self._schedule, self._stop = schedule, stop

    def begin_step(self, step: int) -> None:
        """Ask the system to read ahead what a later step needs."""
        later = step + self._ahead
        if self._ahead and later < self._schedule.num_steps:
            self.prefetch(self._schedule.element_ranges(later))

    def prefetch(self, ranges: Iterable[ElementRange]) -> AbstractContextManager[object]:
        """Ask the system to read elements into its cache (see `RandomAccessReader.prefetch`)."""
        for one in ranges:
            file = self._files.file(one.raw.shard)
            if isinstance(file, LocalFile):
                file.prefetch(*one.byte_range)
        return nullcontext()

    def forget(self, ranges: Iterable[ElementRange]) -> None:
        """Tell the system that elements need not stay cached (see `RandomAccessReader.forget`)."""
        for one in ranges:
            file = self._files.file(one.raw.shard)
            if isinstance(file, LocalFile):
                file.forget(*one.byte_range)

    def end_step(self, step: int) -> None:
        """Do nothing: `read` frees its memory itself."""

    def check_unchanged(self) -> None:
        """Check that no file has changed since it was opened (see `Reader.check_unchanged`)."""
        self._files.check_unchanged()
