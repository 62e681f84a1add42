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

from ..errors import MachineError, MissingPackageError

__all__ = ["machine_error", "missing_package"]


def missing_package(error: ImportError | None, extra: str) -> MissingPackageError:
    """A `MissingPackageError` for what an extra of this package would have installed."""
    what = extra if error is None or error.name is None else error.name
    return MissingPackageError(
        f"{what} is not installed; run: pip install 'gptoss_stream[{extra}]'"
    )


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
