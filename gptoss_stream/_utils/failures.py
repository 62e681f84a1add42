"""Turns system errors and missing packages into errors of this package, with advice."""

from __future__ import annotations

import errno
import os

from ..errors import MachineError, MissingPackageError

__all__ = ["machine_error", "missing_package"]

_ADVICE = {
    errno.ENOSPC: "free some space and run again",
    errno.EDQUOT: "free some of your quota and run again",
    errno.EFBIG: "this file system holds no file that large; name another, or use smaller shards",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose a folder on a writable file system",
    errno.EIO: "check the disk, then run again",
    errno.ENAMETOOLONG: "choose a shorter path",
}


def missing_package(error: ImportError | None, extra: str) -> MissingPackageError:
    """Return the error for a package that an extra of this package would have installed."""
    what = extra if error is None or error.name is None else error.name
    return MissingPackageError(
        f"{what} is not installed; run: pip install 'gptoss_stream[{extra}]'"
    )


def machine_error(error: OSError, doing: str) -> MachineError:
    """Return the error for a failed system call.

    Args:
        error: What the system call raised.
        doing: What was being done, such as "reading /x/y".
    """
    reason = error.strerror or str(error)
    advice = _ADVICE.get(error.errno or 0, "check the disk and the path, then run again")
    name = os.fspath(error.filename) if isinstance(error.filename, (str, os.PathLike)) else ""
    where = f" ({name})" if name and name not in doing else ""
    return MachineError(f"{doing}: {reason}{where}; {advice}")
