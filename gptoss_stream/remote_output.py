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

from .checksums import SUMS_NAME
from .errors import OptionError, OutputError, machine_error, user_path
from .executor import Watch
from .far_folder import FarFolder
from .output import (
    Contents,
    Done,
    Maker,
    check_space,
    disk_full,
    is_disk_full,
    refuse_overwriting_share,
)
from .places import Store
from .planner import PlannedShard
from .run_folder import RunFolder
from .run_state import RECORD_NAME
from .safetensors_format import INDEX_NAME
from .share import Share
from .uploads import Uploads, wait_for_earlier

__all__ = ["make_remote_output", "staged_nbytes", "staging_folder"]


def staging_folder(
    store: Store, staging: str | os.PathLike[str] | None, share: Share | None = None
) -> Path:
    """The folder of this machine in which what goes to a store is made: always the same for the
    same store and task, in `staging` or else in the user's cache."""
    digest = hashlib.sha256(store.identity.encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    parent = user_path(staging) if staging is not None else user_path(cache) / "gptoss_stream"
    return parent / f"staging-{digest}{f'-{share.tag}' if share else ''}"


def staged_nbytes(shards: Sequence[PlannedShard], max_staged: int) -> int:
    """The disk space that making some shards takes, `max_staged` at a time."""
    largest = sorted((shard.nbytes for shard in shards), reverse=True)[:max_staged]
    return sum(largest) + max((shard.scratch_nbytes for shard in shards), default=0)


def make_remote_output(
    store: Store,
    contents: Contents,
    maker: Maker,
    *,
    staging: Path,
    max_staged: int,
    overwrite: bool,
    on_start: Callable[[int], None],
    on_bytes: Callable[[int], None],
    share: Share | None = None,
) -> Done:
    """Make `contents`, or a task's `share` of its shards, in a store.

    At most `max_staged` shards are in the folder `staging` at a time, and it is deleted at the
    end. The rest as in `output.make_output`. Raises `OptionError`, `OutputError`, `MachineError`
    and what the maker raises.
    """
    refuse_overwriting_share(share, overwrite=overwrite)
    if max_staged < 1:
        raise OptionError(f"{max_staged} staged shards: there must be at least one")
    names = [shard.name for shard in contents.shards]
    run = RunFolder(staging, contents.identity, names, contents.companions, contents.checksums)
    far, needed = FarFolder(store, checksums=contents.checksums), 0
    mine = share.of(contents.shards) if share else contents.shards
    wait_for_earlier(store)
    try:
        with run.locked(overwrite=overwrite) as partials:
            far.prepare(run.state, overwrite=overwrite)
            sizes = {shard.name: shard.nbytes for shard in contents.shards}
            arrived = _arrived(far, run, contents)
            for name in arrived:
                (staging / name).unlink(missing_ok=True)
            resumed = sum(shard.nbytes for shard in mine if shard.name in arrived)
            left = [shard for shard in mine if shard.name not in arrived]
            made = [s.name for s in left if run.is_finished(s.name, s.nbytes)]
            missing = [shard for shard in left if shard.name not in made]
            needed = staged_nbytes(missing, max_staged) if maker.is_here else 0
            check_space(staging, needed)
            maker.meet(None)
            on_start(resumed)
            is_complete = not left and far.is_complete(run.state)
            if not is_complete:
                far.begin(run.state)
                run.begin()
                watch = Watch(on_bytes, run.note_sum)
                if share is not None:
                    watch = replace(watch, on_whole=lambda shard: far.check())
                with Uploads(far, staging, max_staged, run.sums.get) as uploads:
                    for name in made:
                        on_bytes(sizes[name])
                        uploads.add_made(name)
                    if maker.is_here:
                        watch = replace(watch, on_begin=uploads.begin, on_shard=uploads.add)
                    maker.make(missing, run.state, staging, partials, watch)
                    uploads.finish()
                far.look()
                is_complete = far.is_complete(run.state) or (
                    len(_arrived(far, run, contents)) == len(sizes)
                )
                if share is None and not is_complete:
                    raise OutputError(
                        f"{store}: a shard that was sent is not there as it was; leave the output "
                        "alone and run the same command again"
                    )
            if is_complete and not far.is_complete(run.state):
                _finish(far, run, contents)
            run.clear()  # also what a run has left that ended right before it could
        with suppress(OSError):  # another run may have begun in it
            staging.rmdir()
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(error, staging, needed) from error
        raise machine_error(error, f"writing to {staging}") from error
    return Done(resumed, is_complete)


def _finish(far: FarFolder, run: RunFolder, contents: Contents) -> None:
    """Make the small files, and send them."""
    run.finish(contents.index, {})
    small = [*contents.companions, SUMS_NAME, RECORD_NAME, INDEX_NAME]
    files = {n: run.path / n for n in small if n in run.state["files"]}
    far.finish(files, {n: s for n, s in run.sums.items() if n in files})


def _arrived(far: FarFolder, run: RunFolder, contents: Contents) -> set[str]:
    """The shards that are complete in the store, and summed where that is wanted."""
    found = {
        shard.name
        for shard in contents.shards
        if far.is_finished(shard.name, shard.nbytes, run.sums.get(shard.name))
        and (not contents.checksums or run.sums.get(shard.name) or far.sum(shard.name))
    }
    run.sums |= {n: known for n in found if (known := far.sum(n)) is not None}
    return found
