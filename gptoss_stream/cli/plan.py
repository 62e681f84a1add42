"""The command line: parses, calls the library, prints. Exit codes: 0 done; 1 verify found
differences; 2 bad usage or input; 3 the machine failed; 130 interrupted (143 by SIGTERM).

Nothing heavy is imported before a command runs, so that --help and usage errors come at once.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from .._utils.messages import counted, sized
from .._utils.paths import user_path
from .options import open_output, open_source, parse_selection
from .printing import format_line, model_line, print_narrowed, selection_line, warn

if TYPE_CHECKING:
    from ..planning.plan import Plan

__all__ = []


def _plan(arguments: argparse.Namespace) -> None:
    from .._utils.thread_pool import count_workers
    from ..planning.plan import plan
    from ..writing.disk_space import free_nbytes
    from ..writing.executor import memory_nbytes
    from ..writing.remote_output import staging_folder, staging_nbytes

    store = open_output(arguments)
    planned = plan(
        open_source(arguments, store),
        to=arguments.to,
        source_format=arguments.source_format,
        dtype=arguments.dtype,
        max_shard_size=arguments.max_shard_size,
        selection=parse_selection(arguments),
    )
    workers = count_workers(arguments.workers)
    if store is None:
        where = user_path(arguments.output)
        needed = planned.nbytes + planned.spill_nbytes
    else:
        where = staging_folder(store, arguments.staging)
        needed = staging_nbytes(planned.shards, arguments.max_staged)
    free = free_nbytes(where)
    is_local = planned.info.location.is_local and store is None
    memory = memory_nbytes(workers, is_local=is_local)
    if arguments.json:
        print(json.dumps(_plan_as_dict(planned, needed, free, memory), indent=2))
        return
    model = planned.model
    print(
        f"source   {planned.info.location}: {planned.source_format} ({planned.detected_by})\n"
        f"model    {model_line(model)}\n"
        f"output   {counted(planned.num_tensors, 'tensor')}{selection_line(planned.selection.as_dict())}, "
        f"{format_line(planned.to, planned.dtype)}, "
        f"{sized(planned.nbytes)} in {counted(len(planned.shards), 'shard')}, "
        f"of {sized(planned.source_nbytes)} read\n"
        f"disk     {sized(needed)} needed, {sized(free)} free"
        f"{'' if needed <= free else ': NOT ENOUGH'}\n"
        f"memory   {sized(memory)} at most, {counted(workers, 'worker')}"
    )
    print_narrowed(planned.narrowed)
    for shard in planned.shards:
        print(f"  {shard.name}  {sized(shard.nbytes):>9}  {counted(len(shard.tensors), 'tensor')}")
    if not arguments.quiet:
        warn(planned)


def _plan_as_dict(planned: Plan, needed: int, free: int, memory: int) -> dict[str, Any]:
    return {
        "source": str(planned.info.location),
        "source_format": planned.source_format,
        "recognised_by": planned.detected_by,
        "model": {
            "layers": planned.model.num_layers,
            "experts": planned.model.num_experts,
            "experts_per_token": planned.model.experts_per_token,
            "parameters": planned.model.num_parameters,
            **planned.model.dimensions,
        },
        "format": planned.to,
        "partial": planned.is_partial,
        "selection": planned.selection.as_dict(),
        "dtype": planned.dtype,
        "narrowed": dict(planned.narrowed),
        "max_shard_size": planned.max_shard_size,
        "tensors": planned.num_tensors,
        "source_bytes": planned.source_nbytes,
        "data_bytes": planned.data_nbytes,
        "bytes": planned.nbytes,
        "disk_needed": needed,
        "disk_free": free,
        "memory": memory,
        "unused": list(planned.unmapped),
        "shards": [
            {
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
            for shard in planned.shards
        ],
    }
