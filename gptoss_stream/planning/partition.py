"""Which shards one task of several makes, where a batch system starts them side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import OptionError
from .shards import PlannedShard, write_nbytes

__all__ = ["ArrayTask"]


_MOST = 10_000


@dataclass(frozen=True, slots=True)
class ArrayTask:
    """The part of task `index` of `count`, counted from 0; raises `OptionError` for none such."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.count <= _MOST:
            raise OptionError(f"{self.count} tasks: there must be 1 to {_MOST}")
        if not 0 <= self.index < self.count:
            raise OptionError(
                f"task {self.index} of {self.count}: tasks are numbered 0 to {self.count - 1}"
            )

    def __str__(self) -> str:
        return f"task {self.index} of {self.count}"

    @property
    def tag(self) -> str:
        """What names of files say for it."""
        return f"task-{self.index}-of-{self.count}"

    def select(self, shards: Sequence[PlannedShard]) -> list[PlannedShard]:
        """The shards of this task, in order: the costliest first, each to the task that has least
        to do, so that all end at about the same time."""
        loads = [0] * self.count
        mine = set()
        for shard in sorted(shards, key=write_nbytes, reverse=True):
            task = loads.index(min(loads))
            loads[task] += write_nbytes(shard)
            if task == self.index:
                mine.add(shard.name)
        return [shard for shard in shards if shard.name in mine]
