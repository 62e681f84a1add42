"""Opens the readers that fit the locations of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from .._utils.temporary_file import scratch_folder
from ..errors import GptOssStreamError
from ..storage.block_cache import BlockCache
from ..storage.local_folder import LocalFile
from ..tensors.dtypes import DType
from .block_reader import BlockReader
from .disk_reader import BUDGET_NBYTES, DiskReader
from .joined_reader import JoinedReader
from .local_reader import LocalReader
from .metadata import CheckpointInfo
from .open_files import OpenFiles
from .reader import RandomAccessReader, Reader
from .regrouping_reader import RegroupingReader
from .remote_reader import RemoteReader

__all__ = [
    "CheckpointReader",
    "RandomAccess",
    "open_random_access",
    "open_reader",
    "open_readers",
]

CheckpointReader: TypeAlias = "LocalReader | DiskReader | RemoteReader"


def open_reader(info: CheckpointInfo, ahead: int = 0) -> AbstractContextManager[CheckpointReader]:
    """Return the reader of a checkpoint.

    Args:
        info: The checkpoint.
        ahead: How many steps the system reads ahead in a local checkpoint (see `LocalReader`). One
            that is remote or on a cold disk is always read ahead, within less memory if this is 0.
    """
    if not info.location.is_local:
        return RemoteReader(info)
    if _is_on_cold_disk(info):
        return DiskReader(info, _budget_nbytes(info, ahead))
    return LocalReader(info, ahead)


def _budget_nbytes(info: CheckpointInfo, ahead: int) -> int:
    """Return the memory for blocks of a checkpoint on a cold disk, in bytes.

    The default has several experts in MXFP4, but of floats only one. While that one is transposed
    or encoded, the next one is read too.
    """
    has_mxfp4 = any(tensor.dtype is DType.U8 for tensor in info.tensors.values())
    return BUDGET_NBYTES * 2 if ahead and not has_mxfp4 else BUDGET_NBYTES


def _is_on_cold_disk(info: CheckpointInfo) -> bool:
    """Return whether all shards are on disks and not in the page cache."""
    files = OpenFiles(info)
    try:
        opened = [files.file(shard.name) for shard in info.shards]
        return all(isinstance(file, LocalFile) and file.is_on_cold_disk() for file in opened)
    except GptOssStreamError:  # perhaps of a shard that is not needed
        return False
    finally:
        files.close()


@contextmanager
def open_readers(
    source: CheckpointInfo,
    reference: CheckpointInfo | None,
    adapters: Sequence[CheckpointInfo],
    scratch: Path,
    ahead: int = 0,
) -> Iterator[Reader]:
    """Open a reader of a source, of a reference and of adapters, as far as there are any.

    Args:
        source: The source, number 0 in `RawTensor.checkpoint`.
        reference: The reference, number 1.
        adapters: The adapters, numbers from 2 on.
        scratch: Where temporary files for adapters are created (see `scratch_folder`).
        ahead: See `open_reader`.
    """
    with ExitStack() as stack:
        readers: dict[int, Reader] = {0: stack.enter_context(open_reader(source, ahead))}
        if reference is not None:
            readers[1] = stack.enter_context(open_reader(reference, ahead))
        if adapters:
            stack.enter_context(_one_blas_thread())
        yield _joined(readers, adapters, scratch, stack)


@dataclass(frozen=True, slots=True)
class RandomAccess:
    """Readers that read in any order."""

    source: RandomAccessReader
    """Of the source alone, which can be told what will be read soon."""
    every: Reader
    """Of the source and the adapters."""


@contextmanager
def open_random_access(
    source: CheckpointInfo,
    adapters: Sequence[CheckpointInfo],
    scratch: Path,
    cache: BlockCache | None = None,
) -> Iterator[RandomAccess]:
    """Open readers of a source and of adapters that read in any order, without a schedule.

    Args:
        source: The source, number 0 in `RawTensor.checkpoint`.
        adapters: The adapters, numbers from 2 on.
        scratch: Where temporary files for adapters are created (see `scratch_folder`).
        cache: Keeps blocks of a remote source on the disk; None to keep some in memory only.
    """
    with ExitStack() as stack:
        reader: RandomAccessReader
        if source.location.is_local:
            reader = stack.enter_context(LocalReader(source))
        else:
            reader = stack.enter_context(BlockReader(source, cache=cache))
        readers: dict[int, Reader] = {0: reader}
        yield RandomAccess(reader, _joined(readers, adapters, scratch, stack))


def _joined(
    readers: dict[int, Reader],
    adapters: Sequence[CheckpointInfo],
    scratch: Path,
    stack: ExitStack,
) -> Reader:
    """Return one reader of checkpoints and of adapters, which are opened."""
    for number, adapter in enumerate(adapters, 2):
        readers[number] = stack.enter_context(RegroupingReader(adapter, scratch_folder(scratch)))
    return readers[0] if len(readers) == 1 else JoinedReader(readers)


def _one_blas_thread() -> AbstractContextManager[object]:
    """Return a context in which a matrix product takes one thread: the threads here are many."""
    from threadpoolctl import threadpool_limits

    limits: AbstractContextManager[object] = threadpool_limits(1, "blas")
    return limits
