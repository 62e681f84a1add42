"""Opens regular files only: reading a pipe would block, and a device may never end."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .platforms import refuse_windows

__all__ = ["NotRegularError", "open_regular"]


class NotRegularError(ValueError):
    """A path is a folder, pipe, socket or device, and not a regular file."""


def open_regular(file: Path) -> int:
    """Open a regular file for reading.

    Returns:
        A file descriptor.

    Raises:
        NotRegularError: If it is not a regular file.
        OSError: If opening fails.
        MachineError: Under Windows.
    """
    refuse_windows()
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise NotRegularError(f"{file}: not a regular file")
    # It may have been replaced since: open without blocking, and check again.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegularError(f"{file}: not a regular file")
    return descriptor
