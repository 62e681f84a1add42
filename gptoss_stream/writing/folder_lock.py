"""Locks an output folder against other runs, by `flock` and by guards in its work folder.

By `flock`: `lock` is held by the run, exclusively by a run of one process, shared by the array
tasks of a run. `<task>.lock` is held by an array task against itself. `turn` is held by a task
while it begins or finishes. The locks of a dead process are released by the system.

`flock` lets everybody in on some file systems and fails on others (see `guard_file`). So these are
held too, each after the lock that it doubles: the guard `run` by a run of one process, and by a
task that begins (to see that there is no such run) or deletes the work folder; the guard `<task>`;
the guard `turn`. A run that was suspended so long that another took its guard over must end.
"""

from __future__ import annotations

import errno
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import IO

from .._utils.platforms import refuse_windows
from ..errors import OutputError
from .durable_files import remove
from .guard_file import GuardFile, GuardHolder, is_guard
from .run_state import WORK_NAME
from .shard_file import sync_folder

__all__ = ["LOCK_NAME", "FolderLock", "is_lock"]

LOCK_NAME = "lock"
_ENDING_SECONDS = 5.0  # for the last task of a run to delete the work folder
_NO_FLOCK = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


def is_lock(name: str) -> bool:
    """Return whether a file of a work folder must stay while the folder is locked."""
    return name == LOCK_NAME or is_guard(name)


class FolderLock:
    """The lock of one process on an output folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._work = folder / WORK_NAME
        self._lock: IO[bytes] | None = None
        self._task_lock: IO[bytes] | None = None
        self._turn: IO[bytes] | None = None
        self._run_guard = self._guard("run")
        self._turn_guard = self._guard("turn")
        self._task_guard: GuardFile | None = None

    def _guard(self, name: str) -> GuardFile:
        return GuardFile(self._work, name, self._flock_excludes)

    @property
    def is_task(self) -> bool:
        """Whether an array task holds the lock, together with others."""
        return self._task_lock is not None

    def acquire(self, task: str | None) -> None:
        """Create the folder and its work folder, and lock them.

        Args:
            task: The name of an array task, which shares the folder with the others of its run.
                The turn is then the task's too.

        Raises:
            OutputError: If another run holds the folder, or the task is running.
        """
        refuse_windows()
        deadline = time.monotonic() + _ENDING_SECONDS
        while True:
            self._create_folders()
            try:
                with suppress(FileNotFoundError):  # a run has just ended and deleted its folder
                    if self._try_acquire(task, is_final=time.monotonic() > deadline):
                        return
            except BaseException:
                self.release()
                raise
            self.release()
            time.sleep(0.05)

    def _try_acquire(self, task: str | None, *, is_final: bool) -> bool:
        """Lock the folder.

        Args:
            task: The name of an array task.
            is_final: Whether not to wait any longer for a task that ends.

        Returns:
            False if a run that ends has deleted, or may delete, the work folder: try again.
        """
        self._lock = open(self._work / LOCK_NAME, "ab")  # noqa: SIM115 (kept for the whole run)
        if not _flock(self._lock, shared=task is not None):
            holder = self._run_guard.holder()
            if task is not None and (holder is None or holder.is_task) and not is_final:
                return False
            raise self._in_use(f"another run{f' ({holder})' if holder else ''} is writing to it")
        if not self._is_current(self._lock):
            return False
        if task is None:
            self._refuse(self._run_guard.acquire() or self._running_task())
            return True
        self._acquire_task(task)
        held = self._run_guard.acquire(is_task=True)
        if held is not None and held.is_task and not is_final:
            return False
        self._refuse(held)
        self._run_guard.release()
        return self._task_guard is not None and self._task_guard.is_held()

    def _acquire_task(self, task: str) -> None:
        """Lock an array task against a second process with the same number, and wait for its turn.

        Raises:
            OutputError: If the task is running.
        """
        lock = open(self._work / f"{task}.lock", "ab")  # noqa: SIM115 (kept for the whole run)
        guard = self._guard(task)
        held = None
        if not _flock(lock) or (held := guard.acquire(is_task=True)):
            lock.close()
            who = f" ({held})" if held else ""
            raise self._in_use(f"{task} is running in it{who}", held, "wait for it, or end it")
        self._task_lock, self._task_guard = lock, guard
        self.acquire_turn()

    def _running_task(self) -> GuardHolder | None:
        """Return an array task that is running, and delete the guards of dead ones."""
        for root in sorted(self._work.glob("*.guard")):
            if root.stem in ("run", "turn"):
                continue
            guard = self._guard(root.stem)
            held = guard.acquire()
            if held is not None:
                return held
            guard.release()
        return None

    def _refuse(self, held: GuardHolder | None) -> None:
        if held is not None:
            raise self._in_use(f"another run ({held}) is writing to it", held)

    def _in_use(
        self,
        what: str,
        held: GuardHolder | None = None,
        remedy: str = "wait for it or name another output",
    ) -> OutputError:
        if held is not None and held.stale_in is not None:
            remedy += f"; if it was killed, run the same command again in {held.stale_in} s"
        return OutputError(f"{self._folder}: {what}; {remedy}")

    def _create_folders(self) -> None:
        """Create the folder and its work folder, with durable names."""
        missing = [p for p in (self._work, self._folder, *self._folder.parents) if not p.exists()]
        self._work.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            sync_folder(folder.parent)

    def _is_current(self, lock: IO[bytes]) -> bool:
        """Return whether a lock file is still the folder's, and not that of a run that ended."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(lock.fileno()), os.stat(self._work / LOCK_NAME))
        return False

    def _flock_excludes(self) -> bool:
        """Return whether `flock` on the lock file, which this process holds, refuses another."""
        with suppress(OSError), open(self._work / LOCK_NAME, "r+b") as second:
            return not _flock(second)
        return False

    def acquire_turn(self) -> None:
        """Wait until no other task begins or finishes."""
        self._turn = open(self._work / "turn", "ab")  # noqa: SIM115 (closed by release_turn)
        _flock(self._turn, wait=True)
        self._turn_guard.acquire(is_task=True, wait=True)

    def release_turn(self) -> None:
        """Let other tasks begin or finish."""
        if self._turn is not None:
            self._turn_guard.release()
            self._turn.close()
            self._turn = None

    @property
    def _own_guard(self) -> GuardFile:
        return self._task_guard or self._run_guard

    @property
    def may_be_shared(self) -> bool:
        """Whether a run that was only silent may wake up and write to files that it has open."""
        return self._own_guard.may_be_shared

    def is_held(self) -> bool:
        """Return whether this process still holds the folder."""
        return self._own_guard.is_held()

    def check(self, *, if_silent: bool = False) -> None:
        """Check that this process still holds the folder.

        Args:
            if_silent: Whether to do nothing if that was checked within half a minute.

        Raises:
            OutputError: If another process has taken it over, or deleted it.
        """
        guard = self._own_guard
        if (if_silent and guard.is_fresh) or guard.is_held():
            return
        holder = guard.holder()
        raise OutputError(
            f"{self._folder}: this run no longer holds it: "
            + (
                f"another one ({holder}) took it over, since nothing was heard of this one for a "
                "minute (a suspended machine?)"
                if holder
                else "its work folder was deleted, or another run took it over"
            )
            + "; wait until no other run writes to it, then run the same command again"
        )

    def is_last(self) -> bool:
        """Return whether no other task shares the folder. The lock is lost if one does."""
        assert self._lock is not None
        assert self._task_guard is not None
        # Give up first, then look: of two tasks that end, the later one must find itself alone.
        # `flock` alone would be enough but for NFS, which would keep the shared lock.
        self._task_guard.release()
        _unlock(self._lock)
        if not _flock(self._lock) or not self._is_current(self._lock):
            return False
        deadline = time.monotonic() + _ENDING_SECONDS
        with suppress(FileNotFoundError):  # another one was the last, and has deleted the folder
            while held := self._run_guard.acquire(is_task=True):
                if not held.is_task or time.monotonic() > deadline:
                    return False
                time.sleep(0.05)
            if self._running_task() is None:
                return True
            self._run_guard.release()
        return False

    def remove_work(self) -> None:
        """Delete the work folder, guards and lock last: until then the folder is locked."""

        def order(file: Path) -> tuple[bool, bool]:
            return file.name == LOCK_NAME, is_lock(file.name)

        with suppress(FileNotFoundError):
            for file in sorted(self._work.iterdir(), key=order):
                remove(file)
        try:
            self._work.rmdir()
        except OSError:
            return  # another run may have begun in it, now that it could
        sync_folder(self._folder)

    def release(self) -> None:
        """Release all locks, each guard before the lock that it doubles."""
        self.release_turn()
        if self._task_guard is not None:
            self._task_guard.release()
        self._run_guard.release()
        for lock in (self._task_lock, self._lock):
            if lock is not None:
                lock.close()
        self._task_lock = self._lock = self._task_guard = None


def _flock(file: IO[bytes], *, shared: bool = False, wait: bool = False) -> bool:
    """Lock a file; where the file system has no locks, do nothing: there is the guard.

    Returns:
        False if another process holds it.
    """
    import fcntl

    operation = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
    return True


def _unlock(file: IO[bytes]) -> None:
    import fcntl

    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_UN)
