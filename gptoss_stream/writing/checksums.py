"""SHA-256 checksums of an output's files, in the format that `sha256sum -c` reads.

They are the checksums that the Hub shows for a file. A shard's checksum is computed of the bytes
in memory while it is written: the file is not read again.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "CHECKSUMS_NAME",
    "RunningChecksum",
    "build_checksums",
    "parse_checksum",
    "parse_checksums",
]

CHECKSUMS_NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  ([^\0\\]+)")


class RunningChecksum:
    """The SHA-256 of a file whose chunks come from several threads, each at its own time."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._turn = threading.Condition()
        self._end = 0

    def add(self, begin: int, data: np.ndarray[Any, Any], stop: threading.Event) -> None:
        """Add a chunk, after all chunks before it.

        Threads must take the chunks in order, or all of them would wait.

        Args:
            begin: The chunk's first byte in the file.
            data: The chunk, uint8.
            stop: Ends the waiting when it is set.
        """
        with self._turn:
            while self._end != begin:
                if stop.is_set():
                    return
                self._turn.wait(0.1)
        self._digest.update(data.data)  # no other thread's turn comes before this one's end
        with self._turn:
            self._end += len(data)
            self._turn.notify_all()

    def hexdigest(self) -> str:
        """Return the checksum of all chunks added so far, in hexadecimal digits."""
        return self._digest.hexdigest()


def build_checksums(checksums: Mapping[str, str]) -> bytes:
    """Return the text of a checksum file, from file names and hexadecimal checksums."""
    return "".join(f"{checksums[name]}  {name}\n" for name in sorted(checksums)).encode()


def parse_checksum(data: bytes) -> str | None:
    """Return the checksum that is all of a small file; None for a damaged one."""
    match = re.fullmatch(rb"([0-9a-f]{64})\n", data)
    return match[1].decode() if match else None


def parse_checksums(data: bytes) -> dict[str, str]:
    """Parse the text of a checksum file.

    Returns:
        The checksum of each file, by name.

    Raises:
        ValueError: If a line is not a checksum of a file in the folder, naming the line.
    """
    checksums: dict[str, str] = {}
    for number, line in enumerate(data.decode("utf-8").splitlines(), 1):
        match = _LINE.fullmatch(line)
        if match is None or match[2] in checksums or match[2].startswith("/") or ".." in match[2]:
            raise ValueError(f"line {number} is not the checksum of a file in this folder")
        checksums[match[2]] = match[1]
    if not checksums or not data.endswith(b"\n"):
        raise ValueError("it ends too early")
    return checksums
