"""The command `convert`: convert a checkpoint to another format."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

from .._utils.messages import counted, sized
from ._adapter_options import adapter_options, named_adapters, open_adapters
from ._command import Arguments, command, option
from ._conversion_arguments import conversion_arguments, refuse_swapped
from ._distributed_options import array_task, dask_client, distributed_options
from ._locations import open_output, open_reference, open_source
from ._options import (
    conversion_options,
    json_option,
    output_argument,
    overwrite_option,
    quiet_option,
    remote_output_options,
    remote_source_options,
    required_output,
    selection_options,
    source_argument,
    workers_option,
)
from ._printing import (
    describe_format,
    print_encoding,
    print_json,
    print_message,
    print_narrowed,
    print_platform_note,
    print_warnings,
)
from ._progress import progress_option, show_progress
from ._pruning_options import pruning_options

if TYPE_CHECKING:
    from ..planning.plan import Plan
    from ..writing.output_spec import Resumption
    from ..writing.report import Report

__all__ = ["convert"]


@command(
    "convert",
    short_help="convert a checkpoint to another format",
    description="Convert a checkpoint to another format. To resume an interrupted conversion, run "
    "the same command again.",
    examples=(
        "openai/gpt-oss-20b gpt-oss-20b-tl",
        "gpt-oss-20b gpt-oss-20b-hf --to hf --dtype bfloat16",
        "gpt-oss-20b part --layers 0-2,-1 --only attention,router",
        "gpt-oss-20b merged --to hf-mxfp4 --adapter my-adapter",
    ),
)
@source_argument()
@output_argument(
    "folder to write (new, empty, or unfinished to resume), or a URL such as s3://bucket/folder or "
    "hf://user/name",
    "OUTPUT",
)
@conversion_options
@workers_option
@overwrite_option
@option(
    "--checksums",
    is_flag=True,
    help="also write SHA256SUMS, the checksums of all files",
)
@json_option
@progress_option
@quiet_option()
@selection_options()
@adapter_options
@pruning_options
@remote_source_options(can_download=True)
@remote_output_options
@distributed_options
def convert(arguments: Arguments) -> int:
    """Run the command; return the exit code."""
    arguments.output = required_output(arguments)
    print_platform_note(quiet=arguments.quiet)
    task = array_task(arguments)
    report = _convert(arguments, task)
    if arguments.json:
        print_json(report.as_dict())
    elif not arguments.quiet:
        _print_report(report, task)
    return 0


def _convert(arguments: Arguments, task: tuple[int, int] | None) -> Report:
    """Convert SOURCE to OUTPUT and print messages on the way."""
    from .. import conversion

    options, adapters = conversion_arguments(arguments), named_adapters(arguments)
    refuse_swapped(arguments.source, arguments.output)
    with dask_client(arguments, task) as client, show_progress(arguments, "writing") as progress:
        output = open_output(arguments)
        if task is not None:
            conversion.join_array(output or arguments.output)
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

        return conversion.convert(
            source,
            output or arguments.output,
            **options,
            workers=arguments.workers,
            overwrite=arguments.overwrite,
            checksums=arguments.checksums,
            staging=arguments.staging,
            max_staged=arguments.max_staged,
            client=client,
            task=task,
            reference=open_reference(arguments),
            adapters=open_adapters(adapters, arguments),
            on_plan=on_plan,
            on_resume=on_resume,
            on_start=progress.start,
            on_progress=progress.advance,
            on_shard=progress.count_shard,
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
            f"{read}wrote {sized(written)} in {_duration(report.seconds)} "
            f"({sized(round(written / report.seconds))}/s), peak memory {sized(report.peak_rss)}"
        )
    if report.complete:
        print(f"load it: {_loading(report)}")


def _duration(seconds: float) -> str:
    """Return a duration in words."""
    if seconds < 1:
        return f"{max(1, round(seconds * 1000))} ms"
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _loading(report: Report) -> str:
    """Return Python that loads an output, in one line."""
    from .. import formats

    module = formats.load(report.format)
    name, lines = report.output, formats.loading(module).splitlines()
    repository = re.fullmatch(r"hf://([^/@]+/[^/@]+)", name)
    if repository and formats.library(module) == "transformers":
        name = repository[1]
    quoted = json.dumps(name, ensure_ascii=False)
    calls = [line.removeprefix("model = ") for line in lines if line.startswith("model = ")]
    if report.partial or "://" in name or not calls:
        return f"gptoss_stream.open_state_dict({quoted})"
    needed = calls[0].partition(".")[0]
    package = next((x.split()[1] for x in lines if re.search(rf"^from .*\b{needed}\b", x)), None)
    prefix = f"from {package} import {needed}; " if package else ""
    return prefix + calls[0].replace("folder", quoted)
