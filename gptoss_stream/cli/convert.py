"""The command line: parses, calls the library, prints. Exit codes: 0 done; 1 verify found
differences; 2 bad usage or input; 3 the machine failed; 130 interrupted (143 by SIGTERM).

Nothing heavy is imported before a command runs, so that --help and usage errors come at once.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .._utils.messages import counted, sized
from ..errors import OptionError
from .options import (
    Parser,
    add_conversion_options,
    add_source,
    add_staging,
    add_writing_options,
    open_output,
    open_source,
    parse_selection,
)
from .printing import format_line, print_narrowed, say, warn
from .progress import progress_bar

if TYPE_CHECKING:
    from ..planning.plan import Plan

__all__ = []


def _add_convert(commands: argparse._SubParsersAction[Parser]) -> None:
    convert = commands.add_parser("convert", help="convert a checkpoint")
    add_source(convert)
    convert.add_argument(
        "output",
        metavar="OUTPUT",
        help="folder to write, new, empty or resumed; or s3://bucket/folder, hf://user/name, …",
    )
    convert.add_argument(
        "--download",
        action="store_true",
        help="download SOURCE into the Hub's cache, not stream it",
    )
    add_staging(convert)
    add_conversion_options(convert)
    add_writing_options(convert)
    _add_distributed(convert)
    convert.add_argument(
        "--checksums", action="store_true", help="write SHA256SUMS too, of all files"
    )
    convert.add_argument("--json", action="store_true", help="print a report for programs")
    convert.set_defaults(run=_convert)


def _add_distributed(parser: argparse.ArgumentParser) -> None:
    part = parser.add_argument_group("on several machines, which see SOURCE and OUTPUT alike")
    part.add_argument(
        "--scheduler",
        metavar="ADDRESS",
        help="of a Dask cluster: tcp://host:8786 or its file; local:N for N processes here",
    )
    part.add_argument("--task-index", type=int, metavar="I", help="make the part of task I …")
    part.add_argument("--num-tasks", type=int, metavar="N", help="… of N, counted from 0")
    part.add_argument(
        "--slurm-array", action="store_true", help="take both from the SLURM job array"
    )


def _array_task(arguments: argparse.Namespace) -> tuple[int, int] | None:
    """Which task of how many this is, if it is one of several."""
    if not arguments.slurm_array:
        if (arguments.task_index is None) != (arguments.num_tasks is None):
            raise OptionError("--task-index and --num-tasks go together")
        if arguments.task_index is None:
            return None
        return arguments.task_index, arguments.num_tasks
    if arguments.task_index is not None or arguments.num_tasks is not None:
        raise OptionError("--slurm-array takes index and number of the task by itself")
    found = {
        name: os.environ.get(f"SLURM_ARRAY_TASK_{name}", default)
        for name, default in (("ID", None), ("COUNT", None), ("MIN", "0"), ("STEP", "1"))
    }
    try:
        number, count, least, step = (int(value) for value in found.values() if value is not None)
    except ValueError:
        raise OptionError(
            "--slurm-array: this is not a task of a SLURM array; start it with sbatch --array=0-15"
        ) from None
    index, rest = divmod(number - least, max(1, step))
    if rest or not 0 <= index < count:
        raise OptionError(
            f"--slurm-array: task {number} of {count} is none of an unbroken array; start it with "
            f"sbatch --array=0-{count - 1}, or give --task-index and --num-tasks"
        )
    return index, count


def _refuse_with_scheduler(arguments: argparse.Namespace, task: tuple[int, int] | None) -> None:
    if task is not None:
        raise OptionError("--scheduler starts tasks by itself; leave out those of a batch system")
    for option, value, instead in (
        ("--token", arguments.token, "set HF_TOKEN where the workers run"),
        ("--download", arguments.download, "workers read what they need by themselves"),
    ):
        if value:
            raise OptionError(f"{option} does not go to other machines; {instead}")


def _convert(arguments: argparse.Namespace) -> None:
    from ..conversion import convert
    from ..planning.partition import ArrayTask

    task = _array_task(arguments)
    if arguments.scheduler:
        _refuse_with_scheduler(arguments, task)
    with _dask_client(arguments) as client, progress_bar(arguments.quiet) as (start, advance):
        store = open_output(arguments)
        source = open_source(arguments, store)

        def on_plan(planned: Plan, resumed: int) -> None:
            shards = planned.shards if task is None else ArrayTask(*task).of(planned.shards)
            total = sum(shard.nbytes for shard in shards)
            if not arguments.quiet:
                if planned.info.location is not source:
                    say(f"going on with {planned.info.location}, which the run began to read")
                warn(planned)
                if resumed:
                    say(f"resuming: {sized(resumed)} of {sized(total)} are finished")
            start(total, resumed)

        report = convert(
            source,
            store or arguments.output,
            to=arguments.to,
            source_format=arguments.source_format,
            dtype=arguments.dtype,
            max_shard_size=arguments.max_shard_size,
            selection=parse_selection(arguments),
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            checksums=arguments.checksums,
            staging=arguments.staging,
            max_staged=arguments.max_staged,
            client=client,
            task=task,
            on_plan=on_plan,
            on_bytes=advance,
        )
    if arguments.json:
        print(json.dumps(report.as_dict(), indent=2))
    elif not arguments.quiet:
        print(
            f"{report.output}: {counted(report.tensors, 'tensor')}, {sized(report.bytes_out)} in "
            f"{counted(len(report.shards), 'shard')}, {format_line(report.format, report.dtype)}"
            f"{', a part of the model' if report.partial else ''}"
        )
        print_narrowed(report.narrowed)
        if task is not None:
            state = "all is finished" if report.complete else "others are still to be made"
            print(f"task {task[0]} of {task[1]} is done; {state}")
            return
        written = report.bytes_out - report.bytes_resumed
        if report.bytes_resumed == report.bytes_out:
            print("nothing was left to do")
            return
        read = f"read {sized(report.bytes_in)} and " if written == report.bytes_out else ""
        print(
            f"{read}wrote {sized(written)} in {report.seconds:.1f} s "
            f"({sized(round(written / report.seconds))}/s), peak memory {sized(report.peak_rss)}"
        )


@contextmanager
def _dask_client(arguments: argparse.Namespace) -> Iterator[Any]:
    """The Dask client that was asked for, if any."""
    if not arguments.scheduler:
        yield None
        return
    from ..distributed.dask_client import open_client

    with open_client(arguments.scheduler) as client:
        if not client.nthreads() and not arguments.quiet:
            say(f"waiting for workers of {arguments.scheduler}")
        yield client
