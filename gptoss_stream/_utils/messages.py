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

from collections.abc import Sequence

__all__ = ["counted", "listed", "sized"]


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few of some names, for a message."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def counted(number: int, what: str) -> str:
    """So many of something, for people."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def sized(nbytes: int) -> str:
    """Bytes for people, in decimal units."""
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit in ("B", "kB") else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} TB"
