"""Locks an output folder against other runs, by `flock` on files in its work folder.

`lock` is held by the run: exclusively by a run of one process, shared by the array tasks of a run.
`<task>.lock` is held by an array task against itself. `turn` is held by a task while it begins or
finishes. The locks of a dead process are released by the system.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from ..errors import OutputError
from .run_state import WORK_NAME
from .shard_file import sync_folder

__all__ = ["LOCK_NAME", "FolderLock"]

LOCK_NAME = "lock"
_ENDING_SECONDS = 5.0  # for the last task of a run to delete the work folder


class FolderLock:
    """The lock of one process on an output folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._work = folder / WORK_NAME
        self._lock: IO[str] | None = None
        self._task_lock: IO[str] | None = None
        self._turn: IO[str] | None = None

    @property
    def is_task(self) -> bool:
        """Whether an array task holds the lock, together with others."""
        return self._task_lock is not None

    def acquire(self, *, shared: bool) -> None:
        """Create the folder and its work folder, and lock them.

        Raises:
            OutputError: If another run holds the folder.
        """
        import fcntl

        deadline = time.monotonic() + _ENDING_SECONDS
        while True:
            self._create_folders()
            try:
                lock = open(self._work / LOCK_NAME, "a+")  # noqa: SIM115 (kept for the whole run)
            except FileNotFoundError:
                continue  # a run has just ended and deleted its work folder
            try:
                fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                with lock:
                    lock.seek(0)
                    holder = lock.read(20).strip()
                if shared and not holder and time.monotonic() < deadline:
                    time.sleep(0.05)
                    continue  # the last task that ended is deleting the work folder
                raise OutputError(
                    f"{self._folder}: another run{f' (process {holder})' if holder else ''} is "
                    "writing to it; wait for it or name another output"
                ) from None
            if self._is_current(lock):
                lock.truncate(0)
                if not shared:
                    lock.write(f"{os.getpid()}\n")
                    lock.flush()
                self._lock = lock
                return
            lock.close()  # it belonged to a run that has just ended

    def _create_folders(self) -> None:
        """Create the folder and its work folder, with durable names."""
        missing = [p for p in (self._work, self._folder, *self._folder.parents) if not p.exists()]
        self._work.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync_folder(folder.parent)

    def _is_current(self, lock: IO[str]) -> bool:
        """Return whether a lock file is still the folder's, and not that of a run that ended."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(lock.fileno()), os.stat(self._work / LOCK_NAME))
        return False

    def acquire_task(self, task: str) -> None:
        """Lock an array task against a second process with the same number.

        Raises:
            OutputError: If the task is running.
        """
        import fcntl

        lock = open(self._work / f"{task}.lock", "a+")  # noqa: SIM115 (kept for the whole run)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise OutputError(
                f"{self._folder}: {task} is running in it; wait for it, or end it"
            ) from None
        self._task_lock = lock

    def acquire_turn(self) -> None:
        """Wait until no other task begins or finishes."""
        import fcntl

        self._turn = open(self._work / "turn", "a+")  # noqa: SIM115 (closed by release_turn)
        fcntl.flock(self._turn, fcntl.LOCK_EX)

    def release_turn(self) -> None:
        """Let other tasks begin or finish."""
        if self._turn is not None:
            self._turn.close()
            self._turn = None

    def is_last(self) -> bool:
        """Return whether no other task shares the folder. The lock is lost if one does."""
        import fcntl

        assert self._lock is not None
        # Unlock first: NFS would keep the shared lock; of two tasks that end none would be last.
        fcntl.flock(self._lock, fcntl.LOCK_UN)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return self._is_current(self._lock)

    def release(self) -> None:
        """Release all locks."""
        self.release_turn()
        for lock in (self._task_lock, self._lock):
            if lock is not None:
                lock.close()
        self._task_lock = self._lock = None
