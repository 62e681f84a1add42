"""A folder of a web server: files under one address, read by byte range."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import get_session

from ..errors import CheckpointError, MachineError, OptionError
from .byte_ranges import TIMEOUT, DownloadLink, read_range, transport_errors
from .location import NEVER, FileInfo, changed
from .retries import FEW_TRIES, TRIES, RetryPolicy, retry_after

__all__ = ["HttpFolder"]


_ONLY = "model.safetensors"  # a web server lists nothing: without an index, this is looked for


class HttpFolder:
    """A folder of a web server (see `places.Place`). What an address holds after a question mark
    or before an @ goes with each request, and into no message and no record."""

    revision = None
    is_local = False

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if not parts.hostname:
            raise OptionError(f"{parts.scheme}://: name a server after it")
        self._parts = parts
        self._known: dict[str, FileInfo | None] = {}

    def _url(self, name: str) -> str:
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
        """The address of a file, without secrets."""
        return f"{self}/{name}"

    def check(self) -> None:
        """Only its files can be asked for."""

    def has(self, name: str) -> bool:
        """Whether the server has such a file."""
        if name not in self._known:
            self._known[name] = self._ask(name, FEW_TRIES)
        return self._known[name] is not None

    def names(self, folder: str = "") -> list[str]:
        """What is known without a listing."""
        return [_ONLY] if not folder and self.has(_ONLY) else []

    def open(self, name: str) -> _HttpFile:
        """A file of it."""
        info = self._known[name] if self.has(name) else None
        if info is None:
            raise CheckpointError(f"{self.display_path(name)}: it is not there; check the address")
        return _HttpFile(self, info)

    def pinned_to(self, state: Mapping[str, Any] | None) -> HttpFolder:
        """It has but one state."""
        return self

    def prepare(self, names: list[str]) -> None:
        """Nothing to do."""

    def link(self, name: str) -> DownloadLink:
        """The address of a file, as it is asked for."""
        return DownloadLink(self._url(name), {})

    def _ask(self, name: str, tries: int = TRIES) -> FileInfo | None:
        """What the server says of a file; None where it has none."""
        patience, where = RetryPolicy(NEVER, tries), self.display_path(name)
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
                patience.wait(
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
                version = reply.headers.get("ETag") or reply.headers.get("Last-Modified") or ""
                return FileInfo(name, int(length), version)
            if status in (401, 403):
                raise CheckpointError(f"{where}: no access ({status}); check the address")
            if status != 429 and status < 500:
                raise CheckpointError(
                    f"{where}: the server gives no size for it ({status}); download it and name "
                    "the folder"
                )
            patience.wait(
                MachineError(f"{where}: the server answers {status}; run again later"),
                retry_after(reply.headers),
            )

    def is_now(self, name: str) -> FileInfo | None:
        """What the server says of a file now."""
        return self._ask(name)


class _HttpFile:
    """A file of a web server (see `places.File`)."""

    def __init__(self, location: HttpFolder, info: FileInfo) -> None:
        self._location = location
        self.info = info

    def read_into(self, out: memoryview, at: int, stop: threading.Event) -> None:
        """Fill `out` with the bytes from `at` on."""
        version = str(self.info.version)
        read_range(
            lambda renew: self._location.link(self.info.name),
            out,
            at,
            self.info.nbytes,
            self._location.display_path(self.info.name),
            stop,
            etag=version if version.startswith(('"', "W/")) else None,
        )

    def check_unchanged(self) -> None:
        """Ask the server once more."""
        if self._location.is_now(self.info.name) != self.info:
            raise changed(self._location.display_path(self.info.name))

    def close(self) -> None:
        """Nothing is held."""
