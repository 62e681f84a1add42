"""The memory that this process has used, and the memory that it can still get."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["available_nbytes", "peak_rss_nbytes"]

_UNKNOWN = 1 << 62  # more than any system has


def peak_rss_nbytes() -> int:
    """Return the peak resident memory of this process in bytes."""
    # Not getrusage on Linux: a child process starts with the peak of its parent.
    peak = _field(Path("/proc/self/status"), "VmHWM")
    if peak is not None:
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_nbytes() -> int:
    """Return the bytes of memory that this process can get without swapping, page cache included.

    This is what the system has, or less if a control group (version 1 or 2) limits the process.
    """
    available = _field(Path("/proc/meminfo"), "MemAvailable")
    return min(_UNKNOWN if available is None else available, *_limits())


def _field(file: Path, name: str) -> int | None:
    """Read a line such as "VmHWM:  1234 kB" of a file in /proc; returns bytes."""
    try:
        match = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _limits() -> list[int]:
    """Return the limits of this process's control groups and of the groups above them."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return [_UNKNOWN]
    limits = [_UNKNOWN]
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, name = Path("/sys/fs/cgroup"), "memory.max"
        elif "memory" in controllers.split(","):
            root, name = Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            with suppress(OSError, ValueError):  # "max", or a group that is not visible
                limits.append(int((folder / name).read_text()))
            if folder == root:
                break
    return limits
