"""A stand-in for the Hugging Face Hub, on loopback, that the real `huggingface_hub` talks to.

    with StandInHub() as hub:
        hub.add_repo("openai/gpt-oss-tiny", {"config.json": b"{}", "model.safetensors": Path(...)})
        hub.faults.append(first(2, Fault("status", 503), "cdn GET"))
        ...  # a client whose environment has HF_ENDPOINT=hub.endpoint and HF_HUB_DISABLE_XET=1

Two servers: the Hub itself, and one of another origin, the CDN, that sends and takes the bytes of
large files (Git LFS) through signed addresses. What the client asks and gets is counted, and what
is answered can be spoilt (`Fault`).
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import hmac
import itertools
import json
import os
import re
import secrets
import socket
import socketserver
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlencode

LFS_NBYTES = 10_000_000  # from here on a file is LFS, whatever its name
_PIECE_NBYTES = 4 << 20

KINDS = {
    "status": "answer with the status `value` (and `headers`)",
    "html": "answer 200 with a page, as a captive portal does",
    "drop_after": "close the connection after `value` bytes of the body (of a PUT: received)",
    "lose_reply": "do all that is asked, then close the connection instead of answering",
    "ignore_range": "200 with the whole file",
    "shift_range": "206 with bytes that begin `value` (or 1) bytes later, and says so",
    "short": "as right, but close the connection after half of the body",
    "wrong_length": "206 with half of the bytes, and their Content-Length, but the full range",
    "flip": "a bit of the first byte is wrong",
    "gzip": "the body with Content-Encoding: gzip, asked for or not",
    "slow": "send (of a PUT: receive) `value` bytes per second",
    "stall": "half of the body, then nothing for `value` seconds, then the rest",
    "wrong_etag": "resolve: another X-Linked-Etag and ETag",
    "wrong_size": "resolve: another X-Linked-Size, and Content-Length of a HEAD",
    "no_commit_header": "resolve: no X-Repo-Commit",
}


@dataclass
class Request:
    """What a client asked for; `path` is as it came, without the query."""

    method: str
    path: str
    query: str
    range: str | None
    has_token: bool
    origin: str
    """`hub` or `cdn`."""
    status: int = 0
    """Of the answer; 0 while there is none."""


@dataclass(frozen=True)
class Fault:
    """What is wrong with an answer: one of `KINDS`, with its number and headers."""

    kind: str
    value: float = 0
    headers: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"no such kind of fault: {self.kind}")


def first(n: int, fault: Fault, match: Any = None) -> Callable[[Request], Fault | None]:
    """A fault of the first `n` requests that match: a function of the request, or a pattern that
    is searched in `origin METHOD path`."""
    turns = itertools.count(1)
    return lambda request: fault if _matches(match, request) and next(turns) <= n else None


def every(n: int, fault: Fault, match: Any = None) -> Callable[[Request], Fault | None]:
    """A fault of each `n`-th request that matches (see `first`)."""
    turns = itertools.count(1)
    return lambda request: fault if _matches(match, request) and next(turns) % n == 0 else None


def _matches(match: Any, request: Request) -> bool:
    if isinstance(match, str):
        return bool(re.search(match, f"{request.origin} {request.method} {request.path}"))
    return match is None or bool(match(request))


class FileContent:
    """The content of a file on disk; `sha256` saves its being read for it."""

    def __init__(self, path: Path, sha256: str | None = None) -> None:
        self.path = path
        self.nbytes = path.stat().st_size
        self.sha256 = sha256 or self._sum()

    def _sum(self) -> str:
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while piece := file.read(_PIECE_NBYTES):
                digest.update(piece)
        return digest.hexdigest()

    def read(self, begin: int, end: int) -> bytes:
        """Bytes of it."""
        with open(self.path, "rb") as file:
            file.seek(begin)
            return file.read(end - begin)

    def send(self, connection: socket.socket, begin: int, end: int) -> None:
        """Send bytes of it without a copy through this process."""
        with open(self.path, "rb") as file:
            while begin < end:
                sent = os.sendfile(connection.fileno(), file.fileno(), begin, end - begin)
                if sent == 0:
                    raise EOFError(f"{self.path} has become shorter")
                begin += sent


class _Bytes:
    def __init__(self, data: Any) -> None:
        self.data = memoryview(data)
        self.nbytes = len(data)

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    def read(self, begin: int, end: int) -> memoryview:
        return self.data[begin:end]


@dataclass
class _Forgotten:
    """What was uploaded with `keep` off: only its size and sum are known."""

    nbytes: int
    sha256: str


class _Entry:
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

    def lfs(self, sum_name: str) -> dict[str, Any]:
        size, pointer_size = self.content.nbytes, self.pointer_nbytes
        return {sum_name: self.sha256, "size": size, "pointerSize": pointer_size}


@dataclass
class _Repo:
    private: bool = False
    gated: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, _Entry]] = field(default_factory=dict)
    objects: dict[str, Any] = field(default_factory=dict)
    """Contents by SHA-256, committed or not."""

    def commit(self, branch: str, files: dict[str, _Entry]) -> str:
        commit = secrets.token_hex(20)
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


@dataclass
class _Upload:
    repo: _Repo
    oid: str
    nbytes: int
    part_nbytes: int
    file: Path | None
    sums: list[Any] = field(default_factory=lambda: [hashlib.sha256()])
    """After each part, from none on: parts come one after another."""


class StandInHub:
    """The Hub and its CDN; contents are bytes, paths, or objects with `nbytes`, `sha256` and
    `read(begin, end)`, which threads call at the same time."""

    def __init__(
        self,
        *,
        link_seconds: float = 3600,
        part_nbytes: int | None = None,
        keep: bool = True,
        log: bool = True,
    ) -> None:
        self.link_seconds = link_seconds
        self.part_nbytes = part_nbytes
        """Of larger objects' parts; without it, all are sent in one piece."""
        self.keep = keep
        """Whether to store what is uploaded, or only its size and sum."""
        self.log = log
        self.verify = True
        """Whether clients are told to ask whether an upload went well."""
        self.page_nentries = 1000
        self.user = "tester"
        self.tokens: set[str] = set()
        """That may write, and read what is private or gated; if there are none, all may."""
        self.faults: list[Callable[[Request], Fault | None]] = []
        self.repos: dict[str, _Repo] = {}
        self.uploads: dict[str, _Upload] = {}
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self._key = secrets.token_bytes(16)
        self.reset_counts()

    def __enter__(self) -> StandInHub:
        self._folder = tempfile.TemporaryDirectory(prefix="stand-in-hub-")
        self._servers = [_Server(self, "hub"), _Server(self, "cdn")]
        self.endpoint, self.cdn = (f"http://127.0.0.1:{s.server_port}" for s in self._servers)
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        for server in self._servers:
            server.stop()
        self._folder.cleanup()

    def add_repo(
        self,
        name: str,
        files: Mapping[str, Any],
        *,
        branch: str = "main",
        private: bool = False,
        gated: bool = False,
    ) -> str:
        """Commit files, and no others, to a branch of a repository; returns the commit's id."""
        with self.lock:
            repo = self.repos.setdefault(name, _Repo())
            repo.private, repo.gated = private, gated
            entries = {}
            for path, data in files.items():
                content = FileContent(data) if isinstance(data, Path) else data
                content = _Bytes(content) if isinstance(content, bytes) else content
                entries[path] = entry = _Entry(content, _is_lfs(path, content.nbytes))
                if entry.sha256:
                    repo.objects[entry.sha256] = content
            return repo.commit(branch, entries)

    def add_folder(self, name: str, folder: Path, **options: Any) -> str:
        """Commit all files of a folder (see `add_repo`)."""
        paths = [p for p in sorted(Path(folder).rglob("*")) if p.is_file()]
        files = {p.relative_to(folder).as_posix(): p for p in paths}
        return self.add_repo(name, files, **options)

    def files(self, name: str, revision: str = "main") -> dict[str, Any]:
        """The contents of a commit's files."""
        repo = self.repos[name]
        commit = repo.commits[repo.branches.get(revision, revision)]
        return {path: entry.content for path, entry in commit.items()}

    def expire_links(self) -> None:
        """End all signed addresses that were given so far."""
        self._key = secrets.token_bytes(16)

    def reset_counts(self) -> None:
        """Count and record from now on."""
        with self.lock:
            self.requests: list[Request] = []
            self.bytes_sent = 0
            """Of files' contents."""
            self.bytes_received = 0
            """By PUT."""

    def count(self, sent: int = 0, received: int = 0) -> None:
        """Add to the counts."""
        with self.lock:
            self.bytes_sent += sent
            self.bytes_received += received

    def note(self, request: Request) -> Fault | None:
        """Record a request; returns what is to go wrong with it."""
        if self.log:
            with self.lock:
                self.requests.append(request)
        return next(filter(None, (fault(request) for fault in list(self.faults))), None)

    def sign(self, origin: str, method: str, path: str) -> str:
        """A signed address, good for a while."""
        until = f"{time.time() + self.link_seconds:.3f}"
        query = {
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "Expires": until,
            "X-Amz-Signature": self.signature(method, path, until),
        }
        return f"{origin}{path}?{urlencode(query)}"

    def signature(self, method: str, path: str, until: str) -> str:
        """What only the Hub can know of an address."""
        return hmac.new(self._key, f"{method} {path} {until}".encode(), "sha256").hexdigest()

    def upload(self, repo: _Repo, oid: str, nbytes: int) -> dict[str, Any]:
        """The action by which a client sends an object."""
        name = secrets.token_hex(8)
        file = Path(self._folder.name, name) if self.keep else None
        parted = self.part_nbytes is not None and nbytes > self.part_nbytes
        part_nbytes = self.part_nbytes if parted and self.part_nbytes else nbytes
        self.uploads[name] = _Upload(repo, oid, nbytes, part_nbytes, file)
        if not parted:
            return {"href": self.sign(self.cdn, "PUT", f"/upload/{name}/1")}
        header = {"chunk_size": str(part_nbytes)}
        for part in range(1, -(-nbytes // part_nbytes) + 1):
            header[f"{part:05}"] = self.sign(self.cdn, "PUT", f"/upload/{name}/{part}")
        return {"href": self.sign(self.endpoint, "POST", f"/complete/{name}"), "header": header}

    def finish(self, upload: _Upload) -> None:
        """Take an object whose parts are here, if it is the one that was announced."""
        nparts, found = -(-upload.nbytes // upload.part_nbytes), upload.sums[-1].hexdigest()
        if len(upload.sums) != nparts + 1 or found != upload.oid:
            raise _Refusal(400, f"the object has the SHA-256 {found}, not {upload.oid}")
        content = FileContent(upload.file, found) if upload.file else None
        upload.repo.objects[found] = content or _Forgotten(upload.nbytes, found)


def _is_lfs(path: str, nbytes: int) -> bool:
    return nbytes >= LFS_NBYTES or (path.endswith(".safetensors") and nbytes > 0)


class _Refusal(Exception):
    """An answer that is an error, with the Hub's code for it."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": message, **body}
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def __init__(self, hub: StandInHub, origin: str) -> None:
        self.hub = hub
        self.origin = origin
        self._connections: set[Any] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def server_bind(self) -> None:
        socketserver.TCPServer.server_bind(self)  # HTTPServer's would ask for the host's name
        self.server_port = self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self._connections.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients may leave
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.shutdown()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()
        until = time.monotonic() + 5
        while self._connections and time.monotonic() < until:
            time.sleep(0.005)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.hub = self.server.hub
        path, _, query = self.path.partition("?")
        self.query = dict(parse_qsl(query))
        asked_range, has_token = self.headers.get("Range"), "Authorization" in self.headers
        origin = self.server.origin
        self.asked = Request(self.command, path, query, asked_range, has_token, origin)
        self.unread = int(self.headers.get("Content-Length") or 0)
        self.fault = self.hub.note(self.asked)
        self.kind = self.fault.kind if self.fault else ""
        try:
            self._route(path)
        except _Refusal as refusal:
            self._json(refusal.body, refusal.status, refusal.headers)
        while self.unread:  # what was not wanted, or the next request would begin with it
            self._receive(bytearray(min(self.unread, _PIECE_NBYTES)))

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self, path: str) -> None:
        if self.fault and self.kind == "status":
            self._reply(int(self.fault.value), self.fault.headers, _Bytes(b""))
            return
        if self.kind == "html":
            page = _Bytes(b"<html><body>Please log in to the network.</body></html>")
            self._reply(200, {"Content-Type": "text/html"}, page)
            return
        for origin, methods, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and origin == self.asked.origin and self.command in methods:
                answer(self, *(unquote(group) for group in match.groups() if group is not None))
                return
        raise _Refusal(404, "Sorry, we can't find the page you are looking for.")

    # --- what comes in -------------------------------------------------------------------------

    def _receive(self, out: Any) -> int:
        """Fill `out` from the request's body; returns how much it was."""
        nbytes = self.rfile.readinto(memoryview(out)[: self.unread])  # type: ignore[attr-defined]
        if not nbytes:
            raise ConnectionError("the client left")
        self.unread -= nbytes
        if self.command == "PUT":
            self.hub.count(received=nbytes)
        return int(nbytes)

    def _body(self) -> bytes:
        data = bytearray(self.unread)
        done = 0
        while self.unread:
            done += self._receive(memoryview(data)[done:])
        return bytes(data)

    def _check_token(self) -> tuple[str, bool]:
        """The token, and whether it opens what is closed."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        is_good = not self.hub.tokens or token in self.hub.tokens
        if token and not is_good:
            raise _Refusal(401, "Invalid credentials in Authorization header")
        return token, is_good

    def _repo(self, name: str, write: bool = False) -> _Repo:
        token, is_good = self._check_token()
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not is_good):
            message = "Repository not found" if token else "Invalid username or password."
            raise _Refusal(404 if token else 401, message, "RepoNotFound")
        if write and not is_good:
            raise _Refusal(401, "Invalid username or password.")
        return repo

    def _commit(self, repo: _Repo, revision: str) -> tuple[str, dict[str, _Entry]]:
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            raise _Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repo.commits[commit]

    def _check_link(self) -> None:
        until, given = self.query.get("Expires", "0"), self.query.get("X-Amz-Signature", "")
        method = "GET" if self.command == "HEAD" else self.command
        right = self.hub.signature(method, self.asked.path, until)
        if not hmac.compare_digest(given, right) or float(until) < time.time():
            raise _Refusal(403, "Request has expired")

    # --- what goes out -------------------------------------------------------------------------

    def _json(self, data: Any, status: int = 200, headers: Mapping[str, str] = {}) -> None:
        headers = {"Content-Type": "application/json; charset=utf-8", **headers}
        self._reply(status, headers, _Bytes(json.dumps(data).encode()))

    def _reply_file(self, content: Any, headers: dict[str, str]) -> None:
        """Send a file or a range of it."""
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        begin, end = 0, content.nbytes
        match = re.fullmatch(r"bytes=(?:(\d+)-(\d*)|-(\d+))", self.asked.range or "")
        if match and match[1]:
            begin, end = int(match[1]), min(int(match[2] or end - 1) + 1, end)
        elif match:
            begin = max(0, end - int(match[3]))
        if match and (begin >= content.nbytes or match[3] == "0"):
            range_of_none = {"Content-Range": f"bytes */{content.nbytes}"}
            self._json({"error": "Range Not Satisfiable"}, 416, range_of_none)
            return
        if not match or begin >= end or self.kind == "ignore_range":
            self._reply(200, headers, content, 0, content.nbytes, counted=True)
            return
        if self.fault and self.kind == "shift_range":
            by = int(self.fault.value) or 1
            if end + by > content.nbytes:
                by = -by
            begin, end = max(0, begin + by), end + by
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{content.nbytes}"
        self._reply(206, headers, content, begin, end, counted=True)

    def _reply(
        self,
        status: int,
        headers: Mapping[str, str],
        content: Any,
        begin: int = 0,
        end: int | None = None,
        counted: bool = False,
    ) -> None:
        """Answer with bytes of a content, as wrong as the fault wants it."""
        if self.kind == "lose_reply":
            self._hang_up()
            return
        headers = dict(headers)
        end = content.nbytes if end is None else end
        if self.kind in ("gzip", "flip"):
            data = bytearray(content.read(begin, end))
            if self.kind == "gzip":
                data = bytearray(gzip.compress(data))
                headers["Content-Encoding"] = "gzip"
            elif data:
                data[0] ^= 1
            content, begin, end = _Bytes(data), 0, len(data)
        if self.kind == "wrong_length":
            end = begin + (end - begin) // 2
        length = end - begin + (self.kind == "wrong_size" and self.command == "HEAD")
        self.asked.status = status
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault and self.kind in ("short", "drop_after"):
            most = (end - begin) // 2 if self.kind == "short" else int(self.fault.value)
            end = min(end, begin + most)
            self._hang_up()
        self._send(content, begin, end, counted)

    def _send(self, content: Any, begin: int, end: int, counted: bool) -> None:
        for nbytes in self._pieces(end - begin):
            if counted:  # before the client can have them, and look
                self.hub.count(sent=nbytes)
            if isinstance(content, FileContent):
                content.send(self.connection, begin, begin + nbytes)
            else:
                piece = memoryview(content.read(begin, begin + nbytes))
                if piece.nbytes != nbytes:
                    raise ValueError(f"a content gave {piece.nbytes} bytes for {nbytes}")
                self.connection.sendall(piece)
            begin += nbytes

    def _hang_up(self) -> None:
        """Read no more; the connection is closed when this request has been dealt with."""
        self.unread = 0
        self.close_connection = True

    def _pieces(self, nbytes: int, most: int = _PIECE_NBYTES) -> Iterator[int]:
        """The sizes of pieces to send or receive, at the pace that the fault wants."""
        value = self.fault.value if self.fault else 0
        most = min(most, max(1, int(value / 20))) if self.kind == "slow" else most
        done, half = 0, nbytes // 2 if self.kind == "stall" else -1
        while done < nbytes:
            if done == half:
                self.hub.closing.wait(value)
            piece = min(most, (half if done < half else nbytes) - done)
            yield piece
            done += piece
            if self.kind == "slow":
                self.hub.closing.wait(piece / value)

    # --- reading -------------------------------------------------------------------------------

    def _whoami(self) -> None:
        if not self._check_token()[1]:
            raise _Refusal(401, "Invalid username or password.")
        token = {"accessToken": {"displayName": "test", "role": "write"}}
        self._json({"type": "user", "name": self.hub.user, "orgs": [], "auth": token})

    def _info(self, name: str, revision: str = "main") -> None:
        repo = self._repo(name)
        commit, files = self._commit(repo, revision)
        siblings: list[dict[str, Any]] = [{"rfilename": path} for path in sorted(files)]
        for sibling in siblings if self.query.get("blobs") == "true" else ():
            entry = files[sibling["rfilename"]]
            sibling.update(size=entry.content.nbytes, blobId=entry.blob_id)
            if entry.sha256:
                sibling["lfs"] = entry.lfs("sha256")
        about: dict[str, Any] = {
            "id": name,
            "modelId": name,
            "author": name.split("/")[0],
            "sha": commit,
        }
        about |= {"private": repo.private, "gated": "manual" if repo.gated else False}
        about |= {"disabled": False, "downloads": 0, "likes": 0, "tags": []}
        self._json({**about, "siblings": siblings})

    def _tree(self, name: str, revision: str, folder: str = "") -> None:
        commit, files = self._commit(self._repo(name), revision)
        is_recursive = self.query.get("recursive") == "true"
        start = folder.strip("/") + "/" if folder else ""
        found: dict[str, dict[str, Any]] = {}
        for path, entry in sorted(files.items()):
            if not path.startswith(start):
                continue
            inner = path.count("/", len(start))
            for depth in range(1, (inner if is_recursive else min(inner, 1)) + 1):
                parent = path.rsplit("/", inner - depth + 1)[0]
                tree_id = hashlib.sha1(f"{commit} {parent}".encode()).hexdigest()
                found[parent] = {"type": "directory", "oid": tree_id, "size": 0, "path": parent}
            if is_recursive or not inner:
                size = entry.content.nbytes
                found[path] = {"type": "file", "oid": entry.blob_id, "size": size, "path": path}
                if entry.sha256:
                    found[path]["lfs"] = entry.lfs("oid")
        if folder and not found:
            raise _Refusal(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        at = int(self.query.get("cursor", 0))
        stop, headers = at + self.hub.page_nentries, {}
        if stop < len(found):
            query = urlencode({**self.query, "cursor": stop})
            headers["Link"] = f'<{self.hub.endpoint}{self.asked.path}?{query}>; rel="next"'
        self._json([*found.values()][at:stop], headers=headers)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        if repo.gated and not self._check_token()[1]:
            raise _Refusal(403, f"Access to model {name} is restricted.", "GatedRepo")
        commit, files = self._commit(repo, revision)
        headers = {} if self.kind == "no_commit_header" else {"X-Repo-Commit": commit}
        if path not in files:
            refusal = _Refusal(404, "Entry not found", "EntryNotFound")
            refusal.headers.update(headers)
            raise refusal
        entry = files[path]
        etag = entry.etag[::-1] if self.kind == "wrong_etag" else entry.etag
        headers["ETag"] = f'"{etag}"'
        if entry.sha256 is None:
            self._reply_file(entry.content, headers)
            return
        headers["X-Linked-ETag"] = f'"{etag}"'
        headers["X-Linked-Size"] = str(entry.content.nbytes + (self.kind == "wrong_size"))
        where = self.hub.sign(self.hub.cdn, "GET", f"/lfs/{name}/{entry.sha256}")
        headers["Location"] = where
        self._reply(302, headers, _Bytes(f"Found. Redirecting to {where}".encode()))

    def _object(self, name: str, oid: str) -> None:
        self._check_link()
        content = self.hub.repos[name].objects[oid]
        if isinstance(content, _Forgotten):
            raise _Refusal(410, "it was not kept")
        self._reply_file(content, {"ETag": f'"{oid}"'})

    # --- writing -------------------------------------------------------------------------------

    def _create(self) -> None:
        asked = json.loads(self._body())
        if not self._check_token()[1]:
            raise _Refusal(401, "Invalid username or password.")
        name = f"{asked.get('organization') or self.hub.user}/{asked['name']}"
        url = f"{self.hub.endpoint}/{name}"
        with self.hub.lock:
            if name in self.hub.repos:
                raise _Refusal(409, "You already created this model repo", url=url, name=name)
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            rule = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
            self.hub.add_repo(name, {".gitattributes": rule}, private=private)
        self._json({"url": url, "name": name})

    def _preupload(self, name: str, revision: str) -> None:
        asked = json.loads(self._body())["files"]
        files = self._commit(self._repo(name, write=True), revision)[1]
        modes = []
        for file in asked:
            path = file["path"]
            mode = "lfs" if _is_lfs(path, file["size"]) else "regular"
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            if path in files:
                modes[-1]["oid"] = files[path].etag
        self._json({"files": modes})

    def _batch(self, name: str) -> None:
        asked = json.loads(self._body())["objects"]
        repo = self._repo(name, write=True)
        objects = []
        for wanted in asked:
            oid, nbytes = wanted["oid"], wanted["size"]
            objects.append({"oid": oid, "size": nbytes})
            if oid not in repo.objects:
                objects[-1]["actions"] = actions = {"upload": self.hub.upload(repo, oid, nbytes)}
                if self.hub.verify:
                    where = f"{self.hub.endpoint}/{name}.git/info/lfs/objects/verify"
                    actions["verify"] = {"href": where}
        parted = any("header" in o.get("actions", {}).get("upload", ()) for o in objects)
        self._json({"transfer": "multipart" if parted else "basic", "objects": objects})

    def _put(self, name: str, number: str) -> None:
        self._check_link()
        upload, part = self.hub.uploads[name], int(number)
        at = upload.part_nbytes * (part - 1)
        if self.unread != min(upload.part_nbytes, upload.nbytes - at):
            raise _Refusal(400, f"{self.unread} bytes are not what was announced")
        if part > len(upload.sums):
            raise _Refusal(400, f"part {part} comes too early")
        if upload.oid in upload.repo.objects:  # the client missed the answer
            self._reply(200, {"ETag": f'"{upload.oid}"'}, _Bytes(b""))
            return
        digest = upload.sums[part - 1].copy()
        buffer = memoryview(bytearray(1 << 20))
        drop = int(self.fault.value) if self.fault and self.kind == "drop_after" else None
        file = os.open(upload.file, os.O_WRONLY | os.O_CREAT) if upload.file else None
        try:
            for wanted in self._pieces(self.unread if drop is None else drop, len(buffer)):
                while wanted:
                    nbytes = self._receive(buffer[:wanted])
                    digest.update(buffer[:nbytes])
                    if file is not None:
                        os.pwrite(file, buffer[:nbytes], at)
                    at, wanted = at + nbytes, wanted - nbytes
        finally:
            if file is not None:
                os.close(file)
        if drop is not None:
            self._hang_up()
            return
        upload.sums[part:] = [digest]
        if upload.part_nbytes == upload.nbytes:
            self.hub.finish(upload)
        self._reply(200, {"ETag": f'"{digest.hexdigest()[:32]}"'}, _Bytes(b""))

    def _complete(self, name: str) -> None:
        self._body()
        self._check_link()
        self.hub.finish(self.hub.uploads[name])
        self._json({})

    def _verify(self, name: str) -> None:
        asked = json.loads(self._body())
        content = self._repo(name, write=True).objects.get(asked["oid"])
        if content is None or content.nbytes != asked["size"]:
            raise _Refusal(404, "it was not uploaded")
        self._json({})

    def _add_commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self._body().split(b"\n") if line]
        repo = self._repo(name, write=True)
        with self.hub.lock:
            head, files = self._commit(repo, revision)
            if revision not in repo.branches:
                raise _Refusal(404, f"{revision} is no branch", "RevisionNotFound")
            files = dict(files)
            for line in lines:
                self._operate(repo, head, files, line["key"], line["value"])
            commit = repo.commit(revision, files)
        where = f"{self.hub.endpoint}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": where, "hookOutput": ""})

    def _operate(
        self, repo: _Repo, head: str, files: dict[str, _Entry], kind: str, value: dict[str, Any]
    ) -> None:
        """Do one line of a commit to the files."""
        path = value.get("path", "")
        if kind == "header":
            if not head.startswith(value.get("parentCommit", "")):
                raise _Refusal(412, "A commit has happened since. Please refresh and try again.")
        elif kind == "file":
            files[path] = _Entry(_Bytes(base64.b64decode(value["content"])), False)
        elif kind == "lfsFile":
            if value["oid"] not in repo.objects:
                message = "LFS pointer pointed to a file that does not exist"
                raise _Refusal(400, f'Your push was rejected: "{path}": {message}')
            files[path] = _Entry(repo.objects[value["oid"]], True)
        elif kind in ("deletedFile", "deletedFolder"):
            start = path.rstrip("/") + "/"
            is_folder = kind == "deletedFolder"
            gone = [p for p in files if (p.startswith(start) if is_folder else p == path)]
            if not gone:
                raise _Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            for each in gone:
                del files[each]
        else:
            raise _Refusal(400, f"unknown operation: {kind}")


_API = r"/api/models/([^/]+/[^/]+)"
_LFS = r"/([^/]+/[^/]+)\.git/info/lfs/objects"
_ROUTES: list[tuple[str, tuple[str, ...], str, Callable[..., None]]] = [
    ("hub", ("GET",), r"/api/whoami-v2", _Handler._whoami),
    ("hub", ("GET",), _API + r"(?:/revision/([^/]+))?", _Handler._info),
    ("hub", ("GET",), _API + r"/tree/([^/]+)(?:/(.+))?", _Handler._tree),
    ("hub", ("GET", "HEAD"), r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", _Handler._resolve),
    ("hub", ("POST",), r"/api/repos/create", _Handler._create),
    ("hub", ("POST",), r"/api/validate-yaml", lambda handler: handler._json({})),
    ("hub", ("POST",), _API + r"/preupload/([^/]+)", _Handler._preupload),
    ("hub", ("POST",), _API + r"/commit/([^/]+)", _Handler._add_commit),
    ("hub", ("POST",), _LFS + "/batch", _Handler._batch),
    ("hub", ("POST",), _LFS + "/verify", _Handler._verify),
    ("hub", ("POST",), r"/complete/(\w+)", _Handler._complete),
    ("cdn", ("GET", "HEAD"), r"/lfs/([^/]+/[^/]+)/(\w+)", _Handler._object),
    ("cdn", ("PUT",), r"/upload/(\w+)/(\d+)", _Handler._put),
]
