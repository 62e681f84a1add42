"""Reading a checkpoint that is far away: each block once, ahead of its use, in bounded memory.

The blocks (`blocks`) are fetched in the order in which they are needed, several at a time, as long
as there is room; what is needed at once is fetched even where there is none. Memory is thus the
room, or what the plan needs at the same time where that is more.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, TypeAlias

from .metadata import CheckpointInfo
from .reader import LocalReader
from .remote_reader import RemoteReader

if TYPE_CHECKING:
    pass

__all__ = ["CheckpointReader", "open_reader"]


CheckpointReader: TypeAlias = "LocalReader | RemoteReader"
"""Both read alike."""


def open_reader(info: CheckpointInfo, ahead: int = 0) -> AbstractContextManager[CheckpointReader]:
    """A described checkpoint for reading, wherever it is; `ahead` as in `Checkpoint`."""
    return LocalReader(info, ahead) if info.location.is_local else RemoteReader(info)
