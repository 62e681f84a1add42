"""Writes one shard of a conversion in another process than the one that runs it."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .. import __version__
from .._utils.failures import machine_error
from .._utils.memory import peak_rss_nbytes
from ..checkpoint.metadata import read_metadata
from ..errors import CheckpointError, OptionError
from ..formats import read_source
from ..planning.plan import Plan, plan_conversion, read_adapters, read_reference
from ..planning.plan_readers import open_plan_readers
from ..planning.run_identity import run_identity
from ..planning.shards import PlannedShard
from ..storage.hub_commits import remember_listings
from ..storage.location import WritableLocation
from ..storage.open_location import open_location, open_writable_location
from ..writing.disk_space import check_space, disk_full_error, is_disk_full
from ..writing.encoding_report import losses_as_text
from ..writing.executor import Callbacks
from ..writing.output_folder import OutputFolder
from ..writing.remote_folder import RemoteFolder
from ..writing.remote_output import staging_nbytes
from ..writing.run_state import differences
from ..writing.shard_summary import ShardSummary
from ..writing.spill_file import is_memory_low
from ..writing.thread_executor import ThreadExecutor
from .task_spec import ShardResult, TaskSpec

__all__ = ["open_task", "write_shard"]


@dataclass(frozen=True, slots=True)
class _OpenedTask:
    """A task specification with what this process made of it."""

    spec: TaskSpec
    plan: Plan
    location: WritableLocation | None
    """The output, if it is remote."""
    shards: Mapping[str, PlannedShard]


_last: _OpenedTask | None = None  # so that it is planned once for all its shards
_opening = threading.Lock()


def open_task(spec: TaskSpec) -> _OpenedTask:
    """Open the source and the output, and make the plan, in this process.

    Raises:
        OptionError: If another version of this tool runs the conversion.
        CheckpointError: If the source differs from the one that the conversion reads.
    """
    global _last
    with _opening:
        if _last is not None and _last.spec == spec:
            return _last
        if spec.version != __version__:
            raise OptionError(
                f"gptoss_stream {__version__} is installed here, and {spec.version} runs the "
                "conversion; install the same version everywhere"
            )
        remember_listings(spec.identity.get("listings"))  # fewer requests to the Hub
        info = read_metadata(open_location(spec.source))
        plan = plan_conversion(
            read_source(info, spec.options.source_format),
            spec.options,
            read_reference(spec.options.reference),
            read_adapters(spec.options),
        )
        # The revision that a user named may have moved on since it was resolved to a commit.
        ignored = {"source", "source_revision", "reference", "adapters", "listings"}
        expected, found = (
            {key: value for key, value in json.loads(json.dumps(identity)).items()
             if key not in ignored}
            for identity in (spec.identity, run_identity(plan))
        )  # fmt: skip
        if differing := "; ".join(differences(expected, found)):
            raise CheckpointError(
                f"{plan.info.location}: this process sees a source that differs in {differing}; "
                "put the source where all machines see the same files"
            )
        shards = {shard.name: shard for shard in plan.shards}
        _last = _OpenedTask(spec, plan, open_writable_location(spec.output), shards)
        return _last


def write_shard(
    spec: TaskSpec,
    run: str,
    name: str,
    staging: Path,
    on_progress: Callable[[int], None],
    on_upload: Callable[[], None],
) -> ShardResult:
    """Write a shard to the local output folder, or through a staging folder to a remote location.

    A shard that is finished is not written again. Any number of processes may write the same shard
    at once.

    Args:
        spec: The conversion.
        run: The fingerprint of the run's state, to which the output must belong.
        name: The shard's name.
        staging: Where a shard is until it is uploaded.
        on_progress: Called with bytes written since the last call, from any thread.
        on_upload: Called when the shard is written and its upload begins.

    Raises:
        CheckpointError: If the source differs from the one that the conversion reads.
        OutputError: If another run has begun in the output.
        MachineError: If writing fails.
    """
    task = open_task(spec)
    shard = task.shards[name]
    folder = staging if task.location else Path(spec.output)
    try:
        if task.location is None:
            checksum, receipt = _write_local(task, shard, run, on_progress), None
            summary = ShardSummary(checksum)
        else:
            summary, receipt = _write_remote(
                task, task.location, shard, run, staging, on_progress, on_upload
            )
    except OSError as error:
        if is_disk_full(error):
            raise disk_full_error(error, folder, staging_nbytes([shard], 1)) from error
        raise machine_error(error, f"writing {name} in {folder}") from error
    return ShardResult(summary, receipt, peak_rss_nbytes())


def _write_local(
    task: _OpenedTask, shard: PlannedShard, run: str, on_progress: Callable[[int], None]
) -> str | None:
    """Write a shard to its folder; returns its checksum if the run computes them."""
    output = OutputFolder(Path(task.spec.output), checksums=task.spec.checksums)
    output.check_run(run)
    if not output.is_finished(shard.name, shard.nbytes):
        with output.worker_folder() as partial_folder:

            def before_commit(name: str, summary: ShardSummary) -> None:
                output.check_run(run)
                output.save_summary(name, summary, partial_folder, partial(output.check_run, run))

            callbacks = Callbacks(on_progress, before_commit=before_commit)
            _write(task, shard, output.path, partial_folder, callbacks, task.spec.checksums)
    return output.checksum(shard.name) if task.spec.checksums else None


def _write_remote(
    task: _OpenedTask,
    location: WritableLocation,
    shard: PlannedShard,
    run: str,
    staging: Path,
    on_progress: Callable[[int], None],
    on_upload: Callable[[], None],
) -> tuple[ShardSummary, bytes | None]:
    """Write a shard to a folder of this process, and upload it.

    Returns:
        What is known of the shard, and its receipt unless it is visible (`RemoteFolder.upload`).
    """
    remote = RemoteFolder(location, checksums=task.spec.checksums)
    remote.join(run)
    if remote.is_finished(shard.name, shard.nbytes):
        return ShardSummary(remote.checksum(shard.name)), None
    written = ShardSummary()

    def before_commit(name: str, summary: ShardSummary) -> None:
        nonlocal written
        remote.check_run()
        written = summary
        if summary.losses:
            remote.losses[name] = losses_as_text(summary.losses)

    staging.mkdir(parents=True, exist_ok=True)
    check_space(staging, staging_nbytes([shard], 1))
    with ExitStack() as cleanup:
        folder = Path(tempfile.mkdtemp(prefix="gptoss_stream-", dir=staging))
        cleanup.callback(shutil.rmtree, folder, ignore_errors=True)
        partial_folder = folder / "partials"
        partial_folder.mkdir()
        callbacks = Callbacks(on_progress, before_commit=before_commit)
        _write(task, shard, folder, partial_folder, callbacks, checksums=True)
        on_upload()
        receipt = remote.upload(shard.name, folder / shard.name, written.sha256)
        if receipt is None:
            remote.confirm_upload(shard.name)
    return written, receipt


def _write(
    task: _OpenedTask,
    shard: PlannedShard,
    folder: Path,
    partial_folder: Path,
    callbacks: Callbacks,
    checksums: bool,
) -> None:
    threads = task.spec.threads
    low_memory = is_memory_low(task.plan.spill_nbytes)
    ahead = 0 if low_memory else threads
    with open_plan_readers(task.plan, folder, ahead) as reader:
        executor = ThreadExecutor(reader, threads, low_memory=low_memory)
        executor.write_shards([shard], folder, partial_folder, callbacks, checksums=checksums)
