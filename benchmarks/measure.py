"""Runs a command and measures it as a whole process: wall time, CPU time, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

_GROUP = Path("/sys/fs/cgroup/memory/gptoss_stream_benchmark")


@dataclass(frozen=True)
class Measured:
    """Times in seconds, and resident memory in bytes, mapped pages included.

    `memory` has the samples (second, bytes), if there are any."""

    wall: float
    cpu: float
    peak_rss: int
    memory: Sequence[tuple[float, int]] = ()


class Failed(RuntimeError):
    """A command failed, with this code (above 128: killed by a signal)."""

    def __init__(self, command: Sequence[str], code: int, said: str) -> None:
        super().__init__(f"{' '.join(command)} failed with {code}:\n{said}")
        self.code = code


def drop_caches() -> None:
    """Drop the page cache (needs root)."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def fill_cache(folder: Path) -> None:
    """Read the files of a folder, so that they are in the page cache."""
    buffer = bytearray(8 << 20)
    for file in sorted(folder.iterdir()):
        with file.open("rb", buffering=0) as f:
            while f.readinto(buffer):
                pass


def can_limit() -> bool:
    """Return whether memory limits can be set: this needs root and control groups, version 1."""
    return os.access("/sys/fs/cgroup/memory/memory.usage_in_bytes", os.R_OK) and os.geteuid() == 0


def limited(command: Sequence[str], nbytes: int | None) -> list[str]:
    """Return the command that runs a command under a memory limit, page cache included.

    Args:
        command: The command.
        nbytes: The limit; None for none.
    """
    if nbytes is None:
        return [*command]
    _GROUP.mkdir(exist_ok=True)
    (_GROUP / "memory.limit_in_bytes").write_text(str(nbytes))
    # The shell joins the group and becomes the command, so nothing before it is counted.
    return ["sh", "-c", f'echo $$ > {_GROUP}/cgroup.procs; exec "$@"', "sh", *command]


def run(
    command: Sequence[str],
    *,
    warm: Path | None = None,
    limit: int | None = None,
    sample: float = 0,
) -> Measured:
    """Run a command and measure it.

    Args:
        command: The command.
        warm: Files that are in the page cache; everything else is dropped from it.
        limit: Bytes of memory for the command, page cache included.
        sample: The interval in seconds at which its memory is sampled.

    Raises:
        Failed: If the command fails, with what it printed.
    """
    drop_caches()
    if warm is not None:
        fill_cache(warm)
    time.sleep(1)
    command = limited(command, limit)
    # The peak of a child starts at the resident memory of its parent, so a small process runs it.
    with subprocess.Popen(
        [sys.executable, "-S", __file__, str(sample), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        measured, errors = process.communicate()
    if process.returncode:
        raise Failed(command, process.returncode, errors.decode(errors="replace"))
    return Measured(**json.loads(measured))


class MemorySampler:
    """Samples the resident memory of a process at an interval, until it is stopped."""

    def __init__(self, pid: int, interval: float) -> None:
        self.samples: list[tuple[float, int]] = []
        self._statm = Path(f"/proc/{pid}/statm")
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample, args=(interval,))
        self._thread.start()

    def _sample(self, interval: float) -> None:
        begin, page = time.perf_counter(), os.sysconf("SC_PAGE_SIZE")
        while True:
            resident = int(self._statm.read_text().split()[1])  # 0 once the process has ended
            self.samples.append((round(time.perf_counter() - begin, 3), resident * page))
            if self._stopped.wait(interval):
                return

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()


def main() -> None:
    """Run the command in argv, which follows the sampling interval, and print the measurements."""
    interval, command = float(sys.argv[1]), sys.argv[2:]
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr)
    sampler = MemorySampler(process.pid, interval) if interval else None
    # Wait without collecting the process, so that its files in /proc stay until the sampler ends.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    if sampler is not None:
        sampler.stop()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    memory = sampler.samples if sampler is not None else []
    cpu = usage.ru_utime + usage.ru_stime
    print(json.dumps(asdict(Measured(wall, cpu, usage.ru_maxrss * 1024, memory))))
    code = process.returncode
    sys.exit(code if code >= 0 else 128 - code)  # as shells report the signal that killed it


if __name__ == "__main__":
    main()
