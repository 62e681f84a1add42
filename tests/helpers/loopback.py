"""Servers on loopback that record requests and can give faulty replies: a file server and a proxy.

with FileServer(folder) as server:
    server.spoil("GET .*safetensors", short, times=2)
    ...  # a client of server.url
"""

from __future__ import annotations

import gzip as gzip_format
import http.client
import itertools
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from math import inf
from pathlib import Path
from typing import Any
from urllib.parse import unquote

BLOCK_NBYTES = 1 << 16
NOT_FORWARDED = {"connection", "date", "expect", "keep-alive", "server", "transfer-encoding"}


@dataclass
class Request:
    """A request of a client; `path` is as it was sent, without the query."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    """By names in lower case."""
    body: bytes = field(repr=False)
    status: int = 0
    """The status of the reply; 0 before it."""

    @property
    def name(self) -> str:
        """The last part of the path."""
        return unquote(self.path.rpartition("/")[2])


@dataclass
class Reply:
    """A reply.

    The connection is closed after `end` bytes of the body, if that is set, and without any reply if
    the status is 0.
    """

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = field(default=b"", repr=False)
    length: int | None = None
    """The Content-Length, if it is not the body's; negative: no such header."""
    end: int | None = None


Answer = Callable[[Request], Reply]
How = Callable[[Request, Answer], Reply]
"""A faulty way to reply, which may use the server's own reply."""


# ------------------------------------------------------------------------------------------- faults


def no_answer(request: Request, answer: Answer) -> Reply:
    """Close the connection, and do nothing."""
    return Reply(0)


def lost_answer(request: Request, answer: Answer) -> Reply:
    """Do what is requested, and close the connection without a reply."""
    answer(request)
    return Reply(0)


def status(number: int, body: bytes = b"", **headers: str) -> How:
    """Return a fault: reply with a status, and do nothing."""
    return lambda request, answer: Reply(number, dict(headers), body)


def short(request: Request, answer: Answer) -> Reply:
    """Close the connection after half of the announced body."""
    reply = answer(request)
    reply.end = len(reply.body) // 2
    return reply


def halved(request: Request, answer: Answer) -> Reply:
    """Send half of the body, with the length of that half."""
    reply = answer(request)
    reply.body = reply.body[: len(reply.body) // 2]
    return reply


def flipped(request: Request, answer: Answer) -> Reply:
    """Flip a bit of what is sent to the server."""
    body = bytearray(request.body)
    body[len(body) // 2] ^= 4
    request.body = bytes(body)
    return answer(request)


def gzipped(request: Request, answer: Answer) -> Reply:
    """Compress the body, even if the client does not accept that."""
    reply = answer(request)
    reply.body = gzip_format.compress(reply.body, 1)
    reply.headers["Content-Encoding"] = "gzip"
    return reply


def without(header: str) -> How:
    """Return a fault: reply without a header."""

    def how(request: Request, answer: Answer) -> Reply:
        reply = answer(request)
        reply.headers.pop(header, None)
        return reply

    return how


# ------------------------------------------------------------------------------------------ servers


class Server:
    """A server on loopback."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.rate = inf
        """Bytes of bodies per second, in each direction."""
        self._spoilt: list[_Spoilt] = []
        self._lock = threading.Lock()

    def __enter__(self):
        self._server = _HTTPServer(self)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    def spoil(self, pattern: str, how: How, times: float = inf, skip: int = 0) -> None:
        """Give faulty replies to the requests that match a pattern.

        Args:
            pattern: It is searched in `METHOD path?query`.
            how: The fault.
            times: The number of requests with the fault.
            skip: The number of matching requests before the first fault.
        """
        self._spoilt.append(_Spoilt(pattern, how, times, itertools.count(-skip)))

    def mend(self) -> None:
        """Remove all faults."""
        self._spoilt = []

    def requests_for(self, pattern: str) -> list[Request]:
        """Return the requests so far that have the pattern in `METHOD path?query`."""
        return [r for r in list(self.requests) if re.search(pattern, _line(r))]

    def respond(self, request: Request) -> Reply:
        """Return the reply, with its fault if there is one."""
        with self._lock:
            self.requests.append(request)
            answer: Answer = self.answer
            for spoilt in list(self._spoilt):
                if re.search(spoilt.pattern, _line(request)):
                    answer = spoilt.by(answer)
        reply = answer(request)
        request.status = reply.status
        return reply

    def answer(self, request: Request) -> Reply:
        """Return the right reply."""
        raise NotImplementedError


def _line(request: Request) -> str:
    return f"{request.method} {request.path}{'?' if request.query else ''}{request.query}"


@dataclass
class _Spoilt:
    pattern: str
    how: How
    times: float
    turns: Iterator[int]

    def by(self, answer: Answer) -> Answer:
        """Return how to reply to this request: with the fault if it is its turn."""
        if 0 <= next(self.turns) < self.times:
            return lambda request: self.how(request, answer)
        return answer


class FileServer(Server):
    """Serves the files of a folder, also by range."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def answer(self, request: Request) -> Reply:
        file = self.folder / unquote(request.path).lstrip("/")
        if request.method not in ("GET", "HEAD") or not file.is_file():
            return Reply(404, body=b"not found")
        data, found = file.read_bytes(), file.stat()
        headers = {"Accept-Ranges": "bytes", "ETag": f'"{found.st_mtime_ns:x}-{len(data):x}"'}
        match = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
        if match is None or request.method == "HEAD":
            return Reply(200, headers, data)
        begin, end = int(match[1]), min(int(match[2]) + 1, len(data))
        if begin >= end:
            return Reply(416, {"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {begin}-{end - 1}/{len(data)}"
        return Reply(206, headers, data[begin:end])


class Proxy(Server):
    """Forwards requests to another server."""

    def __init__(self, upstream: str) -> None:
        super().__init__()
        self._upstream = upstream.removeprefix("http://")

    def answer(self, request: Request) -> Reply:
        connection = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            headers = {n: v for n, v in request.headers.items() if n not in NOT_FORWARDED}
            headers["content-length"] = str(len(request.body))
            target = request.path + ("?" if request.query else "") + request.query
            connection.putrequest(request.method, target, True, True)
            for name, value in headers.items():
                connection.putheader(name, value)
            connection.endheaders(request.body)
            got = connection.getresponse()
            found = {n: v for n, v in got.getheaders() if n.lower() not in NOT_FORWARDED}
            length = found.pop("Content-Length", None)
            is_head = request.method == "HEAD"
            return Reply(got.status, found, got.read(), int(length) if is_head and length else None)
        finally:
            connection.close()


class _HTTPServer(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def __init__(self, owner: Server) -> None:
        self.owner = owner
        self._open: set[Any] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def server_bind(self) -> None:
        self.socket.bind(self.server_address)  # HTTPServer's would ask for the host's name
        self.server_address = self.socket.getsockname()
        self.server_port = self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        self._open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self._open.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # clients may leave
            super().handle_error(request, client_address)

    def stop(self) -> None:
        self.shutdown()
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _HTTPServer

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        headers = {name.lower(): value for name, value in self.headers.items()}
        if "transfer-encoding" in headers:
            raise ValueError("a body without a length")
        body = self._receive(int(headers.get("content-length", 0)))
        reply = self.server.owner.respond(Request(self.command, path, query, headers, body))
        if reply.status == 0:
            self.close_connection = True
            return
        self.send_response(reply.status)
        for name, value in reply.headers.items():
            self.send_header(name, value)
        length = len(reply.body) if reply.length is None else reply.length
        if length >= 0:
            self.send_header("Content-Length", str(length))
        else:
            self.close_connection = True
        self.end_headers()
        if self.command != "HEAD":
            self._send(reply.body[: reply.end])
        if reply.end is not None:
            self.close_connection = True

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def _receive(self, nbytes: int) -> bytes:
        data = bytearray()
        while len(data) < nbytes:
            block = self.rfile.read(min(BLOCK_NBYTES, nbytes - len(data)))
            if not block:
                raise ConnectionError("the client left")
            data += block
            self._pause(len(block))
        return bytes(data)

    def _send(self, data: bytes) -> None:
        for at in range(0, len(data), BLOCK_NBYTES):
            block = data[at : at + BLOCK_NBYTES]
            self.connection.sendall(block)
            self._pause(len(block))

    def _pause(self, nbytes: int) -> None:
        if self.server.owner.rate < inf:
            time.sleep(nbytes / self.server.owner.rate)
