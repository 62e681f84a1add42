"""The output folder during a run: whose it is, what is finished, what may be deleted.

While a run is under way the folder holds `.gptoss_stream/`:
    lock          held by the running process; a dead one holds nothing
    run.json      what the run is: tool version, source files, options, planned output files
    *.safetensors shards in the making, and scratch files
and, beside it, whatever is finished. A shard gets its final name only when all of it is on the
disk, so that under its final name it is complete. `.gptoss_stream/` goes when the run is done;
the record `gptoss_stream.json` then says what the folder is and which files are the tool's.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from . import strict_json
from .errors import OutputError
from .safetensors_format import INDEX_NAME
from .shard_file import sync_folder

__all__ = ["RECORD_NAME", "WORK_NAME", "RunFolder"]

RECORD_NAME = "gptoss_stream.json"
WORK_NAME = ".gptoss_stream"
_MAX_NBYTES = 50_000_000


class RunFolder:
    """The output folder of one run, locked. A context manager.

    Raises `OutputError` for a folder that is in use, holds foreign files, or belongs to another
    run, and `OSError` as the system does.
    """

    def __init__(
        self, path: Path, identity: Mapping[str, Any], files: Sequence[str], *, overwrite: bool
    ) -> None:
        self.path = path
        self.work = path / WORK_NAME
        self._identity = dict(identity)
        self._files = list(files)
        self._overwrite = overwrite
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> RunFolder:
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path}: a file, not a folder; name another output")
        self._refuse_foreign()
        self.work.mkdir(parents=True, exist_ok=True)
        self._take_lock()
        try:
            self._prepare()
        except BaseException:
            if not (self.work / "run.json").exists():
                shutil.rmtree(self.work, ignore_errors=True)
            self._release()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._release()

    def _take_lock(self) -> None:
        import fcntl

        self._lock = open(self.work / "lock", "ab")  # noqa: SIM115 (held for the whole run)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._release()
            raise OutputError(
                f"{self.path}: another run is writing to it; wait for it or name another output"
            ) from None

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _known(self) -> tuple[Mapping[str, Any] | None, set[str]]:
        """The run that the folder belongs to, if any, and the files that are the tool's."""
        for file in (self.work / "run.json", self.path / RECORD_NAME):
            try:
                with open(file, "rb") as opened:
                    run = strict_json.loads(opened.read(_MAX_NBYTES))
                names = {str(name) for name in run["files"]}
                if any(".." in Path(name).parts or Path(name).is_absolute() for name in names):
                    raise ValueError("a file outside the folder")
                return run, names
            except FileNotFoundError:
                continue
            except (ValueError, TypeError, KeyError):
                raise OutputError(
                    f"{file}: damaged, so that it is not clear which files are the tool's; "
                    "delete the folder yourself or name another output"
                ) from None
        return None, set()

    def _refuse_foreign(self) -> None:
        if not self.path.is_dir():
            return
        _, ours = self._known()
        ours |= {WORK_NAME, RECORD_NAME, INDEX_NAME} if ours or self.work.exists() else set()
        tops = {name.split("/")[0] for name in ours}
        foreign = sorted(p.name for p in self.path.iterdir() if p.name not in tops)
        if foreign:
            raise OutputError(
                f"{self.path}: it holds files that are not this tool's "
                f"({', '.join(foreign[:3])}{', …' if len(foreign) > 3 else ''}); "
                "name an empty or new folder"
            )

    def _prepare(self) -> None:
        known, ours = self._known()
        if known is not None and self._overwrite:
            self._delete(ours)
            known = None
        if known is not None:
            if not (self.work / "run.json").exists():
                raise OutputError(
                    f"{self.path}: it holds a finished conversion; add --overwrite to replace it"
                )
            differing = [key for key in self._identity if known.get(key) != self._identity[key]]
            if differing:
                raise OutputError(
                    f"{self.path}: it holds an unfinished run that differs in "
                    f"{', '.join(differing)}; repeat that run to resume it, or add --overwrite "
                    "to replace it"
                )
        for leftover in self.work.iterdir():
            if leftover.name not in ("lock", "run.json"):
                leftover.unlink()
        if known is None:
            state = {**self._identity, "files": self._files}
            self._write(self.work / "run.json", _json(state))

    def _delete(self, names: set[str]) -> None:
        # The index first: without it nothing looks finished. What says which files are the
        # tool's last: a deletion that was interrupted can then be repeated.
        order = sorted(names - {INDEX_NAME, RECORD_NAME})
        for name in (INDEX_NAME, *order, RECORD_NAME):
            (self.path / name).unlink(missing_ok=True)
        (self.work / "run.json").unlink(missing_ok=True)
        for folder in {Path(name).parent for name in names} - {Path()}:
            with suppress(OSError):  # something else may lie in it
                (self.path / folder).rmdir()
        sync_folder(self.path)

    def is_finished(self, name: str, nbytes: int) -> bool:
        """Whether a shard is complete: it is when it stands under its name."""
        try:
            return (self.path / name).stat().st_size == nbytes
        except FileNotFoundError:
            return False

    def write(self, name: str, data: bytes) -> None:
        """Write a small file durably, whole or not at all."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        self._write(target, data)

    def copy(self, source: Path, name: str) -> None:
        """Copy a file byte for byte, durably, whole or not at all."""
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(source, "rb") as opened:
            self._write(target, opened)

    def _write(self, target: Path, data: bytes | IO[bytes]) -> None:
        partial = self.work / f"{target.name}.partial"
        with open(partial, "wb") as opened:
            if isinstance(data, bytes):
                opened.write(data)
            else:
                shutil.copyfileobj(data, opened, 1 << 20)
            opened.flush()
            os.fsync(opened.fileno())
        os.rename(partial, target)
        sync_folder(target.parent)

    def finish(self, index: bytes) -> None:
        """Write record and index, the last of all, and remove the work folder."""
        self.write(RECORD_NAME, _json({**self._identity, "files": self._files}))
        self.write(INDEX_NAME, index)
        shutil.rmtree(self.work)
        sync_folder(self.path)


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
