"""Reads small files of a checkpoint whole: configuration files and the index."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from typing import Any

from .._utils import strict_json
from ..errors import CheckpointError, ConfigError
from ..storage.location import Location, read_whole

__all__ = ["RECORD_NAME", "read_config", "read_small_file"]

RECORD_NAME = "gptoss_stream.json"
"""The file in which a conversion says what it wrote."""

_MAX_CONFIG_NBYTES = 1_000_000


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


def read_config(location: Location, name: str) -> Mapping[str, Any]:
    """Read a JSON file whose value is an object.

    Raises:
        ConfigError: If it is not such a file.
    """
    try:
        config = strict_json.loads(read_small_file(location, name, _MAX_CONFIG_NBYTES))
    except ValueError as error:
        raise ConfigError(f"{location.display_path(name)}: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{location.display_path(name)}: not a JSON object")
    return config
