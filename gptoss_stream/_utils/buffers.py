"""Writing one file of the output: aligned, past the page cache, and whole or not at all.

A file is written under a partial name, in any order of segments, and gets its final name when
all of it is on the disk. `O_DIRECT` is used where system and file system have it: buffered
writing fills the page cache, which on a small machine is the bottleneck.
"""

from __future__ import annotations

import mmap

import numpy as np

__all__ = ["ALIGNMENT", "aligned_buffer"]


ALIGNMENT = 4096
"""What direct writing needs of addresses, offsets and lengths; a page, and a multiple of any
disk's logical block."""


def aligned_buffer(nbytes: int) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    """Zeroed, page-aligned memory, of `nbytes` rounded up to the alignment."""
    return np.frombuffer(mmap.mmap(-1, -(-nbytes // ALIGNMENT) * ALIGNMENT), np.uint8)
