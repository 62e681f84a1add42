"""A folder of an HTTP server: files under one address, read by byte range."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from ..errors import CheckpointError, MachineError, OptionError
from .byte_ranges import TIMEOUT, DownloadLink, read_range, transport_errors
from .location import NEVER_STOP, FileInfo, ShownByName, changed
from .retries import FEW_TRIES, TRIES, RetryPolicy, retry_after

__all__ = ["HttpFolder"]

_log = logging.getLogger(__name__)
_SINGLE_SHARD = "model.safetensors"  # a server lists no files: without an index, try this name
_VERSION_HEADERS = ("ETag", "Last-Modified")


@dataclass(frozen=True, slots=True)
class _Described:
    """What a server says of a file before it is read."""

    info: FileInfo
    versions: dict[str, str]
    """The headers that name its version; if there is none, those of the first reply with bytes."""


class HttpFolder(ShownByName):
    """A folder of an HTTP server (see `Location`).

    The query of an address and a login before an @ are sent with each request, but are in no
    message and no record.
    """

    revision = None
    is_local = False

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if not parts.hostname:
            raise OptionError(f"{parts.scheme}://: name a server after it")
        self._parts = parts
        self._known: dict[str, _Described | None] = {}
        self._has_warned = False

    def _url(self, name: str) -> str:
        """Return the address of a file, with its secrets."""
        path = f"{self._parts.path.rstrip('/')}/{quote(name)}"
        return urlunsplit((*self._parts[:2], path, self._parts.query, ""))

    def __str__(self) -> str:
        host = self._parts.netloc.rpartition("@")[2]
        return urlunsplit((self._parts.scheme, host, self._parts.path.rstrip("/"), "", ""))

    @property
    def identity(self) -> str:
        """Its address, without secrets."""
        return str(self)

    def display_path(self, name: str) -> str:
        """Return the address of a file, without secrets."""
        return f"{self}/{name}"

    def check(self) -> None:
        """Do nothing: an HTTP server knows only files, not folders."""

    def has(self, name: str) -> bool:
        """Return whether the server has a file."""
        if name not in self._known:
            self._known[name] = self._request(name, FEW_TRIES)
        return self._known[name] is not None

    def names(self, folder: str = "") -> list[str]:
        """Return the only file name that can be guessed, if the server has it."""
        return [_SINGLE_SHARD] if not folder and self.has(_SINGLE_SHARD) else []

    def open(self, name: str) -> _HttpFile:
        """Open a file (see `Location.open`)."""
        described = self._known[name] if self.has(name) else None
        if described is None:
            raise CheckpointError(
                f"{self.display_path(name)}: it does not exist; check the address"
            )
        return _HttpFile(self, described)

    def pinned_to(self, state: Mapping[str, Any] | None) -> HttpFolder:
        """Return the folder: it has no revisions."""
        return self

    def download(self, names: list[str]) -> None:
        """Do nothing: only the Hub has a cache."""

    def link(self, name: str) -> DownloadLink:
        """Return the address of a file, with its secrets."""
        return DownloadLink(self._url(name), {})

    def current_info(self, name: str) -> FileInfo | None:
        """Request the current size and version of a file; return None if it does not exist."""
        described = self._request(name)
        return described.info if described else None

    def warn_of_changes(self) -> None:
        """Warn once that a file may change unnoticed."""
        if not self._has_warned:
            self._has_warned = True
            _log.warning(
                "%s: the server sends neither ETag nor Last-Modified, so that a change of a file "
                "while it is read is not noticed; make sure that nothing writes to it",
                self,
            )

    def _request(self, name: str, tries: int = TRIES) -> _Described | None:
        """Request size and version of a file; return None if it does not exist."""
        retries, where = RetryPolicy(NEVER_STOP, tries), self.display_path(name)
        while True:
            try:
                reply = get_session().head(
                    self._url(name),
                    headers={"Accept-Encoding": "identity"},
                    timeout=TIMEOUT,
                    follow_redirects=True,
                )
            except OfflineModeIsEnabled:  # its text holds the whole address
                raise CheckpointError(
                    f"{where}: HF_HUB_OFFLINE is set; unset it to read from a server"
                ) from None
            except transport_errors() as error:
                retries.wait(
                    MachineError(
                        f"{where}: no connection ({type(error).__name__}); check address and "
                        "network"
                    )
                )
                continue
            status, length = reply.status_code, reply.headers.get("Content-Length", "")
            if status in (404, 410):
                return None
            if status == 200 and length.isdecimal():
                versions = {h: reply.headers[h] for h in _VERSION_HEADERS if reply.headers.get(h)}
                return _Described(
                    FileInfo(name, int(length), next(iter(versions.values()), "")), versions
                )
            if status in (401, 403):
                raise CheckpointError(f"{where}: no access ({status}); check the address")
            if status != 429 and status < 500:
                raise CheckpointError(
                    f"{where}: the server gives no size for it ({status}); download it and name "
                    "the folder"
                )
            error_ = MachineError(f"{where}: the server answers {status}; run again later")
            retries.wait(error_, retry_after(reply.headers))


class _HttpFile:
    """An open file of an HTTP server (see `File`)."""

    def __init__(self, location: HttpFolder, described: _Described) -> None:
        self._location = location
        self.info = described.info
        self._versions = described.versions

    def read_into(self, out: memoryview, begin: int, stop: threading.Event) -> bool:
        """Fill memory with the file's bytes (see `File.read_into`)."""
        compared: set[str | None] = set()
        read_range(
            lambda renew: self._location.link(self.info.name),
            out,
            begin,
            self.info.nbytes,
            self._location.display_path(self.info.name),
            stop,
            lambda link, headers: compared.add(self._check_version(headers)),
        )
        if None in compared and self.info.version:
            self.check_unchanged()
        elif None in compared:
            self._location.warn_of_changes()
        return compared == {"ETag"}

    def _check_version(self, headers: Mapping[str, str]) -> str | None:
        """Check that a reply is of the version that was opened.

        Returns:
            The header that shows it, if there is one.
        """
        for header in _VERSION_HEADERS:
            value = headers.get(header)
            if value and not self.info.version:
                self._versions.setdefault(header, value)
            if value and header in self._versions:
                if self._versions[header] != value:
                    raise changed(self._location.display_path(self.info.name))
                return header
        return None

    def check_unchanged(self) -> None:
        """Check with the server that the file is unchanged (see `File.check_unchanged`)."""
        if self._location.current_info(self.info.name) != self.info:
            raise changed(self._location.display_path(self.info.name))

    def close(self) -> None:
        """Do nothing: each request has its own connection."""
