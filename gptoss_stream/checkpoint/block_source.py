"""Gets blocks of a checkpoint's shards from where they are: the cache on disk, or the location.

A file is divided into blocks of a fixed size; the last one is shorter.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias

from .._utils.buffers import releasable_memory
from ..storage.block_cache import BlockCache, block_key
from .metadata import CheckpointInfo
from .open_files import OpenFiles

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Block", "BlockSource"]

Block: TypeAlias = "np.ndarray[tuple[int], np.dtype[np.uint8]]"


class BlockSource:
    """Where blocks come from, from any thread.

    Args:
        info: The checkpoint.
        block_nbytes: The size of a block.
        cache: Blocks on disk, if there is such a cache.
    """

    def __init__(self, info: CheckpointInfo, block_nbytes: int, cache: BlockCache | None) -> None:
        self._info = info
        self._shards = {shard.name: shard for shard in info.shards}
        self._files = OpenFiles(info)
        self._block_nbytes = block_nbytes
        self._cache = cache
        self._dividing = threading.Lock()

    def close(self) -> None:
        """Close all files."""
        self._files.close()

    def check_unchanged(self) -> None:
        """Check that no file has changed since it was opened (see `Reader.check_unchanged`)."""
        self._files.check_unchanged()

    def nbytes(self, shard: str, numbers: range) -> int:
        """Return the size of neighbouring blocks."""
        begin = numbers.start * self._block_nbytes
        return min(numbers.stop * self._block_nbytes, self._shards[shard].nbytes) - begin

    def get(
        self, shard: str, numbers: range, stop: threading.Event
    ) -> tuple[dict[int, Block], list[int]]:
        """Read neighbouring blocks; those that are not in the cache with as few requests as can be.

        Args:
            shard: The file.
            numbers: The numbers of the blocks in it.
            stop: Ends the read with an error when it is set.

        Returns:
            The blocks by number, and the numbers of those that can be put in the cache.

        Raises:
            CheckpointError: If the file has changed since its header was read.
            MachineError: If reading fails.
        """
        blocks = dict(self._cached(shard, numbers))
        new: list[int] = []
        for run in _runs(number for number in numbers if number not in blocks):
            memory = releasable_memory(self.nbytes(shard, run))
            file = self._files.file(shard)
            if file.read_into(memory.data, run.start * self._block_nbytes, stop):
                new += run
            if len(run) == 1:
                blocks[run.start] = memory
                continue
            # Each block has memory of its own, so that it is freed when that block is dropped. One
            # thread at a time, since this takes the memory twice.
            with self._dividing:
                for number in run:
                    begin = (number - run.start) * self._block_nbytes
                    block = releasable_memory(self.nbytes(shard, range(number, number + 1)))
                    block[:] = memory[begin : begin + len(block)]
                    blocks[number] = block
                del memory
        return blocks, new

    def put_in_cache(self, shard: str, blocks: Mapping[int, Block]) -> None:
        """Write blocks to the cache, if there is one and the location identifies them."""
        for number, block in blocks.items():
            key = self._key(shard, number)
            if self._cache is not None and key is not None:
                self._cache.put(key, block.data)

    def _cached(self, shard: str, numbers: range) -> Iterator[tuple[int, Block]]:
        """Yield the blocks that are in the cache."""
        import numpy as np

        for number in numbers:
            key = self._key(shard, number)
            if self._cache is not None and key is not None:
                data = self._cache.get(key, self.nbytes(shard, range(number, number + 1)))
                if data is not None:
                    yield number, np.frombuffer(data, np.uint8)

    def _key(self, shard: str, number: int) -> str | None:
        """Return what identifies a block in the cache."""
        nbytes = self.nbytes(shard, range(number, number + 1))
        begin = number * self._block_nbytes
        return block_key(self._info.location, self._shards[shard], begin, nbytes)


def _runs(numbers: Iterable[int]) -> list[range]:
    """Return increasing numbers as ranges of neighbours."""
    runs: list[range] = []
    for number in numbers:
        if runs and runs[-1].stop == number:
            runs[-1] = range(runs[-1].start, number + 1)
        else:
            runs.append(range(number, number + 1))
    return runs
