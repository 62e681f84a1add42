"""An output as it is stored: its record, its index, and the headers of its shards.

Local and remote outputs are read the same way: small files whole, and of a shard only the header.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._utils import strict_json
from .._utils.failures import machine_error
from ..checkpoint.metadata import CheckpointInfo, read_raw_header
from ..checkpoint.small_files import read_small_file
from ..errors import CheckpointError, OutputError
from ..storage.local_folder import LocalFolder
from ..storage.location import FileInfo, Location, LocationLike
from ..storage.open_location import open_location
from ..tensors.raw_tensor import RawTensor
from ..tensors.safetensors_header import INDEX_NAME, LENGTH_NBYTES, METADATA, parse_header
from ..writing.run_state import RECORD_NAME, refuse_unfinished
from ..writing.safetensors_check import find_problem
from .differences import Difference

__all__ = [
    "StoredOutput",
    "as_output_errors",
    "open_output",
    "parse",
    "read_file",
    "read_output",
    "recorded_files",
    "shard_names",
]

_MAX_NBYTES = 25_000_000


@dataclass(frozen=True, slots=True)
class StoredOutput:
    """An output without the data of its tensors."""

    info: CheckpointInfo
    """Its valid shards, and their tensors."""
    record: bytes | Difference
    """Its record, or what is wrong with the file."""
    index: bytes | Difference
    """Its index, or what is wrong with the file."""

    @property
    def location(self) -> Location:
        """Where it is."""
        return self.info.location

    @property
    def recorded_files(self) -> list[object]:
        """The files that its record names, as far as that is valid."""
        return recorded_files(parse(self.record))


@contextmanager
def as_output_errors() -> Iterator[None]:
    """Raise errors about a checkpoint as errors about an output."""
    try:
        yield
    except CheckpointError as error:
        raise OutputError(str(error)) from None


def open_output(output: LocationLike) -> Location:
    """Open a finished output.

    Raises:
        OutputError: If there is none, or if its run has not finished.
        OptionError: For a name that cannot be used.
        MachineError: If reading fails.
        MissingPackageError: If an optional package is not installed.
    """
    with as_output_errors():
        location = open_location(output)
        try:
            location.check()
            refuse_unfinished(location)
        except OSError as error:
            raise machine_error(error, f"reading {location}") from error
    return location


def read_file(location: Location, name: str, limit: int = _MAX_NBYTES) -> bytes | Difference:
    """Read a file of an output, or say what is wrong with it.

    Args:
        location: The output.
        name: The file.
        limit: The most bytes that it may have.

    Raises:
        MachineError: If reading fails, as does `OSError`.
    """
    if not location.has(name):
        return Difference("missing", name)
    try:
        return read_small_file(location, name, limit)
    except CheckpointError as error:
        return Difference("file", name, found=str(error), expected="a file that can be read")


def parse(data: bytes | Difference) -> Any:
    """Return the value of a JSON file; None for one that cannot be used."""
    try:
        return strict_json.loads(data) if isinstance(data, bytes) else None
    except ValueError:
        return None


def shard_names(location: Location, *named: object) -> list[str]:
    """Return the shards that exist, sorted.

    Args:
        location: The output.
        named: Names in its record, index or checksums, of any type. An HTTP server lists no files,
            so that these are the only ones that can be found there.
    """
    found = {name for name in location.names() if name.endswith(".safetensors")}
    for name in named:
        if isinstance(name, str) and name.endswith(".safetensors") and "/" not in name:
            found |= {name} if name not in found and location.has(name) else set()
    return sorted(found)


def read_output(location: Location) -> tuple[StoredOutput, list[Difference]]:
    """Read the record, the index, and the headers of all shards of an output.

    Returns:
        What was read, and what is wrong with shards.

    Raises:
        OutputError: If there is no shard.
        MachineError: If reading fails, as does `OSError`.
    """
    record, index = read_file(location, RECORD_NAME), read_file(location, INDEX_NAME)
    names = shard_names(location, *_named(parse(record), parse(index)))
    if not names:
        raise OutputError(f"{location}: no .safetensors file in it; name a converted output")
    shards: list[FileInfo] = []
    tensors: dict[str, RawTensor] = {}
    differences = []
    for name in names:
        try:
            shard, header = read_raw_header(location, name)
            where = location.display_path(name)
            listed, metadata = parse_header(header, shard.nbytes, where, name)
        except CheckpointError as error:
            differences.append(Difference("file", name, found=str(error), expected="a valid shard"))
            continue
        shards.append(shard)
        found = {tensor.name: tensor for tensor in listed}
        differences += _compare_header(location, shard, header, found, metadata)
        differences += [
            Difference("unexpected", tensor, f"{name}, a second time")
            for tensor in sorted(tensors.keys() & found.keys())
        ]
        tensors = {**found, **tensors}
    info = CheckpointInfo(location, {}, tuple(shards), tensors)
    return StoredOutput(info, record, index), differences


def _named(record: Any, index: Any) -> Iterator[object]:
    """Yield the files that a record and an index name, as far as they are valid."""
    yield from recorded_files(record)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    yield from weight_map.values() if isinstance(weight_map, dict) else ()


def recorded_files(record: Any) -> list[object]:
    """Return the files that a record names, as far as it is valid."""
    files = record.get("files") if isinstance(record, dict) else None
    return files if isinstance(files, list) else []


def _compare_header(
    location: Location,
    shard: FileInfo,
    header: bytes,
    found: Mapping[str, RawTensor],
    metadata: Mapping[str, str],
) -> Iterator[Difference]:
    """Compare a shard's header with what safetensors' own reader reads, and its metadata."""
    with _local_file(location, shard, header) as file:
        problem = find_problem(file, ((raw.name, raw.dtype, raw.shape) for raw in found.values()))
    if problem is not None:
        yield Difference("file", shard.name, "", problem, "a file that safetensors can read")
    if metadata != METADATA:
        yield Difference("file", shard.name, "", f"metadata {metadata}", METADATA)


@contextmanager
def _local_file(location: Location, shard: FileInfo, header: bytes) -> Iterator[Path]:
    """Give a shard as a file that safetensors can open, which reads the header and the size.

    In place of a remote shard that is a file of the same size with nothing but its header, which
    takes no more disk space than that.
    """
    if isinstance(location, LocalFolder):
        yield location.path / shard.name
        return
    with tempfile.NamedTemporaryFile(prefix="gptoss_stream-", suffix=".safetensors") as file:
        try:
            file.write(len(header).to_bytes(LENGTH_NBYTES, "little") + header)
            file.truncate(shard.nbytes)
        except OSError as error:
            raise machine_error(
                error, f"writing the header of {shard.name} to {file.name}"
            ) from error
        yield Path(file.name)
