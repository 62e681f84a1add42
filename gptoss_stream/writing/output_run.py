"""The run that owns a local output folder: begins, resumes, overwrites and finishes it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .._utils import strict_json
from .._utils.temporary_file import delete_own
from ..checkpoint.auxiliary_files import CopiedFile
from ..checkpoint.source_card import CARD_NAME
from ..errors import OutputError
from ..tensors.encoding_loss import EncodingLoss
from ..tensors.safetensors_header import INDEX_NAME
from .checksums import CHECKSUMS_NAME, build_checksums, parse_checksums
from .deletion import delete_run
from .durable_files import copied_checksum, write_durably
from .encoding_report import (
    LOSSES_SUFFIX,
    REPORT_NAME,
    build_report,
    parse_losses,
    parse_report,
    reported_losses,
)
from .folder_lock import FolderLock, is_lock
from .output_folder import OutputFolder
from .output_spec import OutputSpec
from .receipts import RECEIPT_SUFFIX
from .run_state import RECORD_NAME, refuse_foreign_files, refuse_other_run
from .shard_file import sync_folder
from .shard_journal import clear_leftovers
from .shard_summary import ShardSummary

__all__ = ["OutputRun"]


class OutputRun(OutputFolder):
    """An output folder and the run that writes it.

    Methods raise `OutputError` for a folder that is in use, holds foreign files, or belongs to
    another run, and `OSError` as the system does.

    Args:
        path: The folder, which need not exist.
        spec: What the run writes.
    """

    def __init__(self, path: Path, spec: OutputSpec) -> None:
        super().__init__(path, checksums=spec.checksums)
        self.state = spec.state
        """The state of this run or, once the folder is locked, of the run that it resumes."""
        self._auxiliary_files = spec.auxiliary_files
        self._encoding = spec.encoding
        self._has_index = spec.has_index
        self._encoded = [
            blocks.name for shard in spec.shards for blocks, _ in shard.encoded_pairs()
        ]
        self._outdated: dict[str, tuple[int, int]] = {}
        self._known_losses: dict[str, EncodingLoss] = {}
        self._partial_folder = self.work
        self.begun_nbytes = 0
        """Bytes of unfinished shards that an interrupted run has left; set by `locked`."""
        self._lock = FolderLock(path)

    @contextmanager
    def locked(self, *, overwrite: bool, task: str | None = None) -> Iterator[Path]:
        """Lock the folder and delete leftovers of runs that were killed.

        Leaves no trace if nothing is begun while it is locked.

        Args:
            overwrite: Whether to delete what an earlier run wrote, and only that.
            task: The name of an array task, which shares the folder with the others of its run.

        Yields:
            The folder for partial files.
        """
        if self.path.exists() and not self.path.is_dir():
            raise OutputError(f"{self.path}: a file, not a folder; name another output")
        self._refuse_links()
        existed = self.path.exists()
        if not self.work.exists():
            self._refuse_foreign()
        may_delete = not self.work.exists()
        self._lock.acquire(task)
        partial_folder = self.work if task is None else self.work / task
        try:
            self._refuse_foreign()
            self.check_lock()
            self.delete_leftovers()
            self._prepare(overwrite, partial_folder)
            may_delete = True
            if task is not None:
                partial_folder.mkdir(exist_ok=True)
                self._partial_folder = partial_folder
            yield partial_folder
        except (OSError, OutputError):  # which may only follow from this:
            with suppress(OSError):
                self._lock.check()
            raise
        finally:
            try:
                if self._lock.is_held():  # otherwise all of it is another run's
                    self._clean_up(task, partial_folder, may_delete, existed)
            finally:
                self._lock.release()

    def _clean_up(
        self, task: str | None, partial_folder: Path, may_delete: bool, existed: bool
    ) -> None:
        """Delete what a run leaves that has ended, or was refused."""
        self._lock.release_turn()
        if task is not None:
            with suppress(OSError):
                clear_leftovers(partial_folder)
                partial_folder.rmdir()  # unless a part of a shard is kept
        if may_delete and self._is_unused(task):
            self._lock.remove_work()
            if not existed:
                with suppress(OSError):  # something else is in it: then it stays
                    self.path.rmdir()

    def _is_unused(self, task: str | None) -> bool:
        """Return whether no run is unfinished in the folder and no other task is active."""
        if self.run_file.exists():
            return False
        # Another task may have begun, and ended, since the line above.
        return task is None or (self._lock.is_last() and not self.run_file.exists())

    def _refuse_links(self) -> None:
        """Refuse folders that are links: what is in them belongs to somebody else."""
        is_readable = self.path.is_dir() and not self.work.is_symlink()
        found = self.read_state() if is_readable else None
        names = [*self.state["files"], *(found["files"] if found else ())]
        for folder in {self.work, *((self.path / name).parent for name in names)} - {self.path}:
            if folder.is_symlink():
                raise OutputError(
                    f"{folder}: a link to {os.path.realpath(folder)}; remove the link or name "
                    "another output"
                )

    def _refuse_foreign(self) -> None:
        if self.path.is_dir():
            names = [file.name for file in self.path.iterdir()]
            refuse_foreign_files(str(self.path), names, self.read_state())

    def _prepare(self, overwrite: bool, partial_folder: Path) -> None:
        """Delete an earlier run if that is wanted, or resume it; delete leftovers."""
        found = self.read_state()
        if found is not None and overwrite:
            self._delete(found["files"])
            found = None
        if found is not None:
            unfinished = self.run_file.exists()
            refuse_other_run(str(self.path), found, self.state, unfinished=unfinished)
            self.state = dict(found)
        is_task = partial_folder != self.work  # other tasks may be running
        self.begun_nbytes = clear_leftovers(
            partial_folder,
            lambda name: not is_task and self._is_kept(name),
            keep_parts=not self._lock.may_be_shared,
        )
        self._read_checksums()
        self._outdated = self.identities(INDEX_NAME, RECORD_NAME)  # of a run that lost a file

    def _is_kept(self, name: str) -> bool:
        """Return whether a file of the work folder is not a leftover."""
        is_known = name.endswith((".sha256", LOSSES_SUFFIX, RECEIPT_SUFFIX))
        return is_known or name == self.run_file.name or is_lock(name)

    def _delete(self, names: Sequence[str]) -> None:
        """Delete the files of a run, but for a model card of the folder's users."""
        others_card = [] if self.others_card() is None else [CARD_NAME]
        delete_run(self.path, {*names} - {*others_card}, self.check_lock)

    def _read_checksums(self) -> None:
        with suppress(FileNotFoundError, ValueError):  # such shards are written again
            self.checksums = parse_checksums((self.path / CHECKSUMS_NAME).read_bytes())
        for file in self.work.glob("*.sha256"):
            self.checksum(file.stem)

    @property
    def is_complete(self) -> bool:
        """Whether the run was finished and all its files still exist."""
        return not self.run_file.exists() and all(
            (self.path / name).is_file() for name in self.state["files"]
        )

    def begin(self, *, auxiliary: bool = True) -> None:
        """Write the state and the auxiliary files; other tasks may then begin.

        Args:
            auxiliary: Whether to write the auxiliary files, or leave them to
                `write_auxiliary_files`.
        """
        if not self.run_file.exists():
            self._write(self.run_file, strict_json.dumps(self.state))
        with suppress(FileNotFoundError):
            self.keep_report((self.path / REPORT_NAME).read_bytes())
        self.check_lock()
        for name, identity in self._outdated.items():
            delete_own(self.path / name, identity)  # not those of a run that took the folder over
        if auxiliary:
            self.write_auxiliary_files()
        self._lock.release_turn()

    def write_auxiliary_files(self) -> None:
        """Write the auxiliary files, but for a remote one that another task has copied."""
        for name, data in self._auxiliary_files.items():
            if name == CARD_NAME and (card := self.others_card()) is not None:
                self.checksums[name] = hashlib.sha256(card).hexdigest()
            elif self._lock.is_task and (known := copied_checksum(self.path / name, data)):
                self.checksums[name] = known
            else:
                self._write_with_checksum(name, data)

    def replace_card(self, card: bytes) -> None:
        """Finish with another model card than the planned one."""
        self._write_with_checksum(CARD_NAME, card)

    def clear(self) -> None:
        """Delete all files of the run: they were uploaded."""
        (self.path / CARD_NAME).unlink(missing_ok=True)  # also one of the location's users
        self._delete(self.state["files"])

    def check_lock(self) -> None:
        """Refuse to go on if another run took the folder over while this one was suspended."""
        self._lock.check(if_silent=True)

    def before_commit(self, name: str, summary: ShardSummary) -> None:
        """Keep what is known of a shard, if the run still has its folder."""
        self._lock.check()
        self.save_summary(name, summary, self._partial_folder, self.check_lock)

    def keep_report(self, text: bytes) -> None:
        """Keep what a report says of shards that are not written again."""
        self._known_losses = reported_losses(text)

    def encoding_report(self) -> dict[str, Any] | None:
        """Return the report of a finished run about encoding to MXFP4; None if nothing was."""
        if REPORT_NAME not in self.state["files"]:
            return None
        try:
            return parse_report((self.path / REPORT_NAME).read_bytes())
        except FileNotFoundError:  # it is not finished, or has lost the file
            return None

    def _write_report(self, losses: Mapping[str, bytes]) -> None:
        """Write the report about encoding to MXFP4, if anything was encoded."""
        if self._encoding is not None:
            known = dict(self._known_losses)
            for text in losses.values():
                known |= parse_losses(text)
            report = strict_json.dumps(build_report(self._encoding, known, self._encoded))
            self._write_with_checksum(REPORT_NAME, report)

    def finish(
        self,
        index: bytes,
        sizes: Mapping[str, int],
        losses: Mapping[str, bytes] | None = None,
    ) -> bool:
        """Write the record, the checksums and last of all the index, if all shards are finished.

        Args:
            index: The text of the index, which is not written if the output has none.
            sizes: The bytes of each shard, by name.
            losses: What encoding each shard has lost, by name; by default what this folder knows.

        Returns:
            Whether the output is complete; other tasks may still have shards to write.
        """
        if self._lock.is_task:
            self._lock.acquire_turn()
            self._read_checksums()
        try:
            self._lock.check()
            if self.is_complete:  # finished by another task
                return True
            if not all(self.is_finished(name, nbytes) for name, nbytes in sizes.items()):
                return False
            self._write_report(self.losses() if losses is None else losses)
            self._write_with_checksum(RECORD_NAME, strict_json.dumps(self.state))
            if self._has_checksums:
                known = {n: self.checksums[n] for n in self.state["files"] if n in self.checksums}
                if self._has_index:
                    known[INDEX_NAME] = hashlib.sha256(index).hexdigest()
                self._write(self.path / CHECKSUMS_NAME, build_checksums(known))
            if self._has_index:
                self._write(self.path / INDEX_NAME, index)
            self.check_lock()
            self.run_file.unlink()
            sync_folder(self.work)
            return True
        finally:
            self._lock.release_turn()

    def _write_with_checksum(self, name: str, data: bytes | CopiedFile) -> None:
        target = self.path / name
        target.parent.mkdir(parents=True, exist_ok=True)
        self.checksums[name] = self._write(target, data)

    def _write(self, target: Path, data: bytes | CopiedFile) -> str:
        return write_durably(target, data, self._partial_folder, self.check_lock)
