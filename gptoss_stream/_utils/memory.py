"""What this process has used of the memory, and what it may still use."""

from __future__ import annotations

import re
import sys
from contextlib import suppress
from pathlib import Path

__all__ = ["available_nbytes", "peak_rss_nbytes"]


_UNKNOWN = 1 << 62


def peak_rss_nbytes() -> int:
    """The largest resident memory that this process has had."""
    # Not getrusage on Linux: there a child begins with its parent's peak.
    peak = _field(Path("/proc/self/status"), "VmHWM")
    if peak is not None:
        return peak
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_nbytes() -> int:
    """Memory, the page cache's included, that this process can get without swapping: what the
    system has, or less where a control group (version 1 or 2) limits it."""
    available = _field(Path("/proc/meminfo"), "MemAvailable")
    return min(_UNKNOWN if available is None else available, *_limits())


def _field(file: Path, name: str) -> int | None:
    """A line such as "VmHWM:  1234 kB" of a file in /proc, in bytes."""
    try:
        match = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def _limits() -> list[int]:
    """The limits of this process's control groups and of those above them."""
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
            with suppress(OSError, ValueError):  # "max", or a group that is not visible here
                limits.append(int((folder / name).read_text()))
            if folder == root:
                break
    return limits
