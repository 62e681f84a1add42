"""Chooses which safetensors files of a folder are the checkpoint's, as transformers does.

transformers reads the file that `transformers_weights` in config.json names, else
model.safetensors, else the shards of model.safetensors.index.json. Without any of them, all
safetensors files are read: OpenAI's 120b has no index. Source: transformers 5.24,
`modeling_utils.py` (`_get_resolved_checkpoint_files`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .._utils.messages import listed
from ..errors import CheckpointError, ConfigError
from ..storage.location import Location
from ..tensors.safetensors_header import INDEX_NAME, SINGLE_NAME, parse_index
from .other_kinds import describe_other_kind
from .small_files import read_small_file

__all__ = ["ShardFiles", "find_shard_files"]

_MAX_INDEX_NBYTES = 25_000_000


@dataclass(frozen=True, slots=True)
class ShardFiles:
    """The safetensors files of a checkpoint."""

    names: list[str]
    index_name: str = ""
    """The name of the index; empty if none is read."""
    weight_map: Mapping[str, str] | None = None
    """The shard of each tensor by the index."""
    notes: tuple[str, ...] = ()
    """What users should know about this choice."""


def find_shard_files(location: Location, config: Mapping[str, Any]) -> ShardFiles:
    """Return the safetensors files to read.

    Args:
        location: The checkpoint's folder.
        config: Its config.json; empty without one.

    Raises:
        CheckpointError: If there are none, or if the index names some that do not exist.
        ConfigError: If config.json names a file that cannot be read.
    """
    named = config.get("transformers_weights")
    if named is not None:
        _check_named(location, named)
        if named.endswith(".json"):
            return _from_index(location, named)
        note = f"config.json names {named} (transformers_weights); no other file is read"
        return ShardFiles([named], notes=(note,))
    has_index = location.has(INDEX_NAME)
    if location.has(SINGLE_NAME):
        return ShardFiles([SINGLE_NAME], notes=_note_on_index(location) if has_index else ())
    if has_index:
        return _from_index(location, INDEX_NAME)
    names = [name for name in location.names() if name.endswith(".safetensors") and name[0] != "."]
    if names:
        return ShardFiles(names)
    raise CheckpointError(
        describe_other_kind(location)
        or f"{location}: no {INDEX_NAME} and no .safetensors file; "
        "name the folder of a gpt-oss checkpoint"
    )


def _check_named(location: Location, name: object) -> None:
    """Check the value of `transformers_weights`: the name of a file in the folder."""
    where = location.display_path("config.json")
    if not isinstance(name, str) or not name.endswith((".safetensors", ".safetensors.index.json")):
        raise ConfigError(
            f"{where}: transformers_weights is {str(name)[:80]!r}, which is neither a safetensors "
            "file nor an index"
        )
    if "/" in name or "\\" in name or name.startswith(".") or not name.isprintable():
        raise ConfigError(
            f"{where}: transformers_weights is {name[:80]!r}; it must be a file in the same folder"
        )
    if not location.has(name):
        raise ConfigError(
            f"{where}: transformers_weights is {name[:80]!r}, and there is no such file; download "
            "it, or remove the entry"
        )


def _from_index(location: Location, index_name: str) -> ShardFiles:
    """Return the shards that an index names."""
    index = location.display_path(index_name)
    weight_map = parse_index(read_small_file(location, index_name, _MAX_INDEX_NBYTES), index)
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not location.has(name)]
    if missing:
        raise CheckpointError(
            f"{index}: {len(missing)} of its {len(names)} shards do not exist: "
            f"{listed(missing, 5)}; download them"
        )
    return ShardFiles(names, index_name, weight_map)


def _note_on_index(location: Location) -> tuple[str, ...]:
    """Return a note if an index beside model.safetensors names other files."""
    index = location.display_path(INDEX_NAME)
    try:
        text = read_small_file(location, INDEX_NAME, _MAX_INDEX_NBYTES)
        if set(parse_index(text, index).values()) == {SINGLE_NAME}:
            return ()
    except CheckpointError:
        pass  # It is not read, so its faults do not matter.
    return (
        f"{SINGLE_NAME} is read, as by transformers; {INDEX_NAME} beside it names other files, "
        "which are not read",
    )
