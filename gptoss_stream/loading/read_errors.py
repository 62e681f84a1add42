"""Errors for outputs that cannot be read."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .._utils.failures import machine_error
from ..errors import CheckpointError, OutputError

__all__ = ["translate_read_errors"]


@contextmanager
def translate_read_errors(path: Path) -> Iterator[None]:
    """Raise the errors of reading a file as public errors about an output.

    Outputs are read with the functions that read checkpoints, whose errors are about a source.

    Args:
        path: What is read, for the message.

    Raises:
        OutputError: For a `CheckpointError`.
        MachineError: For an `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise machine_error(error, f"reading {path}") from error
    except CheckpointError as error:
        raise OutputError(f"{error}; run verify, or convert again") from None
