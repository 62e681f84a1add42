"""An output that goes to a store: made in a staging folder, shard by shard, and sent on.

The staging folder is an output folder like any other (`run_folder`), of which each shard leaves
when it has arrived at the far end; so it holds a few shards at a time, and whatever a run that
was interrupted had finished.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from .._utils.failures import machine_error
from .._utils.paths import user_path
from ..errors import OptionError, OutputError
from ..planning.partition import ArrayTask
from ..planning.shards import PlannedShard
from ..storage.location import WritableLocation
from ..tensors.safetensors_header import INDEX_NAME
from .checksums import CHECKSUMS_NAME
from .disk_space import check_space, disk_full, is_disk_full
from .executor import Callbacks
from .output import Executor, OutputResult, OutputSpec, refuse_overwriting_task
from .output_folder import OutputFolder
from .remote_folder import RemoteFolder
from .run_state import RECORD_NAME
from .uploads import Uploads, wait_for_earlier

__all__ = ["staging_folder", "staging_nbytes", "write_remote_output"]


def staging_folder(
    store: WritableLocation, staging: str | os.PathLike[str] | None, share: ArrayTask | None = None
) -> Path:
    """The folder of this machine in which what goes to a store is made: always the same for the
    same store and task, in `staging` or else in the user's cache."""
    digest = hashlib.sha256(store.identity.encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    parent = user_path(staging) if staging is not None else user_path(cache) / "gptoss_stream"
    return parent / f"staging-{digest}{f'-{share.tag}' if share else ''}"


def staging_nbytes(shards: Sequence[PlannedShard], max_staged: int) -> int:
    """The disk space that making some shards takes, `max_staged` at a time."""
    largest = sorted((shard.nbytes for shard in shards), reverse=True)[:max_staged]
    return sum(largest) + max((shard.spill_nbytes for shard in shards), default=0)


def write_remote_output(
    store: WritableLocation,
    contents: OutputSpec,
    maker: Executor,
    *,
    staging: Path,
    max_staged: int,
    overwrite: bool,
    on_start: Callable[[int], None],
    on_bytes: Callable[[int], None],
    share: ArrayTask | None = None,
) -> OutputResult:
    """Make `contents`, or a task's `share` of its shards, in a store.

    At most `max_staged` shards are in the folder `staging` at a time, and it is deleted at the
    end. The rest as in `output.make_output`. Raises `OptionError`, `OutputError`, `MachineError`
    and what the maker raises.
    """
    refuse_overwriting_task(share, overwrite=overwrite)
    if max_staged < 1:
        raise OptionError(f"{max_staged} staged shards: there must be at least one")
    names = [shard.name for shard in contents.shards]
    run = OutputFolder(
        staging, contents.identity, names, contents.auxiliary_files, contents.checksums
    )
    remote, needed = RemoteFolder(store, checksums=contents.checksums), 0
    mine = share.of(contents.shards) if share else contents.shards
    wait_for_earlier(store)
    try:
        with run.locked(overwrite=overwrite) as partials:
            remote.prepare(run.state, overwrite=overwrite)
            sizes = {shard.name: shard.nbytes for shard in contents.shards}
            arrived = _arrived(remote, run, contents)
            for name in arrived:
                (staging / name).unlink(missing_ok=True)
            resumed = sum(shard.nbytes for shard in mine if shard.name in arrived)
            left = [shard for shard in mine if shard.name not in arrived]
            made = [s.name for s in left if run.is_finished(s.name, s.nbytes)]
            missing = [shard for shard in left if shard.name not in made]
            needed = staging_nbytes(missing, max_staged) if maker.in_process else 0
            check_space(staging, needed)
            maker.setup(None)
            on_start(resumed)
            is_complete = not left and remote.is_complete(run.state)
            if not is_complete:
                remote.begin(run.state)
                run.begin()
                callbacks = Callbacks(on_bytes, run.save_checksum)
                if share is not None:
                    callbacks = replace(callbacks, before_commit=lambda shard: remote.check())
                with Uploads(remote, staging, max_staged, run.sums.get) as uploads:
                    for name in made:
                        on_bytes(sizes[name])
                        uploads.add_made(name)
                    if maker.in_process:
                        callbacks = replace(
                            callbacks, on_shard_start=uploads.begin, on_shard_finished=uploads.add
                        )
                    maker.make(missing, run.state, staging, partials, callbacks)
                    uploads.finish()
                remote.look()
                is_complete = remote.is_complete(run.state) or (
                    len(_arrived(remote, run, contents)) == len(sizes)
                )
                if share is None and not is_complete:
                    raise OutputError(
                        f"{store}: a shard that was sent is not there as it was; leave the output "
                        "alone and run the same command again"
                    )
            if is_complete and not remote.is_complete(run.state):
                _finish(remote, run, contents)
            run.clear()  # also what a run has left that ended right before it could
        with suppress(OSError):  # another run may have begun in it
            staging.rmdir()
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(error, staging, needed) from error
        raise machine_error(error, f"writing to {staging}") from error
    return OutputResult(resumed, is_complete)


def _finish(remote: RemoteFolder, run: OutputFolder, contents: OutputSpec) -> None:
    """Make the small files, and send them."""
    run.finish(contents.index, {})
    small = [*contents.auxiliary_files, CHECKSUMS_NAME, RECORD_NAME, INDEX_NAME]
    files = {n: run.path / n for n in small if n in run.state["files"]}
    remote.finish(files, {n: s for n, s in run.sums.items() if n in files})


def _arrived(remote: RemoteFolder, run: OutputFolder, contents: OutputSpec) -> set[str]:
    """The shards that are complete in the store, and summed where that is wanted."""
    found = {
        shard.name
        for shard in contents.shards
        if remote.is_finished(shard.name, shard.nbytes, run.sums.get(shard.name))
        and (not contents.checksums or run.sums.get(shard.name) or remote.sum(shard.name))
    }
    run.sums |= {n: known for n in found if (known := remote.sum(n)) is not None}
    return found
