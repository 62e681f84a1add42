"""Array tasks: each of several runs of one command writes its part of the shards.

A batch system such as SLURM starts them side by side, with a number for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .._utils.arguments import whole_number
from .._utils.messages import short_repr
from ..errors import OptionError
from .shards import PlannedShard, write_nbytes

__all__ = ["ArrayTask"]

_MAX_TASKS = 10_000


@dataclass(frozen=True, slots=True)
class ArrayTask:
    """One of several array tasks that write an output together.

    Args:
        index: The task's number, from 0.
        count: The number of tasks.

    Raises:
        OptionError: If there is no such task.
    """

    index: int
    count: int

    def __post_init__(self) -> None:
        for name in ("index", "count"):
            object.__setattr__(self, name, whole_number(getattr(self, name), f"task {name}"))
        if not 1 <= self.count <= _MAX_TASKS:
            raise OptionError(f"{self.count} tasks: there must be 1 to {_MAX_TASKS}")
        if not 0 <= self.index < self.count:
            raise OptionError(
                f"task {self.index} of {self.count}: tasks are numbered 0 to {self.count - 1}"
            )

    @classmethod
    def of(cls, task: Any) -> ArrayTask | None:
        """Return the task of a pair (index, count); None for none. Raises as the class does."""
        if task is None:
            return None
        if not isinstance(task, Sequence) or len(task) != 2:
            raise OptionError(f"task {short_repr(task)}: it must be a pair (index, count)")
        return cls(*task)

    def __str__(self) -> str:
        return f"task {self.index} of {self.count}"

    @property
    def tag(self) -> str:
        """The task in file names."""
        return f"task-{self.index}-of-{self.count}"

    def select(self, shards: Sequence[PlannedShard]) -> list[PlannedShard]:
        """Return the shards that this task writes, in their order.

        Shards are assigned from the largest to the smallest, each to the task with the fewest
        bytes so far, so that all tasks end at about the same time.
        """
        nbytes = [0] * self.count  # of each task
        selected = set()
        for shard in sorted(shards, key=write_nbytes, reverse=True):
            task = nbytes.index(min(nbytes))
            nbytes[task] += write_nbytes(shard)
            if task == self.index:
                selected.add(shard.name)
        return [shard for shard in shards if shard.name in selected]
