"""Every error that a user can cause or meet.

GptOssStreamError            exit code 2: what was asked for cannot be done as asked
 ├ OptionError               an argument is wrong (unknown format, size that does not parse)
 ├ CheckpointError           the source cannot be used
 │  ├ HeaderError            a safetensors header breaks a rule of the format
 │  ├ ConfigError            config.json is missing, damaged or of another model
 │  └ TensorError            a tensor is missing, of another dtype or shape, or holds a value
 │                           that cannot be converted
 ├ OutputError               the output folder cannot be used (foreign files, a finished run)
 ├ MissingPackageError       a part of this tool needs a package that is not installed
 └ MachineError              exit code 3: the disk is full, an I/O error, no permission

A message is one line: what is wrong, in which file or tensor, and what to do.
"""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import OptionError

__all__ = ["user_path"]


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path that a user gave, `~` expanded; raises `OptionError` for an unknown `~user`."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise OptionError(f"{os.fspath(path)}: {error}") from None
