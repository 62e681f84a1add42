"""A checkpoint, opened: its configuration, its tensors' descriptions, and their bytes.

Knows places and the safetensors format, nothing of gpt-oss. Every header is validated, and held
against the index, before anything is read. Reading is by rows of a raw tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from math import prod
from typing import TYPE_CHECKING, Any

from .._utils import strict_json
from .._utils.failures import machine_error
from .._utils.messages import listed
from ..errors import CheckpointError, ConfigError
from ..storage.location import NEVER, FileInfo, Location, LocationLike, read_whole
from ..storage.open_location import open_location
from ..tensors.dtypes import DType
from ..tensors.safetensors_header import (
    INDEX_NAME,
    LENGTH_NBYTES,
    header_nbytes,
    parse_header,
    parse_index,
)

if TYPE_CHECKING:
    pass

__all__ = ["CheckpointInfo", "RawTensor", "read_header", "read_metadata", "read_small_file"]


_MODEL_CONFIGS = ("config.json", "source_config.json")


_HOOKED_CONFIG = "tl_config.json"


_MAX_CONFIG_NBYTES = 1_000_000


_MAX_INDEX_NBYTES = 25_000_000


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
class CheckpointInfo:
    """What a checkpoint holds, with no file open."""

    location: Location
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


def read_metadata(source: LocationLike) -> CheckpointInfo:
    """Read and check config.json, index and all headers of a checkpoint folder.

    Raises `CheckpointError` (or one of its kinds) for a folder that is no sound checkpoint, and
    `MachineError` where reading fails. Reads no tensor data.
    """
    location = open_location(source)
    try:
        location.check()
        configs = _read_configs(location)
        weight_map = None
        if location.has(INDEX_NAME):
            index = location.display_path(INDEX_NAME)
            weight_map = parse_index(
                read_small_file(location, INDEX_NAME, _MAX_INDEX_NBYTES), index
            )
            names = sorted(set(weight_map.values()))
            missing = [name for name in names if not location.has(name)]
            if missing:
                raise CheckpointError(
                    f"{index}: {len(missing)} of its {len(names)} shards are not there: "
                    f"{listed(missing, 5)}; download them"
                )
        else:
            names = [n for n in location.names() if n.endswith(".safetensors") and n[0] != "."]
            if not names:
                raise CheckpointError(
                    f"{location}: no {INDEX_NAME} and no .safetensors file; "
                    "name the folder of a gpt-oss checkpoint"
                )
        return _read_shards(location, configs, names, weight_map)
    except OSError as error:
        raise machine_error(error, f"reading {location}") from error


def read_small_file(location: Location, name: str, limit: int) -> bytes:
    """A whole file of at most `limit` bytes; raises `CheckpointError` for a larger one."""
    with closing(location.open(name)) as file:
        if file.info.nbytes > limit:
            raise CheckpointError(
                f"{location.display_path(name)}: more than {limit} bytes; this is not the file it should be"
            )
        return read_whole(file)


def _read_configs(location: Location) -> Mapping[str, Mapping[str, Any]]:
    """Read config.json or what stands for it, and a HookedTransformer's where there is one."""
    names: list[str] = []
    for group in (_MODEL_CONFIGS, (_HOOKED_CONFIG,)):
        names += islice((name for name in group if location.has(name)), 1)
    if names:
        return {name: _read_config(location, name) for name in names}
    file = location.display_path("config.json")
    if location.has("model.bin"):
        raise ConfigError(
            f"{file}: missing; this looks like the released metal/, which is not converted: "
            "name the folder above it"
        )
    raise ConfigError(f"{file}: missing; a checkpoint folder needs it")


def _read_config(location: Location, name: str) -> Mapping[str, Any]:
    try:
        config = strict_json.loads(read_small_file(location, name, _MAX_CONFIG_NBYTES))
    except ValueError as error:
        raise ConfigError(f"{location.display_path(name)}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{location.display_path(name)}: not a JSON object")
    return config


def _read_shards(
    location: Location,
    configs: Mapping[str, Mapping[str, Any]],
    names: list[str],
    weight_map: Mapping[str, str] | None,
) -> CheckpointInfo:
    shards: list[FileInfo] = []
    tensors: dict[str, RawTensor] = {}
    for name in names:
        shard, found, _ = read_header(location, name)
        shards.append(shard)
        for twice in sorted(tensors.keys() & found.keys()):
            raise CheckpointError(
                f"{location.display_path(name)}: tensor {twice!r} stands in {tensors[twice].shard} too; "
                "one of them must go"
            )
        tensors |= found
    if weight_map is not None:
        _check_index(location.display_path(INDEX_NAME), weight_map, tensors)
    return CheckpointInfo(location, configs, tuple(shards), tensors)


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


def read_header(
    location: Location, name: str
) -> tuple[FileInfo, dict[str, RawTensor], dict[str, str]]:
    """A safetensors file of a place, its tensors and its metadata; raises `CheckpointError` and
    `OSError`."""
    opened, where = location.open(name), location.display_path(name)
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
