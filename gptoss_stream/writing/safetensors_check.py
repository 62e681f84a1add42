"""Checks shards with the reader of the `safetensors` package, independent of our own code.

Only headers are read, and by system calls: with a memory map, a page that the disk cannot read
would kill the process.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from pathlib import Path

from ..tensors.dtypes import DType

__all__ = ["find_problem"]


def find_problem(file: Path, tensors: Iterable[tuple[str, DType, tuple[int, ...]]]) -> str | None:
    """Compare what `safetensors` reads in a file's header with what should be in it.

    Args:
        file: A safetensors file.
        tensors: Name, dtype and shape of each tensor.

    Returns:
        The first problem or difference that `safetensors` finds, or None.

    Raises:
        OSError: If reading fails.
    """
    from safetensors import SafetensorError, safe_open

    expected = list(tensors)
    try:
        with safe_open(file, "np", backend="pread") as opened:
            names = set(opened.keys())
            if names != {name for name, _, _ in expected}:
                return f"it sees {len(names)} tensors, not the {len(expected)} that are in it"
            for name, dtype, shape in expected:
                found = opened.get_slice(name)
                if (found.get_dtype(), tuple(found.get_shape())) != (dtype.code, shape):
                    seen = f"{found.get_dtype()} {found.get_shape()}"
                    return f"it sees {name!r} as {seen}, not {dtype} {list(shape)}"
    except SafetensorError as error:
        return str(error)
    except FileNotFoundError:  # safetensors raises this whenever it cannot open a file
        with open(file, "rb"):
            raise OSError(errno.EIO, "safetensors cannot open it", str(file)) from None
    return None
