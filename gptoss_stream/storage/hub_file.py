"""An open file of a repository of the Hub."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Mapping
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


class Address:
    """From where a file can be downloaded at the moment, for all who have it open."""

    def __init__(self) -> None:
        self.link: DownloadLink | None = None
        self.linking = threading.Lock()
        self.etags: dict[str, str] = {}
        """The ETag of the first reply from each link."""


class HubFile:
    """An open file of a repository (see `File`), read from the Hub's cache or by range."""

    def __init__(self, location: HubRepository, info: FileInfo, address: Address) -> None:
        self._location = location
        self.info = info
        self._address = address
        self._cached: LocalFile | None = None
        self._opening = threading.Lock()
        self._has_searched_cache = False

    def read_into(self, out: memoryview, begin: int, stop: threading.Event) -> bool:
        """Fill memory with the file's bytes; check the checksum if that is the whole file."""
        if not self._has_searched_cache:
            with self._opening:
                self._cached = self._cached or self._open_cached()
                self._has_searched_cache = True
        if self._cached is not None:
            self._cached.read_into(out, begin, stop)
            self._cached.check_unchanged()
            return True
        where = self._location.display_path(self.info.name)
        is_whole = len(out) == self.info.nbytes
        if is_whole and self.info.sha256 is None:
            self._read_small(out, where, stop)
        else:
            read_range(self._get_link, out, begin, self.info.nbytes, where, stop, self._check_etag)
        if is_whole and not _has_checksum(out, self.info):
            raise changed(where)
        return True

    def _check_etag(self, link: DownloadLink, headers: Mapping[str, str]) -> None:
        """Check that all replies from an address have the same ETag."""
        etag = headers.get("ETag")
        if etag is not None and self._address.etags.setdefault(link.url, etag) != etag:
            raise changed(self._location.display_path(self.info.name))

    def _read_small(self, out: memoryview, where: str, stop: threading.Event) -> None:
        """Read a whole file that the Hub sends itself, without a request for its address."""
        link = DownloadLink(self._url, self._headers())
        try:
            read_range(lambda renew: link, out, 0, len(out), where, stop)
        except CheckpointError:
            self._resolve()  # says why the Hub refuses it
            raise

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
        where = location.display_path(info.name)
        with source_errors(where):
            found = retry(
                lambda: huggingface_hub.get_hf_file_metadata(
                    self._url, token=location.token, timeout=TIMEOUT
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
        headers = self._headers()
        if target != home:
            headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
        return DownloadLink(found.location, headers, is_signed=target != home)

    @property
    def _url(self) -> str:
        """The file's address at the Hub."""
        return huggingface_hub.hf_hub_url(
            self._location.repo,
            self._location.repo_path(self.info.name),
            revision=self._location.commit,
            endpoint=constants.ENDPOINT,
        )

    def _headers(self) -> dict[str, str]:
        """Return the headers of requests to the Hub."""
        return huggingface_hub.utils.build_hf_headers(
            token=self._location.token, library_name="gptoss_stream"
        )

    def _get_link(self, renew: bool) -> DownloadLink:
        """Return the file's address, a new one if `renew` is set."""
        address = self._address
        used = address.link
        with address.linking:
            # Another thread may have renewed it meanwhile.
            if address.link is None or (renew and address.link is used):
                address.link = self._resolve()
            return address.link

    def check_unchanged(self) -> None:
        """Check nothing more: a file of a commit cannot change.

        The Hub has named its commit, size and checksum with each address, and all replies from an
        address had the same ETag.
        """
        if self._cached is not None:
            self._cached.check_unchanged()

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
