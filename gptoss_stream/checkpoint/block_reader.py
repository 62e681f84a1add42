"""Reads the tensor data of a remote checkpoint in any order, without a schedule."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from math import prod
from typing import TYPE_CHECKING, Any

from .._utils.forks import begin_again_after_fork
from ..storage.block_cache import BlockCache
from ..tensors.raw_tensor import RawTensor
from .block_fetcher import BlockFetcher
from .metadata import CheckpointInfo
from .reader import ElementRange, Reader
from .remote_reader import BUDGET_NBYTES

if TYPE_CHECKING:
    import numpy as np

__all__ = ["BLOCK_NBYTES", "BlockReader"]

BLOCK_NBYTES = 1 << 20


class BlockReader(Reader):
    """A `Reader` of a remote checkpoint that needs no schedule; a context manager.

    It keeps the blocks that were read last in memory, and in the cache on disk if there is one.
    Methods raise `CheckpointError` if a file has changed since its header was read, and
    `MachineError` if reading fails; the next read tries again. After a fork, the child begins with
    no blocks in memory.

    Args:
        info: The checkpoint.
        budget_nbytes: Memory for blocks, in bytes.
        block_nbytes: The bytes of a block.
        cache: Blocks on disk, which processes may share.
    """

    def __init__(
        self,
        info: CheckpointInfo,
        budget_nbytes: int = BUDGET_NBYTES,
        block_nbytes: int = BLOCK_NBYTES,
        cache: BlockCache | None = None,
    ) -> None:
        self.info = info
        self._blocks = BlockFetcher(info, budget_nbytes, block_nbytes, cache)
        begin_again_after_fork(self)

    def __enter__(self) -> BlockReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._blocks.close()

    def begin_again(self) -> None:
        """Forget all blocks, files, threads and locks, as a forked child must."""
        self._blocks.begin_again()

    @contextmanager
    def read(
        self, tensor: RawTensor, first: int, shape: tuple[int, ...]
    ) -> Iterator[np.ndarray[Any, Any]]:
        """Read elements of a tensor (see `Reader.read`)."""
        import numpy as np

        from ..tensors.cast import STORAGE

        itemsize = tensor.dtype.itemsize
        memory = np.empty(prod(shape) * itemsize, np.uint8)
        self._blocks.read_into(memory.data, tensor.shard, tensor.offset + first * itemsize)
        array = memory.view(STORAGE[tensor.dtype]).reshape(shape)
        array.flags.writeable = False
        yield array

    def prefetch(self, ranges: Iterable[ElementRange]) -> AbstractContextManager[object]:
        """Begin to fetch what will be read soon, as far as there is memory for it.

        Neighbouring blocks are fetched together, with few requests. More of them are fetched as
        those before are read.

        Args:
            ranges: What will be read, in this order.

        Returns:
            A context manager, at whose end what has not been fetched yet is given up. It need not
            be used as one, if all is read.
        """
        return self._blocks.prefetch((one.raw.shard, *one.byte_range) for one in ranges)

    def forget(self, ranges: Iterable[ElementRange]) -> None:
        """Do nothing: the memory is bounded, and what was read last stays longest."""

    def check_unchanged(self) -> None:
        """Check that no file has changed since it was opened (see `Reader.check_unchanged`)."""
        self._blocks.check_unchanged()
