"""Where an output is written, and the unfinished run that may be there."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._utils.paths import user_path
from ..errors import OutputError
from ..storage.local_folder import LocalFolder
from ..storage.location import WritableLocation
from ..storage.open_location import open_writable_location
from .run_state import RECORD_NAME, RUN_NAME, parse_state

__all__ = ["open_target", "refuse_nested", "unfinished_state"]


def open_target(
    output: str | os.PathLike[str] | WritableLocation,
) -> Path | WritableLocation:
    """Return the folder or the remote location to write to."""
    if isinstance(output, LocalFolder):
        return output.path
    if isinstance(output, WritableLocation):
        return output
    return open_writable_location(output) or user_path(output)


def refuse_nested(target: Path | WritableLocation) -> None:
    """Refuse a folder in another output, which could not be resumed then.

    Raises:
        OutputError: Naming the other output.
    """
    for folder in target.absolute().parents if isinstance(target, Path) else ():
        if any((folder / name).is_file() for name in (RECORD_NAME, RUN_NAME)):
            raise OutputError(
                f"{target}: in the converted output {folder}; name a folder outside it"
            )


def unfinished_state(target: Path | WritableLocation) -> Mapping[str, Any] | None:
    """Return the state of the unfinished run in the output, if there is one."""
    if not isinstance(target, Path):
        from .remote_folder import RemoteFolder

        return RemoteFolder(target).read_unfinished_state()
    try:
        return parse_state((target / RUN_NAME).read_bytes(), str(target / RUN_NAME))
    except (OSError, OutputError):
        return None  # no run, or a damaged one, which is refused when the folder is locked
