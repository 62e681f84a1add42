"""What this system lacks, and what is done about it."""

from __future__ import annotations

import os
import sys

from ..errors import MachineError

__all__ = ["platform_note", "read_at", "refuse_windows"]


def refuse_windows() -> None:
    """Refuse to go on under Windows.

    Raises:
        MachineError: If this is Windows.
    """
    if sys.platform == "win32":
        raise MachineError(
            "Windows has no locks and no reading at offsets as this tool needs them; run it in "
            "WSL ('wsl --install' in PowerShell), where it works as on Linux"
        )


def platform_note() -> str | None:
    """Return what writing on this system lacks, if anything."""
    if sys.platform != "darwin":
        return None
    return (
        "macOS writes through its page cache, and a power loss may lose what the disk has not "
        "written yet; after one, run 'verify'"
    )


def read_at(descriptor: int, views: list[memoryview], offset: int) -> int:
    """Fill views, one after another, with a file's bytes from an offset on.

    Returns:
        How many bytes were read, which may be fewer than fit; 0 at the end of the file.
    """
    if hasattr(os, "preadv"):
        return os.preadv(descriptor, views, offset)
    data = os.pread(descriptor, len(views[0]), offset)  # macOS before 11
    views[0][: len(data)] = data
    return len(data)
