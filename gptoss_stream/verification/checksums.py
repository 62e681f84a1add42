"""Comparison of an output's files with its SHA256SUMS."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ..errors import OutputError
from ..writing.checksums import CHECKSUMS_NAME, parse_checksums
from ..writing.executor import CHUNK_NBYTES
from .differences import Difference

__all__ = ["compare_checksums", "compare_file_names", "read_checksums"]


def read_checksums(folder: Path) -> tuple[dict[str, str], list[Difference]]:
    """Read SHA256SUMS.

    Returns:
        The checksums by file name, and what is wrong with SHA256SUMS.

    Raises:
        OutputError: If the folder has no SHA256SUMS.
        OSError: If reading fails.
    """
    file = folder / CHECKSUMS_NAME
    if not file.is_file():
        raise OutputError(f"{folder}: no {CHECKSUMS_NAME} in it; convert --checksums writes one")
    try:
        return parse_checksums(file.read_bytes()), []
    except ValueError as error:
        return {}, [
            Difference("checksum", CHECKSUMS_NAME, "", str(error), "a checksum on each line")
        ]


def compare_file_names(folder: Path, checksums: Mapping[str, str]) -> Iterator[Difference]:
    """Yield files of SHA256SUMS that are missing, and shards that are not in it."""
    for name in checksums:
        if not (folder / name).is_file():
            yield Difference("missing", name)
    for shard in sorted(folder.glob("*.safetensors")):
        if shard.name not in checksums:
            yield Difference("unexpected", shard.name)


def compare_checksums(
    files: Mapping[str, Path], expected: Mapping[str, str], on_progress: Callable[[int], None]
) -> Iterator[Difference]:
    """Read files and yield those whose checksums are not as expected.

    Args:
        files: The files, by their names in SHA256SUMS.
        expected: SHA-256 in hexadecimal digits, by the same names.
        on_progress: Called with the number of bytes read since the last call.

    Raises:
        OSError: If reading fails.
    """
    for name, file in files.items():
        digest = hashlib.sha256()
        with open(file, "rb", buffering=0) as opened:
            while chunk := opened.read(CHUNK_NBYTES):
                digest.update(chunk)
                on_progress(len(chunk))
        if digest.hexdigest() != expected[name]:
            yield Difference("checksum", name, "", digest.hexdigest(), expected[name])
