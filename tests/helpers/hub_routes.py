"""The API of the stand-in Hub: what it answers to each request."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from hub_contents import BytesContent, Entry, ForgottenContent, Refusal, Repo, is_lfs
from hub_http import BaseHandler


class Handler(BaseHandler):
    """Answers the requests of `huggingface_hub`."""

    # --- reading -------------------------------------------------------------------------------

    def _whoami(self) -> None:
        if not self._check_token()[1]:
            raise Refusal(401, "Invalid username or password.")
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
            raise Refusal(404, f"{folder} does not exist on {revision!r}", "EntryNotFound")
        at = int(self.query.get("cursor", 0))
        stop, headers = at + self.hub.page_nentries, {}
        if stop < len(found):
            query = urlencode({**self.query, "cursor": stop})
            headers["Link"] = f'<{self.hub.endpoint}{self.client_request.path}?{query}>; rel="next"'
        self._json([*found.values()][at:stop], headers=headers)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        if repo.gated and not self._check_token()[1]:
            raise Refusal(403, f"Access to model {name} is restricted.", "GatedRepo")
        commit, files = self._commit(repo, revision)
        headers = {} if self.kind == "no_commit_header" else {"X-Repo-Commit": commit}
        if path not in files:
            refusal = Refusal(404, "Entry not found", "EntryNotFound")
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
        self._reply(302, headers, BytesContent(f"Found. Redirecting to {where}".encode()))

    def _object(self, name: str, oid: str) -> None:
        self._check_link()
        content = self.hub.repos[name].objects[oid]
        if isinstance(content, ForgottenContent):
            raise Refusal(410, "it was not kept")
        etag = oid[::-1] if self.kind == "wrong_etag" else oid
        self._reply_file(content, {"ETag": f'"{etag}"'})

    # --- writing -------------------------------------------------------------------------------

    def _create(self) -> None:
        body = json.loads(self._body())
        if not self._check_token()[1]:
            raise Refusal(401, "Invalid username or password.")
        name = f"{body.get('organization') or self.hub.user}/{body['name']}"
        url = f"{self.hub.endpoint}/{name}"
        with self.hub.lock:
            if name in self.hub.repos:
                raise Refusal(409, "You already created this model repo", url=url, name=name)
            private = bool(body.get("private")) or body.get("visibility") == "private"
            rule = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
            self.hub.add_repo(name, {".gitattributes": rule}, private=private)
        self._json({"url": url, "name": name})

    def _preupload(self, name: str, revision: str) -> None:
        body = json.loads(self._body())["files"]
        files = self._commit(self._repo(name, write=True), revision)[1]
        modes = []
        for file in body:
            path = file["path"]
            mode = "lfs" if is_lfs(path, file["size"]) else "regular"
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False})
            if path in files:
                modes[-1]["oid"] = files[path].etag
        self._json({"files": modes})

    def _batch(self, name: str) -> None:
        body = json.loads(self._body())["objects"]
        repo = self._repo(name, write=True)
        objects = []
        for announced in body:
            oid, nbytes = announced["oid"], announced["size"]
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
            raise Refusal(400, f"{self.unread} bytes are not what was announced")
        if part > len(upload.digests):
            raise Refusal(400, f"part {part} comes too early")
        if upload.oid in upload.repo.objects:  # the client missed the answer
            self._reply(200, {"ETag": f'"{upload.oid}"'}, BytesContent(b""))
            return
        digest = upload.digests[part - 1].copy()
        buffer = memoryview(bytearray(1 << 20))
        drop = int(self.fault.value) if self.fault and self.kind == "drop_after" else None
        file = os.open(upload.file, os.O_WRONLY | os.O_CREAT) if upload.file else None
        try:
            for left in self._blocks(self.unread if drop is None else drop, len(buffer)):
                while left:
                    nbytes = self._receive(buffer[:left])
                    digest.update(buffer[:nbytes])
                    if file is not None:
                        os.pwrite(file, buffer[:nbytes], at)
                    at, left = at + nbytes, left - nbytes
        finally:
            if file is not None:
                os.close(file)
        if drop is not None:
            self._hang_up()
            return
        upload.digests[part:] = [digest]
        if upload.part_nbytes == upload.nbytes:
            self.hub.finish(upload)
        self._reply(200, {"ETag": f'"{digest.hexdigest()[:32]}"'}, BytesContent(b""))

    def _complete(self, name: str) -> None:
        self._body()
        self._check_link()
        self.hub.finish(self.hub.uploads[name])
        self._json({})

    def _verify(self, name: str) -> None:
        body = json.loads(self._body())
        content = self._repo(name, write=True).objects.get(body["oid"])
        if content is None or content.nbytes != body["size"]:
            raise Refusal(404, "it was not uploaded")
        self._json({})

    def _xet_token(self, name: str, revision: str) -> None:
        """Give access to a folder in which hf_xet stores what is uploaded, instead of a server."""
        self._repo(name, write=True)
        if self.hub.xet is None:
            raise Refusal(404, "no Xet")
        where = f"local://{self.hub.xet}" if isinstance(self.hub.xet, Path) else self.hub.xet
        until = int(time.time()) + 3600
        headers = {
            "X-Xet-Cas-Url": where,
            "X-Xet-Access-Token": "xet",
            "X-Xet-Token-Expiration": str(until),
        }
        self._json({"casUrl": where, "accessToken": "xet", "exp": until}, headers=headers)

    def _add_commit(self, name: str, revision: str) -> None:
        lines = [json.loads(line) for line in self._body().split(b"\n") if line]
        repo = self._repo(name, write=True)
        with self.hub.lock:
            head, files = self._commit(repo, revision)
            if revision not in repo.branches:
                raise Refusal(404, f"{revision} is no branch", "RevisionNotFound")
            files = dict(files)
            for line in lines:
                self._operate(repo, head, files, line["key"], line["value"])
            commit = repo.commit(revision, files)
        where = f"{self.hub.endpoint}/{name}/commit/{commit}"
        self._json({"success": True, "commitOid": commit, "commitUrl": where, "hookOutput": ""})

    def _operate(
        self, repo: Repo, head: str, files: dict[str, Entry], kind: str, value: dict[str, Any]
    ) -> None:
        """Apply one line of a commit to the files."""
        path = value.get("path", "")
        if kind == "header":
            if not head.startswith(value.get("parentCommit", "")):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        elif kind == "file":
            files[path] = Entry(BytesContent(base64.b64decode(value["content"])), False)
        elif kind == "lfsFile":
            if value["oid"] not in repo.objects and self.hub.xet is not None:
                repo.objects[value["oid"]] = ForgottenContent(value["size"], value["oid"])
            if value["oid"] not in repo.objects:
                message = "LFS pointer pointed to a file that does not exist"
                raise Refusal(400, f'Your push was rejected: "{path}": {message}')
            files[path] = Entry(repo.objects[value["oid"]], True)
        elif kind in ("deletedFile", "deletedFolder"):
            start = path.rstrip("/") + "/"
            is_folder = kind == "deletedFolder"
            gone = [p for p in files if (p.startswith(start) if is_folder else p == path)]
            if not gone:
                raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
            for each in gone:
                del files[each]
        else:
            raise Refusal(400, f"unknown operation: {kind}")


_API = r"/api/models/([^/]+/[^/]+)"
_LFS = r"/([^/]+/[^/]+)\.git/info/lfs/objects"
Handler.routes = [
    ("hub", ("GET",), r"/api/whoami-v2", Handler._whoami),
    ("hub", ("GET",), _API + r"(?:/revision/([^/]+))?", Handler._info),
    ("hub", ("GET",), _API + r"/tree/([^/]+)(?:/(.+))?", Handler._tree),
    ("hub", ("GET", "HEAD"), r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", Handler._resolve),
    ("hub", ("POST",), r"/api/repos/create", Handler._create),
    ("hub", ("POST",), r"/api/validate-yaml", lambda handler: handler._json({})),
    ("hub", ("POST",), _API + r"/preupload/([^/]+)", Handler._preupload),
    ("hub", ("GET",), _API + r"/xet-write-token/([^/]+)", Handler._xet_token),
    ("hub", ("POST",), _API + r"/commit/([^/]+)", Handler._add_commit),
    ("hub", ("POST",), _LFS + "/batch", Handler._batch),
    ("hub", ("POST",), _LFS + "/verify", Handler._verify),
    ("hub", ("POST",), r"/complete/(\w+)", Handler._complete),
    ("cdn", ("GET", "HEAD"), r"/lfs/([^/]+/[^/]+)/(\w+)", Handler._object),
    ("cdn", ("PUT",), r"/upload/(\w+)/(\d+)", Handler._put),
]
