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

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

__all__ = [
    "CheckpointError",
    "ConfigError",
    "GptOssStreamError",
    "HeaderError",
    "MachineError",
    "MissingPackageError",
    "OptionError",
    "OutputError",
    "TensorError",
    "counted",
    "listed",
    "machine_error",
    "missing_package",
    "reading_output",
    "sized",
    "user_path",
]


class GptOssStreamError(Exception):
    """Base of all errors of this package; `exit_code` is what the command line exits with."""

    exit_code = 2


class OptionError(GptOssStreamError):
    """An argument has a value that cannot be used."""


class CheckpointError(GptOssStreamError):
    """The source is not a checkpoint that can be converted."""


class HeaderError(CheckpointError):
    """A safetensors header breaks a rule of the format."""


class ConfigError(CheckpointError):
    """config.json is missing, damaged, or describes something else than a gpt-oss model."""


class TensorError(CheckpointError):
    """A tensor is missing, has an unexpected dtype or shape, or holds an unusable value."""


class OutputError(GptOssStreamError):
    """The output folder cannot be written to without harm."""


class MissingPackageError(GptOssStreamError, ImportError):
    """An optional package is not installed, or in a version that cannot be used."""


class MachineError(GptOssStreamError):
    """The machine failed: disk full, I/O error, no permission."""

    exit_code = 3


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path that a user gave, `~` expanded; raises `OptionError` for an unknown `~user`."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise OptionError(f"{os.fspath(path)}: {error}") from None


def missing_package(error: ImportError | None, extra: str) -> MissingPackageError:
    """A `MissingPackageError` for what an extra of this package would have installed."""
    what = extra if error is None or error.name is None else error.name
    return MissingPackageError(
        f"{what} is not installed; run: pip install 'gptoss_stream[{extra}]'"
    )


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


_ADVICE = {
    errno.ENOSPC: "free some space and run again",
    errno.EDQUOT: "free some of your quota and run again",
    errno.EFBIG: "this file system holds no file that large; use a smaller --max-shard-size",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose a folder on a writable file system",
    errno.EIO: "check the disk, then run again",
    errno.ENAMETOOLONG: "choose a shorter path",
}


def machine_error(error: OSError, doing: str) -> MachineError:
    """A `MachineError` for an `OSError` that struck while `doing` (as in "writing /x/y")."""
    reason = error.strerror or str(error)
    advice = _ADVICE.get(error.errno or 0, "check the disk and the path, then run again")
    name = os.fspath(error.filename) if isinstance(error.filename, (str, os.PathLike)) else ""
    where = f" ({name})" if name and name not in doing else ""
    return MachineError(f"{doing}: {reason}{where}; {advice}")


@contextmanager
def reading_output(where: Path) -> Iterator[None]:
    """What a reader of checkpoints finds wrong with files of an output, as errors of the output."""
    try:
        yield
    except OSError as error:
        raise machine_error(error, f"reading {where}") from error
    except CheckpointError as error:
        raise OutputError(f"{error}; run verify, or convert again") from None
