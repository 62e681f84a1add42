"""A writable location of the tests, in memory."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

from gptoss_stream.errors import MachineError
from gptoss_stream.storage.location import FileInfo


class Memory:
    """A remote location in memory, which can be slow or fail."""

    is_local = False
    identity = "memory of a test"
    revision = None

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.puts: list[str] = []
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

    def put(self, files, sums):
        for name, data in files.items():
            time.sleep(self.pause)
            if name == self.fails_at:
                raise MachineError(f"{name}: the store is gone")
            self.files[name] = data if isinstance(data, bytes) else Path(data).read_bytes()
            if name in sums:
                assert hashlib.sha256(self.files[name]).hexdigest() == sums[name]
            self.puts.append(name)

    def delete(self, names):
        for name in names:
            self.files.pop(name, None)

    @property
    def sums(self) -> dict[str, str]:
        return {n: hashlib.sha256(d).hexdigest() for n, d in self.files.items()}
