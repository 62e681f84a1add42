"""SHA-256 sums of an output's files, in the form that `sha256sum -c` reads.

They are those that the Hub shows for a file. A shard's sum is taken while it is made, of the bytes
in memory: the file is not read again.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

__all__ = ["CHECKSUMS_NAME", "RunningChecksum", "build_checksums", "parse_checksums"]


CHECKSUMS_NAME = "SHA256SUMS"


_LINE = re.compile(r"([0-9a-f]{64})  ([^\0\\]+)")


class RunningChecksum:
    """The sum of a file whose segments come from several threads, each in its time."""

    def __init__(self) -> None:
        self._sum = hashlib.sha256()
        self._turn = threading.Condition()
        self._end = 0

    def add(self, begin: int, data: np.ndarray[Any, Any], stop: threading.Event) -> None:
        """Add the file's bytes from `begin` on; waits for all before them, unless `stop` is set.

        Segments must be begun in order, or all threads would wait.
        """
        with self._turn:
            while self._end != begin:
                if stop.is_set():
                    return
                self._turn.wait(0.1)
        self._sum.update(data.data)  # no other thread's turn comes before this one's end
        with self._turn:
            self._end += len(data)
            self._turn.notify_all()

    def hexdigest(self) -> str:
        """The sum of what was added."""
        return self._sum.hexdigest()


def build_checksums(sums: Mapping[str, str]) -> bytes:
    """The text of a file of sums, from each file's name to its sum in hexadecimal digits."""
    return "".join(f"{sums[name]}  {name}\n" for name in sorted(sums)).encode()


def parse_checksums(data: bytes) -> dict[str, str]:
    """The sums in a file's text; raises `ValueError`, saying in which line, for another text."""
    sums: dict[str, str] = {}
    for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in sums or match[2].startswith("/") or ".." in match[2]:
            raise ValueError(f"line {number} is no sum of a file of this folder")
        sums[match[2]] = match[1]
    if not sums or not data.endswith(b"\n"):
        raise ValueError("it ends too early")
    return sums
