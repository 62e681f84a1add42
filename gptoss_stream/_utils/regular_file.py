"""Opening what must be a regular file: a pipe would block for ever, a device never end."""

from __future__ import annotations

import os
import stat
from pathlib import Path

__all__ = ["NotRegularError", "open_regular"]


class NotRegularError(ValueError):
    """A folder, pipe, socket or device stands where a file should be."""


def open_regular(file: Path) -> int:
    """A descriptor for reading; raises `NotRegularError`, and `OSError` as the system does."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise NotRegularError(f"{file}: not a regular file")
    # It may have become something else meanwhile: open without waiting, and look again.
    descriptor = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise NotRegularError(f"{file}: not a regular file")
    return descriptor
