"""Writes an output folder from empty, or from where an earlier run stopped, to finished.

Everything that writes shards goes through here: refuse what cannot succeed, resume what is
finished, write the missing shards, and finish in the order that never makes a half-written folder
look complete.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Event

from .._utils.failures import machine_error
from ..checkpoint.auxiliary_files import CopiedFile
from ..errors import OptionError, OutputError
from ..planning.array_task import ArrayTask
from ..planning.shards import PlannedShard, spill_nbytes
from .disk_space import check_space, disk_full_error, is_disk_full, size_on_disk
from .executor import Callbacks, Executor, count_shards
from .output_run import OutputRun
from .output_spec import OutputResult, OutputSpec, Resumption
from .run_state import fingerprint
from .shard_summary import ShardSummary

__all__ = ["refuse_overwriting_task", "write_output"]


def write_output(
    folder: Path,
    spec: OutputSpec,
    executor: Executor,
    *,
    overwrite: bool,
    on_start: Callable[[Resumption], None],
    on_progress: Callable[[int], None],
    on_shard: Callable[[int, int], None] = lambda finished, total: None,
    task: ArrayTask | None = None,
) -> OutputResult:
    """Write an output, or the shards of one array task, to a local folder.

    Args:
        folder: The folder, which is created if it does not exist.
        spec: What to write.
        executor: What writes the shards.
        overwrite: Whether to delete what an earlier run wrote.
        on_start: Called with what an interrupted run has written of this task's shards.
        on_progress: Called with bytes written since the last call, from any thread.
        on_shard: Called with the number of finished shards and of all (of this task), when writing
            starts and after each shard, from any thread.
        task: The array task, if the run is divided into tasks.

    Raises:
        OutputError: If the folder cannot be used.
        MachineError: If writing fails.
    """
    refuse_overwriting_task(task, overwrite=overwrite)
    run = OutputRun(folder, spec)
    try:
        if overwrite:
            # An earlier output is not deleted for a run that cannot succeed.
            check_space(folder, _space_needed(spec.shards), size_on_disk(folder))
        for data in spec.auxiliary_files.values():
            if isinstance(data, CopiedFile):
                data.check()
        return _write_missing(run, spec, executor, overwrite, on_start, on_progress, on_shard, task)
    except OSError as error:
        if is_disk_full(error):
            left = [s for s in spec.shards if not run.is_finished(s.name, s.nbytes)]
            raise disk_full_error(error, folder, _space_needed(left)) from error
        raise machine_error(error, f"writing to {folder}") from error


def _write_missing(
    run: OutputRun,
    spec: OutputSpec,
    executor: Executor,
    overwrite: bool,
    on_start: Callable[[Resumption], None],
    on_progress: Callable[[int], None],
    on_shard: Callable[[int, int], None],
    task: ArrayTask | None,
) -> OutputResult:
    """Lock the folder, write the shards that are missing, and finish."""
    shards = task.select(spec.shards) if task else spec.shards
    with run.locked(overwrite=overwrite, task=task.tag if task else None) as partial_folder:
        finished = [shard for shard in shards if run.is_finished(shard.name, shard.nbytes)]
        missing = [shard for shard in shards if shard not in finished]
        fingerprint_ = fingerprint(run.state)
        written = executor.find_written(missing, partial_folder, fingerprint_)
        resumed = Resumption.of(shards, finished, run.begun_nbytes, written)
        check_space(run.path, _space_needed(missing) - written)
        executor.setup(run.work)
        on_start(resumed)
        if not missing and run.is_complete:
            return OutputResult(resumed.nbytes, is_complete=True, encoding=run.encoding_report())
        run.begin()
        count = count_shards(on_shard, len(finished), len(shards))

        def before_commit(name: str, summary: ShardSummary) -> None:
            if task is not None:  # another run may have replaced this one
                run.check_run(fingerprint_)
            run.before_commit(name, summary)

        def report(nbytes: int) -> None:
            run.check_lock()
            on_progress(nbytes)

        def before_start(name: str, stop: Event) -> None:
            run.check_lock()

        executor.write_shards(
            missing,
            run.path,
            partial_folder,
            Callbacks(report, before_start, before_commit, count),
            run=fingerprint_,
            checksums=spec.checksums,
        )
        is_complete = run.finish(spec.index, {s.name: s.nbytes for s in spec.shards})
        if task is None and not is_complete:
            raise OutputError(
                f"{run.path}: a finished shard no longer exists; leave the folder alone and run "
                "the same command again"
            )
        return OutputResult(resumed.nbytes, is_complete, run.encoding_report())


def refuse_overwriting_task(task: ArrayTask | None, *, overwrite: bool) -> None:
    """Refuse an array task that would delete what the other tasks write.

    Raises:
        OptionError: If a task is to overwrite.
    """
    if task is not None and overwrite:
        raise OptionError(
            f"{task} would overwrite what the other tasks write; delete the earlier output first"
        )


def _space_needed(shards: Sequence[PlannedShard]) -> int:
    return sum(shard.nbytes for shard in shards) + spill_nbytes(shards)
