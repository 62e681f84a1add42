"""Reads the metadata of a checkpoint: configuration files, index and safetensors headers.

Every header is validated, and checked against the index, before any tensor data is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from typing import Any

from .._utils.failures import machine_error
from .._utils.messages import counted, sized, summary
from ..errors import CheckpointError, ConfigError
from ..storage.location import NEVER_STOP, FileInfo, Location
from ..tensors.raw_tensor import RawTensor
from ..tensors.safetensors_header import LENGTH_NBYTES, header_nbytes, parse_header
from .other_kinds import describe_other_kind
from .shard_files import ShardFiles, find_shard_files
from .small_files import read_config

__all__ = ["CheckpointInfo", "read_header", "read_metadata", "read_raw_header"]

_MODEL_CONFIGS = ("config.json", "source_config.json")
_HOOKED_CONFIG = "tl_config.json"
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
    notes: tuple[str, ...] = ()
    """What users should know about how it was read."""

    def __repr__(self) -> str:
        nbytes = sum(tensor.nbytes for tensor in self.tensors.values())
        return summary(
            self,
            f"{counted(len(self.tensors), 'tensor')}, {sized(nbytes)} in "
            f"{counted(len(self.shards), 'file')} in {self.location}",
        )

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
        config = configs.get("config.json", {})
        return _read_shards(location, configs, find_shard_files(location, config))
    except OSError as error:
        raise machine_error(error, f"reading {location}") from error


def _read_configs(location: Location) -> Mapping[str, Mapping[str, Any]]:
    """Read config.json or what replaces it, and the configuration of a HookedTransformer."""
    names: list[str] = []
    for group in (_MODEL_CONFIGS, (_HOOKED_CONFIG,)):
        names += islice((name for name in group if location.has(name)), 1)
    if "config.json" in names and location.has("adapter_config.json"):
        raise CheckpointError(
            f"{location.display_path('adapter_config.json')}: a LoRA adapter beside a checkpoint, "
            "and nothing says whether it is merged; transformers would load it on top: move it to "
            "another folder, and if it is not merged, name that with --adapter"
        )
    if names:
        return {name: read_config(location, name) for name in names}
    file = location.display_path("config.json")
    if location.has("model.bin"):
        raise ConfigError(
            f"{file}: missing; this looks like the released metal/, which is not converted: "
            "name the folder above it"
        )
    other = describe_other_kind(location)
    if other is not None:
        raise CheckpointError(other)
    raise ConfigError(f"{file}: missing; a checkpoint folder needs it")


def _read_shards(
    location: Location,
    configs: Mapping[str, Mapping[str, Any]],
    files: ShardFiles,
) -> CheckpointInfo:
    """Read the headers of shards, and check them against the index if there is one."""
    shards: list[FileInfo] = []
    tensors: dict[str, RawTensor] = {}
    for name in files.names:
        shard, found, _ = read_header(location, name)
        shards.append(shard)
        for duplicate in sorted(tensors.keys() & found.keys()):
            raise CheckpointError(
                f"{location.display_path(name)}: tensor {duplicate!r} is in "
                f"{tensors[duplicate].shard} too; remove one of them"
            )
        tensors |= found
    if files.weight_map is not None:
        _check_index(location.display_path(files.index_name), files.weight_map, tensors)
    if not tensors:
        raise CheckpointError(
            f"{location.display_path(files.names[0])}: no tensors in it; the program that saved "
            "the checkpoint wrote none: save or download it again"
        )
    return CheckpointInfo(location, configs, tuple(shards), tensors, files.notes)


def _check_index(
    index: str, weight_map: Mapping[str, str], tensors: Mapping[str, RawTensor]
) -> None:
    """Check that the index names exactly the tensors of the shards."""
    for tensor, shard in weight_map.items():
        if tensor not in tensors or tensors[tensor].shard != shard:
            where = f"in {tensors[tensor].shard}" if tensor in tensors else "in none of the shards"
            raise CheckpointError(
                f"{index}: it says that tensor {tensor!r} is in {shard}, but it is {where}; "
                "the two are not of the same checkpoint: save or download both again"
            )
    for tensor, raw in tensors.items():
        if tensor not in weight_map:
            raise CheckpointError(
                f"{index}: tensor {tensor!r} of {raw.shard} is missing from it; "
                "the two are not of the same checkpoint: save or download both again"
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
    info, header = read_raw_header(location, name)
    tensors, metadata = parse_header(header, info.nbytes, location.display_path(name), name)
    return info, {tensor.name: tensor for tensor in tensors}, metadata


def read_raw_header(location: Location, name: str) -> tuple[FileInfo, bytes]:
    """Read the header of a safetensors file, without its length; raises as `read_header` does."""
    with closing(location.open(name)) as file:
        nbytes = file.info.nbytes
        first = bytearray(min(_FIRST_NBYTES, nbytes))
        file.read_into(memoryview(first), 0, NEVER_STOP)
        header = bytearray(header_nbytes(bytes(first), nbytes, location.display_path(name)))
        file.read_into(memoryview(header), LENGTH_NBYTES, NEVER_STOP)
        return file.info, bytes(header)
