"""Paths as users write them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import OptionError
from .messages import short_repr

__all__ = ["path_text", "user_path"]


def path_text(path: Any) -> str:
    """Return a path, a URL or the name of a repository as text.

    Raises:
        OptionError: For another type, an empty text, and a text that no path can have.
    """
    text = os.fspath(path) if isinstance(path, (str, os.PathLike)) else None
    if not isinstance(text, str):
        raise OptionError(f"{short_repr(path)} is no path, URL or repository; give one as a text")
    if not text:
        raise OptionError("an empty name of a file or folder; write . for the current folder")
    if "\0" in text:
        raise OptionError(f"{text!r}: a path cannot have a null character")
    return text


def user_path(path: str | os.PathLike[str]) -> Path:
    """Return a path with `~` expanded.

    Raises:
        OptionError: For an unknown `~user`, and for what is no path.
    """
    text = path_text(path)
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise OptionError(f"{text}: {error}") from None
