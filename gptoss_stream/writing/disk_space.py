"""An output folder from empty, or from where an earlier run stopped, to finished.

What every producer of shards goes through: refuse what cannot end well, say how much is finished,
make the rest, and finish in the order that leaves nothing half-written looking whole.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from .._utils.failures import machine_error
from .._utils.messages import sized
from ..errors import MachineError

__all__ = ["check_space", "disk_full", "free_nbytes", "is_disk_full"]


def free_nbytes(folder: Path) -> int:
    """Bytes that can still be written to the file system of a folder, which need not exist."""
    try:
        there = folder.absolute()
        while not there.exists():
            there = there.parent
        status = os.statvfs(there)
    except OSError as error:
        raise machine_error(error, f"asking for the free space of {folder}") from error
    return status.f_bavail * status.f_frsize


def check_space(folder: Path, needed: int, given_up: int = 0) -> None:
    """Refuse to begin what cannot end; `given_up` bytes will be deleted first."""
    free = free_nbytes(folder) + given_up
    if needed > free:
        raise MachineError(
            f"{folder}: {sized(needed)} are needed and {sized(free)} are free; "
            f"free {sized(needed - free)} or name another output"
        )


def is_disk_full(error: OSError) -> bool:
    """Whether an error says that the disk, or the user's part of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def disk_full(error: OSError, folder: Path, needed: int) -> MachineError:
    """The error for a disk that is full, with `needed` bytes of shards still to be written."""
    free = free_nbytes(folder)
    full = (
        "your quota of the disk is used up" if error.errno == errno.EDQUOT else "the disk is full"
    )
    missing = f", {sized(needed - free)} too little" if needed > free else ""
    left = f"{sized(needed)} are" if needed else "only the index and other small files are"
    return MachineError(
        f"{folder}: {full}: {left} still to be written and {sized(free)} are free"
        f"{missing}; make room and run the same command again: what is finished stays"
    )


def _size_on_disk(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
