"""An open file of a repository of the Hub."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from ..errors import CheckpointError, MachineError
from .byte_ranges import TIMEOUT, DownloadLink, origin, read_range
from .hub_requests import retry, source_errors
from .local_folder import LocalFile, LocalFolder
from .location import FileInfo, changed

if TYPE_CHECKING:
    from .hub import HubRepository

__all__ = ["HubFile", "cached_folder"]


class HubFile:
    """An open file of a repository (see `File`), read from the Hub's cache or by range."""

    def __init__(self, location: HubRepository, info: FileInfo) -> None:
        self._location = location
        self.info = info
        self._link: DownloadLink | None = None
        self._linking = threading.Lock()
        self._cached: LocalFile | None = None
        self._has_searched_cache = False
        self._needs_check = False

    def read_into(self, out: memoryview, begin: int, stop: threading.Event) -> None:
        """Fill memory with the file's bytes; check the checksum if that is the whole file."""
        if not self._has_searched_cache:
            with self._linking:
                self._cached = self._cached or self._open_cached()
                self._has_searched_cache = True
        if self._cached is not None:
            self._cached.read_into(out, begin, stop)
            return
        where = self._location.display_path(self.info.name)
        self._needs_check = True
        read_range(self._get_link, out, begin, self.info.nbytes, where, stop)
        if len(out) == self.info.nbytes and not _has_checksum(out, self.info):
            raise changed(where)

    def _open_cached(self) -> LocalFile | None:
        """Open the file in huggingface_hub's cache, if it is complete."""
        location, info = self._location, self.info
        path = huggingface_hub.try_to_load_from_cache(
            location.repo, location.repo_path(info.name), revision=location.commit
        )
        if not isinstance(path, str):
            return None
        # The cache names a file by its ETag, and only a complete file has a name in a snapshot.
        is_complete = os.path.basename(os.path.realpath(path)) == info.version
        file = LocalFolder(Path(path).parent).open(Path(path).name) if is_complete else None
        if file is not None and file.info.nbytes != info.nbytes:
            file.close()
            return None
        return file

    def _resolve(self) -> DownloadLink:
        """Request the file's address; raise `CheckpointError` if the file has changed."""
        location, info = self._location, self.info
        url = huggingface_hub.hf_hub_url(
            location.repo,
            location.repo_path(info.name),
            revision=location.commit,
            endpoint=constants.ENDPOINT,
        )
        where = location.display_path(info.name)
        with source_errors(where):
            found = retry(
                lambda: huggingface_hub.get_hf_file_metadata(
                    url, token=location.token, timeout=TIMEOUT
                ),
                where,
            )
        if found.commit_hash is None:
            raise MachineError(
                f"{where}: the server's answer is not one of the Hub: it names no commit; check "
                "HF_ENDPOINT and the network"
            )
        if (
            found.commit_hash != location.commit
            or found.size not in (None, info.nbytes)
            or found.etag not in (None, info.version)
        ):
            raise changed(where)
        home, target = origin(constants.ENDPOINT), origin(found.location)
        if home[0] == "https" and target[0] != "https":
            raise MachineError(f"{where}: the Hub redirects from https to an unprotected address")
        headers = huggingface_hub.utils.build_hf_headers(
            token=location.token, library_name="gptoss_stream"
        )
        if target != home:
            headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
        return DownloadLink(found.location, headers, is_signed=target != home)

    def _get_link(self, renew: bool) -> DownloadLink:
        """Return the file's address, a new one if `renew` is set."""
        used = self._link
        with self._linking:
            # Another thread may have renewed it meanwhile.
            if self._link is None or (renew and self._link is used):
                self._link = self._resolve()
            return self._link

    def check_unchanged(self) -> None:
        """Check with the Hub that the file is unchanged, if it was read since the last check."""
        if self._needs_check:
            self._needs_check = False
            self._resolve()

    def close(self) -> None:
        """Close the cached file, if there is one."""
        if self._cached is not None:
            self._cached.close()


def _has_checksum(data: memoryview, info: FileInfo) -> bool:
    """Return whether a whole file has the checksum that the Hub lists: SHA-256, or git's SHA-1."""
    if info.sha256 is not None:
        return hashlib.sha256(data).hexdigest() == info.sha256
    digest = hashlib.sha1(b"blob %d\0" % len(data), usedforsecurity=False)
    digest.update(data)
    return digest.hexdigest() == info.version


def cached_folder(repo: str, revision: str | None, subfolder: str) -> LocalFolder:
    """Return the folder of a repository in the Hub's cache, without a request."""
    with source_errors(f"hf://{repo}"):
        try:
            path = huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True)
        except LocalEntryNotFoundError:
            raise CheckpointError(
                f"hf://{repo}: HF_HUB_OFFLINE is set, and it is not in the cache; unset it, or "
                "download the repository first"
            ) from None
    return LocalFolder(Path(path) / subfolder)
