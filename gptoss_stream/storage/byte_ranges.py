"""Reads byte ranges over HTTP: checks every reply and resumes broken ones.

`huggingface_hub` provides the session, with its proxies, certificates and hooks, but does not
check replies. A server or a proxy may ignore a range, shift it, cut it short or compress it
(huggingface_hub #3778, fsspec #1140): then wrong bytes would become wrong weights.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from urllib.parse import urlsplit

from ..errors import CheckpointError, MachineError
from .location import changed
from .retries import TRIES, RetryPolicy, retry_after

__all__ = ["TIMEOUT", "DownloadLink", "origin", "read_range", "transport_errors"]

TIMEOUT = 30.0  # seconds without a byte
_CHUNK_NBYTES = 1 << 20
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


@dataclass(frozen=True, slots=True)
class DownloadLink:
    """The address from which a file can be downloaded at the moment."""

    url: str
    headers: Mapping[str, str]
    is_signed: bool = False
    """Whether the address is signed and expires."""


class _FailedTry(Exception):
    """A try failed; `seconds` is how long the server asks to wait."""

    tries = TRIES

    def __init__(self, reason: str, seconds: float | None = None) -> None:
        super().__init__(reason)
        self.seconds = seconds


class _RangeIgnored(_FailedTry):
    """The server sends the whole file, and will probably do so each time."""

    tries = 5


class _LinkExpired(_FailedTry):
    """A signed address has expired."""


@dataclass(frozen=True, slots=True)
class _Range:
    """A byte range to request, and what is known of its file."""

    begin: int
    nbytes: int
    total: int
    """The size of the file."""
    where: str
    """The name of the file in messages."""

    @property
    def is_whole(self) -> bool:
        """Whether the whole file is requested."""
        return self.begin == 0 and self.nbytes == self.total


def read_range(
    link: Callable[[bool], DownloadLink],
    out: memoryview,
    begin: int,
    total: int,
    where: str,
    stop: threading.Event,
    check: Callable[[DownloadLink, Mapping[str, str]], object] = lambda link, headers: None,
) -> None:
    """Fill memory with bytes of a file.

    Args:
        link: Returns the file's address; called with True, it returns a new one, since the last
            has expired.
        out: The memory.
        begin: The first byte in the file.
        total: The size of the file.
        where: The name of the file in messages.
        stop: Ends the read with an error when it is set.
        check: Called with the address and the headers of each reply before its bytes are used;
            raises an error if the file has changed.

    Raises:
        CheckpointError: If the file is missing, cannot be accessed, or has changed.
        MachineError: If the server keeps failing.
    """
    retries = RetryPolicy(stop)
    done = 0
    renew = False
    while done < len(out):
        requested = _Range(begin + done, len(out) - done, total, where)
        try:
            for nbytes in _try(link(renew), out[done:], requested, check):
                done += nbytes
                retries.progress()
                if stop.is_set():
                    raise MachineError(f"{where}: reading was stopped")
            renew = False
        except _FailedTry as failure:
            renew = isinstance(failure, _LinkExpired)
            error = MachineError(
                f"{where}: {failure}, {failure.tries} times; check the network and run the same "
                "command again: finished shards are kept"
            )
            retries.wait(error, failure.seconds, failure.tries)


def _try(
    link: DownloadLink,
    out: memoryview,
    requested: _Range,
    check: Callable[[DownloadLink, Mapping[str, str]], object],
) -> Iterator[int]:
    """Send one request, and yield the number of bytes of each chunk that arrives."""
    from huggingface_hub.utils import get_session

    headers = {**link.headers, "Accept-Encoding": "identity"}
    if not requested.is_whole:
        headers["Range"] = f"bytes={requested.begin}-{requested.begin + requested.nbytes - 1}"
    try:
        with get_session().stream(
            "GET", link.url, headers=headers, timeout=TIMEOUT, follow_redirects=True
        ) as reply:
            _refuse_downgrade(link.url, str(reply.url), requested.where)
            _check_status(reply, link, requested)
            _check_headers(reply, requested)
            check(link, reply.headers)
            done = 0
            for chunk in reply.iter_raw(_CHUNK_NBYTES):
                if done + len(chunk) > len(out):
                    raise _FailedTry("the server sent more bytes than were requested")
                out[done : done + len(chunk)] = chunk
                done += len(chunk)
                yield len(chunk)
            if done < len(out):
                raise _FailedTry("the connection ended early")
    except transport_errors() as error:
        raise _FailedTry(_describe(error)) from None


def _check_status(reply: Any, link: DownloadLink, requested: _Range) -> None:
    """Check that a reply has the status of success for the range."""
    status, where = reply.status_code, requested.where
    if status == (200 if requested.is_whole else 206):
        return
    if status in (408, 425, 429) or status >= 500:
        raise _FailedTry(f"the server answers {status}", retry_after(reply.headers))
    if status in (401, 403) and link.is_signed:
        raise _LinkExpired(f"the server refuses its own signed address ({status})")
    if status in (401, 403):
        raise CheckpointError(
            f"{where}: no access ({status}); check the address and the credentials"
        )
    if status in (404, 410):
        raise CheckpointError(f"{where}: it does not exist ({status}); check its name")
    if status == 416:
        raise CheckpointError(f"{where}: it is shorter than it was; start again with --overwrite")
    if status in (200, 206):
        raise _RangeIgnored(
            "the server does not honour byte ranges (download the files and name their folder)"
        )
    raise CheckpointError(f"{where}: the server answers {status}; check the address")


def _check_headers(reply: Any, requested: _Range) -> None:
    """Check that a reply has exactly the requested bytes, without a content encoding."""
    coding = reply.headers.get("Content-Encoding", "identity")
    if coding != "identity":
        raise _FailedTry(f"the server sent the bytes with the coding {coding[:20]!r}")
    length = reply.headers.get("Content-Length")
    if length is not None and length != str(requested.nbytes):
        if requested.is_whole:
            raise changed(requested.where)
        raise _FailedTry(f"the server sends {length[:20]} bytes for {requested.nbytes}")
    if requested.is_whole:
        return
    match = _CONTENT_RANGE.fullmatch(reply.headers.get("Content-Range", ""))
    if match is None:
        raise _FailedTry("the server does not say which bytes it sends")
    if int(match[3]) != requested.total:
        raise changed(requested.where)
    begin, last = requested.begin, requested.begin + requested.nbytes - 1
    if (int(match[1]), int(match[2])) != (begin, last):
        raise _FailedTry(f"the server sends bytes {match[1]}-{match[2]} for {begin}-{last}")


def _refuse_downgrade(requested: str, got: str, where: str) -> None:
    """Check that no redirect leads from https to http."""
    if urlsplit(requested).scheme == "https" and urlsplit(got).scheme != "https":
        raise MachineError(f"{where}: the server redirects from https to an unprotected address")


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port: only the same origin may see a token."""
    parts = urlsplit(url)
    default = {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname, parts.port or default


def transport_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that the session raises if a connection fails.

    A RuntimeError is one of them: another thread may have closed the session (`huggingface_hub`
    does so after a failed connection).
    """
    from huggingface_hub.utils import get_session

    library = import_module(type(get_session()).__module__.partition(".")[0])
    errors: tuple[type[Exception], ...] = (library.HTTPError, library.StreamError, RuntimeError)
    return errors


def _describe(error: Exception) -> str:
    """Describe an error without its text, which may contain a signed address."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
    return f"no connection ({words})" if "connect" in words else words
