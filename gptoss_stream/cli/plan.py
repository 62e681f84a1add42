"""The command `plan`: show what `convert` would write."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .._utils.messages import counted, listed, sized
from .._utils.paths import user_path
from ..errors import MachineError
from ._adapter_options import adapter_options, named_adapters, open_adapters
from ._adapter_page import describe_adapter
from ._command import Arguments, command
from ._conversion_arguments import conversion_arguments, refuse_swapped
from ._locations import open_output, open_reference, open_source
from ._options import (
    conversion_options,
    given_output,
    json_option,
    output_argument,
    quiet_option,
    remote_output_options,
    remote_source_options,
    selection_options,
    source_argument,
    workers_option,
)
from ._printing import (
    describe_format,
    describe_model,
    describe_selection,
    print_json,
    print_narrowed,
    print_warnings,
)
from ._pruning_options import pruning_options

if TYPE_CHECKING:
    from ..planning.plan import Plan
    from ..planning.shards import PlannedShard
    from ..storage.location import WritableLocation

__all__ = ["plan"]


class _Resources(NamedTuple):
    """What a conversion needs of this machine, in bytes."""

    disk_needed: int
    disk_free: int
    memory: int

    @property
    def suffice(self) -> bool:
        """Whether the disk has room."""
        return self.disk_needed <= self.disk_free


@command(
    "plan",
    short_help="show what convert would write",
    description="Show what convert would write with the same options, and how much disk and memory "
    "it needs. Only headers and configuration are read. The exit code is 3 if the disk has not "
    "enough room.",
    examples=(
        "gpt-oss-20b gpt-oss-20b-tl",
        "openai/gpt-oss-120b s3://bucket/gpt-oss-120b-tl --max-shard-size 1GB",
    ),
)
@source_argument()
@output_argument("where convert would write (default: a folder in the current one)")
@conversion_options
@workers_option
@json_option
@quiet_option("the plan and errors")
@selection_options()
@adapter_options
@pruning_options
@remote_source_options()
@remote_output_options
def plan(arguments: Arguments) -> int:
    """Run the command; return the exit code."""
    from .._utils.thread_pool import count_workers
    from ..planning import plan as planning
    from ..storage.location import BatchingLocation

    options, adapters = conversion_arguments(arguments), named_adapters(arguments)
    workers = count_workers(arguments.workers)
    found = given_output(arguments, arguments.output)
    arguments.output = found or "."
    refuse_swapped(arguments.source, arguments.output)
    output = open_output(arguments)
    planned = planning.plan(
        open_source(arguments, is_token_for_other=output is not None),
        **options,
        reference=open_reference(arguments),
        adapters=open_adapters(adapters, arguments),
    )
    resources, folder = _resources(planned, output, workers, arguments)
    if arguments.json:
        print_json(_as_dict(planned, resources))
    else:
        where = "the current folder" if found is None else str(folder)
        _print_plan(planned, resources, where, workers)
        if isinstance(output, BatchingLocation):
            print(
                "commits  shards are uploaded as they are made, and committed together, at most "
                "once a minute: the Hub allows 128 commits an hour"
            )
        if not arguments.quiet:
            print_warnings(planned)
    return 0 if resources.suffice else MachineError.exit_code


def _resources(
    planned: Plan, output: WritableLocation | None, workers: int, arguments: Arguments
) -> tuple[_Resources, Path]:
    """Return what the conversion needs, and the folder whose disk it needs: OUTPUT or staging."""
    from ..planning.shards import compiled_nbytes
    from ..storage.open_location import upload_nbytes
    from ..tensors.compiled import is_worthwhile
    from ..writing.disk_space import free_nbytes
    from ..writing.executor import memory_nbytes
    from ..writing.remote_output import staging_folder, staging_nbytes
    from ..writing.spill_file import is_memory_low

    if output is None:
        folder = user_path(arguments.output)
        needed = planned.nbytes + planned.spill_nbytes
    else:
        folder = staging_folder(output, arguments.staging)
        needed = staging_nbytes(planned.shards, arguments.max_staged)
    is_local = planned.info.location.is_local and output is None
    memory = memory_nbytes(
        workers,
        is_local=is_local,
        upload_nbytes=0 if output is None else upload_nbytes(arguments.output),
        has_reference=planned.reference is not None,
        has_adapters=planned.merge is not None,
        is_compiled=is_worthwhile(compiled_nbytes(planned.shards))
        and not is_memory_low(planned.spill_nbytes),
    )
    return _Resources(needed, free_nbytes(folder), memory), folder


def _print_plan(planned: Plan, resources: _Resources, where: str, workers: int) -> None:
    """Print the plan: source, model, output, resources, and a line for each shard."""
    print(
        f"source   {planned.info.location}: {planned.source_format} ({planned.detected_by})\n"
        f"model    {describe_model(planned.model)}\n"
        f"output   {counted(planned.num_tensors, 'tensor')}"
        f"{describe_selection(planned.selection.as_dict())}, "
        f"{describe_format(planned.to, planned.dtype)}, "
        f"{sized(planned.nbytes)} in {counted(len(planned.shards), 'shard')}, "
        f"made from {sized(planned.source_nbytes)} of the source\n"
        f"disk     {sized(resources.disk_needed)} needed, {sized(resources.disk_free)} free "
        f"in {where}"
        f"{'' if resources.suffice else ': NOT ENOUGH'}\n"
        f"memory   {sized(resources.memory)} at most, {counted(workers, 'worker')}"
    )
    for adapter in () if planned.merge is None else planned.merge.describe():
        print(
            f"adapter  {adapter['path']}: {describe_adapter(adapter)}, "
            f"{listed([*adapter['targets'], *adapter['saved_whole']], 9)}"
        )
    if planned.mxfp4_rule is not None:
        kept = "" if planned.reference is None else f", blocks of {planned.reference.location} kept"
        print(f"mxfp4    experts encoded by the rule {planned.mxfp4_rule}{kept}")
    print_narrowed(planned.narrowed)
    for shard in planned.shards:
        print(f"  {shard.name}  {sized(shard.nbytes):>9}  {counted(len(shard.tensors), 'tensor')}")


def _as_dict(planned: Plan, resources: _Resources) -> dict[str, Any]:
    """Return the whole plan as JSON types; sizes and offsets are in bytes."""
    model = planned.model
    return {
        "source": str(planned.info.location),
        "source_format": planned.source_format,
        "detected_by": planned.detected_by,
        "model": {
            "layers": model.num_layers,
            "experts": model.num_experts,
            "experts_per_token": model.experts_per_token,
            "parameters": model.num_parameters,
            **model.dimensions,
        },
        "format": planned.to,
        "partial": planned.is_partial,
        "selection": planned.selection.as_dict(),
        "pruning": planned.pruning,
        "dtype": planned.dtype,
        "narrowed": dict(planned.narrowed),
        "mxfp4_rule": planned.mxfp4_rule,
        "adapters": [] if planned.merge is None else planned.merge.describe(),
        "reference": None if planned.reference is None else str(planned.reference.location),
        "max_shard_size": planned.max_shard_size,
        "tensors": planned.num_tensors,
        "source_bytes": planned.source_nbytes,
        "data_bytes": planned.data_nbytes,
        "bytes": planned.nbytes,
        **resources._asdict(),
        "unmapped": list(planned.unmapped),
        "notes": list(planned.notes),
        "shards": [_shard_as_dict(shard) for shard in planned.shards],
    }


def _shard_as_dict(shard: PlannedShard) -> dict[str, Any]:
    """Return a planned shard as JSON types."""
    return {
        "name": shard.name,
        "bytes": shard.nbytes,
        "tensors": [
            {
                "name": tensor.name,
                "dtype": tensor.dtype.code,
                "shape": list(tensor.shape),
                "offset": offset,
                "bytes": tensor.nbytes,
            }
            for tensor, offset in zip(shard.tensors, shard.offsets, strict=True)
        ],
    }
