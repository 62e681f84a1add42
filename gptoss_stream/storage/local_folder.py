"""A folder on this machine."""

from __future__ import annotations

import errno
import mmap
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._utils.buffers import ALIGNMENT
from .._utils.failures import machine_error
from .._utils.platforms import read_at
from .._utils.regular_file import NotRegularError, open_regular
from ..errors import CheckpointError
from .location import FileInfo, ShownByName, changed

if TYPE_CHECKING:
    import numpy as np

__all__ = ["LocalFile", "LocalFolder"]

# Without a reservation of swap space: Linux would refuse a private map that is larger than memory,
# though hardly any of it is written to. (MAP_NORESERVE, which `mmap` lacks before Python 3.13.)
_NORESERVE = 0x4000 if sys.platform == "linux" else 0
_PROBES = 16
"""Places in a file that show whether the page cache has it."""


class LocalFolder(ShownByName):
    """A local folder (see `Location`). Methods raise `OSError` as the system does."""

    revision = None
    is_local = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def identity(self) -> str:
        """Its path, with links resolved."""
        # Not Path.resolve: before Python 3.13 a loop of links is a RuntimeError there.
        return os.fsencode(os.path.realpath(self.path)).decode(errors="backslashreplace")

    def display_path(self, name: str) -> str:
        """Return the path of a file."""
        return str(self.path / name)

    def check(self) -> None:
        """Check that the folder exists (see `Location.check`)."""
        if not self.path.exists():
            raise CheckpointError(f"{self.path}: there is no such folder; check the path")
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: not a folder; name the folder of the checkpoint")

    def has(self, name: str) -> bool:
        """Return whether a file or anything else of that name exists."""
        return (self.path / name).exists()

    def names(self, folder: str = "") -> list[str]:
        """Return the names in the folder or in a folder of it, sorted."""
        try:
            return sorted(p.name for p in (self.path / folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def open(self, name: str) -> LocalFile:
        """Open a regular file.

        Links may lead to files in the folder or, as in the Hub's cache (snapshots/<commit>/x ->
        ../../blobs/<hash>), to the blobs beside the snapshots.
        """
        file = self.path / name
        target = Path(os.path.realpath(file))
        home = Path(os.path.realpath(self.path))
        allowed = [home]
        snapshot = next((p for p in (home, *home.parents) if p.parent.name == "snapshots"), None)
        if snapshot is not None:
            allowed.append(snapshot.parent.parent / "blobs")
        if file.is_symlink() and not any(folder in target.parents for folder in allowed):
            raise CheckpointError(
                f"{file}: a link that leads out of the folder, to {target}; copy the file to the "
                "folder"
            )
        try:
            return LocalFile(name, file, open_regular(target))
        except NotRegularError:
            raise CheckpointError(
                f"{file}: not a regular file; copy the file to the folder"
            ) from None

    def pinned_to(self, state: Mapping[str, Any] | None) -> LocalFolder:
        """Return the folder: it has no revisions."""
        return self

    def download(self, names: list[str]) -> None:
        """Do nothing: the files are local."""


class LocalFile:
    """An open local file (see `File`).

    Reads by `pread`: if a memory-mapped file shrinks, the process that reads it is killed by
    SIGBUS, without an exception.
    """

    def __init__(self, name: str, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._name = name
        self._opening = threading.Lock()
        self._direct: int | None = None
        self.info = self._describe()

    def _describe(self) -> FileInfo:
        """Return size, time of change and inode of the file as they are now."""
        status = os.fstat(self._descriptor)
        # Not the change time: adding or removing a link to the file changes it too.
        return FileInfo(self._name, status.st_size, status.st_mtime_ns, status.st_ino)

    def read_into(self, out: memoryview, begin: int, stop: threading.Event) -> bool:
        """Fill memory with the file's bytes (see `File.read_into`)."""
        try:
            while out:
                count = read_at(self._descriptor, [out], begin)
                if count == 0:
                    raise changed(str(self._path))
                out, begin = out[count:], begin + count
        except OSError as error:
            raise machine_error(error, f"reading {self._path} at byte {begin}") from error
        return False

    def is_on_cold_disk(self) -> bool:
        """Return whether the file is on a disk of this machine, most of it not in the page cache.

        Then reading past the page cache costs a tenth of the processor's time. Other file systems
        (of a network, or in user space) may read ahead only through the page cache.
        """
        is_on_disk = os.major(os.fstat(self._descriptor).st_dev) != 0
        if not is_on_disk or not hasattr(os, "O_DIRECT") or not hasattr(os, "RWF_NOWAIT"):
            return False
        places = range(0, self.info.nbytes, max(1, self.info.nbytes // _PROBES))
        return 2 * sum(map(self._is_cached, places)) <= len(places)

    def _is_cached(self, place: int) -> bool:
        """Return whether the page cache has a byte."""
        try:
            return os.preadv(self._descriptor, [bytearray(1)], place, os.RWF_NOWAIT) == 1
        except OSError:  # it would have to be read, or the file system cannot say
            return False

    def read_past_cache(
        self, memory: np.ndarray[Any, Any], begin: int, stop: threading.Event
    ) -> None:
        """Fill memory with the file's bytes past the page cache, if the system allows that.

        Args:
            memory: Page-aligned memory. What of its last page is beyond the end of the file keeps
                its values.
            begin: The first byte in the file, a multiple of `ALIGNMENT`.
            stop: See `read_into`.

        Raises:
            CheckpointError: If the file has changed since it was opened.
            MachineError: If reading fails.
        """
        nbytes = min(len(memory), self.info.nbytes - begin)
        done = 0
        try:
            while done < nbytes:
                count = read_at(self._opened_direct(), [memory.data[done:]], begin + done)
                if done + count < nbytes:
                    count -= count % ALIGNMENT  # go on at an aligned byte
                if count == 0:
                    raise changed(str(self._path))
                done += count
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise machine_error(error, f"reading {self._path} at byte {begin}") from error
            self.read_into(memory[:nbytes].data, begin, stop)  # some file systems refuse it late

    def _opened_direct(self) -> int:
        """Return a descriptor that reads past the page cache, or else the ordinary one."""
        with self._opening:
            if self._direct is None:
                flags = os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC
                try:  # the same file, wherever its name leads now
                    self._direct = os.open(f"/proc/self/fd/{self._descriptor}", flags)
                except OSError:
                    self._direct = os.dup(self._descriptor)
            return self._direct

    def map(self) -> mmap.mmap:
        """Map the file: writing to the memory copies the page and never changes the file.

        The memory stays valid when the file is closed. Raises `OSError`, and `ValueError` if the
        file is empty.
        """
        return mmap.mmap(
            self._descriptor,
            0,
            flags=mmap.MAP_PRIVATE | _NORESERVE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
        )

    def prefetch(self, begin: int, nbytes: int) -> None:
        """Ask the system to read bytes ahead; returns at once."""
        if hasattr(os, "posix_fadvise"):  # not on every system, and only a hint
            os.posix_fadvise(self._descriptor, begin, nbytes, os.POSIX_FADV_WILLNEED)

    def forget(self, begin: int, nbytes: int) -> None:
        """Tell the system that bytes need not stay in its cache; those that are mapped do."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._descriptor, begin, nbytes, os.POSIX_FADV_DONTNEED)

    def check_unchanged(self) -> None:
        """Check that the file was not written to since it was opened.

        Otherwise some of the bytes that were read may be old and some new (see
        `File.check_unchanged`).
        """
        if self._describe() != self.info:
            raise changed(str(self._path))

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._direct is not None:
            os.close(self._direct)
            self._direct = None
