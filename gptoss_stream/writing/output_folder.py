"""The output folder during a run: whose it is, what is finished, what may be deleted.

While a run is under way the folder holds `.gptoss_stream/`:
    lock          held by the running process; a dead one holds nothing
    run.json      what the run is: tool version, source files, options, planned output files
    *.sha256      sums of shards, each written before its shard gets its name
    *.safetensors shards in the making, and scratch files
    task-*        the same of one task of several, which share the lock
    worker-*      the same of a process that makes shards for the one that holds the lock
    turn          held by a task while it begins or finishes
and, beside it, whatever is finished. A shard gets its final name only when all of it is on the
disk, so that under its final name it is complete. `.gptoss_stream/` goes when the run is done;
the record `gptoss_stream.json` then says what the folder is and which files are the tool's.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from .._utils import strict_json
from .._utils.regular_file import NotRegularError, open_regular
from ..checkpoint.auxiliary_files import CopiedFile
from ..errors import OutputError
from ..tensors.safetensors_header import INDEX_NAME
from .checksums import CHECKSUMS_NAME, build_checksums, parse_checksums
from .run_state import (
    RECORD_NAME,
    RUN_NAME,
    WORK_NAME,
    fingerprint,
    parse_state,
    refuse_foreign,
    refuse_other_run,
)
from .shard_file import sync_folder

__all__ = ["JoinedOutputFolder", "OutputFolder"]


_MAX_NBYTES = 50_000_000


_ENDING = 5.0  # seconds


class OutputFolder:
    """The output folder of one run.

    `identity` (JSON values) is what two runs must have in common to be the same run; `source` in
    it is only for people: the same files under another path are the same source.
    Raises `OutputError` for a folder that is in use, holds foreign files, or belongs to another
    run, and `OSError` as the system does.
    """

    def __init__(
        self,
        path: Path,
        identity: Mapping[str, Any],
        shards: Sequence[str],
        auxiliary_files: Mapping[str, bytes | CopiedFile],
        checksums: bool,
    ) -> None:
        self.path = path
        self.work = path / WORK_NAME
        self._auxiliary_files = auxiliary_files
        self._checksums = checksums
        sums = [CHECKSUMS_NAME] if checksums else []
        files = [*auxiliary_files, *shards, *sums, RECORD_NAME, INDEX_NAME]
        self.state: dict[str, Any] = {**identity, "checksums": checksums, "files": files}
        self.sums: dict[str, str] = {}
        self._partials = self.work
        self._task_lock: IO[str] | None = None
        self._turn: IO[str] | None = None

    @contextmanager
    def locked(self, *, overwrite: bool, task: str | None = None) -> Iterator[Path]:
        """Hold the folder against other runs, cleaned of leftovers; `overwrite` deletes what an
        earlier run made, and only that. Leaves no trace if nothing is begun meanwhile.

        A `task` of a run shares the folder with the other tasks of that run. Gives the folder for
        shards in the making."""
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path}: a file, not a folder; name another output")
        self._refuse_links()
        existed = self.path.exists()
        if not self.work.exists():
            self._refuse_foreign()
        ours = not self.work.exists()
        lock = self._take_lock(shared=task is not None)
        own = self.work if task is None else self.work / task
        try:
            if task is not None:
                self._task_lock = self._take_task_lock(task)
                self._take_turn()
            self._refuse_foreign()
            self._prepare(overwrite, own)
            ours = True
            if own != self.work:
                own.mkdir()
                self._partials = own
            yield own
        finally:
            self._end_turn()
            if own != self.work and self._task_lock is not None:
                shutil.rmtree(own, ignore_errors=True)
            if ours and not self._run_file.exists() and (own == self.work or self._is_alone(lock)):
                self._remove_work()
                if not existed:
                    with suppress(OSError):  # something is in it: then it stays
                        self.path.rmdir()
            if self._task_lock is not None:
                self._task_lock.close()
            lock.close()

    def _refuse_links(self) -> None:
        """What is written or deleted through a folder that is a link belongs to somebody else."""
        known = self._known() if self.path.is_dir() and not self.work.is_symlink() else None
        names = [*self.state["files"], *(known["files"] if known else ())]
        for folder in {self.work, *((self.path / name).parent for name in names)} - {self.path}:
            if folder.is_symlink():
                raise OutputError(
                    f"{folder}: a link to {os.path.realpath(folder)}; remove the link or name "
                    "another output"
                )

    @property
    def _run_file(self) -> Path:
        return self.path / RUN_NAME

    def _take_task_lock(self, task: str) -> IO[str]:
        """Hold a task against itself."""
        import fcntl

        lock = open(self.work / f"{task}.lock", "a+")  # noqa: SIM115 (held for the whole run)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise OutputError(
                f"{self.path}: {task} is at work in it; wait for it, or end it"
            ) from None
        return lock

    def _take_turn(self) -> None:
        """Wait until no other task begins or finishes."""
        import fcntl

        self._turn = open(self.work / "turn", "a+")  # noqa: SIM115 (ended by _end_turn)
        fcntl.flock(self._turn, fcntl.LOCK_EX)

    def _end_turn(self) -> None:
        if self._turn is not None:
            self._turn.close()
            self._turn = None

    def _is_alone(self, lock: IO[str]) -> bool:
        """Whether no other task shares the folder; the lock is lost where one does."""
        import fcntl

        fcntl.flock(lock, fcntl.LOCK_UN)  # NFS would keep it: of two that end none would be alone
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        # Another may have begun, and ended, since the run was looked for.
        return self._is_there(lock) and not self._run_file.exists()

    def _is_there(self, lock: IO[str]) -> bool:
        """Whether a lock is the folder's, and not of a run that has ended meanwhile."""
        with suppress(FileNotFoundError):
            return os.path.samestat(os.fstat(lock.fileno()), os.stat(self.work / "lock"))
        return False

    def _take_lock(self, *, shared: bool) -> IO[str]:
        import fcntl

        patience = time.monotonic() + _ENDING
        while True:
            self._make_folders()
            try:
                lock = open(self.work / "lock", "a+")  # noqa: SIM115 (held for the whole run)
            except FileNotFoundError:
                continue  # a run has just ended, and taken its work folder away
            try:
                fcntl.flock(lock, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except BlockingIOError:
                with lock:
                    lock.seek(0)
                    holder = lock.read(20).strip()
                if shared and not holder and time.monotonic() < patience:
                    time.sleep(0.05)
                    continue  # the last task that ended is taking the work folder away
                raise OutputError(
                    f"{self.path}: another run{f' (process {holder})' if holder else ''} is "
                    "writing to it; wait for it or name another output"
                ) from None
            if self._is_there(lock):
                lock.truncate(0)
                if not shared:
                    lock.write(f"{os.getpid()}\n")
                    lock.flush()
                return lock
            lock.close()  # of a run that has just ended

    def _make_folders(self) -> None:
        """The folder and its work folder, with their names on the disk."""
        made = [p for p in (self.work, self.path, *self.path.parents) if not p.exists()]
        self.work.mkdir(parents=True, exist_ok=True)
        for folder in made:
            sync_folder(folder.parent)

    def _remove_work(self) -> None:
        """The lock last: until then the folder is held."""
        with suppress(FileNotFoundError):
            for file in sorted(self.work.iterdir(), key=lambda file: file.name == "lock"):
                _remove(file)
        try:
            self.work.rmdir()
        except OSError:
            return  # another run may have begun in it, now that it could
        sync_folder(self.path)

    def _known(self) -> Mapping[str, Any] | None:
        """The state of the run that the folder belongs to, if any."""
        for file in (self._run_file, self.path / RECORD_NAME):
            try:
                with open(open_regular(file), "rb") as opened:
                    data = opened.read(_MAX_NBYTES)
            except FileNotFoundError:
                continue
            except NotRegularError:
                data = b""
            return parse_state(data, str(file))
        return None

    def _refuse_foreign(self) -> None:
        if self.path.is_dir():
            refuse_foreign(str(self.path), [p.name for p in self.path.iterdir()], self._known())

    def _prepare(self, overwrite: bool, own: Path) -> None:
        known = self._known()
        if known is not None and overwrite:
            self._delete(known["files"])
            known = None
        if known is not None:
            unfinished = self._run_file.exists()
            refuse_other_run(str(self.path), known, self.state, unfinished=unfinished)
            self.state = dict(known)
        if own != self.work:  # the rest may be of tasks that are at work
            _remove(own)
        else:
            for leftover in self.work.iterdir():
                if leftover.name not in ("lock", "run.json") and leftover.suffix != ".sha256":
                    _remove(leftover)
        self._read_sums()

    def _delete(self, names: Sequence[str]) -> None:
        # The index first: without it nothing looks finished. What says which files are the
        # tool's last: a deletion that was interrupted can then be repeated.
        order = sorted({*names} - {INDEX_NAME, RECORD_NAME})
        (self.path / INDEX_NAME).unlink(missing_ok=True)
        # Before any shard: what a worker of that run has in the making can no longer get its name.
        with suppress(FileNotFoundError):
            self._run_file.replace(self.path / RECORD_NAME)
        for file in self.work.iterdir():
            if file.name != "lock":
                _remove(file)
        for name in (*order, RECORD_NAME):
            (self.path / name).unlink(missing_ok=True)
        for folder in {Path(name).parent for name in names} - {Path()}:
            with suppress(OSError):  # something else may lie in it
                (self.path / folder).rmdir()
        sync_folder(self.path)

    def _read_sums(self) -> None:
        with suppress(FileNotFoundError, ValueError):  # such shards are made again
            self.sums = parse_checksums((self.path / CHECKSUMS_NAME).read_bytes())
        for file in self.work.glob("*.sha256"):
            self.sums[file.stem] = file.read_text().strip()

    def is_finished(self, name: str, nbytes: int) -> bool:
        """Whether a shard is complete, and summed where that is wanted: it is complete when it
        stands under its name."""
        if self._checksums and name not in self.sums:
            return False
        return _has_size(self.path / name, nbytes)

    @property
    def is_complete(self) -> bool:
        """Whether the run was finished, and everything it made is still there."""
        return not self._run_file.exists() and all(
            (self.path / name).is_file() for name in self.state["files"]
        )

    def begin(self) -> None:
        """Say what the run is, and write the small files; other tasks may then begin."""
        if not self._run_file.exists():
            self._write(self._run_file, strict_json.dumps(self.state))
        for name in (INDEX_NAME, RECORD_NAME):  # of a finished run that has lost a file
            (self.path / name).unlink(missing_ok=True)
        for name, data in self._auxiliary_files.items():
            self._write_named(name, data)
        self._end_turn()

    def clear(self) -> None:
        """Delete all that the run made: it has been taken elsewhere."""
        self._delete(self.state["files"])

    def save_checksum(self, name: str, digest: str) -> None:
        """Keep the sum of a shard that is about to get its name."""
        self.sums[name] = digest
        save_checksum(self.work, name, digest, self._partials)

    def finish(self, index: bytes, sizes: Mapping[str, int]) -> bool:
        """Where all shards are there, write record, sums and index, the last of all.

        Gives whether all is done; other tasks may have something left to do."""
        if self._task_lock is not None:
            self._take_turn()
            self._read_sums()
        try:
            if self.is_complete:  # by another task
                return True
            if not all(self.is_finished(name, nbytes) for name, nbytes in sizes.items()):
                return False
            self._write_named(RECORD_NAME, strict_json.dumps(self.state))
            if self._checksums:
                digest = hashlib.sha256(index).hexdigest()
                sums = {name: self.sums[name] for name in self.state["files"] if name in self.sums}
                self._write(
                    self.path / CHECKSUMS_NAME, build_checksums({**sums, INDEX_NAME: digest})
                )
            self._write(self.path / INDEX_NAME, index)
            self._run_file.unlink()
            sync_folder(self.work)
            return True
        finally:
            self._end_turn()

    def _write_named(self, name: str, data: bytes | CopiedFile) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        self.sums[name] = self._write(target, data)

    def _write(self, target: Path, data: bytes | CopiedFile) -> str:
        return _write(target, data, self._partials)


class JoinedOutputFolder:
    """A run in a folder of which another process makes some shards, for the one that holds it.

    `run` is the fingerprint of the run's state. Raises `OutputError` where the folder does not hold
    that run, or no longer.
    """

    def __init__(self, path: Path, run: str) -> None:
        self.path = path
        self.work = path / WORK_NAME
        self._run = run

    def check(self) -> None:
        """Raise `OutputError` if another run has begun."""
        state: Mapping[str, Any] = {}
        for name in (RUN_NAME, RECORD_NAME):  # or all of it is finished, this shard included
            with suppress(FileNotFoundError):
                state = parse_state((self.path / name).read_bytes(), str(self.path / name))
                break
        if fingerprint(state) != self._run:
            raise OutputError(
                f"{self.path}: the run that this shard was made for is not under way there; "
                "is it a folder that all workers share?"
            )

    @contextmanager
    def partials(self) -> Iterator[Path]:
        """A folder for shards in the making, which no other process uses."""
        self.check()
        folder = Path(tempfile.mkdtemp(prefix="worker-", dir=self.work))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def is_finished(self, name: str, nbytes: int) -> bool:
        """Whether a shard stands under its name."""
        return _has_size(self.path / name, nbytes)

    def sum(self, name: str) -> str | None:
        """The SHA-256 that was kept of a shard."""
        with suppress(FileNotFoundError):
            return (self.work / f"{name}.sha256").read_text().strip()
        return None


def _has_size(path: Path, nbytes: int) -> bool:
    try:
        return path.stat().st_size == nbytes
    except FileNotFoundError:
        return False


def save_checksum(work: Path, name: str, digest: str, partials: Path) -> None:
    """Keep the sum of a shard that is about to get its name in the work folder."""
    _write(work / f"{name}.sha256", f"{digest}\n".encode(), partials)


def _write(target: Path, data: bytes | CopiedFile, partials: Path) -> str:
    """Write or copy a small file durably, whole or not at all; returns its SHA-256."""
    partial = partials / f"{target.name}.partial"
    digest = hashlib.sha256()
    with open(partial, "wb") as opened:
        for chunk in [data] if isinstance(data, bytes) else data.chunks():
            digest.update(chunk)
            opened.write(chunk)
        opened.flush()
        os.fsync(opened.fileno())
    os.rename(partial, target)
    sync_folder(target.parent)
    return digest.hexdigest()


def _remove(path: Path) -> None:
    """Delete a file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # a process left over may still write to it
    else:
        path.unlink(missing_ok=True)
