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
from pathlib import Path

from .checksums import SUMS_NAME
from .errors import OptionError, machine_error, user_path
from .executor import Watch, execute
from .far_folder import FarFolder
from .operands import Reader
from .output import Contents, check_space, disk_full, is_disk_full
from .places import Store
from .planner import PlannedShard
from .run_folder import RunFolder
from .run_state import RECORD_NAME
from .safetensors_format import INDEX_NAME
from .uploads import Uploads, wait_for_earlier

__all__ = ["make_remote_output", "staged_nbytes", "staging_folder"]


def staging_folder(store: Store, staging: str | os.PathLike[str] | None) -> Path:
    """The folder of this machine in which what goes to a store is made: always the same for the
    same store, in `staging` or else in the user's cache."""
    digest = hashlib.sha256(store.identity.encode()).hexdigest()[:16]
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    parent = user_path(staging) if staging is not None else user_path(cache) / "gptoss_stream"
    return parent / f"staging-{digest}"


def staged_nbytes(shards: Sequence[PlannedShard], max_staged: int) -> int:
    """The disk space that making some shards takes, `max_staged` at a time."""
    largest = sorted((shard.nbytes for shard in shards), reverse=True)[:max_staged]
    return sum(largest) + max((shard.scratch_nbytes for shard in shards), default=0)


def make_remote_output(
    store: Store,
    contents: Contents,
    reader: Reader,
    *,
    staging: Path,
    max_staged: int,
    overwrite: bool,
    workers: int,
    on_start: Callable[[int], None],
    on_bytes: Callable[[int], None],
    scarce: bool = False,
) -> int:
    """Make `contents` in a store; returns how many bytes of its shards were finished before.

    At most `max_staged` shards are in the folder `staging` at a time, and it is deleted at the
    end. The rest as in `output.make_output`. Raises `OptionError`, `OutputError`, `MachineError`
    and what the reader raises.
    """
    if max_staged < 1:
        raise OptionError(f"{max_staged} staged shards: there must be at least one")
    names = [shard.name for shard in contents.shards]
    run = RunFolder(staging, contents.identity, names, contents.companions, contents.checksums)
    far, needed = FarFolder(store), 0
    wait_for_earlier(store)
    try:
        with run.locked(overwrite=overwrite):
            far.prepare(run.state, overwrite=overwrite)
            sizes = {shard.name: shard.nbytes for shard in contents.shards}
            arrived = {
                name
                for name, nbytes in sizes.items()
                if far.is_finished(name, nbytes, run.sums.get(name))
                and (not contents.checksums or run.sums.get(name) or far.sum(name))
            }
            run.sums |= {n: found for n in arrived if (found := far.sum(n)) is not None}
            for name in arrived:
                (staging / name).unlink(missing_ok=True)
            left = [shard for shard in contents.shards if shard.name not in arrived]
            made = [s.name for s in left if run.is_finished(s.name, s.nbytes)]
            missing = [shard for shard in left if shard.name not in made]
            needed = staged_nbytes(missing, max_staged)
            check_space(staging, needed)
            on_start(sum(sizes[name] for name in arrived))
            if left or not far.is_complete(run.state):
                far.begin(run.state)
                run.begin()
                with Uploads(store, staging, max_staged, run.sums.get) as uploads:
                    for name in made:
                        on_bytes(sizes[name])
                        uploads.add_made(name)
                    execute(
                        missing,
                        reader,
                        staging,
                        partials=run.work,
                        workers=workers,
                        watch=Watch(on_bytes, run.note_sum, uploads.begin, uploads.add),
                        scarce=scarce,
                    )
                    uploads.finish()
                run.finish(contents.index)
                small = [*contents.companions, SUMS_NAME, RECORD_NAME, INDEX_NAME]
                files = {n: staging / n for n in small if n in run.state["files"]}
                far.finish(files, {n: s for n, s in run.sums.items() if n in files})
            run.clear()  # also what a run has left that ended right before it could
        with suppress(OSError):  # another run may have begun in it
            staging.rmdir()
    except OSError as error:
        if is_disk_full(error):
            raise disk_full(error, staging, needed) from error
        raise machine_error(error, f"writing to {staging}") from error
    return sum(sizes[name] for name in arrived)
