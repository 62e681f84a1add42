"""The open files of a checkpoint."""

from __future__ import annotations

import threading

from .._utils.failures import machine_error
from ..storage.location import File, changed
from .metadata import CheckpointInfo

__all__ = ["OpenFiles"]


class OpenFiles:
    """The shards of a checkpoint, each opened when it is first used, from any thread."""

    def __init__(self, info: CheckpointInfo) -> None:
        self.info = info
        self._files: dict[str, File] = {}
        self._opening = threading.Lock()

    def close(self) -> None:
        """Close all files."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def file(self, name: str) -> File:
        """Return a shard; open it if it is not open.

        Raises:
            CheckpointError: If the file has changed since its header was read.
            MachineError: If it cannot be opened.
        """
        file = self._files.get(name)
        if file is None:
            with self._opening:
                file = self._files.get(name) or self._open(name)
                self._files[name] = file
        return file

    def _open(self, name: str) -> File:
        """Open a shard and check that it is the file whose header was read."""
        described = next(shard for shard in self.info.shards if shard.name == name)
        where = self.info.location.display_path(name)
        try:
            file = self.info.location.open(name)
        except OSError as error:
            raise machine_error(error, f"reading {where}") from error
        if file.info != described:
            file.close()
            raise changed(where)
        return file

    def check_unchanged(self) -> None:
        """Check that no file has changed since it was opened.

        Raises:
            CheckpointError: If one has.
        """
        for file in list(self._files.values()):
            file.check_unchanged()
