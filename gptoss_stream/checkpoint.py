"""A checkpoint folder, opened: its configuration, its tensors' descriptions, and their bytes.

Knows files and the safetensors format, nothing of gpt-oss. Every header is validated, and held
against the index, before anything is read. Reading is by rows of a raw tensor.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import strict_json
from .dtypes import DType
from .errors import CheckpointError, ConfigError, HeaderError, machine_error, user_path
from .regular_file import NotRegularError, open_regular
from .safetensors_format import (
    INDEX_NAME,
    LENGTH_NBYTES,
    header_nbytes,
    parse_header,
    parse_index,
)

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "Checkpoint",
    "CheckpointInfo",
    "Extent",
    "RawTensor",
    "ShardInfo",
    "describe",
    "read_header",
]

_MAX_CONFIG_NBYTES = 1_000_000
_MAX_INDEX_NBYTES = 25_000_000


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """A safetensors file: its name in the folder, and what tells whether it is still the same."""

    name: str
    nbytes: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True, slots=True)
class RawTensor:
    """A tensor as the checkpoint names and stores it; `offset` is its first byte in the file."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    shard: str
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * self.dtype.bits // 8


@dataclass(frozen=True, slots=True)
class Extent:
    """Elements `first … first + count` of a raw tensor."""

    raw: RawTensor
    first: int
    count: int


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a checkpoint folder holds, with no file open."""

    path: Path
    config: Mapping[str, Any]
    shards: tuple[ShardInfo, ...]
    tensors: Mapping[str, RawTensor]


def describe(path: str | os.PathLike[str]) -> CheckpointInfo:
    """Read and check config.json, index and all headers of a checkpoint folder.

    Raises `CheckpointError` (or one of its kinds) for a folder that is no sound checkpoint, and
    `MachineError` where reading fails. Reads no tensor data.
    """
    folder = user_path(path)
    try:
        if not folder.exists():
            raise CheckpointError(f"{folder}: there is no such folder; check the path")
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: not a folder; name the folder of the checkpoint")
        config = _read_config(folder)
        index = folder / INDEX_NAME
        weight_map = None
        if index.exists():
            weight_map = parse_index(_read_small(index, _MAX_INDEX_NBYTES), str(index))
            names = sorted(set(weight_map.values()))
            missing = [name for name in names if not (folder / name).exists()]
            if missing:
                raise CheckpointError(
                    f"{index}: {len(missing)} of its {len(names)} shards are not there: "
                    f"{', '.join(missing[:5])}{' …' if len(missing) > 5 else ''}; download them"
                )
        else:
            names = sorted(p.name for p in folder.glob("*.safetensors") if p.name[0] != ".")
            if not names:
                raise CheckpointError(
                    f"{folder}: no {INDEX_NAME} and no .safetensors file; "
                    "name the folder of a gpt-oss checkpoint"
                )
        return _describe_shards(folder, config, names, weight_map)
    except OSError as error:
        raise machine_error(error, f"reading {folder}") from error


def _read_small(file: Path, limit: int) -> bytes:
    with open(_open_regular(file, file.parent), "rb") as opened:
        data = opened.read(limit + 1)
    if len(data) > limit:
        raise CheckpointError(f"{file}: more than {limit} bytes; this is not the file it should be")
    return data


def _read_config(folder: Path) -> Mapping[str, Any]:
    file = folder / "config.json"
    if not file.exists():
        if (folder / "model.bin").exists():
            raise ConfigError(
                f"{file}: missing; this looks like the released metal/, which is not converted: "
                "name the folder above it"
            )
        raise ConfigError(f"{file}: missing; a checkpoint folder needs it")
    try:
        config = strict_json.loads(_read_small(file, _MAX_CONFIG_NBYTES))
    except ValueError as error:
        raise ConfigError(f"{file}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{file}: not a JSON object")
    return config


def _open_regular(file: Path, folder: Path) -> int:
    """A descriptor of a regular file of the folder; links may lead within it or, as in the Hub's
    cache (snapshots/<commit>/x -> ../../blobs/<hash>), to the blobs beside the snapshots."""
    target = Path(os.path.realpath(file))
    home = Path(os.path.realpath(folder))
    allowed = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    if file.is_symlink() and not any(place in target.parents for place in allowed):
        raise CheckpointError(
            f"{file}: a link that leads out of the folder, to {target}; copy the file here"
        )
    try:
        return open_regular(target)
    except NotRegularError:
        raise CheckpointError(f"{file}: not a regular file; put the file itself there") from None


def _describe_shards(
    folder: Path,
    config: Mapping[str, Any],
    names: list[str],
    weight_map: Mapping[str, str] | None,
) -> CheckpointInfo:
    shards: list[ShardInfo] = []
    tensors: dict[str, RawTensor] = {}
    for name in names:
        shard, found, _ = read_header(folder, name)
        shards.append(shard)
        for twice in sorted(tensors.keys() & found.keys()):
            raise CheckpointError(
                f"{folder / name}: tensor {twice!r} stands in {tensors[twice].shard} too; "
                "one of them must go"
            )
        tensors |= found
    if weight_map is not None:
        _check_index(folder / INDEX_NAME, weight_map, tensors)
    return CheckpointInfo(folder, config, tuple(shards), tensors)


def _check_index(
    index: Path, weight_map: Mapping[str, str], tensors: Mapping[str, RawTensor]
) -> None:
    for tensor, shard in weight_map.items():
        if tensor not in tensors or tensors[tensor].shard != shard:
            where = f"in {tensors[tensor].shard}" if tensor in tensors else "in none of the shards"
            raise CheckpointError(
                f"{index}: it says that tensor {tensor!r} lies in {shard}, but it lies {where}; "
                "download index and shards again"
            )
    for tensor, raw in tensors.items():
        if tensor not in weight_map:
            raise CheckpointError(
                f"{index}: tensor {tensor!r} of {raw.shard} is missing from it; "
                "download index and shards again"
            )


def read_header(folder: Path, name: str) -> tuple[ShardInfo, dict[str, RawTensor], dict[str, str]]:
    """A safetensors file of a folder, its tensors and its metadata; raises `CheckpointError` and
    `OSError`."""
    file = folder / name
    with open(_open_regular(file, folder), "rb", buffering=0) as opened:
        status = os.fstat(opened.fileno())
        length = header_nbytes(os.pread(opened.fileno(), 64, 0), status.st_size, str(file))
        header = os.pread(opened.fileno(), length, LENGTH_NBYTES)
    if len(header) != length:
        raise HeaderError(f"{file}: it shrank while it was read; is something writing to it?")
    infos, metadata = parse_header(header, status.st_size, str(file))
    start = LENGTH_NBYTES + length
    tensors = {i.name: RawTensor(i.name, i.dtype, i.shape, name, start + i.begin) for i in infos}
    return _shard_info(name, status), tensors, metadata


class Checkpoint:
    """A described checkpoint with its files open, for reading from any number of threads.

    A context manager. Reads by `pread` into memory that each thread keeps and uses again: a mapped
    file that shrinks kills the process that reads it, without an exception (SIGBUS). Raises
    `CheckpointError` where a file is no longer what was described, `MachineError` where reading
    fails.
    """

    def __init__(self, info: CheckpointInfo) -> None:
        self.info = info
        self._files: dict[str, _OpenFile] = {}
        self._opening = threading.Lock()
        self._memory = threading.local()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        for file in self._files.values():
            os.close(file.descriptor)
        self._files.clear()

    def _file(self, name: str) -> _OpenFile:
        file = self._files.get(name)
        if file is None:
            with self._opening:
                file = self._files.get(name) or self._open(name)
                self._files[name] = file
        return file

    def _open(self, name: str) -> _OpenFile:
        described = next(shard for shard in self.info.shards if shard.name == name)
        path = self.info.path / name
        try:
            descriptor = _open_regular(path, self.info.path)
            status = os.fstat(descriptor)
        except OSError as error:
            raise machine_error(error, f"reading {path}") from error
        if _shard_info(name, status) != described:
            os.close(descriptor)
            raise _changed(path)
        return _OpenFile(path, descriptor, described)

    @contextmanager
    def read(
        self, tensor: RawTensor, first: int, shape: tuple[int, ...]
    ) -> Iterator[np.ndarray[Any, Any]]:
        """`prod(shape)` elements of a tensor from element `first` on, as an array of that shape.

        BF16 comes as its bits (uint16). The array's memory is used again when the block ends.
        """
        import numpy as np

        from .cast import STORAGE

        nbytes = prod(shape) * tensor.dtype.itemsize
        free: list[np.ndarray[Any, Any]] = self._memory.__dict__.setdefault("free", [])
        memory = free.pop() if free else np.empty(0, np.uint8)
        if len(memory) < nbytes:
            memory = np.empty(nbytes, np.uint8)
        self._read_into(memory[:nbytes], tensor, first * tensor.dtype.itemsize)
        yield memory[:nbytes].view(STORAGE[tensor.dtype]).reshape(shape)
        free.append(memory)

    def _read_into(self, out: np.ndarray[Any, Any], tensor: RawTensor, begin: int) -> None:
        file = self._file(tensor.shard)
        view, at = out.data, tensor.offset + begin
        try:
            while view:
                count = os.preadv(file.descriptor, [view], at)
                if count == 0:
                    raise _changed(file.path)
                view, at = view[count:], at + count
        except OSError as error:
            raise machine_error(error, f"reading {file.path} at byte {at}") from error

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if a file was written to since it was opened: what was read may
        then be in part of one state and in part of another."""
        for file in list(self._files.values()):
            if _shard_info(file.described.name, os.fstat(file.descriptor)) != file.described:
                raise _changed(file.path)

    def prefetch(self, extent: Extent) -> None:
        """Ask the system to read elements ahead; returns at once."""
        if hasattr(os, "posix_fadvise"):  # absent on some systems: then it is no help, nor harm
            size = extent.raw.dtype.itemsize
            begin = extent.raw.offset + extent.first * size
            descriptor = self._file(extent.raw.shard).descriptor
            os.posix_fadvise(descriptor, begin, extent.count * size, os.POSIX_FADV_WILLNEED)


@dataclass(frozen=True, slots=True)
class _OpenFile:
    path: Path
    descriptor: int
    described: ShardInfo


def _shard_info(name: str, status: os.stat_result) -> ShardInfo:
    # Not the change time: a new link to the file, or one less, changes it too.
    return ShardInfo(name, status.st_size, status.st_mtime_ns, status.st_ino)


def _changed(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path}: it changed while it was being read; see that nothing writes to it, then start "
        "again with --overwrite"
    )
