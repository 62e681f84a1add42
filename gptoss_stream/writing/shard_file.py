"""Writing one file of the output: aligned, past the page cache, and whole or not at all.

A file is written under a partial name, in any order of segments, and gets its final name when
all of it is on the disk. `O_DIRECT` is used where system and file system have it: buffered
writing fills the page cache, which on a small machine is the bottleneck.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .._utils.buffers import ALIGNMENT

__all__ = ["ShardFile", "sync_folder"]


_FLUSH_NBYTES = 64_000_000  # of buffered writing, so that unwritten pages do not pile up


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class ShardFile:
    """A file of known size that is being written, from any number of threads.

    Nothing has the final name until `commit`, which calls `check` with the partial file. After any
    error the file is only good for `discard`. Raises `OSError` as the system does.
    """

    def __init__(
        self,
        partial: Path,
        final: Path,
        nbytes: int,
        check: Callable[[Path], None] = lambda partial: None,
    ) -> None:
        self._partial = partial
        self._final = final
        self._nbytes = nbytes
        self._check = check
        self._unflushed = 0
        self._flushing = threading.Lock()
        self._direct = getattr(os, "O_DIRECT", 0)
        self._descriptor = self._open()

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC | getattr(os, "O_CLOEXEC", 0)
        try:
            return os.open(self._partial, flags | self._direct, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
        self._direct = 0
        return os.open(self._partial, flags, 0o666)

    def write(self, segment: np.ndarray[tuple[int], np.dtype[np.uint8]], offset: int) -> None:
        """Write an aligned segment at an aligned offset; the last may reach beyond the end."""
        view = segment.data
        done = 0
        while done < len(view):
            direct = self._direct  # another thread may find out meanwhile that it is not taken
            try:
                written = os.pwrite(self._descriptor, view[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                self._go_buffered()
                continue
            if written == 0:
                raise OSError(errno.EIO, "the file system takes no more and gives no reason")
            if direct and done + written < len(view):
                written -= written % ALIGNMENT  # a short write: go on from an aligned place
                if written == 0:
                    self._go_buffered()  # which writes the rest, or says why it cannot
            done += written
        if not self._direct:
            self._flush(len(view))

    def _go_buffered(self) -> None:
        """Some file systems take the flag and refuse the write."""
        import fcntl

        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._direct = 0

    def _flush(self, nbytes: int) -> None:
        with self._flushing:
            self._unflushed += nbytes
            if self._unflushed < _FLUSH_NBYTES:
                return
            self._unflushed = 0
        getattr(os, "fdatasync", os.fsync)(self._descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def commit(self) -> None:
        """Cut the file to its size, wait until it is on the disk, have it checked, and give it its
        final name."""
        os.ftruncate(self._descriptor, self._nbytes)
        os.fsync(self._descriptor)
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)
        self._check(self._partial)
        os.rename(self._partial, self._final)
        sync_folder(self._final.parent)

    def discard(self) -> None:
        """Close and delete the partial file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        self._partial.unlink(missing_ok=True)
