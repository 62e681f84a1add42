"""Bytes of a file over HTTP: asked for in ranges, each reply checked, broken ones resumed.

`huggingface_hub` gives the session, with its proxies, certificates and hooks; what it does not do
is doubt a reply. A server, or what stands between, may ignore a range, shift it, cut it short or
compress it (huggingface_hub #3778, fsspec #1140): then wrong bytes would become wrong weights.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
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
    """Where a file's bytes are to be had, for now."""

    url: str
    headers: Mapping[str, str]
    is_signed: bool = False
    """Whether the address is good for a while only, and a refusal means that it has run out."""


class _Failed(Exception):
    """A try failed; `asked` is how long the server wants to be left alone, in seconds."""

    tries = TRIES

    def __init__(self, reason: str, asked: float | None = None) -> None:
        super().__init__(reason)
        self.asked = asked


class _RangeIgnored(_Failed):
    """The server sends the whole file, as it is likely to do each time."""

    tries = 5


class _Expired(_Failed):
    """A signed address has run out."""


def read_range(
    link: Callable[[bool], DownloadLink],
    out: memoryview,
    at: int,
    total: int,
    where: str,
    stop: threading.Event,
    etag: str | None = None,
) -> None:
    """Fill `out` with bytes from `at` on of a file of `total` bytes, which messages call `where`.

    `link` gives the address; told True, a new one, since the last has run out. With `etag`, each
    reply must bear it. Raises `CheckpointError` where the file is gone, not to be had, or no longer
    the same, `MachineError` where the server fails for long.
    """
    patience = RetryPolicy(stop)
    got = 0
    renew = False
    while got < len(out):
        try:
            for nbytes in _try(link(renew), out[got:], at + got, total, where, etag):
                got += nbytes
                patience.progress()
                if stop.is_set():
                    raise MachineError(f"{where}: reading was stopped")
            renew = False
        except _Failed as failure:
            renew = isinstance(failure, _Expired)
            error = MachineError(
                f"{where}: {failure}, {failure.tries} times; check the network and run the same "
                "command again: what is finished stays"
            )
            patience.wait(error, failure.asked, failure.tries)


def _try(
    link: DownloadLink, out: memoryview, at: int, total: int, where: str, etag: str | None
) -> Any:
    """One request; yields how many bytes have come, as they come."""
    from huggingface_hub.utils import get_session

    whole = at == 0 and len(out) == total
    headers = {**link.headers, "Accept-Encoding": "identity"}
    if not whole:
        headers["Range"] = f"bytes={at}-{at + len(out) - 1}"
    try:
        with get_session().stream(
            "GET", link.url, headers=headers, timeout=TIMEOUT, follow_redirects=True
        ) as reply:
            _refuse_downgrade(link.url, str(reply.url), where)
            _check_status(reply, link, whole, where)
            _check_reply(reply, at, len(out), total, whole, where, etag)
            got = 0
            for chunk in reply.iter_raw(_CHUNK_NBYTES):
                if got + len(chunk) > len(out):
                    raise _Failed("the server sent more bytes than were asked for")
                out[got : got + len(chunk)] = chunk
                got += len(chunk)
                yield len(chunk)
            if got < len(out):
                raise _Failed("the connection ended early")
    except transport_errors() as error:
        raise _Failed(_named(error)) from None


def _check_status(reply: Any, link: DownloadLink, whole: bool, where: str) -> None:
    status = reply.status_code
    if status == (200 if whole else 206):
        return
    if status in (408, 425, 429) or status >= 500:
        raise _Failed(f"the server answers {status}", retry_after(reply.headers))
    if status in (401, 403) and link.is_signed:
        raise _Expired(f"the server refuses its own signed address ({status})")
    if status in (401, 403):
        raise CheckpointError(
            f"{where}: no access ({status}); check the address and the credentials"
        )
    if status in (404, 410):
        raise CheckpointError(f"{where}: it is not there ({status}); check its name")
    if status == 416:
        raise CheckpointError(f"{where}: it is shorter than it was; start again with --overwrite")
    if status in (200, 206):
        raise _RangeIgnored(
            "the server does not honour byte ranges (download the files and name their folder)"
        )
    raise CheckpointError(f"{where}: the server answers {status}; check the address")


def _check_reply(
    reply: Any, at: int, nbytes: int, total: int, whole: bool, where: str, etag: str | None
) -> None:
    """A reply must be of the very bytes asked for, as they are."""
    coding = reply.headers.get("Content-Encoding", "identity")
    if coding != "identity":
        raise _Failed(f"the server sent the bytes with the coding {coding[:20]!r}")
    found = reply.headers.get("ETag")
    if etag is not None and found is not None and found != etag:
        raise changed(where)
    length = reply.headers.get("Content-Length")
    if length is not None and length != str(nbytes):
        if whole:
            raise changed(where)
        raise _Failed(f"the server sends {length[:20]} bytes for {nbytes}")
    if whole:
        return
    match = _CONTENT_RANGE.fullmatch(reply.headers.get("Content-Range", ""))
    if match is None:
        raise _Failed("the server does not say which bytes it sends")
    if int(match[3]) != total:
        raise changed(where)
    if (int(match[1]), int(match[2])) != (at, at + nbytes - 1):
        raise _Failed(f"the server sends bytes {match[1]}-{match[2]} for {at}-{at + nbytes - 1}")


def _refuse_downgrade(asked: str, got: str, where: str) -> None:
    if urlsplit(asked).scheme == "https" and urlsplit(got).scheme != "https":
        raise MachineError(f"{where}: the server leads from https to an unprotected address")


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port: what may see a token, and what may not."""
    parts = urlsplit(url)
    default = {"http": 80, "https": 443}.get(parts.scheme)
    return parts.scheme, parts.hostname, parts.port or default


def transport_errors() -> tuple[type[Exception], ...]:
    """What the session raises where a connection fails; another thread may have closed it, too
    (`huggingface_hub` does, after an error to connect)."""
    from huggingface_hub.utils import get_session

    library = import_module(type(get_session()).__module__.partition(".")[0])
    errors: tuple[type[Exception], ...] = (library.HTTPError, library.StreamError, RuntimeError)
    return errors


def _named(error: Exception) -> str:
    """An error without its text, which may hold an address with its signature."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()
    return f"no connection ({words})" if "connect" in words else words
