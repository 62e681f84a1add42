"""Defines the interface of every location: it lists files, and reads byte ranges of them.

Each kind of location is one module of this room. The other rooms use only `Location`, which is a
local or remote folder, and its `File`s. `WritableLocation` can also write and delete files.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from .._utils.messages import short_call, summary
from ..errors import CheckpointError, OutputError

__all__ = [
    "NEVER_STOP",
    "BatchingLocation",
    "File",
    "FileInfo",
    "Location",
    "LocationLike",
    "LostUploadError",
    "ShownByName",
    "WritableLocation",
    "changed",
    "read_whole",
]

NEVER_STOP = threading.Event()
"""An event that is never set, for reads that cannot be stopped."""


class ShownByName:
    """What `repr` shows of a location: its name in messages, which has no secret."""

    def __repr__(self) -> str:
        return summary(self, str(self))


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file of a location: its name, its size, and what shows whether it has changed."""

    name: str
    """Its name in the location, with / between folders."""
    nbytes: int
    """Its size in bytes."""
    version: int | str
    """The time of its last change in ns, or a server's identifier: an ETag, a hash."""
    inode: int = 0
    """Of a local file, its number in the file system."""
    sha256: str | None = None
    """Its checksum, if the location knows it."""

    def __repr__(self) -> str:
        return short_call("FileInfo", {"name": self.name, "nbytes": self.nbytes})


class File(Protocol):
    """An open file."""

    @property
    def info(self) -> FileInfo:
        """The file as it was when it was opened."""

    def read_into(self, out: memoryview, begin: int, stop: threading.Event) -> bool:
        """Fill memory with the file's bytes.

        Args:
            out: The memory.
            begin: The first byte in the file.
            stop: When this is set, the read ends early with any exception.

        Returns:
            Whether the bytes are certainly those of the version that `info` names, and may be kept
            under it. If not, only `check_unchanged` shows a change of a local file, and nothing may
            show one of a remote file.

        Raises:
            CheckpointError: If the file has changed since it was opened.
            MachineError: If reading fails.
        """

    def check_unchanged(self) -> None:
        """Check that the file has not changed since it was opened.

        Raises:
            CheckpointError: If it has.
        """

    def close(self) -> None:
        """Close the file."""


@runtime_checkable
class Location(Protocol):
    """A folder, local or remote. `str` of it is its name in messages, without any secret."""

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine."""

    @property
    def identity(self) -> str:
        """Its full name, which identifies it in the record of a run."""

    @property
    def revision(self) -> str | None:
        """The requested revision, if the location has revisions."""

    def display_path(self, name: str) -> str:
        """Return the name of a file in messages, without any secret."""

    def check(self) -> None:
        """Check that the location exists.

        Raises:
            CheckpointError: If it does not.
        """

    def has(self, name: str) -> bool:
        """Return whether a file exists."""

    def names(self, folder: str = "") -> list[str]:
        """Return the names of the files in the location or in a folder of it, sorted."""

    def open(self, name: str) -> File:
        """Open a file.

        Args:
            name: Its name.

        Returns:
            The open file, which the caller closes.

        Raises:
            CheckpointError: If it does not exist.
            MachineError: If opening fails.
        """

    def pinned_to(self, state: Mapping[str, Any] | None) -> Location:
        """Return the location at the commit that an unfinished run began to read.

        Locations without revisions return themselves.

        Args:
            state: The state of the unfinished run, if there is one.
        """

    def download(self, names: list[str]) -> None:
        """Download files into the Hub's cache, if the location was opened with `download=True`.

        Other locations do nothing.
        """


@runtime_checkable
class WritableLocation(Location, Protocol):
    """A location that files can be written to.

    Methods raise `OutputError` if that is refused and `MachineError` if it fails.
    """

    def listing(self) -> Mapping[str, FileInfo]:
        """Return all files in the location and its folders, as they are now, by name."""

    def read(self, name: str) -> bytes:
        """Return the bytes of a small file."""

    def put(self, files: Mapping[str, Path | bytes], checksums: Mapping[str, str]) -> None:
        """Write files in order, each completely or not at all, and check what has arrived.

        Args:
            files: Local files or bytes, by name.
            checksums: The SHA-256 of files for which it is known.
        """

    def delete(self, names: list[str]) -> None:
        """Delete files; files that do not exist are ignored."""


class LostUploadError(OutputError):
    """A file that was uploaded and not published is not there any more."""


@runtime_checkable
class BatchingLocation(WritableLocation, Protocol):
    """A location that limits how often files may be made visible, but not how often uploaded."""

    def upload(self, name: str, file: Path, checksum: str) -> bytes:
        """Upload a file, which is not visible before `publish`.

        Args:
            name: Its name.
            file: The local file.
            checksum: Its SHA-256.

        Returns:
            A receipt for `publish`, also of a later process.
        """

    def publish(self, receipts: Mapping[str, bytes], files: Mapping[str, bytes]) -> None:
        """Make uploaded files visible, all at once, together with small files.

        Args:
            receipts: What `upload` has returned, by name.
            files: The small files, by name.

        Raises:
            LostUploadError: If an uploaded file is not there any more.
        """


LocationLike: TypeAlias = "str | os.PathLike[str] | Location"
"""How callers name a location: a path, a URL, a repository, or an opened location."""


def read_whole(file: File) -> bytes:
    """Read a small file, which stays open."""
    data = bytearray(file.info.nbytes)
    file.read_into(memoryview(data), 0, NEVER_STOP)
    return bytes(data)


def changed(where: str) -> CheckpointError:
    """Return the error for a file that has changed since it was opened."""
    return CheckpointError(
        f"{where}: it changed while it was being read; make sure that nothing writes to it, then "
        "start again with --overwrite"
    )
