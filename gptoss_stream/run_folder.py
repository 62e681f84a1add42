"""The output folder during a run: whose it is, what is finished, what may be deleted.

While a run is under way the folder holds `.gptoss_stream/`:
    lock          held by the running process; a dead one holds nothing
    run.json      what the run is: tool version, source files, options, planned output files
    *.sha256      sums of shards, each written before its shard gets its name
    *.safetensors shards in the making, and scratch files
and, beside it, whatever is finished. A shard gets its final name only when all of it is on the
disk, so that under its final name it is complete. `.gptoss_stream/` goes when the run is done;
the record `gptoss_stream.json` then says what the folder is and which files are the tool's.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from . import strict_json
from .checksums import SUMS_NAME, build_sums, parse_sums
from .companions import Carried
from .errors import OutputError
from .regular_file import NotRegularError, open_regular
from .run_state import (
    RECORD_NAME,
    RUN_NAME,
    WORK_NAME,
    parse_state,
    refuse_foreign,
    refuse_other_run,
)
from .safetensors_format import INDEX_NAME
from .shard_file import sync_folder

__all__ = ["RunFolder"]

_MAX_NBYTES = 50_000_000


class RunFolder:
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
        companions: Mapping[str, bytes | Carried],
        checksums: bool,
    ) -> None:
        self.path = path
        self.work = path / WORK_NAME
        self._companions = companions
        self._checksums = checksums
        sums = [SUMS_NAME] if checksums else []
        files = [*companions, *shards, *sums, RECORD_NAME, INDEX_NAME]
        self.state: dict[str, Any] = {**identity, "checksums": checksums, "files": files}
        self.sums: dict[str, str] = {}

    @contextmanager
    def locked(self, *, overwrite: bool) -> Iterator[None]:
        """Hold the folder against other runs, cleaned of leftovers; `overwrite` deletes what an
        earlier run made, and only that. Leaves no trace if nothing is begun meanwhile."""
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path}: a file, not a folder; name another output")
        self._refuse_links()
        existed = self.path.exists()
        if not self.work.exists():
            self._refuse_foreign()
        ours = not self.work.exists()
        lock = self._take_lock()
        try:
            self._refuse_foreign()
            self._prepare(overwrite)
            ours = True
            yield
        finally:
            if ours and not self._run_file.exists():
                self._remove_work()
                if not existed:
                    with suppress(OSError):  # something is in it: then it stays
                        self.path.rmdir()
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

    def _take_lock(self) -> IO[str]:
        import fcntl

        while True:
            self._make_folders()
            try:
                lock = open(self.work / "lock", "a+")  # noqa: SIM115 (held for the whole run)
            except FileNotFoundError:
                continue  # a run has just ended, and taken its work folder away
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                with lock:
                    lock.seek(0)
                    holder = lock.read(20).strip()
                raise OutputError(
                    f"{self.path}: another run{f' (process {holder})' if holder else ''} is "
                    "writing to it; wait for it or name another output"
                ) from None
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), os.stat(self.work / "lock")):
                    lock.truncate(0)
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
                file.unlink(missing_ok=True)
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

    @property
    def unfinished(self) -> Mapping[str, Any] | None:
        """The state of a run that the folder holds a part of, if any."""
        return self._known() if self._run_file.exists() else None

    def _refuse_foreign(self) -> None:
        if self.path.is_dir():
            refuse_foreign(str(self.path), [p.name for p in self.path.iterdir()], self._known())

    def _prepare(self, overwrite: bool) -> None:
        known = self._known()
        if known is not None and overwrite:
            self._delete(known["files"])
            known = None
        if known is not None:
            unfinished = self._run_file.exists()
            refuse_other_run(str(self.path), known, self.state, unfinished=unfinished)
            self.state = dict(known)
        for leftover in self.work.iterdir():
            if leftover.name not in ("lock", "run.json") and leftover.suffix != ".sha256":
                leftover.unlink()
        self._read_sums()

    def _delete(self, names: Sequence[str]) -> None:
        # The index first: without it nothing looks finished. What says which files are the
        # tool's last: a deletion that was interrupted can then be repeated.
        order = sorted({*names} - {INDEX_NAME, RECORD_NAME})
        for name in (INDEX_NAME, *order, RECORD_NAME):
            (self.path / name).unlink(missing_ok=True)
        for file in self.work.iterdir():
            if file.name != "lock":
                file.unlink()
        for folder in {Path(name).parent for name in names} - {Path()}:
            with suppress(OSError):  # something else may lie in it
                (self.path / folder).rmdir()
        sync_folder(self.path)

    def _read_sums(self) -> None:
        with suppress(FileNotFoundError, ValueError):  # such shards are made again
            self.sums = parse_sums((self.path / SUMS_NAME).read_bytes())
        for file in self.work.glob("*.sha256"):
            self.sums[file.stem] = file.read_text().strip()

    def is_finished(self, name: str, nbytes: int) -> bool:
        """Whether a shard is complete, and summed where that is wanted: it is complete when it
        stands under its name."""
        if self._checksums and name not in self.sums:
            return False
        try:
            return (self.path / name).stat().st_size == nbytes
        except FileNotFoundError:
            return False

    @property
    def is_complete(self) -> bool:
        """Whether the run was finished, and everything it made is still there."""
        return not self._run_file.exists() and all(
            (self.path / name).is_file() for name in self.state["files"]
        )

    def begin(self) -> None:
        """Say what the run is, and write the small files."""
        if not self._run_file.exists():
            self._write(self._run_file, strict_json.dumps(self.state))
        for name in (INDEX_NAME, RECORD_NAME):  # of a finished run that has lost a file
            (self.path / name).unlink(missing_ok=True)
        for name, data in self._companions.items():
            self._write_named(name, data)

    def clear(self) -> None:
        """Delete all that the run made: it has been taken elsewhere."""
        self._delete(self.state["files"])

    def note_sum(self, name: str, digest: str) -> None:
        """Keep the sum of a shard that is about to get its name."""
        self.sums[name] = digest
        self._write(self.work / f"{name}.sha256", f"{digest}\n".encode())

    def finish(self, index: bytes) -> None:
        """Write record, sums and index, the last of all, and remove the work folder."""
        self._write_named(RECORD_NAME, strict_json.dumps(self.state))
        if self._checksums:
            digest = hashlib.sha256(index).hexdigest()
            sums = {name: self.sums[name] for name in self.state["files"] if name in self.sums}
            self._write(self.path / SUMS_NAME, build_sums({**sums, INDEX_NAME: digest}))
        self._write(self.path / INDEX_NAME, index)
        self._run_file.unlink()
        sync_folder(self.work)

    def _write_named(self, name: str, data: bytes | Carried) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        self.sums[name] = self._write(target, data)

    def _write(self, target: Path, data: bytes | Carried) -> str:
        """Write or copy a small file durably, whole or not at all; returns its SHA-256."""
        partial = self.work / f"{target.name}.partial"
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
