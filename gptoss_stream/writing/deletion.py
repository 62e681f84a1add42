"""Deletes the files of a run from a local output folder."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import suppress
from pathlib import Path

from ..tensors.safetensors_header import INDEX_NAME
from .durable_files import remove
from .folder_lock import is_lock
from .run_state import RECORD_NAME, RUN_NAME, WORK_NAME
from .shard_file import sync_folder

__all__ = ["delete_run"]


def delete_run(folder: Path, names: Collection[str], check: Callable[[], None]) -> None:
    """Delete the files of a run, but for the locks of its folder.

    The index goes first: without it nothing looks finished. The record of which files are the
    tool's goes last, so that a deletion that was interrupted can be repeated.

    Args:
        folder: The output folder.
        names: The files of the run.
        check: Called before each file; raises if the folder is another run's now.
    """
    check()
    (folder / INDEX_NAME).unlink(missing_ok=True)
    # Before any shard: a worker of that run can then no longer commit one.
    with suppress(FileNotFoundError):
        (folder / RUN_NAME).replace(folder / RECORD_NAME)
    for file in (folder / WORK_NAME).iterdir():
        if not is_lock(file.name):
            check()
            remove(file)
    for name in (*sorted({*names} - {INDEX_NAME, RECORD_NAME}), RECORD_NAME):
        check()
        (folder / name).unlink(missing_ok=True)
    for subfolder in {Path(name).parent for name in names} - {Path()}:
        with suppress(OSError):  # something else may be in it
            (folder / subfolder).rmdir()
    sync_folder(folder)
