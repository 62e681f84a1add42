"""Receipts of shards that are uploaded and not visible yet (see `BatchingLocation`).

They are kept in the work folder of the staging folder, so that a run that is killed before it
publishes the shards need not upload them again. Before each stands its SHA-256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from .durable_files import write_durably

__all__ = ["RECEIPT_SUFFIX", "Receipts"]

RECEIPT_SUFFIX = ".receipt"


class Receipts:
    """The receipts in a folder. Methods raise `OSError` as the system does.

    Args:
        folder: The folder.
        check: Called before a receipt is kept; raises if the folder is another run's.
    """

    def __init__(self, folder: Path, check: Callable[[], None] = lambda: None) -> None:
        self._folder = folder
        self._check = check

    def keep(self, name: str, receipt: bytes) -> None:
        """Keep the receipt of a shard, durably."""
        text = f"{_digest(receipt)}\n".encode() + receipt
        write_durably(self._folder / f"{name}{RECEIPT_SUFFIX}", text, self._folder, self._check)

    def read(self) -> dict[str, bytes]:
        """Return all receipts but damaged ones, by the shards' names."""
        found = {}
        for file in self._folder.glob(f"*{RECEIPT_SUFFIX}"):
            digest, _, receipt = file.read_bytes().partition(b"\n")
            if digest == _digest(receipt).encode():
                found[file.name.removesuffix(RECEIPT_SUFFIX)] = receipt
        return found

    def clear(self) -> None:
        """Delete all receipts."""
        for file in self._folder.glob(f"*{RECEIPT_SUFFIX}"):
            file.unlink()


def _digest(receipt: bytes) -> str:
    return hashlib.sha256(receipt).hexdigest()
