"""Page-aligned memory, which direct I/O needs."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ALIGNMENT", "aligned_buffer", "releasable_memory"]

ALIGNMENT = 4096
"""Bytes to which direct I/O aligns addresses, offsets and lengths: a page, and a multiple of any
disk's logical block."""


def aligned_buffer(nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return zeroed, page-aligned uint8 memory, with `nbytes` rounded up to the alignment."""
    import numpy as np

    return np.frombuffer(mmap.mmap(-1, -(-nbytes // ALIGNMENT) * ALIGNMENT), np.uint8)


def releasable_memory(nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return uint8 memory that the system gets back as soon as it is freed."""
    return aligned_buffer(nbytes)[:nbytes]
