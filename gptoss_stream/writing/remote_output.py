"""Writes an output to a remote location, shard by shard through a staging folder.

The staging folder is an output folder like any other (`output_run`). Each shard is deleted from it
when it has been uploaded, so that it holds a few shards at a time, and what an interrupted run had
finished.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._utils.failures import machine_error
from .._utils.paths import user_path
from ..checkpoint.source_card import CARD_NAME
from ..errors import OptionError, OutputError
from ..planning.array_task import ArrayTask
from ..planning.shards import PlannedShard
from ..storage.location import LostUploadError, WritableLocation
from ..tensors.safetensors_header import INDEX_NAME
from . import uploads
from .checksums import CHECKSUMS_NAME
from .disk_space import check_space, disk_full_error, is_disk_full
from .encoding_report import REPORT_NAME, losses_as_text, parse_report
from .executor import Callbacks, Executor, count_shards
from .output import refuse_overwriting_task
from .output_run import OutputRun
from .output_spec import OutputResult, OutputSpec, Resumption
from .receipts import Receipts
from .remote_folder import RemoteFolder
from .run_state import RECORD_NAME, fingerprint
from .shard_summary import ShardSummary
from .uploads import Uploads, wait_for_earlier_uploads

_SECONDS_OF_A_TASK = 36.0
"""Between two commits, for each array task: together they make 100 an hour."""

__all__ = ["staging_folder", "staging_nbytes", "write_remote_output"]


def staging_folder(
    location: WritableLocation,
    staging: str | os.PathLike[str] | None,
    task: ArrayTask | None = None,
) -> Path:
    """Return the local folder through which an output goes to a remote location.

    It is always the same for the same location and task.

    Args:
        location: Where the output goes.
        staging: The folder to put it in; None for the user's cache.
        task: The array task, if the run is divided into tasks.
    """
    digest = hashlib.sha256(location.identity.encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    parent = user_path(staging) if staging is not None else user_path(cache) / "gptoss_stream"
    return parent / f"staging-{digest}{f'-{task.tag}' if task else ''}"


def staging_nbytes(shards: Sequence[PlannedShard], max_staged: int) -> int:
    """Return the disk space in bytes that writing shards takes, `max_staged` at a time."""
    largest = sorted((shard.nbytes for shard in shards), reverse=True)[:max_staged]
    return sum(largest) + max((shard.spill_nbytes for shard in shards), default=0)


def write_remote_output(
    location: WritableLocation,
    spec: OutputSpec,
    executor: Executor,
    *,
    staging: Path,
    max_staged: int,
    overwrite: bool,
    on_start: Callable[[Resumption], None],
    on_progress: Callable[[int], None],
    on_shard: Callable[[int, int], None] = lambda finished, total: None,
    task: ArrayTask | None = None,
) -> OutputResult:
    """Write an output, or the shards of one array task, to a remote location.

    Args:
        location: Where to write to.
        spec: What to write.
        executor: What writes the shards.
        staging: The local folder for shards until they are uploaded; it is deleted at the end.
        max_staged: The most shards in that folder at a time.
        overwrite: Whether to delete what an earlier run wrote.
        on_start: Called with what an interrupted run has written of this task's shards.
        on_progress: Called with bytes written since the last call, from any thread.
        on_shard: Called with the number of written shards and of all (see `write_output`).
        task: The array task, if the run is divided into tasks.

    Raises:
        OptionError: If `max_staged` is less than 1.
        OutputError: If the location cannot be used.
        MachineError: If writing or uploading fails.
    """
    refuse_overwriting_task(task, overwrite=overwrite)
    if max_staged < 1:
        raise OptionError(f"{max_staged} staged shards: there must be at least one")
    run = OutputRun(staging, spec)
    remote = RemoteFolder(location, checksums=spec.checksums)
    output = _RemoteOutput(run, remote, spec, executor, max_staged, task, on_shard)
    wait_for_earlier_uploads(location)
    try:
        with run.locked(overwrite=overwrite) as partial_folder:
            remote.prepare(run.state, overwrite=overwrite)
            result = output.write(partial_folder, on_start, on_progress)
            run.clear()  # also what is left of a run that ended right before it could
        with suppress(OSError):  # another run may have begun in it
            staging.rmdir()
    except OSError as error:
        if is_disk_full(error):
            raise disk_full_error(error, staging, output.needed) from error
        raise machine_error(error, f"writing to {staging}") from error
    return result


@dataclass
class _RemoteOutput:
    """One call of `write_remote_output`."""

    run: OutputRun
    remote: RemoteFolder
    spec: OutputSpec
    executor: Executor
    max_staged: int
    task: ArrayTask | None
    on_shard: Callable[[int, int], None]
    needed: int = field(default=0, init=False)
    """Bytes of disk space that are still needed."""

    @property
    def shards(self) -> Sequence[PlannedShard]:
        """The shards of this run, or of its array task."""
        return self.task.select(self.spec.shards) if self.task else self.spec.shards

    def write(
        self,
        partial_folder: Path,
        on_start: Callable[[Resumption], None],
        on_progress: Callable[[int], None],
    ) -> OutputResult:
        """Write and upload the shards that are missing, and finish if none is."""
        run, remote, shards = self.run, self.remote, self.shards
        remote.losses = run.losses()
        uploaded = self._uploaded()
        if self._publish_receipts(uploaded):
            uploaded = self._uploaded()
        for name in uploaded:
            (run.path / name).unlink(missing_ok=True)
        finished = [shard for shard in shards if shard.name in uploaded]
        left = [shard for shard in shards if shard.name not in uploaded]
        staged = [shard for shard in left if run.is_finished(shard.name, shard.nbytes)]
        missing = [shard for shard in left if shard not in staged]
        written = self.executor.find_written(missing, partial_folder, fingerprint(run.state))
        resumed = Resumption.of(shards, finished, run.begun_nbytes, written)
        self.needed = staging_nbytes(missing, self.max_staged) if self.executor.in_process else 0
        check_space(run.path, self.needed)
        self.executor.setup(None)
        on_start(resumed)
        is_complete = not left and remote.is_complete(run.state)
        if not is_complete:
            remote.begin(run.state)
            run.begin(auxiliary=self.task is None)  # of tasks, only the last needs them
            self._write_shards(staged, missing, partial_folder, on_progress)
            is_complete = self._is_complete()
        if is_complete and not remote.is_complete(run.state):
            self._finish()
        return OutputResult(resumed.nbytes, is_complete, self._encoding_report())

    def _encoding_report(self) -> dict[str, Any] | None:
        """Return the report about encoding to MXFP4, of this run or one that ended before."""
        report = self.run.encoding_report()
        if report is None and self.spec.encoding is not None:
            report = parse_report(self.remote.read_report() or b"")
        return report

    def _write_shards(
        self,
        staged: list[PlannedShard],
        missing: list[PlannedShard],
        partial_folder: Path,
        on_progress: Callable[[int], None],
    ) -> None:
        """Upload the staged shards, write the missing ones, and upload them as they finish."""
        run = self.run

        def before_commit(name: str, summary: ShardSummary) -> None:
            if self.task is not None:  # another run may have replaced this one
                self.remote.check_run()
            run.before_commit(name, summary)
            if summary.losses:
                self.remote.losses[name] = losses_as_text(summary.losses)

        def report(nbytes: int) -> None:
            run.check_lock()
            on_progress(nbytes)

        seconds = _SECONDS_OF_A_TASK * self.task.count if self.task else 0.0
        with Uploads(
            self.remote,
            run.path,
            self.max_staged,
            run.checksums.get,
            Receipts(run.work, run.check_lock).keep,
            max(uploads.PUBLISH_SECONDS, seconds),
        ) as uploading:
            for shard in staged:
                on_progress(shard.nbytes)
                uploading.add_finished(shard.name)
            total = len(self.shards)
            count = count_shards(self.on_shard, total - len(missing), total)
            callbacks = Callbacks(
                report,
                before_commit=before_commit,
                on_shard_finished=count,
                on_upload=uploading.add_uploaded,
            )
            if self.executor.in_process:

                def finish(name: str) -> None:
                    uploading.add(name)
                    count(name)

                callbacks = Callbacks(report, uploading.start, before_commit, finish)
            self.executor.write_shards(
                missing,
                run.path,
                partial_folder,
                callbacks,
                run=fingerprint(run.state),
                checksums=True,
            )
            uploading.finish()

    def _publish_receipts(self, uploaded: set[str]) -> bool:
        """Make visible what an interrupted run has uploaded; return whether there was anything.

        If the location has lost it, it is made again.
        """
        kept = Receipts(self.run.work)
        found = kept.read()
        receipts = {name: found[name] for name in found if name not in uploaded}
        if receipts:
            self.remote.begin(self.run.state)
            try:
                self.remote.publish(receipts, self.run.checksums)
                self.remote.refresh()
            except LostUploadError:
                receipts = {}
        kept.clear()
        return bool(receipts)

    def _is_complete(self) -> bool:
        """Return whether all shards are in the remote location.

        Raises:
            OutputError: If some are not, and no other task is to write them.
        """
        self.remote.refresh()
        if self.remote.is_complete(self.run.state):
            return True
        if len(self._uploaded()) == len(self.spec.shards):
            return True
        if self.task is None:
            raise OutputError(
                f"{self.remote.location}: an uploaded shard does not exist or has changed; leave "
                "the output alone and run the same command again"
            )
        return False

    def _finish(self) -> None:
        """Write the small files, and upload them."""
        run = self.run
        losses: dict[str, bytes] = {}
        if self.spec.encoding is not None:
            run.keep_report(self.remote.read_report() or b"{}")  # of a run that has lost a file
            losses = {**self.remote.read_losses(), **run.losses()}
        if self.task is not None:
            run.write_auxiliary_files()
        if (card := self.remote.others_card()) is not None:
            run.replace_card(card)  # for its checksum
        run.finish(self.spec.index, {}, losses)
        small = [*self.spec.auxiliary_files, REPORT_NAME, CHECKSUMS_NAME, RECORD_NAME, INDEX_NAME]
        files = {name: run.path / name for name in small if name in run.state["files"]}
        if card is not None:
            del files[CARD_NAME]
        self.remote.finish(files, {n: s for n, s in run.checksums.items() if n in files})

    def _uploaded(self) -> set[str]:
        """Return the shards that are complete in the remote location."""
        run, remote = self.run, self.remote
        found = {
            shard.name
            for shard in self.spec.shards
            if remote.is_finished(shard.name, shard.nbytes, run.checksums.get(shard.name))
        }
        known = {name: remote.checksum(name) for name in found}
        run.checksums |= {name: sum_ for name, sum_ in known.items() if sum_ is not None}
        return found
