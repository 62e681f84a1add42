"""Opens the readers that fit the locations of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import TypeAlias

from .joined_reader import JoinedReader
from .local_reader import LocalReader
from .metadata import CheckpointInfo
from .reader import Reader
from .remote_reader import RemoteReader

__all__ = ["CheckpointReader", "open_reader", "open_readers"]

CheckpointReader: TypeAlias = "LocalReader | RemoteReader"


def open_reader(info: CheckpointInfo, ahead: int = 0) -> AbstractContextManager[CheckpointReader]:
    """Return the reader of a checkpoint: a `LocalReader` or a `RemoteReader`.

    Args:
        info: The checkpoint.
        ahead: How many steps the system reads ahead in a local checkpoint (see `LocalReader`). A
            remote checkpoint is always read ahead.
    """
    return LocalReader(info, ahead) if info.location.is_local else RemoteReader(info)


@contextmanager
def open_readers(
    source: CheckpointInfo, reference: CheckpointInfo | None, ahead: int = 0
) -> Iterator[Reader]:
    """Open a reader of a source and of a reference, if there is one.

    Args:
        source: The source, number 0 in `RawTensor.checkpoint`.
        reference: The reference, number 1.
        ahead: See `open_reader`.
    """
    with open_reader(source, ahead) as reader:
        if reference is None:
            yield reader
            return
        with open_reader(reference, ahead) as reference_reader:
            yield JoinedReader((reader, reference_reader))
