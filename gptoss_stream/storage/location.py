"""What all places say of a file, and when it is no longer that."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias, runtime_checkable

from ..errors import CheckpointError

__all__ = [
    "NEVER",
    "File",
    "FileInfo",
    "Location",
    "LocationLike",
    "WritableLocation",
    "changed",
    "read_whole",
]


NEVER = threading.Event()
"""Set by nobody: for reads that nothing stops."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file of a place: its name there, its size, and what tells whether it is still the same."""

    name: str
    nbytes: int
    version: int | str
    """The time of its last change in ns, or what a server has for it: an ETag, a hash."""
    inode: int = 0
    sha256: str | None = None
    """Where the place knows it."""


def read_whole(file: File) -> bytes:
    """All of a small file, which stays open."""
    data = bytearray(file.info.nbytes)
    file.read_into(memoryview(data), 0, NEVER)
    return bytes(data)


def changed(where: str) -> CheckpointError:
    """The error for a file that is not what it was."""
    return CheckpointError(
        f"{where}: it changed while it was being read; see that nothing writes to it, then start "
        "again with --overwrite"
    )


class File(Protocol):
    """A file, opened. Reading raises `CheckpointError` where it is no longer what it was when it
    was opened, and `MachineError` where reading fails."""

    @property
    def info(self) -> FileInfo:
        """What it was when it was opened."""

    def read_into(self, out: memoryview, at: int, stop: threading.Event) -> None:
        """Fill `out` with the file's bytes from `at` on; ends early, by any exception, when
        `stop` is set."""

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if the file is no longer what it was."""

    def close(self) -> None:
        """Give up what is held."""


@runtime_checkable
class Location(Protocol):
    """A folder, wherever it is; `str` of it is what messages call it, without any secret."""

    @property
    def is_local(self) -> bool:
        """Whether it is of this machine."""

    @property
    def identity(self) -> str:
        """Its whole name, by which a run's record tells it from others."""

    @property
    def revision(self) -> str | None:
        """What was asked for, where a place has several states."""

    def display_path(self, name: str) -> str:
        """What messages call a file of it."""

    def check(self) -> None:
        """Raise `CheckpointError` if there is no such place."""

    def has(self, name: str) -> bool:
        """Whether there is such a file."""

    def names(self, folder: str = "") -> list[str]:
        """The names of the files right in it, or in a folder of it, sorted."""

    def open(self, name: str) -> File:
        """A file of it; raises as `File` does."""

    def pinned_to(self, state: Mapping[str, Any] | None) -> Location:
        """The place in the state that an unfinished run began to read, where it has several and
        the same one was asked for."""

    def prepare(self, names: list[str]) -> None:
        """Told before reading which files' data will be read."""


class WritableLocation(Location, Protocol):
    """A place that files can be written to. Raises `OutputError` where that is refused and
    `MachineError` where it fails."""

    def listing(self) -> Mapping[str, FileInfo]:
        """All files in it and in its folders, as they are now; none where it is not there."""

    def read(self, name: str) -> bytes:
        """A small file."""

    def put(self, files: Mapping[str, Path | bytes], sums: Mapping[str, str]) -> None:
        """Write files, each whole or not at all, in their order, and check what has arrived;
        `sums` are SHA-256 sums of those for which they are known."""

    def delete(self, names: list[str]) -> None:
        """Delete files."""


LocationLike: TypeAlias = "str | os.PathLike[str] | Location"
"""How callers name a place: a path, a URL, a repository, or a place that was opened."""
