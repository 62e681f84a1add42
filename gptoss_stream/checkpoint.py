"""A checkpoint, opened: its configuration, its tensors' descriptions, and their bytes.

Knows places and the safetensors format, nothing of gpt-oss. Every header is validated, and held
against the index, before anything is read. Reading is by rows of a raw tensor.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, Any

from . import strict_json
from .dtypes import DType
from .errors import CheckpointError, ConfigError, listed, machine_error
from .places import File, FileInfo, Name, Place, open_place
from .places._file import NEVER, changed, read_whole
from .places.folder import LocalFile
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
    "OpenFiles",
    "RawTensor",
    "Schedule",
    "describe",
    "is_zero",
    "read_header",
    "read_small",
]

_MODEL_CONFIGS = ("config.json", "source_config.json")
_HOOKED_CONFIG = "tl_config.json"
_MAX_CONFIG_NBYTES = 1_000_000
_MAX_INDEX_NBYTES = 25_000_000
_PIECE_NBYTES = 1 << 20


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

    @property
    def span(self) -> tuple[int, int]:
        """Where their bytes begin in the file, and how many these are."""
        size = self.raw.dtype.itemsize
        return self.raw.offset + self.first * size, self.count * size


@dataclass(frozen=True, slots=True)
class Schedule:
    """What each of a run's steps reads, numbered in the order in which they are begun."""

    count: int
    extents: Callable[[int], Iterable[Extent]]


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """What a checkpoint holds, with no file open."""

    place: Place
    configs: Mapping[str, Mapping[str, Any]]
    """Its configuration files by name: config.json, or what stands beside a converted model."""
    shards: tuple[FileInfo, ...]
    tensors: Mapping[str, RawTensor]

    @property
    def config_name(self) -> str:
        """The file that says what the model is."""
        return next(iter(self.configs), "config.json")

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of Hugging Face or OpenAI; empty where there is none."""
        return next((self.configs[n] for n in _MODEL_CONFIGS if n in self.configs), {})


def describe(source: Name) -> CheckpointInfo:
    """Read and check config.json, index and all headers of a checkpoint folder.

    Raises `CheckpointError` (or one of its kinds) for a folder that is no sound checkpoint, and
    `MachineError` where reading fails. Reads no tensor data.
    """
    place = open_place(source)
    try:
        place.check()
        configs = _read_configs(place)
        weight_map = None
        if place.has(INDEX_NAME):
            index = place.at(INDEX_NAME)
            weight_map = parse_index(read_small(place, INDEX_NAME, _MAX_INDEX_NBYTES), index)
            names = sorted(set(weight_map.values()))
            missing = [name for name in names if not place.has(name)]
            if missing:
                raise CheckpointError(
                    f"{index}: {len(missing)} of its {len(names)} shards are not there: "
                    f"{listed(missing, 5)}; download them"
                )
        else:
            names = [n for n in place.names() if n.endswith(".safetensors") and n[0] != "."]
            if not names:
                raise CheckpointError(
                    f"{place}: no {INDEX_NAME} and no .safetensors file; "
                    "name the folder of a gpt-oss checkpoint"
                )
        return _describe_shards(place, configs, names, weight_map)
    except OSError as error:
        raise machine_error(error, f"reading {place}") from error


def read_small(place: Place, name: str, limit: int) -> bytes:
    """A whole file of at most `limit` bytes; raises `CheckpointError` for a larger one."""
    with closing(place.open(name)) as file:
        if file.info.nbytes > limit:
            raise CheckpointError(
                f"{place.at(name)}: more than {limit} bytes; this is not the file it should be"
            )
        return read_whole(file)


def _read_configs(place: Place) -> Mapping[str, Mapping[str, Any]]:
    """Read config.json or what stands for it, and a HookedTransformer's where there is one."""
    names: list[str] = []
    for group in (_MODEL_CONFIGS, (_HOOKED_CONFIG,)):
        names += islice((name for name in group if place.has(name)), 1)
    if names:
        return {name: _read_config(place, name) for name in names}
    file = place.at("config.json")
    if place.has("model.bin"):
        raise ConfigError(
            f"{file}: missing; this looks like the released metal/, which is not converted: "
            "name the folder above it"
        )
    raise ConfigError(f"{file}: missing; a checkpoint folder needs it")


def _read_config(place: Place, name: str) -> Mapping[str, Any]:
    try:
        config = strict_json.loads(read_small(place, name, _MAX_CONFIG_NBYTES))
    except ValueError as error:
        raise ConfigError(f"{place.at(name)}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{place.at(name)}: not a JSON object")
    return config


def _describe_shards(
    place: Place,
    configs: Mapping[str, Mapping[str, Any]],
    names: list[str],
    weight_map: Mapping[str, str] | None,
) -> CheckpointInfo:
    shards: list[FileInfo] = []
    tensors: dict[str, RawTensor] = {}
    for name in names:
        shard, found, _ = read_header(place, name)
        shards.append(shard)
        for twice in sorted(tensors.keys() & found.keys()):
            raise CheckpointError(
                f"{place.at(name)}: tensor {twice!r} stands in {tensors[twice].shard} too; "
                "one of them must go"
            )
        tensors |= found
    if weight_map is not None:
        _check_index(place.at(INDEX_NAME), weight_map, tensors)
    return CheckpointInfo(place, configs, tuple(shards), tensors)


def _check_index(
    index: str, weight_map: Mapping[str, str], tensors: Mapping[str, RawTensor]
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


_FIRST_NBYTES = 64  # enough to see what a file is


def read_header(place: Place, name: str) -> tuple[FileInfo, dict[str, RawTensor], dict[str, str]]:
    """A safetensors file of a place, its tensors and its metadata; raises `CheckpointError` and
    `OSError`."""
    opened, where = place.open(name), place.at(name)
    try:
        nbytes = opened.info.nbytes
        first = bytearray(min(_FIRST_NBYTES, nbytes))
        opened.read_into(memoryview(first), 0, NEVER)
        length = header_nbytes(bytes(first), nbytes, where)
        header = bytearray(length)
        opened.read_into(memoryview(header), LENGTH_NBYTES, NEVER)
    finally:
        opened.close()
    infos, metadata = parse_header(bytes(header), nbytes, where)
    start = LENGTH_NBYTES + length
    tensors = {i.name: RawTensor(i.name, i.dtype, i.shape, name, start + i.begin) for i in infos}
    return opened.info, tensors, metadata


def is_zero(info: CheckpointInfo, raw: RawTensor) -> bool:
    """Whether a tensor of floats is zero, of either sign; reads it a piece at a time."""
    import numpy as np

    bits = np.dtype(f"u{raw.dtype.itemsize}")
    try:
        with closing(info.place.open(raw.shard)) as file:
            for at in range(0, raw.nbytes, _PIECE_NBYTES):
                piece = bytearray(min(_PIECE_NBYTES, raw.nbytes - at))
                file.read_into(memoryview(piece), raw.offset + at, NEVER)
                if (np.frombuffer(piece, bits) << 1).any():  # the sign shifted out
                    return False
    except OSError as error:
        raise machine_error(error, f"reading {info.place.at(raw.shard)}") from error
    return True


class OpenFiles:
    """The files of a described checkpoint, opened when they are first read, by any thread.

    Raises `CheckpointError` where a file is no longer what was described.
    """

    def __init__(self, info: CheckpointInfo) -> None:
        self.info = info
        self._files: dict[str, File] = {}
        self._opening = threading.Lock()

    def close(self) -> None:
        """Close them all."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def file(self, name: str) -> File:
        """One of them."""
        file = self._files.get(name)
        if file is None:
            with self._opening:
                file = self._files.get(name) or self._open(name)
                self._files[name] = file
        return file

    def _open(self, name: str) -> File:
        described = next(shard for shard in self.info.shards if shard.name == name)
        try:
            file = self.info.place.open(name)
        except OSError as error:
            raise machine_error(error, f"reading {self.info.place.at(name)}") from error
        if file.info != described:
            file.close()
            raise changed(self.info.place.at(name))
        return file

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if one of them is no longer what was opened."""
        for file in list(self._files.values()):
            file.check_unchanged()


class Checkpoint:
    """A described checkpoint of this machine, for reading from any number of threads.

    A context manager, and a `operands.Reader`; what the steps so many `ahead` will read is read
    ahead by the system. Each thread keeps the memory that it reads into and uses it again. Raises
    `CheckpointError` where a file is no longer what was described, `MachineError` where reading
    fails.
    """

    def __init__(self, info: CheckpointInfo, ahead: int = 0) -> None:
        self.info = info
        self._files = OpenFiles(info)
        # By thread; a threading.local that is collected within sys._current_frames, which Dask's
        # profiler calls, locks Python 3.11 up (python/cpython#106883).
        self._memory: dict[int, list[np.ndarray[Any, Any]]] = {}
        self._ahead = ahead
        self._schedule = Schedule(0, lambda step: ())
        self._stop = NEVER

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()

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
        free = self._memory.setdefault(threading.get_ident(), [])
        memory = free.pop() if free else np.empty(0, np.uint8)
        if len(memory) < nbytes:
            memory = np.empty(nbytes, np.uint8)
        begin = tensor.offset + first * tensor.dtype.itemsize
        self._files.file(tensor.shard).read_into(memory[:nbytes].data, begin, self._stop)
        yield memory[:nbytes].view(STORAGE[tensor.dtype]).reshape(shape)
        free.append(memory)

    def schedule(self, schedule: Schedule, stop: threading.Event) -> None:
        """Told before reading what each step will read."""
        self._schedule, self._stop = schedule, stop

    def begin(self, step: int) -> None:
        """Have the system read ahead what a later step needs."""
        later = step + self._ahead
        if self._ahead and later < self._schedule.count:
            for extent in self._schedule.extents(later):
                file = self._files.file(extent.raw.shard)
                if isinstance(file, LocalFile):
                    file.prefetch(*extent.span)

    def end(self, step: int) -> None:
        """Nothing is held."""

    def check_unchanged(self) -> None:
        """Raise `CheckpointError` if a file was written to since it was opened."""
        self._files.check_unchanged()
