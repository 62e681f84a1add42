"""Writes and deletes the small files of an output."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from ..checkpoint.auxiliary_files import CopiedFile
from .shard_file import sync_folder

__all__ = ["copied_checksum", "remove", "write_durably"]


def write_durably(
    target: Path,
    data: bytes | CopiedFile,
    partial_folder: Path,
    check: Callable[[], None] = lambda: None,
) -> str:
    """Write or copy a small file, durably, and completely or not at all.

    Args:
        target: The file.
        data: Its bytes, or the file that is copied.
        partial_folder: Where the file is written before it is renamed.
        check: Called first, and again right before the renaming; raises if the folder belongs to
            another run by now.

    Returns:
        The SHA-256 of the file in hexadecimal digits.
    """
    check()
    partial = partial_folder / f"{target.name}.partial"
    partial.unlink(missing_ok=True)  # left by an error, or open in a run that lost its folder
    digest = hashlib.sha256()
    with open(partial, "xb") as opened:
        for chunk in [data] if isinstance(data, bytes) else data.chunks():
            digest.update(chunk)
            opened.write(chunk)
        opened.flush()
        os.fsync(opened.fileno())
    check()
    os.rename(partial, target)
    sync_folder(target.parent)
    return digest.hexdigest()


def copied_checksum(target: Path, data: bytes | CopiedFile) -> str | None:
    """Return the SHA-256 of a copy of a remote file, or None if there is none.

    So a file that was copied is not requested again.
    """
    if isinstance(data, bytes) or data.location.is_local or not target.is_file():
        return None
    with closing(data.location.open(data.name)) as file:
        info = file.info
    digest = hashlib.sha256(target.read_bytes()).hexdigest()
    is_copy = target.stat().st_size == info.nbytes and info.sha256 in (None, digest)
    return digest if is_copy else None


def remove(path: Path) -> None:
    """Delete a file, or a folder with everything in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)  # a process left over may still write to it
    else:
        path.unlink(missing_ok=True)
