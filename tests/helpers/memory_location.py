"""A remote, writable location in memory."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from gptoss_stream.errors import MachineError
from gptoss_stream.storage.location import FileInfo


class MemoryLocation:
    """A remote location in memory, which can be slow or fail.

    Attributes:
        files: The content of each file.
        uploaded: The names of all uploads, in order.
        pause: How long each upload takes, in seconds.
        fails_at: The name of a file whose upload fails.
    """

    is_local = False
    identity = "memory of a test"
    revision = None

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.uploaded: list[str] = []
        self.pause = 0.0
        self.fails_at: str | None = None

    def __str__(self) -> str:
        return self.identity

    def display_path(self, name: str) -> str:
        return f"{self}/{name}"

    def check(self): ...

    def has(self, name):
        return name in self.files

    def names(self, folder=""):
        return sorted(self.files)

    def open(self, name):
        raise NotImplementedError

    def pinned_to(self, state):
        return self

    def download(self, names): ...

    def listing(self):
        return {n: FileInfo(n, len(d), hashlib.md5(d).hexdigest()) for n, d in self.files.items()}

    def read(self, name):
        return self.files[name]

    def put(self, files, checksums):
        for name, data in files.items():
            time.sleep(self.pause)
            if name == self.fails_at:
                raise MachineError(f"{name}: the connection is lost")
            self.files[name] = data if isinstance(data, bytes) else Path(data).read_bytes()
            if name in checksums:
                assert hashlib.sha256(self.files[name]).hexdigest() == checksums[name]
            self.uploaded.append(name)

    def delete(self, names):
        for name in names:
            self.files.pop(name, None)

    @property
    def checksums(self) -> dict[str, str]:
        """SHA-256 by name."""
        return {n: hashlib.sha256(d).hexdigest() for n, d in self.files.items()}
