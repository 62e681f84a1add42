"""A tensor of a remote output that is read many times: it is fetched once, to a temporary file."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path

import numpy as np

from .._utils.failures import machine_error
from .._utils.temporary_file import TemporaryFile, unnamed_file
from .._utils.thread_pool import Buffer
from ..checkpoint.reader import ElementRange, Reader
from ..tensors.cast import STORAGE
from ..tensors.raw_tensor import RawTensor

__all__ = ["TensorCopy"]

_POLL_SECONDS = 0.1  # how often waiting threads look at the stop event


class TensorCopy:
    """A copy of a tensor, from any thread. The disk space is that of the tensor.

    Args:
        raw: The tensor.
        chunk_nbytes: The most bytes that are copied at a time.
        folder: Where the temporary file is created.
        stop: Ends the waiting for what is not copied yet.
    """

    def __init__(
        self, raw: RawTensor, chunk_nbytes: int, folder: Path, stop: threading.Event
    ) -> None:
        count = max(1, chunk_nbytes // raw.dtype.itemsize)
        total = prod(raw.shape)
        self.chunks = [
            ElementRange(raw, first, min(count, total - first)) for first in range(0, total, count)
        ]
        """What is to be copied, each by one call of `copy`."""
        self._raw = raw
        self._folder = folder
        self._stop = stop
        self._lock = threading.Lock()
        self._file: TemporaryFile | None = None
        self._chunks_left = len(self.chunks)
        self._is_complete = threading.Event()

    def copy(self, chunk: ElementRange, reader: Reader) -> None:
        """Copy a chunk.

        Raises:
            CheckpointError: If the output changes meanwhile.
            MachineError: If reading or writing fails.
        """
        with reader.read(self._raw, chunk.first, (chunk.count,)) as data:
            try:
                with self._lock:
                    file = self._file = self._file or unnamed_file(self._folder)
                file.write(data.view(np.uint8), chunk.first * data.itemsize)
            except OSError as error:
                doing = f"copying {self._raw.name} to a temporary file in {self._folder}"
                raise machine_error(error, doing) from error
        with self._lock:
            self._chunks_left -= 1
            if not self._chunks_left:
                self._is_complete.set()

    @contextmanager
    def read(self, tensor: RawTensor, first: int, shape: tuple[int, ...]) -> Iterator[Buffer]:
        """Read elements (see `Reader.read`); waits until the whole tensor is copied."""
        while not self._is_complete.wait(_POLL_SECONDS):
            if self._stop.is_set():
                raise RuntimeError("stopped by an error or a signal, which is reported elsewhere")
        assert self._file is not None
        array = np.empty(shape, STORAGE[tensor.dtype])
        self._file.read([array.reshape(-1).view(np.uint8).data], first * tensor.dtype.itemsize)
        yield array

    def close(self) -> None:
        """Delete the file."""
        if self._file is not None:
            self._file.close()
