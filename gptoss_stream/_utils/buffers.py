"""Page-aligned memory, which direct I/O needs, in huge pages, which make it fast."""

from __future__ import annotations

import mmap
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

__all__ = ["ALIGNMENT", "aligned_buffer", "releasable_memory"]

ALIGNMENT = 4096
"""Bytes to which direct I/O aligns addresses, offsets and lengths: a page, and a multiple of any
disk's logical block."""
_HUGE_PAGE_NBYTES = 2 << 20


def aligned_buffer(nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return zeroed, page-aligned uint8 memory, with `nbytes` rounded up to the alignment.

    From 2 MiB on it is in huge pages if the system has them. A disk takes a limited number of
    places in memory at a time, often 256; with pages of 4 KiB anywhere in memory, that is 1 MiB.
    """
    import numpy as np

    size = -(-nbytes // ALIGNMENT) * ALIGNMENT
    if sys.platform != "linux":
        return np.frombuffer(mmap.mmap(-1, size), np.uint8)
    # Private: by default, memory that may be shared is never in huge pages.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if size >= _HUGE_PAGE_NBYTES:
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def releasable_memory(nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Return uint8 memory that the system gets back as soon as it is freed."""
    return aligned_buffer(nbytes)[:nbytes]
