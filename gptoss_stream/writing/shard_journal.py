"""The journal of a shard that is being written: how much of it is certainly on the disk.

The journal of `model-00001-of-00002.safetensors` is the file of this name with `.journal` after it,
in the same folder. It is a JSON object:

    run      the fingerprint of the run's state (`run_state`), which names source and version
    header   the SHA-256 of the shard's header
    chunk    the bytes of a chunk
    written  the bytes of the shard, from its beginning, that are on the disk
    inodes   the inode of the shard's file, and of each spill file of scales that is needed
    losses   what encoding these bytes to MXFP4 has lost (`encoding_report`)
    schema   the version of the journal (`strict_json.SCHEMA`)
    sha256   the SHA-256 of all this

Data are synced before a journal says that they are written, so that it is right after a power loss
too. A journal that is damaged, of another run, or beside other files than those that it was written
for (such as copies, which may be older) is not believed.
"""

from __future__ import annotations

import hashlib
import stat
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .._utils import strict_json
from ..planning.shards import PlannedShard
from ..tensors.encoding_loss import EncodingLoss
from .durable_files import remove, write_durably
from .encoding_report import read_losses
from .shard_file import sync_folder
from .spilled_scales import scales_file

__all__ = ["ShardJournal", "WrittenPart", "clear_leftovers"]

_SUFFIX = ".journal"
_MAX_NBYTES = 10_000_000


@dataclass(frozen=True, slots=True)
class WrittenPart:
    """The part of a shard that is on the disk."""

    nbytes: int = 0
    """Bytes from the beginning of the file."""
    losses: Mapping[str, EncodingLoss] = field(default_factory=dict)
    """What encoding them to MXFP4 has lost, by the name of the tensor of blocks."""


class ShardJournal:
    """The journal of one shard. Methods raise `OSError` as the system does.

    Args:
        folder: The folder in which the shard is written.
        shard: The shard.
        run: The fingerprint of the run's state.
        chunk_nbytes: The size of a chunk in bytes.
    """

    def __init__(self, folder: Path, shard: PlannedShard, run: str, chunk_nbytes: int) -> None:
        self._folder = folder
        self._shard = shard
        self._file = folder / f"{shard.name}{_SUFFIX}"
        self._chunk_nbytes = chunk_nbytes
        self._identity = {
            "run": run,
            "header": hashlib.sha256(shard.header).hexdigest(),
            "chunk": chunk_nbytes,
        }

    def write(self, part: WrittenPart, check: Callable[[], None]) -> None:
        """Say that a part of the shard is on the disk, durably.

        Args:
            part: The part.
            check: Raises an error if the source has changed or the folder is another run's.
        """
        losses = {name: asdict(loss) for name, loss in part.losses.items()}
        content: dict[str, Any] = {"schema": strict_json.SCHEMA, **self._identity}
        content |= {"written": part.nbytes, "losses": losses}
        content["inodes"] = [file.lstat().st_ino for file, _ in self._files(part.nbytes)]
        text = strict_json.dumps({**content, "sha256": _digest(content)})
        write_durably(self._file, text, self._folder, check)

    def read(self) -> WrittenPart:
        """Return the part of the shard that an interrupted run has left, which may be empty."""
        try:
            if not _is_own_file(self._file):
                return WrittenPart()
            with open(self._file, "rb") as opened:
                content = strict_json.loads(opened.read(_MAX_NBYTES))
            digest = content.pop("sha256")
            if digest != _digest(content):
                return WrittenPart()
            if content.pop("schema", strict_json.SCHEMA) != strict_json.SCHEMA:
                return WrittenPart()
            part = WrittenPart(content.pop("written"), read_losses(content.pop("losses")))
            has = self._has(part.nbytes, content.pop("inodes"))
            return part if has and content == self._identity else WrittenPart()
        except (FileNotFoundError, ValueError, TypeError, KeyError, AttributeError):
            return WrittenPart()

    def _files(self, written: int) -> list[tuple[Path, int]]:
        """Return the files that are needed to go on, and how many bytes each has at least."""
        shard = self._shard
        files = [(self._folder / shard.name, written)]
        for number, (blocks, scales) in enumerate(shard.encoded_pairs()):
            if shard.begin_of(blocks) < written < shard.begin_of(scales) + scales.nbytes:
                files.append((scales_file(self._folder, shard, number), scales.nbytes))
        return files

    def _has(self, written: int, inodes: list[int]) -> bool:
        """Return whether the files are those of the journal and have what it says."""
        if not 0 < written < self._shard.nbytes or written % self._chunk_nbytes:
            return False
        files = self._files(written)
        return all(_is_own_file(*file) for file in files) and inodes == [
            file.lstat().st_ino for file, _ in files
        ]

    def clear(self) -> None:
        """Delete what was written of the shard, the journal first."""
        if self._file.exists():
            remove(self._file)
            sync_folder(self._folder)  # or a power loss could bring it back beside another file
        for file in self._folder.glob(f"{self._shard.name}*"):
            remove(file)

    def close(self) -> None:
        """Delete the journal of a shard that is finished."""
        self._file.unlink(missing_ok=True)


def clear_leftovers(
    folder: Path, is_kept: Callable[[str], bool] = lambda name: False, *, keep_parts: bool = True
) -> int:
    """Delete what interrupted runs have left in a folder, other than shards with a journal.

    Args:
        folder: The folder, which need not exist.
        is_kept: Returns whether another file is kept, by its name.
        keep_parts: Whether to keep shards with a journal. A process that has one open could still
            write to it.

    Returns:
        The bytes of the unfinished shards that were there, with a journal or without.
    """
    if folder.is_symlink() or not folder.is_dir():
        remove(folder)
        return 0
    names = {file.name for file in folder.iterdir()}
    shards = {name for name in names if name.endswith(".safetensors")}
    journaled = tuple(sorted(name for name in shards if f"{name}{_SUFFIX}" in names))
    nbytes = sum(
        status.st_size
        for name in shards
        if stat.S_ISREG((status := (folder / name).lstat()).st_mode)
    )
    for name in names:
        is_part = keep_parts and name.startswith(journaled) and not name.endswith(".partial")
        if not is_part and not is_kept(name):
            remove(folder / name)
    return nbytes


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(strict_json.dumps(content)).hexdigest()


def _is_own_file(file: Path, nbytes: int = 0) -> bool:
    """Return whether a file has at least some bytes, and nobody else can have put it there.

    A link would let the run write to a file outside its folder.
    """
    try:
        status = file.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_size >= nbytes
