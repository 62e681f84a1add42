"""Comparison of an output's files with its SHA256SUMS."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial

from .._utils.thread_pool import Buffer, run_steps
from ..checkpoint.source_card import CARD_NAME
from ..errors import CheckpointError, OutputError
from ..storage.location import FileInfo, Location
from ..writing.checksums import CHECKSUMS_NAME, parse_checksums
from ..writing.executor import CHUNK_NBYTES
from .differences import Difference
from .stored_output import read_file, shard_names

__all__ = ["compare_checksums", "compare_file_names", "describe_files", "read_checksums"]

_MAX_REQUESTS = 4  # at the same time


def read_checksums(location: Location) -> tuple[dict[str, str], list[Difference]]:
    """Read SHA256SUMS.

    Returns:
        The checksums by file name, without that of the model card, which users edit; and what is
        wrong with SHA256SUMS.

    Raises:
        OutputError: If the output has no SHA256SUMS.
        MachineError: If reading fails, as does `OSError`.
    """
    if not location.has(CHECKSUMS_NAME):
        raise OutputError(
            f"{location}: no {CHECKSUMS_NAME} in it; convert --checksums writes one. Without it, "
            "verify compares an output with its SOURCE"
        )
    data = read_file(location, CHECKSUMS_NAME)
    if isinstance(data, Difference):
        return {}, [data]
    try:
        found = parse_checksums(data)
        return {name: found[name] for name in found if name != CARD_NAME}, []
    except ValueError as error:
        return {}, [
            Difference("checksum", CHECKSUMS_NAME, "", str(error), "a checksum on each line")
        ]


def compare_file_names(
    location: Location, checksums: Mapping[str, str], recorded: Iterable[object]
) -> Iterator[Difference]:
    """Yield files of SHA256SUMS that are missing, and files that are not in it.

    Args:
        location: The output.
        checksums: The checksums by file name.
        recorded: The files that the record names.
    """
    for name in checksums:
        if not location.has(name):
            yield Difference("missing", name)
    for shard in shard_names(location):
        if shard not in checksums:
            yield Difference("unexpected", shard)
    for file in recorded:
        if file not in checksums and file not in (CARD_NAME, CHECKSUMS_NAME):
            yield Difference("checksum", CHECKSUMS_NAME, "", "none", f"a line for {file}")


def describe_files(
    location: Location, checksums: Mapping[str, str]
) -> tuple[list[FileInfo], list[Difference]]:
    """Return the files of SHA256SUMS that exist, and what is wrong with those of no use.

    Raises:
        MachineError: If opening one fails, as does `OSError`.
    """
    files, differences = [], []
    for name in filter(location.has, checksums):
        try:
            with closing(location.open(name)) as file:
                files.append(file.info)
        except CheckpointError as error:
            differences.append(Difference("file", name, "", str(error), "a file that can be read"))
    return files, differences


def compare_checksums(
    location: Location,
    files: list[FileInfo],
    expected: Mapping[str, str],
    on_progress: Callable[[int], None],
) -> list[Difference]:
    """Return the files whose checksums are not as expected.

    A file is read unless the location knows its checksum, as the Hub does of large files.

    Args:
        location: The output.
        files: The files, named as in SHA256SUMS.
        expected: SHA-256 in hexadecimal digits, by the same names.
        on_progress: Called with the number of bytes compared since the last call, from any thread.

    Raises:
        CheckpointError: If a file changes meanwhile.
        MachineError: If reading fails, as does `OSError`.
    """
    found: dict[str, str] = {}
    stop = threading.Event()

    def read(file: FileInfo, buffer: Buffer) -> None:
        found[file.name] = file.sha256 or _checksum(location, file, buffer, stop, on_progress)
        if file.sha256 is not None:
            on_progress(file.nbytes)

    # A local disk would only seek between the files.
    threads = 1 if location.is_local else _MAX_REQUESTS
    run_steps((partial(read, file) for file in files), threads, CHUNK_NBYTES, stop)
    return [
        Difference("checksum", file.name, "", found[file.name], expected[file.name])
        for file in files
        if found[file.name] != expected[file.name]
    ]


def _checksum(
    location: Location,
    described: FileInfo,
    buffer: Buffer,
    stop: threading.Event,
    on_progress: Callable[[int], None],
) -> str:
    """Read a file and return its SHA-256 in hexadecimal digits."""
    digest = hashlib.sha256()
    with closing(location.open(described.name)) as file:
        for begin in range(0, file.info.nbytes, len(buffer)):
            chunk = buffer[: min(len(buffer), file.info.nbytes - begin)]
            file.read_into(chunk.data, begin, stop)
            digest.update(chunk.data)
            on_progress(len(chunk))
        file.check_unchanged()
    return digest.hexdigest()
