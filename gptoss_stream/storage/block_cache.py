"""Keeps blocks of remote files on disk, in a folder that processes share.

A block is a file that is named by a hash of what identifies its bytes. It is written under another
name and renamed, and a digest at its end shows whether it is whole: a damaged one is deleted, as if
it had never been there. So nothing need be synced to the disk, and no lock is needed to read or to
write.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .._utils.paths import user_path
from .location import FileInfo, Location

__all__ = ["BlockCache", "block_key", "default_cache_folder"]

_DIGEST_NBYTES = 16
_SUFFIX = ".block"
_PARTIAL = ".partial"
_NAME = re.compile(rf"[0-9a-f]{{40}}{re.escape(_SUFFIX)}|\d+-\w+{re.escape(_PARTIAL)}")
_LOCK_NAME = "lock"
_PARTIAL_SECONDS = 3600.0  # a partial file that is older belongs to a process that is gone
_SCAN_SHARE = 64
"""A process looks at the folder again when it has written this part (1/64) of the bound."""
_FREE_SHARE = 8
"""This part (1/8) of the bound is kept free for what processes write before they look again."""
_STRONG_VERSION = re.compile(r'"[^"]*"|(?!\d{1,20}$|\d{4}-\d\d-\d\d)[\w+/=-]+')
"""A strong ETag, or a hash. A time is none: it does not tell apart two versions within a second, or
two files whose addresses differ only in their secret parts. Nor is a weak ETag, by definition."""


def default_cache_folder() -> Path:
    """Return the folder for blocks by default, by the XDG Base Directory Specification.

    The folder above it also holds what is staged for remote outputs.

    Raises:
        OptionError: If the user has no home folder.
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else user_path("~/.cache")) / "gptoss_stream" / "blocks"


def block_key(location: Location, info: FileInfo, begin: int, nbytes: int) -> str | None:
    """Return what identifies a block, without any secret.

    Args:
        location: Where the file is.
        info: The file.
        begin: The first byte of the block in the file.
        nbytes: The size of the block.

    Returns:
        The key; None if the location does not know the version of the file well enough.
    """
    version = info.sha256 or str(info.version)
    if not _STRONG_VERSION.fullmatch(version):
        return None
    return "\0".join((location.identity, info.name, str(info.nbytes), version, f"{begin}+{nbytes}"))


class BlockCache:
    """Blocks on disk, from any thread and any process. No error of the disk is raised.

    The blocks that were used least recently are deleted when the folder exceeds the bound. It holds
    for all processes together, as long as no more than eight write at a time.

    Args:
        folder: Where the blocks are. It is created, and only the user may access it.
        max_nbytes: The most bytes of all blocks in the folder.
    """

    def __init__(self, folder: Path, max_nbytes: int) -> None:
        self._folder = folder
        self._max_nbytes = max_nbytes
        self._unscanned_nbytes = 0  # written since the last look; several threads: about right
        self._can_read = self._can_write = False
        with suppress(OSError):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = folder.stat().st_mode
            if mode & 0o077:  # others could put blocks there whose digests are right
                folder.chmod(mode & 0o700)
            self._can_read = True
            self._trim(0)
            self._can_write = True

    def get(self, key: str, nbytes: int) -> bytes | None:
        """Return a block, or None if it is not there or is damaged.

        Args:
            key: See `block_key`.
            nbytes: The size of the block.
        """
        if not self._can_read:
            return None
        path = self._path(key)
        try:
            with open(path, "rb") as opened:
                data = opened.read(nbytes + _DIGEST_NBYTES + 1)
        except OSError:
            return None
        block, digest = data[:nbytes], data[nbytes:]
        is_whole = digest == _digest(path, block)
        with suppress(OSError):  # a read-only folder
            if is_whole:
                os.utime(path)
            else:
                path.unlink()
        return block if is_whole else None

    def put(self, key: str, data: bytes | memoryview) -> None:
        """Write a block, if the disk allows it.

        Args:
            key: See `block_key`.
            data: The bytes.
        """
        nbytes = len(data) + _DIGEST_NBYTES
        if not self._can_write or nbytes > self._max_nbytes // _FREE_SHARE:
            return
        try:
            is_due = self._unscanned_nbytes + nbytes > self._max_nbytes // _SCAN_SHARE
            if is_due and not self._trim(nbytes):
                return
            self._unscanned_nbytes += nbytes
            path = self._path(key)
            with _partial_file(self._folder) as (descriptor, partial):
                with open(descriptor, "wb") as opened:
                    opened.write(data)
                    opened.write(_digest(path, data))
                os.rename(partial, path)
        except OSError:  # such as a full disk: not tried again, which would slow down each read
            self._can_write = False

    def _path(self, key: str) -> Path:
        """Return the file of a block."""
        name = hashlib.blake2b(key.encode(errors="surrogatepass"), digest_size=20).hexdigest()
        return self._folder / f"{name}{_SUFFIX}"

    def _trim(self, nbytes: int) -> bool:
        """Delete what was used least recently, so that there is room for some bytes.

        Returns:
            Whether the folder is within its bound; False if another thread or process is deleting.
        """
        import fcntl

        descriptor = os.open(
            self._folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._delete_least_recent(self._max_nbytes - self._max_nbytes // _FREE_SHARE - nbytes)
            # Closing is not enough: a process that was forked meanwhile holds the lock too.
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        self._unscanned_nbytes = 0
        return True

    def _delete_least_recent(self, most_nbytes: int) -> None:
        """Delete blocks until the folder has no more than some bytes; and old partial files."""
        found: list[tuple[float, int, str]] = []
        with os.scandir(self._folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):  # renamed or deleted meanwhile
                    if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                        status = entry.stat(follow_symlinks=False)
                        found.append((status.st_mtime, status.st_size, entry.path))
        total = sum(nbytes for _, nbytes, _ in found)
        for changed, nbytes, path in sorted(found):
            is_partial = path.endswith(_PARTIAL)
            is_left_over = is_partial and changed < time.time() - _PARTIAL_SECONDS
            if is_left_over or (total > most_nbytes and not is_partial):
                with suppress(FileNotFoundError):
                    Path(path).unlink()
                total -= nbytes


def _digest(path: Path, data: bytes | memoryview) -> bytes:
    """Return the digest at the end of a block, which a file renamed to another block lacks."""
    return hashlib.blake2b(data, digest_size=_DIGEST_NBYTES, key=path.name.encode()).digest()


@contextmanager
def _partial_file(folder: Path) -> Iterator[tuple[int, str]]:
    """Create a partial file, which is deleted if an error occurs; give its descriptor and path."""
    descriptor, path = tempfile.mkstemp(_PARTIAL, f"{os.getpid()}-", folder)
    try:
        yield descriptor, path
    except BaseException:
        with suppress(OSError):
            Path(path).unlink()
        raise
