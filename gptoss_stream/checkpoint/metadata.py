"""Reads the metadata of a checkpoint: configuration files, index and safetensors headers.

Every header is validated, and checked against the index, before any tensor data is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

from .._utils import strict_json
from .._utils.failures import machine_error
from .._utils.messages import listed
from ..errors import CheckpointError, ConfigError
from ..storage.location import NEVER_STOP, FileInfo, Location, read_whole
from ..tensors.raw_tensor import RawTensor
from ..tensors.safetensors_header import (
    INDEX_NAME,
    LENGTH_NBYTES,
    header_nbytes,
    parse_header,
    parse_index,
)

__all__ = ["CheckpointInfo", "read_header", "read_metadata", "read_small_file"]

_MODEL_CONFIGS = ("config.json", "source_config.json")
_HOOKED_CONFIG = "tl_config.json"
_MAX_CONFIG_NBYTES = 1_000_000
_MAX_INDEX_NBYTES = 25_000_000
_FIRST_NBYTES = 64  # enough to recognize other kinds of files


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """The metadata of a checkpoint. No file is open."""

    location: Location
    """Where it is, already opened: its data is read through this."""
    configs: Mapping[str, Mapping[str, Any]]
    """Its parsed configuration files by name: config.json, or those of a converted output."""
    shards: tuple[FileInfo, ...]
    """Its safetensors files, sorted by name."""
    tensors: Mapping[str, RawTensor]
    """Its tensors by name."""

    @property
    def config_name(self) -> str:
        """The name of the file that describes the model."""
        return next(iter(self.configs), "config.json")

    @property
    def config(self) -> Mapping[str, Any]:
        """The configuration of Hugging Face or OpenAI; empty if there is none."""
        return next((self.configs[n] for n in _MODEL_CONFIGS if n in self.configs), {})


def read_metadata(location: Location) -> CheckpointInfo:
    """Read and check the configuration, the index and all headers of a checkpoint.

    Args:
        location: Where the checkpoint is, already opened.

    Raises:
        CheckpointError: If the location has no checkpoint, or one that is incomplete or damaged.
        MachineError: If reading fails.
    """
    try:
        location.check()
        configs = _read_configs(location)
        weight_map = None
        if location.has(INDEX_NAME):
            index = location.display_path(INDEX_NAME)
            text = read_small_file(location, INDEX_NAME, _MAX_INDEX_NBYTES)
            weight_map = parse_index(text, index)
            names = sorted(set(weight_map.values()))
            missing = [name for name in names if not location.has(name)]
            if missing:
                raise CheckpointError(
                    f"{index}: {len(missing)} of its {len(names)} shards do not exist: "
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
    """Read a whole file.

    Raises:
        CheckpointError: If it has more than `limit` bytes.
    """
    with closing(location.open(name)) as file:
        if file.info.nbytes > limit:
            raise CheckpointError(
                f"{location.display_path(name)}: more than {limit} bytes; this is not the file "
                "that it should be"
            )
        return read_whole(file)


def _read_configs(location: Location) -> Mapping[str, Mapping[str, Any]]:
    """Read config.json or what replaces it, and the configuration of a HookedTransformer."""
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
    """Read a JSON file whose value is an object."""
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
    """Read the headers of shards, and check them against the index if there is one."""
    shards: list[FileInfo] = []
    tensors: dict[str, RawTensor] = {}
    for name in names:
        shard, found, _ = read_header(location, name)
        shards.append(shard)
        for duplicate in sorted(tensors.keys() & found.keys()):
            raise CheckpointError(
                f"{location.display_path(name)}: tensor {duplicate!r} is in "
                f"{tensors[duplicate].shard} too; remove one of them"
            )
        tensors |= found
    if weight_map is not None:
        _check_index(location.display_path(INDEX_NAME), weight_map, tensors)
    return CheckpointInfo(location, configs, tuple(shards), tensors)


def _check_index(
    index: str, weight_map: Mapping[str, str], tensors: Mapping[str, RawTensor]
) -> None:
    """Check that the index names exactly the tensors of the shards."""
    for tensor, shard in weight_map.items():
        if tensor not in tensors or tensors[tensor].shard != shard:
            where = f"in {tensors[tensor].shard}" if tensor in tensors else "in none of the shards"
            raise CheckpointError(
                f"{index}: it says that tensor {tensor!r} is in {shard}, but it is {where}; "
                "download index and shards again"
            )
    for tensor, raw in tensors.items():
        if tensor not in weight_map:
            raise CheckpointError(
                f"{index}: tensor {tensor!r} of {raw.shard} is missing from it; "
                "download index and shards again"
            )


def read_header(
    location: Location, name: str
) -> tuple[FileInfo, dict[str, RawTensor], dict[str, str]]:
    """Read the header of a safetensors file.

    Returns:
        The file, its tensors by name, and the metadata of its header.

    Raises:
        CheckpointError: If the file breaks a rule of the format.
        OSError: If reading fails.
    """
    where = location.display_path(name)
    with closing(location.open(name)) as file:
        nbytes = file.info.nbytes
        first = bytearray(min(_FIRST_NBYTES, nbytes))
        file.read_into(memoryview(first), 0, NEVER_STOP)
        header = bytearray(header_nbytes(bytes(first), nbytes, where))
        file.read_into(memoryview(header), LENGTH_NBYTES, NEVER_STOP)
        info = file.info
    tensors, metadata = parse_header(bytes(header), nbytes, where, name)
    return info, {tensor.name: tensor for tensor in tensors}, metadata
