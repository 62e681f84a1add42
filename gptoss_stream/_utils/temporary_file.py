"""Files for bytes that wait on the disk until they are needed."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from .platforms import read_at

__all__ = [
    "TemporaryFile",
    "delete_own",
    "file_identity",
    "is_leftover",
    "scratch_folder",
    "unnamed_file",
]

_PREFIX = ".gptoss_stream-"

_MAX_VIEWS = 1024  # that one preadv call fills (IOV_MAX)


class TemporaryFile:
    """A file that is written and read at offsets, from any thread, and deleted when it is closed.

    Args:
        path: Where to create it; None if it has no name.
        existing: Whether it exists, with contents to keep.
        descriptor: Of the file without a name.
    """

    def __init__(self, path: Path | None, *, existing: bool = False, descriptor: int = -1) -> None:
        self._path = path
        if path is not None:
            flags = os.O_RDWR | getattr(os, "O_CLOEXEC", 0)
            if existing:
                flags |= getattr(os, "O_NOFOLLOW", 0)
            else:
                path.unlink(missing_ok=True)  # a process that has it open keeps what is in it
                flags |= os.O_CREAT | os.O_EXCL
            descriptor = os.open(path, flags, 0o600)
        self._descriptor = descriptor

    def advise(self, offset: int, nbytes: int, advice: str) -> None:
        """Give the system advice on some bytes, such as POSIX_FADV_RANDOM, where it takes any."""
        if hasattr(os, advice):
            os.posix_fadvise(self._descriptor, offset, nbytes, getattr(os, advice))

    def write(self, data: np.ndarray[Any, Any], offset: int) -> None:
        """Write a C-contiguous array of uint8 at an offset."""
        view = data.data.cast("B")
        while view:
            written = os.pwrite(self._descriptor, view, offset)
            view, offset = view[written:], offset + written

    def read(self, views: list[memoryview], offset: int) -> None:
        """Fill views, one after another, with the bytes from an offset on."""
        while views:
            count = read_at(self._descriptor, views[:_MAX_VIEWS], offset)
            if count == 0:
                raise OSError("the spill file is shorter than what was written to it")
            offset += count
            full = 0
            while full < len(views) and count >= len(views[full]):
                count -= len(views[full])
                full += 1
            views = views[full:]
            if count:
                views[0] = views[0][count:]

    def resize(self, nbytes: int) -> None:
        """Set the size of the file; bytes that were not written are 0."""
        os.ftruncate(self._descriptor, nbytes)

    def sync(self) -> None:
        """Make what was written durable."""
        os.fsync(self._descriptor)

    def close(self, *, keep: bool = False) -> None:
        """Close the file, and delete it unless it is to be kept."""
        if self._descriptor >= 0:
            identity = file_identity(os.fstat(self._descriptor))
            os.close(self._descriptor)
            self._descriptor = -1
            if not keep and self._path is not None:
                delete_own(self._path, identity)


def file_identity(status: os.stat_result) -> tuple[int, int]:
    """Return what tells a file from others."""
    return status.st_dev, status.st_ino


def delete_own(path: Path, identity: tuple[int, int]) -> None:
    """Delete a file unless another process has made another one of the same name."""
    with suppress(FileNotFoundError):
        if file_identity(os.lstat(path)) == identity:
            path.unlink()


def unnamed_file(folder: Path) -> TemporaryFile:
    """Create a file without a name, which is gone even if the process is killed."""
    try:
        return TemporaryFile(None, descriptor=os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600))
    except (AttributeError, OSError):  # not every system and file system has that
        descriptor, name = tempfile.mkstemp(dir=folder, prefix=_PREFIX)
        Path(name).unlink()
        return TemporaryFile(None, descriptor=descriptor)


def is_leftover(name: str) -> bool:
    """Return whether a file of this name is what a killed process left of an unnamed file."""
    return name.startswith(_PREFIX)


def scratch_folder(path: Path) -> Path:
    """Return an existing folder for unnamed files, on the file system of a path if possible."""
    folder = path.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return folder if os.access(folder, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
