"""The data of the stand-in Hub: requests, faults, files and repositories."""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import secrets
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LFS_NBYTES = 10_000_000  # from here on a file is LFS, whatever its name
BLOCK_NBYTES = 4 << 20

KINDS = {
    "status": "answer with the status `value` (and `headers`)",
    "html": "answer 200 with a page, as a captive portal does",
    "drop_after": "close the connection after `value` bytes of the body (of a PUT: received)",
    "lose_reply": "do all that is requested, then close the connection instead of answering",
    "ignore_range": "200 with the whole file",
    "shift_range": "206 with bytes that begin `value` (or 1) bytes later, and says so",
    "short": "close the connection after half of the body",
    "wrong_length": "206 with half of the bytes, and their Content-Length, but the full range",
    "flip": "a bit of the first byte is wrong",
    "gzip": "the body with Content-Encoding: gzip, even if not accepted",
    "slow": "send (of a PUT: receive) `value` bytes per second",
    "stall": "half of the body, then nothing for `value` seconds, then the other half",
    "wrong_etag": "resolve and data: another X-Linked-Etag and ETag",
    "wrong_size": "resolve: another X-Linked-Size, and Content-Length of a HEAD",
    "no_commit_header": "resolve: no X-Repo-Commit",
}


@dataclass
class Request:
    """A request of a client; `path` is as it was sent, without the query."""

    method: str
    path: str
    query: str
    range: str | None
    has_token: bool
    origin: str
    """`hub` or `cdn`."""
    status: int = 0
    """The status of the reply; 0 before it."""


@dataclass(frozen=True)
class Fault:
    """A fault of a reply: one of `KINDS`, with its number and headers."""

    kind: str
    value: float = 0
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no such kind of fault: {self.kind}")


def first(n: int, fault: Fault, match: Any = None) -> Callable[[Request], Fault | None]:
    """Return a fault for the first `n` requests that match.

    Args:
        n: The number of requests.
        fault: The fault.
        match: A function of the request, or a pattern that is searched in `origin METHOD path`.
    """
    turns = itertools.count(1)
    return lambda request: fault if _matches(match, request) and next(turns) <= n else None


def every(n: int, fault: Fault, match: Any = None) -> Callable[[Request], Fault | None]:
    """Return a fault for each `n`-th request that matches (see `first`)."""
    turns = itertools.count(1)
    return lambda request: fault if _matches(match, request) and next(turns) % n == 0 else None


def _matches(match: Any, request: Request) -> bool:
    if isinstance(match, str):
        return bool(re.search(match, f"{request.origin} {request.method} {request.path}"))
    return match is None or bool(match(request))


class FileContent:
    """The content of a file on the disk; with `sha256` it is not read to compute the checksum."""

    def __init__(self, path: Path, sha256: str | None = None) -> None:
        self.path = path
        self.nbytes = path.stat().st_size
        self.sha256 = sha256 or self._compute_sha256()

    def _compute_sha256(self) -> str:
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while block := file.read(BLOCK_NBYTES):
                digest.update(block)
        return digest.hexdigest()

    def read(self, begin: int, end: int) -> bytes:
        """Return a range of bytes."""
        with open(self.path, "rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    def send(self, connection: socket.socket, begin: int, end: int) -> None:
        """Send a range of bytes without copying it through this process."""
        with open(self.path, "rb") as file:
            while begin < end:
                sent = os.sendfile(connection.fileno(), file.fileno(), begin, end - begin)
                if sent == 0:
                    raise EOFError(f"{self.path} has become shorter")
                begin += sent


class BytesContent:
    def __init__(self, data: Any) -> None:
        self.data = memoryview(data)
        self.nbytes = len(data)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def read(self, begin: int, end: int) -> memoryview:
        return self.data[begin:end]


@dataclass
class ForgottenContent:
    """A file that was uploaded with `keep` off: only its size and checksum are known."""

    nbytes: int
    sha256: str


class Entry:
    """A file of a commit: its content and its names in git and in LFS."""

    def __init__(self, content: Any, is_lfs: bool) -> None:
        self.content = content
        self.sha256 = content.sha256 if is_lfs else None
        pointer = (
            "version https://git-lfs.github.com/spec/v1\n"
            f"oid sha256:{self.sha256}\nsize {content.nbytes}\n"
        ).encode()
        blob = pointer if is_lfs else bytes(content.read(0, content.nbytes))
        self.blob_id = hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()
        self.pointer_nbytes = len(pointer)

    @property
    def etag(self) -> str:
        return self.sha256 or self.blob_id

    def lfs(self, key: str) -> dict[str, Any]:
        size, pointer_size = self.content.nbytes, self.pointer_nbytes
        return {key: self.sha256, "size": size, "pointerSize": pointer_size}


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Entry]] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    """Contents by SHA-256, committed or not."""

    def commit(self, branch: str, files: dict[str, Entry]) -> str:
        commit = secrets.token_hex(20)
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


@dataclass
class Upload:
    repo: Repo
    oid: str
    nbytes: int
    part_nbytes: int
    file: Path | None
    digests: list[Any] = field(default_factory=lambda: [hashlib.sha256()])
    """The SHA-256 before the first part and after each part; parts arrive in order."""


def is_lfs(path: str, nbytes: int) -> bool:
    return nbytes >= LFS_NBYTES or (path.endswith(".safetensors") and nbytes > 0)


class Refusal(Exception):
    """A reply that is an error, with the Hub's code for it."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": message, **body}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
