"""The command `convert`: convert a checkpoint to another format."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .._utils.messages import counted, sized
from ._adapter_options import add_adapters, open_adapters
from ._distributed_options import add_distributed_options, array_task, dask_client
from ._options import (
    add_conversion_options,
    add_json,
    add_overwrite,
    add_quiet,
    add_remote_output,
    add_remote_source,
    add_selection,
    add_source,
    add_workers,
    open_output,
    open_reference,
    open_source,
    parse_selection,
)
from ._parser import Commands
from ._printing import (
    describe_format,
    print_encoding,
    print_json,
    print_message,
    print_narrowed,
    print_platform_note,
    print_warnings,
)
from ._progress import progress_bar
from ._pruning_options import add_pruning, parse_keep_experts

if TYPE_CHECKING:
    from ..planning.plan import Plan
    from ..writing.output_spec import Resumption
    from ..writing.report import Report

__all__ = ["add_parser", "run"]


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "convert",
        help="convert a checkpoint to another format",
        description="Convert a checkpoint to another format. To resume an interrupted conversion, "
        "run the same command again.",
    )
    add_source(parser)
    parser.add_argument(
        "output",
        metavar="OUTPUT",
        help="folder to write (new, empty, or unfinished to resume), or a URL such as "
        "s3://bucket/folder or hf://user/name",
    )
    add_conversion_options(parser)
    add_workers(parser)
    add_overwrite(parser)
    parser.add_argument(
        "--checksums",
        action="store_true",
        help="also write SHA256SUMS, the checksums of all files",
    )
    add_quiet(parser)
    add_json(parser)
    add_selection(parser)
    add_adapters(parser)
    add_pruning(parser)
    add_remote_source(parser, can_download=True)
    add_remote_output(parser)
    add_distributed_options(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    print_platform_note(arguments)
    task = array_task(arguments)
    report = _convert(arguments, task)
    if arguments.json:
        print_json(report.as_dict())
    elif not arguments.quiet:
        _print_report(report, task)
    return 0


def _convert(arguments: argparse.Namespace, task: tuple[int, int] | None) -> Report:
    """Convert SOURCE to OUTPUT and print messages on the way."""
    from ..conversion import convert, join_array

    with (
        dask_client(arguments, task) as client,
        progress_bar(arguments.quiet) as (start_bar, on_progress),
    ):
        output = open_output(arguments)
        if task is not None:
            join_array(output or arguments.output)
        source = open_source(arguments, is_token_for_other=output is not None)

        def on_plan(plan: Plan) -> None:
            if arguments.quiet:
                return
            if plan.info.location is not source:
                print_message(
                    f"reading {plan.info.location}, the commit recorded by the unfinished run"
                )
            print_warnings(plan)

        def on_resume(found: Resumption) -> None:
            if not arguments.quiet:
                print_message(_describe_resumption(found))

        return convert(
            source,
            output or arguments.output,
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
            mxfp4_rule=arguments.mxfp4_rule,
            reference=open_reference(arguments),
            keep_layers=arguments.keep_layers,
            keep_experts=parse_keep_experts(arguments),
            adapters=open_adapters(arguments),
            merge_like_peft=bool(arguments.merge_like_peft),
            on_plan=on_plan,
            on_resume=on_resume,
            on_start=start_bar,
            on_progress=on_progress,
        )


def _describe_resumption(found: Resumption) -> str:
    """Return in words what an interrupted run has written, and what of it is made again."""
    parts = f", and {sized(found.written_nbytes)} of others written" if found.written_nbytes else ""
    lost = f"; {sized(found.lost_nbytes)} are made again" if found.lost_nbytes else ""
    return (
        f"resuming: {found.finished_shards} of {counted(found.total_shards, 'shard')} "
        f"({sized(found.finished_nbytes)}) are finished{parts}{lost}"
    )


def _print_report(report: Report, task: tuple[int, int] | None) -> None:
    """Print what the conversion, or one array task of it, did."""
    print(
        f"{report.output}: {counted(report.tensors, 'tensor')}, {sized(report.bytes_out)} in "
        f"{counted(len(report.shards), 'shard')}, {describe_format(report.format, report.dtype)}"
        f"{', part of the model' if report.partial else ''}"
    )
    for adapter in report.adapters:
        print(f"merged {adapter['adapter']}, scale {adapter['scale']:g}")
    print_narrowed(report.narrowed)
    if report.mxfp4 is not None:
        print_encoding(report.mxfp4)
    written = report.bytes_out - report.bytes_resumed
    if task is not None:
        state = "the output is complete" if report.complete else "other tasks are not finished yet"
        print(f"task {task[0]} of {task[1]} is done; {state}")
    elif not written:
        print("nothing to do: all shards were already written")
    else:
        # How much of the source an earlier run has read is not known.
        read = "" if report.bytes_resumed else f"read {sized(report.bytes_in)} and "
        print(
            f"{read}wrote {sized(written)} in {report.seconds:.1f} s "
            f"({sized(round(written / report.seconds))}/s), peak memory {sized(report.peak_rss)}"
        )
