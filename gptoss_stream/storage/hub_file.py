"""A repository of the Hub, to read from and to write to.

A revision is resolved to a commit once, and everything is read of that commit. `huggingface_hub`
talks to the Hub: names, login, endpoint, proxies, cache, uploads and commits are its; the checks
of what arrives are ours (`_ranges`). A token goes to the Hub's own origin only.
"""

from __future__ import annotations

import hashlib
import threading
from typing import TYPE_CHECKING

from .byte_ranges import DownloadLink, read_range
from .local_folder import LocalFile
from .location import FileInfo, changed

if TYPE_CHECKING:
    from .hub import HubRepository

__all__ = ["HubFile"]


class HubFile:
    """A file of a repository (see `places.File`)."""

    def __init__(self, location: HubRepository, info: FileInfo) -> None:
        self._location = location
        self.info = info
        self._link: DownloadLink | None = None
        self._linking = threading.Lock()
        self._cached: LocalFile | None = None
        self._was_looked_for = False
        self._is_unchecked = False

    def read_into(self, out: memoryview, at: int, stop: threading.Event) -> None:
        """Fill `out` with the bytes from `at` on, and check the sum where that is all of it."""
        if not self._was_looked_for:
            with self._linking:
                self._cached = self._cached or self._location.cached(self.info)
                self._was_looked_for = True
        if self._cached is not None:
            self._cached.read_into(out, at, stop)
            return
        where = self._location.display_path(self.info.name)
        self._is_unchecked = True
        read_range(self._get_link, out, at, self.info.nbytes, where, stop)
        if len(out) == self.info.nbytes and not _is_right(out, self.info):
            raise changed(where)

    def _get_link(self, renew: bool) -> DownloadLink:
        used = self._link
        with self._linking:
            # Another thread may have renewed it meanwhile.
            if self._link is None or (renew and self._link is used):
                self._link = self._location.resolve(self.info)
            return self._link

    def check_unchanged(self) -> None:
        """Ask the Hub once more, if anything was read since it was asked."""
        if self._is_unchecked:
            self._is_unchecked = False
            self._location.resolve(self.info)

    def close(self) -> None:
        """Close what is held of the cache."""
        if self._cached is not None:
            self._cached.close()


def _is_right(data: memoryview, info: FileInfo) -> bool:
    """Whether a whole file has the sum that the Hub lists: SHA-256, or git's of its content."""
    if info.sha256 is not None:
        return hashlib.sha256(data).hexdigest() == info.sha256
    digest = hashlib.sha1(b"blob %d\0" % len(data), usedforsecurity=False)
    digest.update(data)
    return digest.hexdigest() == info.version
