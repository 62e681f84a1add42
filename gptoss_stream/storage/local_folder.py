"""A folder of this machine."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._utils.failures import machine_error
from .._utils.regular_file import NotRegularError, open_regular
from ..errors import CheckpointError
from .location import FileInfo, changed

__all__ = ["LocalFile", "LocalFolder"]


class LocalFolder:
    """A folder of this machine (see `places.Place`). Raises `OSError` as the system does."""

    revision = None
    is_local = True

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    @property
    def identity(self) -> str:
        """Its path, links followed."""
        return os.fsencode(self.path.resolve()).decode(errors="backslashreplace")

    def display_path(self, name: str) -> str:
        """The path of a file of it."""
        return str(self.path / name)

    def check(self) -> None:
        """Raise `CheckpointError` if there is no such folder."""
        if not self.path.exists():
            raise CheckpointError(f"{self.path}: there is no such folder; check the path")
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: not a folder; name the folder of the checkpoint")

    def has(self, name: str) -> bool:
        """Whether there is anything of that name."""
        return (self.path / name).exists()

    def names(self, folder: str = "") -> list[str]:
        """The names in it, or in a folder of it, sorted; none where that is none."""
        try:
            return sorted(p.name for p in (self.path / folder).iterdir())
        except (FileNotFoundError, NotADirectoryError):
            return []

    def open(self, name: str) -> LocalFile:
        """A regular file; links may lead within the folder or, as in the Hub's cache
        (snapshots/<commit>/x -> ../../blobs/<hash>), to the blobs beside the snapshots."""
        file = self.path / name
        target = Path(os.path.realpath(file))
        home = Path(os.path.realpath(self.path))
        allowed = [home]
        snapshot = next((p for p in (home, *home.parents) if p.parent.name == "snapshots"), None)
        if snapshot is not None:
            allowed.append(snapshot.parent.parent / "blobs")
        if file.is_symlink() and not any(location in target.parents for location in allowed):
            raise CheckpointError(
                f"{file}: a link that leads out of the folder, to {target}; copy the file here"
            )
        try:
            return LocalFile(name, file, open_regular(target))
        except NotRegularError:
            raise CheckpointError(
                f"{file}: not a regular file; put the file itself there"
            ) from None

    def pinned_to(self, state: Mapping[str, Any] | None) -> LocalFolder:
        """It has but one state."""
        return self

    def prepare(self, names: list[str]) -> None:
        """Nothing to do."""


class LocalFile:
    """A file of this machine, opened (see `places.File`). Reads by `pread`: a mapped file that
    shrinks kills the process that reads it, without an exception (SIGBUS)."""

    def __init__(self, name: str, path: Path, descriptor: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._name = name
        self.info = self._describe()

    def _describe(self) -> FileInfo:
        status = os.fstat(self._descriptor)
        # Not the change time: a new link to the file, or one less, changes it too.
        return FileInfo(self._name, status.st_size, status.st_mtime_ns, status.st_ino)

    def read_into(self, out: memoryview, at: int, stop: threading.Event) -> None:
        """Fill `out` with the bytes from `at` on."""
        try:
            while out:
                count = os.preadv(self._descriptor, [out], at)
                if count == 0:
                    raise changed(str(self._path))
                out, at = out[count:], at + count
        except OSError as error:
            raise machine_error(error, f"reading {self._path} at byte {at}") from error

    def prefetch(self, at: int, nbytes: int) -> None:
        """Ask the system to read bytes ahead; returns at once."""
        if hasattr(os, "posix_fadvise"):  # absent on some systems: then it is no help, nor harm
            os.posix_fadvise(self._descriptor, at, nbytes, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if it was written to since it was opened: what was read may then
        be in part of one state and in part of another."""
        if self._describe() != self.info:
            raise changed(str(self._path))

    def close(self) -> None:
        """Close it."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
