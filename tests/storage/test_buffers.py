"""Memory for direct I/O."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from gptoss_stream._utils.buffers import ALIGNMENT, aligned_buffer

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.parametrize("nbytes", [1, 4096, 4097, 3 << 20])
def test_it_begins_and_ends_with_a_page(nbytes):
    buffer = aligned_buffer(nbytes)
    assert buffer.ctypes.data % ALIGNMENT == 0
    assert nbytes <= len(buffer) < nbytes + ALIGNMENT
    assert len(buffer) % ALIGNMENT == 0
    assert not buffer.any()
    buffer[:] = 1
    assert buffer.all()


def huge_nbytes(buffer: np.ndarray) -> int:
    """The bytes of huge pages in the mapping that has a buffer."""
    found = 0
    is_here = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(number, 16) for number in match.groups())
            is_here = begin < buffer.ctypes.data + len(buffer) and end > buffer.ctypes.data
        elif is_here and line.startswith("AnonHugePages:"):
            found += int(line.split()[1]) * 1024
    return found


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(),
    reason="needs a system with huge pages",
)
def test_a_large_one_is_in_huge_pages_and_a_small_one_is_not():
    large, small = aligned_buffer(64 << 20), aligned_buffer(1 << 20)
    large[:], small[:] = 1, 1
    assert huge_nbytes(large) > 0
    assert huge_nbytes(small) == 0 or "[always]" in HUGE_PAGES.read_text()
