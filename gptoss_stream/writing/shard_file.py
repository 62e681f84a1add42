"""Writes one shard: aligned, past the page cache, and completely or not at all.

A shard is written under a partial name, in any order of chunks, and gets its final name when all
of it is on the disk. `O_DIRECT` is used where the system and the file system support it: buffered
writing fills the page cache, which is the bottleneck on a small machine.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np

from .._utils.buffers import ALIGNMENT
from .._utils.platforms import read_at
from .._utils.temporary_file import delete_own, file_identity

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

    The final name exists only after `commit`. After any error only `close` may be called.
    Methods raise `OSError` as the system does.

    Args:
        partial: The file's name while it is written.
        final: Its name when it is complete, on the same file system.
        nbytes: Its size in bytes.
        check: Called with the partial file before it gets its final name; may raise.
        existing: Whether the partial file exists, with contents to keep.
    """

    def __init__(
        self,
        partial: Path,
        final: Path,
        nbytes: int,
        check: Callable[[Path], None] = lambda partial: None,
        *,
        existing: bool = False,
    ) -> None:
        self._partial = partial
        self._final = final
        self._nbytes = nbytes
        self._check = check
        self._unflushed = 0
        self._flushing = threading.Lock()
        self._direct = getattr(os, "O_DIRECT", 0)
        self._descriptor = self._open(existing)
        self._identity = file_identity(os.fstat(self._descriptor))

    def _open(self, existing: bool) -> int:
        flags = os.O_RDWR | getattr(os, "O_CLOEXEC", 0)
        # If a file exists that should not, another run has taken the folder over and begun it.
        flags |= getattr(os, "O_NOFOLLOW", 0) if existing else os.O_CREAT | os.O_EXCL
        try:
            return os.open(self._partial, flags | self._direct, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL or not self._direct:
                raise
        self._direct = 0
        # The attempt that failed may have created it.
        return os.open(self._partial, flags & ~os.O_EXCL, 0o666)

    def write(self, chunk: np.ndarray[tuple[int], np.dtype[np.uint8]], offset: int) -> None:
        """Write a chunk.

        Args:
            chunk: Page-aligned uint8, a multiple of 4096 bytes long; the last chunk may reach
                beyond the end of the file.
            offset: The chunk's first byte in the file, a multiple of 4096.
        """
        view = chunk.data
        done = 0
        while done < len(view):
            direct = self._direct  # another thread may fall back to buffered writing meanwhile
            try:
                written = os.pwrite(self._descriptor, view[done:], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                self._use_page_cache()
                continue
            if written == 0:
                raise OSError(errno.EIO, "the file system takes no more and gives no reason")
            if direct and done + written < len(view):
                written -= written % ALIGNMENT  # a short write: continue at an aligned offset
                if written == 0:
                    self._use_page_cache()  # the next attempt writes the rest or says why not
            done += written
        if not self._direct:
            self._flush(len(view))

    def read(self, chunk: np.ndarray[tuple[int], np.dtype[np.uint8]], offset: int) -> None:
        """Read bytes that were written before.

        Args:
            chunk: Page-aligned memory for them, a multiple of 4096 bytes long.
            offset: The first byte in the file, a multiple of 4096.
        """
        done = 0
        while done < len(chunk):
            direct = self._direct
            try:
                count = read_at(self._descriptor, [chunk.data[done:]], offset + done)
            except OSError as error:
                if error.errno != errno.EINVAL or not direct:
                    raise
                self._use_page_cache()
                continue
            count -= count % ALIGNMENT if direct else 0
            if count == 0:
                raise OSError(errno.EIO, "the file is shorter than what was written to it")
            done += count

    def sync(self) -> None:
        """Make what was written durable."""
        getattr(os, "fdatasync", os.fsync)(self._descriptor)

    def _use_page_cache(self) -> None:
        """Go on without O_DIRECT: some file systems accept it and refuse to write."""
        import fcntl

        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~os.O_DIRECT)
        self._direct = 0

    def _flush(self, nbytes: int) -> None:
        """Write pages to the disk and drop them from the page cache, every now and then."""
        with self._flushing:
            self._unflushed += nbytes
            if self._unflushed < _FLUSH_NBYTES:
                return
            self._unflushed = 0
        self.sync()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def commit(self) -> None:
        """Cut the file to its size, sync it to the disk, check it, and give it its final name."""
        os.ftruncate(self._descriptor, self._nbytes)
        os.fsync(self._descriptor)
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)
        self._check(self._partial)
        os.rename(self._partial, self._final)
        sync_folder(self._final.parent)

    def close(self, *, keep: bool) -> None:
        """Close the partial file, and delete it unless it is to be kept."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if not keep:
            delete_own(self._partial, self._identity)
