"""What all places say of a file, and when it is no longer that."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import CheckpointError

if TYPE_CHECKING:
    from . import File

__all__ = ["NEVER", "FileInfo", "changed", "read_whole"]

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
