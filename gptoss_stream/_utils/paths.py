"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import OptionError

__all__ = ["user_path"]


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with `~` expanded.

    Raises:
        OptionError: For an unknown `~user`.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise OptionError(f"{os.fspath(path)}: {error}") from None
