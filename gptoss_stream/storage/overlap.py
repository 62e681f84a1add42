"""Refuses an output within its source, and a source within its output."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..errors import OutputError
from .local_folder import LocalFolder
from .location import Location, WritableLocation

__all__ = ["refuse_overlap"]


def refuse_overlap(target: Path | WritableLocation, **read: Iterable[Location]) -> None:
    """Refuse an output that is what it is made of, or of which one is inside the other.

    Args:
        target: The output.
        **read: What it is made of, such as `source`.

    Raises:
        OutputError: If they overlap.
    """
    for what, locations in read.items():
        for location in locations:
            _refuse_one(what, location, target)


def _refuse_one(what: str, source: Location, target: Path | WritableLocation) -> None:
    """Refuse an output that overlaps with one location."""
    one, other = _folder(source), _folder(target)
    if one is None or other is None:
        return
    for inner, outer in ((one, other), (other, one)):
        if any(_is_same(folder, outer) for folder in (inner, *inner.parents)):
            raise OutputError(
                f"{target}: output and {what} ({source}) are the same folder, or one is inside "
                "the other; name another output"
            )


def _folder(location: Location | Path) -> Path | None:
    """Return the path of a local folder, also of one that is named by a URL."""
    path = location.path if isinstance(location, LocalFolder) else location
    if not isinstance(path, Path):
        protocol, _, name = path.identity.partition("://")
        if protocol not in ("file", "local"):
            return None
        path = Path(name)
    # Not Path.resolve: before Python 3.13 a loop of links is a RuntimeError there.
    return Path(os.path.realpath(path))


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one == other or os.path.samefile(one, other)
    except OSError:
        return False
