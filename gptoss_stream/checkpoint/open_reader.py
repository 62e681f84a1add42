"""Opens the reader that fits a checkpoint's location."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TypeAlias

from .local_reader import LocalReader
from .metadata import CheckpointInfo
from .remote_reader import RemoteReader

__all__ = ["CheckpointReader", "open_reader"]

CheckpointReader: TypeAlias = "LocalReader | RemoteReader"


def open_reader(info: CheckpointInfo, ahead: int = 0) -> AbstractContextManager[CheckpointReader]:
    """Return the reader of a checkpoint: a `LocalReader` or a `RemoteReader`.

    Args:
        info: The checkpoint.
        ahead: How many steps the system reads ahead in a local checkpoint (see `LocalReader`). A
            remote checkpoint is always read ahead.
    """
    return LocalReader(info, ahead) if info.location.is_local else RemoteReader(info)
