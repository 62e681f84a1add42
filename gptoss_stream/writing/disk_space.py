"""Free space on the file system of an output, and errors of a full disk."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from .._utils.failures import machine_error
from .._utils.messages import sized
from ..errors import MachineError

__all__ = ["check_space", "disk_full_error", "free_nbytes", "is_disk_full", "size_on_disk"]


def free_nbytes(folder: Path) -> int:
    """Return the bytes that can still be written to a folder, which need not exist yet.

    Raises:
        MachineError: If the system does not say.
    """
    try:
        existing = folder.absolute()
        while not existing.exists():
            existing = existing.parent
        status = os.statvfs(existing)
    except OSError as error:
        raise machine_error(error, f"asking for the free space of {folder}") from error
    return status.f_bavail * status.f_frsize


def check_space(folder: Path, needed: int, to_be_deleted: int = 0) -> None:
    """Check that a folder has room, before anything is written.

    Args:
        folder: The folder to write to.
        needed: Bytes to be written.
        to_be_deleted: Bytes that will be deleted first.

    Raises:
        MachineError: If there is not enough room.
    """
    free = free_nbytes(folder) + to_be_deleted
    if needed > free:
        raise MachineError(
            f"{folder}: {sized(needed)} are needed and {sized(free)} are free; "
            f"free {sized(needed - free)} or name another output"
        )


def is_disk_full(error: OSError) -> bool:
    """Return whether an error says that the disk or the user's quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_full_error(error: OSError, folder: Path, needed: int) -> MachineError:
    """Return the error for a full disk, with `needed` bytes of shards still to be written."""
    free = free_nbytes(folder)
    full = "your disk quota is used up" if error.errno == errno.EDQUOT else "the disk is full"
    missing = f", {sized(needed - free)} too little" if needed > free else ""
    left = f"{sized(needed)} are" if needed else "only the index and other small files are"
    return MachineError(
        f"{folder}: {full}: {left} still to be written and {sized(free)} are free"
        f"{missing}; make room and run the same command again: finished shards are kept"
    )


def size_on_disk(folder: Path) -> int:
    """Return the bytes of all files in a folder and its subfolders."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
