"""A stand-in for the Hugging Face Hub, on loopback, that the real `huggingface_hub` talks to.

    with StandInHub() as hub:
        hub.add_repo("openai/gpt-oss-tiny", {"config.json": b"{}", "model.safetensors": Path(...)})
        hub.faults.append(first(2, Fault("status", 503), "cdn GET"))
        ...  # a client whose environment has HF_ENDPOINT=hub.endpoint and HF_HUB_DISABLE_XET=1

Two servers: the Hub itself, and one of another origin, the CDN, that sends and takes the bytes of
large files (Git LFS) through signed addresses. Requests and bytes are counted, and replies can be
faulty (`Fault`).
"""

from __future__ import annotations

import hmac
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from hub_contents import (
    BytesContent,
    Entry,
    Fault,
    FileContent,
    ForgottenContent,
    Refusal,
    Repo,
    Request,
    Upload,
    every,
    first,
    is_lfs,
)
from hub_http import Server
from hub_routes import Handler

__all__ = ["Fault", "Request", "StandInHub", "every", "first"]


class StandInHub:
    """The Hub and its CDN.

    Contents are bytes, paths, or objects with `nbytes`, `sha256` and `read(begin, end)`, which
    threads call at the same time.
    """

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
        """The size of the parts in which larger objects are uploaded; None: each is one part."""
        self.keep = keep
        """Whether to keep uploaded bytes, or only their size and checksum."""
        self.log = log
        self.verify = True
        """Whether clients must verify each upload by another request."""
        self.page_nentries = 1000
        self.xet: Path | None = None
        """The folder that hf_xet uploads to, if it is used; commits then name what is in it."""
        self.user = "tester"
        self.tokens: set[str] = set()
        """Tokens that may write, and read private or gated repositories; if empty, all may."""
        self.faults: list[Callable[[Request], Fault | None]] = []
        self.repos: dict[str, Repo] = {}
        self.uploads: dict[str, Upload] = {}
        self.lock = threading.RLock()
        self.closing = threading.Event()
        self._key = secrets.token_bytes(16)
        self.reset_counts()

    def __enter__(self) -> StandInHub:
        self._folder = tempfile.TemporaryDirectory(prefix="stand-in-hub-")
        self._servers = [Server(self, origin, Handler) for origin in ("hub", "cdn")]
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
        """Commit exactly these files to a branch of a repository, and return the commit's id."""
        with self.lock:
            repo = self.repos.setdefault(name, Repo())
            repo.private, repo.gated = private, gated
            entries = {}
            for path, data in files.items():
                content = FileContent(data) if isinstance(data, Path) else data
                content = BytesContent(content) if isinstance(content, bytes) else content
                entries[path] = entry = Entry(content, is_lfs(path, content.nbytes))
                if entry.sha256:
                    repo.objects[entry.sha256] = content
            return repo.commit(branch, entries)

    def add_folder(self, name: str, folder: Path, **options: Any) -> str:
        """Commit all files of a folder (see `add_repo`)."""
        paths = [p for p in sorted(Path(folder).rglob("*")) if p.is_file()]
        files = {p.relative_to(folder).as_posix(): p for p in paths}
        return self.add_repo(name, files, **options)

    def files(self, name: str, revision: str = "main") -> dict[str, Any]:
        """Return the contents of a commit's files, by path."""
        repo = self.repos[name]
        commit = repo.commits[repo.branches.get(revision, revision)]
        return {path: entry.content for path, entry in commit.items()}

    def expire_links(self) -> None:
        """Let all signed addresses expire."""
        self._key = secrets.token_bytes(16)

    def reset_counts(self) -> None:
        """Count and record from now on."""
        with self.lock:
            self.requests: list[Request] = []
            self.bytes_sent = 0
            """Bytes of files' contents."""
            self.bytes_received = 0
            """Bytes received by PUT."""

    def count(self, sent: int = 0, received: int = 0) -> None:
        """Add to the counts."""
        with self.lock:
            self.bytes_sent += sent
            self.bytes_received += received

    def note(self, request: Request) -> Fault | None:
        """Record a request, and return its fault."""
        if self.log:
            with self.lock:
                self.requests.append(request)
        return next(filter(None, (fault(request) for fault in list(self.faults))), None)

    def sign(self, origin: str, method: str, path: str) -> str:
        """Return a signed address that expires."""
        until = f"{time.time() + self.link_seconds:.3f}"
        query = {
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256",
            "Expires": until,
            "X-Amz-Signature": self.signature(method, path, until),
        }
        return f"{origin}{path}?{urlencode(query)}"

    def signature(self, method: str, path: str, until: str) -> str:
        """Return the signature of an address."""
        return hmac.new(self._key, f"{method} {path} {until}".encode(), "sha256").hexdigest()

    def upload(self, repo: Repo, oid: str, nbytes: int) -> dict[str, Any]:
        """Return the action by which a client uploads an object."""
        name = secrets.token_hex(8)
        file = Path(self._folder.name, name) if self.keep else None
        parted = self.part_nbytes is not None and nbytes > self.part_nbytes
        part_nbytes = self.part_nbytes if parted and self.part_nbytes else nbytes
        self.uploads[name] = Upload(repo, oid, nbytes, part_nbytes, file)
        if not parted:
            return {"href": self.sign(self.cdn, "PUT", f"/upload/{name}/1")}
        header = {"chunk_size": str(part_nbytes)}
        for part in range(1, -(-nbytes // part_nbytes) + 1):
            header[f"{part:05}"] = self.sign(self.cdn, "PUT", f"/upload/{name}/{part}")
        return {"href": self.sign(self.endpoint, "POST", f"/complete/{name}"), "header": header}

    def finish(self, upload: Upload) -> None:
        """Add an object whose parts have arrived, if it has the announced checksum."""
        nparts, found = -(-upload.nbytes // upload.part_nbytes), upload.digests[-1].hexdigest()
        if len(upload.digests) != nparts + 1 or found != upload.oid:
            raise Refusal(400, f"the object has the SHA-256 {found}, not {upload.oid}")
        content = FileContent(upload.file, found) if upload.file else None
        upload.repo.objects[found] = content or ForgottenContent(upload.nbytes, found)
