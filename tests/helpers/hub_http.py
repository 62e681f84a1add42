"""The servers of the stand-in Hub: receiving, sending, and faults on the way."""

from __future__ import annotations

import gzip
import hmac
import json
import re
import socket
import socketserver
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote

from hub_contents import BLOCK_NBYTES, BytesContent, Entry, FileContent, Refusal, Repo, Request

if TYPE_CHECKING:
    from stand_in_hub import StandInHub


class Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def __init__(self, hub: StandInHub, origin: str, handler: type[BaseHandler]) -> None:
        self.hub = hub
        self.origin = origin
        self._connections: set[Any] = set()
        super().__init__(("127.0.0.1", 0), handler)

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


class BaseHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server
    routes: list[tuple[str, tuple[str, ...], str, Callable[..., None]]]
    """Origin, methods, path and the method that answers."""

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.hub = self.server.hub
        path, _, query = self.path.partition("?")
        self.query = dict(parse_qsl(query))
        byte_range, has_token = self.headers.get("Range"), "Authorization" in self.headers
        origin = self.server.origin
        self.client_request = Request(self.command, path, query, byte_range, has_token, origin)
        self.unread = int(self.headers.get("Content-Length") or 0)
        self.fault = self.hub.note(self.client_request)
        self.kind = self.fault.kind if self.fault else ""
        try:
            self._route(path)
        except Refusal as refusal:
            self._json(refusal.body, refusal.status, refusal.headers)
        while self.unread:  # unread bytes would be taken for the next request
            self._receive(bytearray(min(self.unread, BLOCK_NBYTES)))

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self, path: str) -> None:
        if self.fault and self.kind == "status":
            self._reply(int(self.fault.value), self.fault.headers, BytesContent(b""))
            return
        if self.kind == "html":
            page = BytesContent(b"<html><body>Please log in to the network.</body></html>")
            self._reply(200, {"Content-Type": "text/html"}, page)
            return
        for origin, methods, pattern, answer in self.routes:
            match = re.fullmatch(pattern, path)
            if match and origin == self.client_request.origin and self.command in methods:
                answer(self, *(unquote(group) for group in match.groups() if group is not None))
                return
        raise Refusal(404, "Sorry, we can't find the page you are looking for.")

    # --- requests ------------------------------------------------------------------------------

    def _receive(self, out: Any) -> int:
        """Fill `out` from the request's body, and return the number of bytes."""
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
        """Return the token, and whether it gives access to gated repositories."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        is_good = not self.hub.tokens or token in self.hub.tokens
        if token and not is_good:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return token, is_good

    def _repo(self, name: str, write: bool = False) -> Repo:
        token, is_good = self._check_token()
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not is_good):
            message = "Repository not found" if token else "Invalid username or password."
            raise Refusal(404 if token else 401, message, "RepoNotFound")
        if write and not is_good:
            raise Refusal(401, "Invalid username or password.")
        return repo

    def _commit(self, repo: Repo, revision: str) -> tuple[str, dict[str, Entry]]:
        commit = repo.branches.get(revision, revision)
        if commit not in repo.commits:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit, repo.commits[commit]

    def _check_link(self) -> None:
        until, given = self.query.get("Expires", "0"), self.query.get("X-Amz-Signature", "")
        method = "GET" if self.command == "HEAD" else self.command
        right = self.hub.signature(method, self.client_request.path, until)
        if not hmac.compare_digest(given, right) or float(until) < time.time():
            raise Refusal(403, "Request has expired")

    # --- replies -------------------------------------------------------------------------------

    def _json(self, data: Any, status: int = 200, headers: Mapping[str, str] = {}) -> None:
        headers = {"Content-Type": "application/json; charset=utf-8", **headers}
        self._reply(status, headers, BytesContent(json.dumps(data).encode()))

    def _reply_file(self, content: Any, headers: dict[str, str]) -> None:
        """Send a file or a range of it."""
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes", **headers}
        begin, end = 0, content.nbytes
        match = re.fullmatch(r"bytes=(?:(\d+)-(\d*)|-(\d+))", self.client_request.range or "")
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
        """Reply with a range of a content, with the fault."""
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
            content, begin, end = BytesContent(data), 0, len(data)
        if self.kind == "wrong_length":
            end = begin + (end - begin) // 2
        length = end - begin + (self.kind == "wrong_size" and self.command == "HEAD")
        self.client_request.status = status
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
        for nbytes in self._blocks(end - begin):
            if counted:  # before the client can receive them and read the count
                self.hub.count(sent=nbytes)
            if isinstance(content, FileContent):
                content.send(self.connection, begin, begin + nbytes)
            else:
                block = memoryview(content.read(begin, begin + nbytes))
                if block.nbytes != nbytes:
                    raise ValueError(f"a content gave {block.nbytes} bytes for {nbytes}")
                self.connection.sendall(block)
            begin += nbytes

    def _hang_up(self) -> None:
        """Stop reading; the connection is closed after this request."""
        self.unread = 0
        self.close_connection = True

    def _blocks(self, nbytes: int, most: int = BLOCK_NBYTES) -> Iterator[int]:
        """Yield the sizes of blocks to send or receive, at the speed of the fault."""
        value = self.fault.value if self.fault else 0
        most = min(most, max(1, int(value / 20))) if self.kind == "slow" else most
        done, half = 0, nbytes // 2 if self.kind == "stall" else -1
        while done < nbytes:
            if done == half:
                self.hub.closing.wait(value)
            block = min(most, (half if done < half else nbytes) - done)
            yield block
            done += block
            if self.kind == "slow":
                self.hub.closing.wait(block / value)
