"""Options that distribute a conversion over machines: array tasks and Dask clusters."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import OptionError
from ._command import Arguments, Decorator, OptionGroup, combined, option
from ._printing import print_message

__all__ = ["array_task", "dask_client", "distributed_options"]

_GROUP = OptionGroup(
    "Distributed", "All machines must have access to SOURCE and OUTPUT under the same names."
)

distributed_options: Decorator = combined(
    (
        option(
            "--scheduler",
            metavar="ADDRESS",
            group=_GROUP,
            help="convert on a Dask cluster: tcp://host:8786, a scheduler file, or local:N for N "
            "processes on this machine",
        ),
        option(
            "--task-index",
            type=int,
            metavar="I",
            group=_GROUP,
            help="convert only the shards of array task I, counted from 0",
        ),
        option("--num-tasks", type=int, metavar="N", group=_GROUP, help="number of array tasks"),
        option(
            "--slurm-array",
            is_flag=True,
            group=_GROUP,
            help="take task index and number of tasks from the SLURM job array",
        ),
    )
)


def array_task(arguments: Arguments) -> tuple[int, int] | None:
    """Return the array task, as index and number of tasks, or None without one.

    Raises:
        OptionError: If the options contradict each other, or the SLURM variables are not those
            of a contiguous array.
    """
    given = arguments.task_index, arguments.num_tasks
    if arguments.slurm_array:
        if given != (None, None):
            raise OptionError("--slurm-array sets the task; leave out --task-index and --num-tasks")
        return _slurm_array_task()
    if (arguments.task_index is None) != (arguments.num_tasks is None):
        raise OptionError("--task-index and --num-tasks must be given together")
    return None if arguments.task_index is None else given


def _slurm_array_task() -> tuple[int, int]:
    """Return index and number of tasks from the environment variables of a SLURM job array.

    Source: sbatch's manual, "Job Array Support". An array such as 10-14:2 has the task IDs 10, 12
    and 14.
    """
    found = {
        name: os.environ.get(f"SLURM_ARRAY_TASK_{name}", default)
        for name, default in (("ID", None), ("COUNT", None), ("MIN", "0"), ("STEP", "1"))
    }
    try:
        task_id, count, least, step = (int(value) for value in found.values() if value is not None)
    except ValueError:
        raise OptionError(
            "--slurm-array: this is not a task of a SLURM array; start it with sbatch --array=0-15"
        ) from None
    index, remainder = divmod(task_id - least, max(1, step))
    if remainder or not 0 <= index < count:
        raise OptionError(
            f"--slurm-array: task {task_id} is not in a contiguous array of {count} tasks; start "
            f"it with sbatch --array=0-{count - 1}, or give --task-index and --num-tasks"
        )
    return index, count


@contextmanager
def dask_client(arguments: Arguments, task: tuple[int, int] | None) -> Iterator[Any]:
    """Yield a client of the Dask cluster of `--scheduler`, or None without that option.

    Raises:
        OptionError: If another option cannot be used with a cluster.
        MachineError: If the scheduler cannot be reached.
        MissingPackageError: If Dask is not installed.
    """
    if not arguments.scheduler:
        yield None
        return
    _refuse_with_scheduler(arguments, task)
    from ..distributed.dask_client import open_client

    with open_client(arguments.scheduler) as client:
        if not client.nthreads() and not arguments.quiet:
            print_message(f"waiting for workers of {arguments.scheduler}")
        yield client


def _refuse_with_scheduler(arguments: Arguments, task: tuple[int, int] | None) -> None:
    """Refuse options that do not work with `--scheduler`."""
    if task is not None:
        raise OptionError("--scheduler distributes the shards itself; leave out the array task")
    for name, value, advice in (
        ("--token", arguments.token, "set HF_TOKEN in the workers' environment"),
        ("--download", arguments.download, "each worker reads what it needs"),
    ):
        if value:
            raise OptionError(f"{name} is not sent to workers; {advice}")
