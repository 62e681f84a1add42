"""A file that one process at a time holds, for file systems on which `flock` lets everybody in.

That is so on Lustre unless it is mounted with `flock`, and on some GPFS and NFS mounts. Creating a
name that must not exist yet is atomic on all of them.

A guard `run` is a chain of files. Its first holder creates `run.guard`. Each file names its holder
and has a random token. When that holder is dead, others try to create `run.guard-<token>`: one of
them succeeds, and is the next holder. So the holder is who created the last file of the chain. It
renews the file's modification time every ten seconds, and is dead after a minute without that, or
if its process does not exist any more where that can be known. Who gives a guard up deletes
`run.guard` first. No token occurs twice: a process that judged a chain which has ended meanwhile
creates a file that is in no chain, sees that, and begins again.
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from .process_identity import ProcessIdentity

__all__ = ["GuardFile", "GuardHolder", "is_guard"]

_HEARTBEAT_SECONDS = 10.0
_STALE_SECONDS = 60.0
_POLL_SECONDS = 0.1
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


def is_guard(name: str) -> bool:
    """Return whether a file of a work folder belongs to a guard."""
    return ".guard" in name


@dataclass(frozen=True, slots=True)
class GuardHolder:
    """A process that holds a guard, or died when it did."""

    process: ProcessIdentity
    path: Path
    """Its file."""
    heartbeat: float
    """When it last renewed the file, by the clock of the file system."""
    stale_in: int | None = None
    """Seconds until it counts as dead if it gives no sign of life; None if it is known to live."""

    @property
    def is_task(self) -> bool:
        """Whether it is an array task."""
        return self.process.is_task

    def __str__(self) -> str:
        process = self.process
        if process.is_local:
            return f"process {process.pid}"
        return f"process {process.pid} on host {process.host}, since {process.since}"


class GuardFile:
    """One guard of a folder, and this process's share in it.

    Methods raise `OSError` as the system does.

    Args:
        folder: The folder.
        name: The guard's name.
        flock_excludes: Returns whether `flock` works among the processes of this kernel that use
            this mount. If so, who calls `acquire` must hold a lock that excludes other holders.
    """

    def __init__(self, folder: Path, name: str, flock_excludes: Callable[[], bool]) -> None:
        self._folder = folder
        self._root = folder / f"{name}.guard"
        self._flock_excludes = flock_excludes
        self._token: str | None = None
        self._path: Path | None = None
        self._renewed = -math.inf
        self.may_be_shared = False
        """Whether the last holder may only have been silent, and may wake up and write."""
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self, *, is_task: bool = False, wait: bool = False) -> GuardHolder | None:
        """Acquire the guard, from a dead holder if need be.

        Args:
            is_task: Whether this is an array task, for others to read.
            wait: Whether to wait as long as another process holds it.

        Returns:
            Who holds it, if that is another process.
        """
        process = ProcessIdentity.this(self._folder, is_task=is_task)
        text = json.dumps(asdict(process)).encode()
        candidate = self._root.with_name(f"{self._root.name}-{process.token}.new")
        try:
            with open(candidate, "xb") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())  # after a power loss a guard says whose it was
            while True:
                chain = self._chain()
                os.utime(candidate)  # the clock of the file system
                now = candidate.stat().st_mtime
                if chain and (holder := self._alive(chain[-1], process, now)):
                    if not wait:
                        return holder
                    time.sleep(_POLL_SECONDS)
                    continue
                path = self._path_after(chain)
                if not _create(path, candidate, text):
                    continue  # another process was faster
                if self._succeeds(chain, process, now):
                    break
                path.unlink(missing_ok=True)
        finally:
            candidate.unlink(missing_ok=True)
        self._token, self._path, self._renewed = process.token, path, time.time()
        self.may_be_shared = bool(chain) and self._lives(chain[-1].process, process) is None
        self._stop = threading.Event()
        thread = threading.Thread(target=self._renew, daemon=True)
        thread.start()
        self._thread = thread  # after its start: a signal in between ends the run by `release`
        return None

    def _succeeds(self, chain: list[GuardHolder], process: ProcessIdentity, now: float) -> bool:
        """Return whether the file that was just created is the last of the chain.

        The chain may have ended, or its holder have woken up, since it was judged.
        """
        found = self._chain()
        expected = [*(holder.process.token for holder in chain), process.token]
        if [holder.process.token for holder in found] != expected:
            return False
        return not chain or self._alive(found[-2], process, now) is None

    def _alive(self, holder: GuardHolder, own: ProcessIdentity, now: float) -> GuardHolder | None:
        """Return a holder unless it is dead."""
        lives = self._lives(holder.process, own)
        if lives is not None:
            return holder if lives else None
        left = holder.heartbeat + _STALE_SECONDS - now
        return replace(holder, stale_in=math.ceil(left)) if left > 0 else None

    def _lives(self, process: ProcessIdentity, own: ProcessIdentity) -> bool | None:
        """Return whether a holder's process runs; None if that is not known."""
        if process.kernel != own.kernel:
            return None
        if process.device == own.device and self._flock_excludes():
            return False
        return process.is_running if process.pid_space == own.pid_space else None

    def _path_after(self, chain: list[GuardHolder]) -> Path:
        if not chain:
            return self._root
        return self._root.with_name(f"{self._root.name}-{chain[-1].process.token}")

    def _chain(self) -> list[GuardHolder]:
        """Read all files of the guard, in their order."""
        chain: list[GuardHolder] = []
        with suppress(FileNotFoundError):
            while True:
                chain.append(_read(self._path_after(chain)))
        return chain

    def holder(self) -> GuardHolder | None:
        """Return the last holder, alive or dead."""
        chain = self._chain()
        return chain[-1] if chain else None

    def is_held(self) -> bool:
        """Return whether this process still holds the guard; if so, it does for a minute."""
        now, holder = time.time(), None
        with suppress(FileNotFoundError):
            if self._path is not None:
                os.utime(self._path)  # first: who takes it over looks at this last
                holder = self.holder()
        if holder is None or holder.process.token != self._token:
            self._renewed = -math.inf
            return False
        self._renewed = now
        return True

    @property
    def is_fresh(self) -> bool:
        """Whether this process was seen to hold the guard so lately that none can have taken it."""
        return abs(time.time() - self._renewed) < _STALE_SECONDS / 2

    def _renew(self) -> None:
        """Show that this process is alive, until the guard is given up or lost."""
        while not self._stop.wait(_HEARTBEAT_SECONDS):
            with suppress(OSError):  # a server may be back the next time
                if not self.is_held():
                    return

    def release(self) -> None:
        """Give the guard up, and delete its files. Without effect if it is not held."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(OSError):  # then others see that this process has ended
            if self.is_held():
                for holder in self._chain():
                    holder.path.unlink(missing_ok=True)
        self._token = self._path = self._thread = None


def _create(path: Path, candidate: Path, text: bytes) -> bool:
    """Create a file that must not exist yet, with its text; return whether that succeeded."""
    try:
        os.link(candidate, path)
        return True
    except FileExistsError:
        # NFS may have carried a request out whose answer was lost, and then repeated it.
        with suppress(FileNotFoundError):
            return os.path.samefile(candidate, path)
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    with suppress(FileExistsError), open(path, "xb") as file:
        file.write(text)
        return True
    return False


def _read(path: Path) -> GuardHolder:
    """Read a file of a guard; of one that is not whole only the heartbeat counts."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        text = file.read()
    try:
        process = ProcessIdentity(**json.loads(text))
        if not re.fullmatch("[0-9a-f]+", process.token) or not process.pid > 0:
            raise ValueError("not written by this tool")
    except (ValueError, TypeError):
        process = ProcessIdentity(
            f"{status.st_ino:x}", "unknown", 0, "", "", "", 0, "unknown", False
        )
    return GuardHolder(process, path, status.st_mtime)
