"""Reads an adapter: small pieces in any order, and tensors regrouped by expert.

An expert's columns of a tensor whose columns alternate between experts touch every page of it (47
MB with rank 16 and the 128 experts of gpt-oss-120b, in float32). Such a tensor is read once, some
rows at a time, and written to a temporary file expert by expert. The file is kept while the tensor
is among the last ones that were used. So memory does not grow with the rank or the experts.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._utils.temporary_file import TemporaryFile, unnamed_file
from ..storage.location import NEVER_STOP
from ..tensors.raw_tensor import RawTensor, RegroupedTensor
from .auxiliary_files import CopiedFile
from .metadata import CheckpointInfo
from .open_files import OpenFiles
from .reader import ReadSchedule

if TYPE_CHECKING:
    import numpy as np

__all__ = ["KEPT_TENSORS", "RegroupingReader"]

KEPT_TENSORS = 4
"""Regrouped tensors on the disk: of two layers, for gate and up and for down."""
_TILE_NBYTES = 1 << 20


class _Regrouped:
    """A regrouped tensor in a temporary file, and how many threads are reading it."""

    def __init__(self, file: TemporaryFile) -> None:
        self.file = file
        self.users = 0


class RegroupingReader:
    """A `Reader` of an adapter; a context manager. It needs no schedule.

    A remote adapter is copied to a temporary file first: its pieces are small and read often.

    Args:
        info: The adapter.
        folder: Where temporary files are created.
    """

    def __init__(self, info: CheckpointInfo, folder: Path) -> None:
        self.info = info
        self._folder = folder
        self._files = OpenFiles(info)
        self._copies: dict[str, TemporaryFile] = {}
        self._regrouped: OrderedDict[RegroupedTensor, _Regrouped] = OrderedDict()
        self._lock = threading.Lock()

    def __enter__(self) -> RegroupingReader:
        if not self.info.location.is_local:
            for shard in self.info.shards:
                self._copy(shard.name)
        return self

    def __exit__(self, *exception: object) -> None:
        self._files.close()
        for copy in self._copies.values():
            copy.close()
        for regrouped in self._regrouped.values():
            regrouped.file.close()

    def _copy(self, name: str) -> None:
        """Copy a file to a temporary file."""
        import numpy as np

        copy = self._copies[name] = unnamed_file(self._folder)
        offset = 0
        for chunk in CopiedFile(self.info.location, name).chunks():
            copy.write(np.frombuffer(chunk, np.uint8), offset)
            offset += len(chunk)

    @contextmanager
    def read(
        self, tensor: RawTensor, first: int, shape: tuple[int, ...]
    ) -> Iterator[np.ndarray[Any, Any]]:
        """Read elements of a tensor (see `Reader.read`), or of one that is regrouped."""
        import numpy as np

        from ..tensors.cast import STORAGE

        array = np.empty(shape, STORAGE[tensor.dtype])
        view, offset = array.reshape(-1).view(np.uint8).data, first * tensor.dtype.itemsize
        if isinstance(tensor, RegroupedTensor):
            regrouped = self._use(tensor)
            try:
                regrouped.file.read([view], offset)
            finally:
                self._release(regrouped)
        elif tensor.shard in self._copies:
            self._copies[tensor.shard].read([view], tensor.offset + offset)
        else:
            file = self._files.file(tensor.shard)
            file.read_into(view, tensor.offset + offset, NEVER_STOP)
        yield array

    def _use(self, tensor: RegroupedTensor) -> _Regrouped:
        """Return a regrouped tensor, which is regrouped if it is not; other threads wait."""
        with self._lock:
            if tensor not in self._regrouped:
                self._regrouped[tensor] = _Regrouped(self._regroup(tensor))
            found = self._regrouped[tensor]
            found.users += 1
            self._regrouped.move_to_end(tensor)
            self._drop_oldest()
            return found

    def _release(self, regrouped: _Regrouped) -> None:
        with self._lock:
            regrouped.users -= 1

    def _drop_oldest(self) -> None:
        """Delete the files that were used longest ago, but none that is being read."""
        for tensor in list(self._regrouped)[:-KEPT_TENSORS]:
            if not self._regrouped[tensor].users:
                self._regrouped.pop(tensor).file.close()

    def _regroup(self, tensor: RegroupedTensor) -> TemporaryFile:
        """Write a tensor to a temporary file, group by group."""
        import numpy as np

        groups, num_rows, width = tensor.shape
        stored = RawTensor(
            tensor.name, tensor.dtype, (num_rows, groups * width), tensor.shard, tensor.offset
        )
        row_nbytes = prod(stored.shape[1:]) * stored.dtype.itemsize
        step = max(1, _TILE_NBYTES // max(1, row_nbytes))
        file = unnamed_file(self._folder)
        try:
            for begin in range(0, num_rows, step):
                count = min(step, num_rows - begin)
                with self.read(stored, begin * groups * width, (count, groups * width)) as rows:
                    if tensor.is_group_fastest:
                        by_group = rows.reshape(count, width, groups).transpose(2, 0, 1)
                    else:
                        by_group = rows.reshape(count, groups, width).transpose(1, 0, 2)
                    for group, part in enumerate(np.ascontiguousarray(by_group)):
                        offset = (group * num_rows + begin) * width * tensor.dtype.itemsize
                        file.write(part, offset)
        except BaseException:
            file.close()
            raise
        return file

    def set_schedule(self, schedule: ReadSchedule, stop: threading.Event) -> None:
        """Do nothing: what is read is small."""

    def begin_step(self, step: int) -> None:
        """Do nothing."""

    def end_step(self, step: int) -> None:
        """Do nothing."""

    def check_unchanged(self) -> None:
        """Check that no file has changed since it was opened (see `Reader.check_unchanged`)."""
        self._files.check_unchanged()
