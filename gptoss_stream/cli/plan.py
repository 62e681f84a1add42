"""The command `plan`: show what `convert` would write."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, NamedTuple

from .._utils.messages import counted, listed, sized
from .._utils.paths import user_path
from ._adapter_options import add_adapters, open_adapters
from ._adapter_page import describe_adapter
from ._options import (
    add_conversion_options,
    add_json,
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
    describe_model,
    describe_selection,
    print_json,
    print_narrowed,
    print_warnings,
)
from ._pruning_options import add_pruning, parse_keep_experts

if TYPE_CHECKING:
    from ..planning.plan import Plan
    from ..planning.shards import PlannedShard
    from ..storage.location import WritableLocation

__all__ = ["add_parser", "run"]


class _Resources(NamedTuple):
    """What a conversion needs of this machine, in bytes."""

    disk_needed: int
    disk_free: int
    memory: int


def add_parser(commands: Commands) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "plan",
        help="show what convert would write",
        description="Show what convert would write with the same options, and how much disk and "
        "memory it needs. Only headers and configuration are read.",
    )
    add_source(parser)
    parser.add_argument(
        "output",
        metavar="OUTPUT",
        nargs="?",
        default=".",
        help="where convert would write (default: the current folder)",
    )
    add_conversion_options(parser)
    add_workers(parser)
    add_quiet(parser, "the plan and errors")
    add_json(parser)
    add_selection(parser)
    add_adapters(parser)
    add_pruning(parser)
    add_remote_source(parser)
    add_remote_output(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the command; return the exit code."""
    from .._utils.thread_pool import count_workers
    from ..planning.plan import plan

    output = open_output(arguments)
    planned = plan(
        open_source(arguments, is_token_for_other=output is not None),
        to=arguments.to,
        source_format=arguments.source_format,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        selection=parse_selection(arguments),
        mxfp4_rule=arguments.mxfp4_rule,
        reference=open_reference(arguments),
        keep_layers=arguments.keep_layers,
        keep_experts=parse_keep_experts(arguments),
        adapters=open_adapters(arguments),
        merge_like_peft=bool(arguments.merge_like_peft),
    )
    workers = count_workers(arguments.workers)
    resources = _resources(planned, output, workers, arguments)
    if arguments.json:
        print_json(_as_dict(planned, resources))
        return 0
    _print_plan(planned, resources, workers)
    if not arguments.quiet:
        print_warnings(planned)
    return 0


def _resources(
    planned: Plan, output: WritableLocation | None, workers: int, arguments: argparse.Namespace
) -> _Resources:
    """Return what the conversion needs, on the disk of a local OUTPUT or of the staging folder."""
    from ..storage.open_location import upload_nbytes
    from ..writing.disk_space import free_nbytes
    from ..writing.executor import memory_nbytes
    from ..writing.remote_output import staging_folder, staging_nbytes

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
    )
    return _Resources(needed, free_nbytes(folder), memory)


def _print_plan(planned: Plan, resources: _Resources, workers: int) -> None:
    """Print the plan: source, model, output, resources, and a line for each shard."""
    print(
        f"source   {planned.info.location}: {planned.source_format} ({planned.detected_by})\n"
        f"model    {describe_model(planned.model)}\n"
        f"output   {counted(planned.num_tensors, 'tensor')}"
        f"{describe_selection(planned.selection.as_dict())}, "
        f"{describe_format(planned.to, planned.dtype)}, "
        f"{sized(planned.nbytes)} in {counted(len(planned.shards), 'shard')}, "
        f"made from {sized(planned.source_nbytes)} of the source\n"
        f"disk     {sized(resources.disk_needed)} needed, {sized(resources.disk_free)} free"
        f"{': NOT ENOUGH' if resources.disk_needed > resources.disk_free else ''}\n"
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
