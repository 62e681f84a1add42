"""Identifies a process, so that other processes can tell whether it still runs."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ProcessIdentity", "kernel"]


@dataclass(frozen=True, slots=True)
class ProcessIdentity:
    """A process, as other processes can recognise it."""

    token: str
    host: str
    pid: int
    started: str
    """When it began, in the kernel's clock; empty where the system does not say."""
    kernel: str
    """Identifies a boot of a machine."""
    pid_space: str
    """Identifies the container, or whatever else has process ids of its own."""
    device: int
    """The mount of the folder, within a kernel."""
    since: str
    is_task: bool

    @classmethod
    def this(cls, folder: Path, *, is_task: bool) -> ProcessIdentity:
        """Return this process, with a new token."""
        return cls(
            token=os.urandom(12).hex(),
            host=os.uname().nodename,
            pid=os.getpid(),
            started=_state_and_start(os.getpid())[1],
            kernel=kernel(),
            pid_space=_pid_space(),
            device=os.stat(folder).st_dev,
            since=time.strftime("%Y-%m-%d %H:%M:%S %z"),
            is_task=is_task,
        )

    @property
    def is_local(self) -> bool:
        """Whether its process id means the same process to this process."""
        return (self.kernel, self.pid_space) == (kernel(), _pid_space())

    @property
    def is_running(self) -> bool | None:
        """Whether a process with an id of this system runs; None if that is not known."""
        try:
            with suppress(PermissionError):  # it is another user's
                os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        state, started = _state_and_start(self.pid)
        if not started or not self.started:
            return None  # it may be another process with the same id
        return started == self.started and state not in "ZX"


def _state_and_start(pid: int) -> tuple[str, str]:
    """Return the state of a process, and when it began; empty where the system does not say."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return fields[0], fields[19]
    except (OSError, IndexError):
        return "", ""


def kernel() -> str:
    """Return what identifies this boot of this machine."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        import uuid

        return f"{uuid.getnode():x}"  # a random number, equal to no other, if there is no address


def _pid_space() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""
