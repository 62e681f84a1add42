"""Runs a command and measures it as a whole process: wall time, CPU time, peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup/memory/gptoss_stream_benchmark")


@dataclass(frozen=True)
class Measured:
    """Seconds, and bytes of peak resident memory (mapped pages included)."""

    wall: float
    cpu: float
    peak_rss: int


def drop_caches() -> None:
    """Start from a cold page cache (needs root)."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def can_limit() -> bool:
    """Whether memory limits can be set here: root, and control groups of version 1."""
    return os.access("/sys/fs/cgroup/memory/memory.usage_in_bytes", os.R_OK) and os.geteuid() == 0


def run(command: Sequence[str], *, cold: bool = True, limit: int | None = None) -> Measured:
    """Run a command to its end; `limit` is bytes of memory, the page cache's included.

    Raises `RuntimeError`, with what it printed, where the command fails.
    """
    if cold:
        drop_caches()
        time.sleep(1)
    if limit is not None:
        _GROUP.mkdir(exist_ok=True)
        (_GROUP / "memory.limit_in_bytes").write_text(str(limit))
        # The shell joins the group and becomes the command: nothing before it is counted.
        command = ["sh", "-c", f'echo $$ > {_GROUP}/cgroup.procs; exec "$@"', "sh", *command]
    # A child's peak begins with its parent's resident memory: so a small process in between.
    with subprocess.Popen(
        [sys.executable, "-S", __file__, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        measured, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{errors.decode(errors='replace')}")
    return Measured(**json.loads(measured))


def main() -> None:
    """Run the command in argv and print what it took."""
    begin = time.perf_counter()
    process = subprocess.Popen(sys.argv[1:], stdout=sys.stderr)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    measured = Measured(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)
    print(json.dumps(asdict(measured)))
    sys.exit(process.returncode)


if __name__ == "__main__":
    main()
