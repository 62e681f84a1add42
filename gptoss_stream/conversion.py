"""The conversion from end to end: open the source, plan, write the output."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._utils.arguments import whole_number
from ._utils.memory import peak_rss_nbytes
from ._utils.messages import short_repr
from ._utils.paths import user_path
from ._utils.progress import OnProgress, OnStart, check_callbacks, progress_callbacks
from .adapters import AdapterLike, as_adapters, check_values, open_adapters
from .checkpoint.metadata import read_metadata
from .errors import OptionError
from .formats import read_source
from .model.numbers import NumbersLike
from .model.pruning import ExpertsLike, Pruning
from .model.selection import SelectionLike
from .planning.array_task import ArrayTask
from .planning.options import DEFAULT_FORMAT, ConversionOptions
from .planning.output_files import output_files
from .planning.plan import Plan, plan_conversion, read_adapters, read_reference
from .planning.run_identity import encoding_identity, run_identity
from .planning.shards import DEFAULT_SHARD_SIZE
from .storage.hub_commits import remember_listings, remember_run
from .storage.location import Location, LocationLike, WritableLocation
from .storage.open_location import open_location
from .storage.overlap import refuse_overlap
from .tensors.dtypes import DTypeLike
from .writing.report import Report, make_report
from .writing.target import open_target, refuse_nested, unfinished_state

if TYPE_CHECKING:
    import distributed

    from .writing.executor import Executor
    from .writing.output_spec import OutputResult, OutputSpec, Resumption

__all__ = ["convert", "join_array"]

_log = logging.getLogger(__name__)


def convert(
    source: LocationLike,
    output: str | os.PathLike[str] | WritableLocation,
    *,
    to: str = DEFAULT_FORMAT,
    source_format: str | None = None,
    dtype: DTypeLike | None = None,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    selection: SelectionLike | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    checksums: bool = False,
    staging: str | os.PathLike[str] | None = None,
    max_staged: int = 2,
    client: distributed.Client | None = None,
    task: tuple[int, int] | None = None,
    mxfp4_rule: str | None = None,
    reference: LocationLike | None = None,
    keep_layers: NumbersLike | None = None,
    keep_experts: ExpertsLike | None = None,
    adapters: AdapterLike | Sequence[AdapterLike] | None = (),
    merge_like_peft: bool = False,
    on_plan: Callable[[Plan], None] | None = None,
    on_resume: Callable[[Resumption], None] | None = None,
    on_start: Callable[[int, int], None] | None = None,
    on_progress: Callable[[int], None] | None = None,
    on_shard: Callable[[int, int], None] | None = None,
    progress: bool = False,
) -> Report:
    """Convert a checkpoint to another format, or to other shards or another dtype.

    An interrupted run resumes when the same call is made again; a finished run is left as it is.
    A remote source is read by byte range. A remote output is uploaded shard by shard.

    Args:
        source: A local folder, a repository of the Hub, or a URL (see `open_location`).
        output: A folder, or a URL or repository (see `open_writable_location`).
        to: The format to write (see `formats.names`).
        source_format: The format to read; by default it is detected.
        dtype: bfloat16, float16, float32 or "keep" (see `plan`), also as a dtype of torch.
        max_shard_size: In bytes, or a text such as "5GB" (decimal units).
        selection: Which tensors to write, also as a dict (see `plan`); all by default.
        workers: The number of threads, by default one more than there are processors, at most 8.
            It changes speed and memory, never the bytes that are written.
        overwrite: Whether to delete what an earlier run of this tool wrote to `output`.
        checksums: Whether to write `SHA256SUMS`, in the format that `sha256sum -c` reads.
        staging: The folder for shards of a remote output until they are uploaded; by default in
            the user's cache.
        max_staged: The most shards in that folder at a time.
        client: A Dask client, whose workers write the shards, one at a time each with `workers`
            threads (by default one more than the worker has, at most 8). They must see source
            and output under the same names.
        task: (index, count): write only this part of the shards, while other processes write the
            others. The last one writes the index.
        mxfp4_rule: How floats become MXFP4: "openai" (the default), "modelopt", "ocp" or "even".
        reference: A checkpoint in MXFP4, such as openai/gpt-oss-20b. Its blocks are kept where they
            decode to the source's values, so that what was not trained keeps its bytes.
        keep_layers: The layers of which a smaller model is made (see `plan`); all by default.
        keep_experts: The experts of which a smaller model is made (see `plan`); all by default.
        adapters: LoRA adapters to merge, in order: locations, or `Adapter` objects that say more.
        merge_like_peft: Whether merged values are rounded as PEFT does, instead of once.
        on_plan: Called with the plan when the output can be written, before `on_start`.
        on_resume: Called with what an interrupted run has written, if it has written anything.
        on_start: Called with the bytes to write (by this task), and how many of them were written
            before.
        on_progress: Called with the bytes written since the last call, from any thread.
        on_shard: Called with the number of finished shards and of all (of this task), when writing
            starts and after each shard, from any thread.
        progress: Whether to show a progress bar.

    Returns:
        What was done.

    Raises:
        OptionError: For an argument that cannot be used.
        CheckpointError: For a source that cannot be converted.
        OutputError: For an output that cannot be used.
        MachineError: If the system fails: disk full, I/O error, no connection.
        MissingPackageError: If an extra is not installed.
    """
    from ._utils.thread_pool import count_workers
    from .planning.plan_readers import open_plan_readers
    from .writing.output_spec import OutputSpec
    from .writing.remote_output import staging_folder
    from .writing.spill_file import is_memory_low
    from .writing.thread_executor import ThreadExecutor

    started = time.perf_counter()
    base = None if reference is None else open_location(reference)
    options = ConversionOptions(
        to, source_format, dtype, max_shard_size, selection, mxfp4_rule,
        None if base is None else base.identity, Pruning.of(keep_layers, keep_experts),
        as_adapters(adapters), merge_like_peft,
    )  # fmt: skip
    check_callbacks(
        on_plan=on_plan, on_resume=on_resume, on_start=on_start, on_progress=on_progress,
        on_shard=on_shard,
    )  # fmt: skip
    threads = count_workers(workers)
    array_task = ArrayTask.of(task)
    max_staged = whole_number(max_staged, "max_staged")
    if array_task is not None and client is not None:
        raise OptionError(f"{array_task} is for runs without a scheduler; give only one of them")
    target = open_target(output)
    state = None if overwrite else unfinished_state(target)
    if array_task is not None:
        remember_listings((state or {}).get("listings"))
    location = open_location(source).pinned_to(state)
    options = replace(options, adapters=open_adapters(options.adapters, state))
    source_model = read_source(read_metadata(location), source_format)
    plan = plan_conversion(source_model, options, read_reference(base), read_adapters(options))
    adapter = [] if plan.merge is None else [info.location for info in plan.merge.infos]
    refuse_overlap(target, source=[location], reference=[base] if base else [], adapter=adapter)
    refuse_nested(target)
    identity = run_identity(plan)
    spec = OutputSpec(
        identity, plan.shards, output_files(plan), checksums, encoding_identity(identity)
    )
    low_memory = is_memory_low(plan.spill_nbytes)
    scratch = target if isinstance(target, Path) else staging_folder(target, staging, array_task)
    with (
        open_plan_readers(plan, scratch, 0 if low_memory else threads) as reader,
        progress_callbacks("converting", progress, on_start, on_progress) as (start, advance),
    ):
        if plan.merge is not None:
            check_values(plan.merge, reader)
        executor: Executor = ThreadExecutor(reader, threads, low_memory=low_memory)
        if client is not None:
            executor = _dask_executor(client, location, target, options, spec, workers, staging)
        result = _write(
            target,
            spec,
            executor,
            overwrite=overwrite,
            staging=staging,
            max_staged=max_staged,
            task=array_task,
            on_start=partial(_announce, plan, str(target), on_plan, on_resume, start),
            on_progress=advance,
            on_shard=on_shard,
        )
    peak_rss = max(executor.peak_rss, peak_rss_nbytes())
    return make_report(plan, str(target), result, time.perf_counter() - started, peak_rss)


def _announce(
    plan: Plan,
    output: str,
    on_plan: Callable[[Plan], None] | None,
    on_resume: Callable[[Resumption], None] | None,
    on_start: OnStart,
    total: int,
    found: Resumption,
) -> None:
    """Report what is planned and what an earlier run has written, before the first shard."""
    _log.info("converting to %s: %s", output, plan.summary)
    if on_plan is not None:
        on_plan(plan)
    if found.nbytes + found.lost_nbytes:
        counts = found.finished_shards, found.total_shards
        _log.info("resuming %s: %d of %d shards are finished", output, *counts)
        if on_resume is not None:
            on_resume(found)
    on_start(total, found.nbytes)


def join_array(output: str | WritableLocation) -> None:
    """Read the commits that the other array tasks of this process's run read, if any has begun.

    Each then need not ask the Hub for them. Not done for outputs on the Hub: it would take more
    requests than it saves.
    """
    target = open_target(output)
    if isinstance(target, Path) or not target.identity.startswith("hf://"):
        remember_run(unfinished_state(target) or {})


def _dask_executor(
    client: distributed.Client,
    source: Location,
    target: Path | WritableLocation,
    options: ConversionOptions,
    spec: OutputSpec,
    workers: int | None,
    staging: str | os.PathLike[str] | None,
) -> Executor:
    """Return an executor for the workers of a Dask client."""
    if not hasattr(client, "scheduler_info"):
        raise OptionError(f"client {short_repr(client)}: it must be a Client of Dask")
    from .distributed.dask_executor import DaskExecutor
    from .distributed.task_spec import TaskSpec

    output = os.path.realpath(target) if isinstance(target, Path) else target.identity
    folder = None if staging is None else str(user_path(staging).absolute())
    options = replace(options, adapters=tuple(one.by_name() for one in options.adapters))
    task_spec = TaskSpec(
        source.identity, output, options, spec.identity, spec.checksums, threads=1, staging=folder
    )
    return DaskExecutor(client, task_spec, threads=workers)


def _write(
    target: Path | WritableLocation,
    spec: OutputSpec,
    executor: Executor,
    *,
    overwrite: bool,
    staging: str | os.PathLike[str] | None,
    max_staged: int,
    task: ArrayTask | None,
    on_start: Callable[[int, Resumption], None],
    on_progress: OnProgress,
    on_shard: Callable[[int, int], None] | None,
) -> OutputResult:
    """Write the output to a folder or to a remote location."""
    from .writing.output import write_output
    from .writing.remote_output import staging_folder, write_remote_output

    shards = task.select(spec.shards) if task else spec.shards
    total = sum(shard.nbytes for shard in shards)
    options: dict[str, Any] = {
        "overwrite": overwrite,
        "task": task,
        "on_start": lambda found: on_start(total, found),
        "on_progress": on_progress,
        "on_shard": on_shard or (lambda finished, total: None),
    }
    if isinstance(target, Path):
        return write_output(target, spec, executor, **options)
    return write_remote_output(
        target,
        spec,
        executor,
        staging=staging_folder(target, staging, task),
        max_staged=max_staged,
        **options,
    )
