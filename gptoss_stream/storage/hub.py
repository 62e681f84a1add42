"""A repository of the Hub, to read from and to write to.

A revision is resolved to a commit once, and everything is read of that commit. `huggingface_hub`
talks to the Hub: names, login, endpoint, proxies, cache, uploads and commits are its; the checks
of what arrives are ours (`_ranges`). A token goes to the Hub's own origin only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
)

from ..errors import CheckpointError, MachineError, OptionError, OutputError
from .byte_ranges import TIMEOUT, DownloadLink, origin
from .hub_file import HubFile
from .hub_requests import NotFoundError, output_errors, retry, source_errors, without_progress_bars
from .local_folder import LocalFile, LocalFolder
from .location import FileInfo, changed, read_whole
from .retries import FEW_TRIES

__all__ = ["HubRepository", "name_of_page"]


_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.*))?")


_OWN = (".gitattributes", "README.md", ".gitignore")  # that a repository has of itself


def name_of_page(url: str) -> str | None:
    """`user/name@revision/folder` for the address of a repository's page, as browsers show it."""
    if origin(url) != origin(constants.ENDPOINT):
        return None
    match = re.fullmatch(
        r"/([\w.-]+/[\w.-]+)(?:/(?:tree|blob|resolve)/([^/]+)(/.*)?)?",
        urlsplit(url).path.rstrip("/"),
    )
    if match is None:
        return None
    return f"{match[1]}{f'@{match[2]}' if match[2] else ''}{match[3] or ''}"


class HubRepository:
    """A repository, or a folder of it, at one commit (see `places.Place` and `places.Store`)."""

    is_local = False

    def __init__(
        self, repo: str, commit: str | None, subfolder: str, token: str | None, download: bool
    ) -> None:
        self.repo = repo
        self.commit = commit
        self.revision = commit
        """What was asked for."""
        self._subfolder = subfolder
        self._token = token
        self._download = download
        self._api = huggingface_hub.HfApi(token=token, library_name="gptoss_stream")
        self._files: dict[str, FileInfo] = {}
        self._is_made = False
        self._is_reached = False

    @classmethod
    def to_read(
        cls,
        name: str,
        *,
        revision: str | None,
        subfolder: str | None,
        token: str | None,
        download: bool,
    ) -> HubRepository | LocalFolder:
        """Resolve `user/name@revision/subfolder`; offline, the folder of it in the cache.

        Raises `OptionError`, `CheckpointError`, `MachineError`.
        """
        repo, named_revision, named_folder = _parse(name)
        if revision and named_revision and revision != named_revision:
            raise OptionError(f"hf://{name}: it names another revision than --revision {revision}")
        revision = revision or named_revision
        folder = "/".join(filter(None, (named_folder, subfolder))).strip("/")
        if constants.HF_HUB_OFFLINE:
            return _cached_folder(repo, revision, folder)
        location = cls(repo, None, folder, token, download)
        with source_errors(f"hf://{repo}"):
            info = retry(
                lambda: location._api.repo_info(repo, revision=revision, timeout=TIMEOUT),
                f"hf://{repo}",
                tries=FEW_TRIES,
            )
        location.commit = info.sha
        location.revision = revision or constants.DEFAULT_REVISION
        if not re.fullmatch(r"[0-9a-f]{40}", str(info.sha)):
            raise CheckpointError(
                f"hf://{repo}: the server names no commit, so that files of two states could be "
                "mixed; use --download from the Hub itself"
            )
        with source_errors(str(location)):
            location._files = dict(location.listing())
        return location

    @classmethod
    def to_write(cls, name: str, *, token: str | None) -> HubRepository:
        """The repository `user/name`, or a folder of it, which need not be there yet."""
        repo, revision, folder = _parse(name)
        if revision:
            raise OptionError(f"hf://{name}: name no revision; what is written goes to main")
        return cls(repo, None, (folder or "").strip("/"), token, False)

    def __str__(self) -> str:
        commit = f"@{self.commit[:12]}" if self.commit else ""
        return "/".join(filter(None, (f"hf://{self.repo}{commit}", self._subfolder)))

    @property
    def identity(self) -> str:
        """The repository, the whole commit, and the folder."""
        commit = f"@{self.commit}" if self.commit else ""
        return "/".join(filter(None, (f"hf://{self.repo}{commit}", self._subfolder)))

    def display_path(self, name: str) -> str:
        """What messages call a file of it."""
        return f"{self}/{name}"

    def check(self) -> None:
        """It was found when it was opened; a folder of it that is none holds nothing."""
        if not self._files:
            raise CheckpointError(f"{self}: there are no files in it; check the name of the folder")

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return name in self._files

    def names(self, folder: str = "") -> list[str]:
        """The names of the files right in it, or in a folder of it."""
        parent = PurePosixPath(folder)
        return sorted(
            path.name for path in map(PurePosixPath, self._files) if path.parent == parent
        )

    def open(self, name: str) -> HubFile:
        """A file: from the cache, where all of it is there, or by byte range."""
        if name not in self._files:
            raise CheckpointError(f"{self.display_path(name)}: there is no such file")
        return HubFile(self, self._files[name])

    def pinned_to(self, state: Mapping[str, Any] | None) -> HubRepository | LocalFolder:
        """The repository at the commit that an unfinished run began to read."""
        if state is None or state.get("source_revision") != self.revision:
            return self
        begun = re.fullmatch(
            rf"hf://{re.escape(self.repo)}@([0-9a-f]{{40}})(?:/.*)?", str(state.get("source"))
        )
        if begun is None or begun[1] == self.commit:
            return self
        try:
            location = HubRepository.to_read(
                "/".join(filter(None, (self.repo, self._subfolder))),
                revision=begun[1],
                subfolder=None,
                token=self._token,
                download=self._download,
            )
        except NotFoundError:
            raise CheckpointError(
                f"hf://{self.repo}@{begun[1][:12]}: it is gone, and the run began to read it; "
                "start again with --overwrite"
            ) from None
        if isinstance(location, HubRepository):
            location.revision = self.revision
        return location

    def prepare(self, names: list[str]) -> None:
        """Download the files whose data will be read into the cache, if that was asked for."""
        for name in names if self._download else ():
            with source_errors(self.display_path(name)):
                retry(
                    lambda name=name: huggingface_hub.hf_hub_download(  # type: ignore[misc]
                        self.repo,
                        self._path(name),
                        revision=self.commit,
                        token=self._token,
                        library_name="gptoss_stream",
                        endpoint=constants.ENDPOINT,
                    ),
                    self.display_path(name),
                )

    def _path(self, name: str) -> str:
        return f"{self._subfolder}/{name}" if self._subfolder else name

    # --- reading -------------------------------------------------------------------------------

    def cached(self, info: FileInfo) -> LocalFile | None:
        """A file in huggingface_hub's cache, if all of it is there."""
        path = huggingface_hub.try_to_load_from_cache(
            self.repo, self._path(info.name), revision=self.commit
        )
        if not isinstance(path, str):
            return None
        # The cache names a file by its ETag; a name of its own is only given to a whole one.
        whole = os.path.basename(os.path.realpath(path)) == info.version
        file = LocalFolder(Path(path).parent).open(Path(path).name) if whole else None
        if file is not None and file.info.nbytes != info.nbytes:
            file.close()
            return None
        return file

    def resolve(self, info: FileInfo) -> DownloadLink:
        """Where a file's bytes are to be had; raises `CheckpointError` if it has changed."""
        url = huggingface_hub.hf_hub_url(
            self.repo, self._path(info.name), revision=self.commit, endpoint=constants.ENDPOINT
        )
        where = self.display_path(info.name)
        with source_errors(where):
            found = retry(
                lambda: huggingface_hub.get_hf_file_metadata(
                    url, token=self._token, timeout=TIMEOUT
                ),
                where,
            )
        if found.commit_hash is None:
            raise MachineError(
                f"{where}: the server's answer is none of the Hub's: it names no commit; check "
                "HF_ENDPOINT and the network"
            )
        if found.commit_hash != self.commit:
            raise changed(where)
        if found.size is not None and found.size != info.nbytes:
            raise changed(where)
        if found.etag is not None and found.etag != info.version:
            raise changed(where)
        home = origin(constants.ENDPOINT)
        there = origin(found.location)
        if home[0] == "https" and there[0] != "https":
            raise MachineError(f"{where}: the Hub leads from https to an unprotected address")
        headers = huggingface_hub.utils.build_hf_headers(
            token=self._token, library_name="gptoss_stream"
        )
        if there != home:
            headers = {k: v for k, v in headers.items() if k.lower() != "authorization"}
        return DownloadLink(found.location, headers, is_signed=there != home)

    # --- writing -------------------------------------------------------------------------------

    def listing(self) -> Mapping[str, FileInfo]:
        """All files in it, with their SHA-256 where the Hub has it; none if there is no such
        repository or folder."""
        try:
            with source_errors(str(self)):
                if self.commit is None and not self._is_reached:
                    self._ask()
                found = retry(self._tree, str(self))
        except NotFoundError:
            if self.commit is not None:
                raise
            return {}
        return {info.name: info for info in found}

    def _ask(self) -> None:
        """See whether the Hub is there at all: listing a folder is tried for minutes."""
        retry(lambda: self._api.repo_info(self.repo, timeout=TIMEOUT), str(self), tries=FEW_TRIES)
        self._is_reached = True

    def _tree(self) -> list[FileInfo]:
        try:
            entries = list(
                self._api.list_repo_tree(
                    self.repo, self._subfolder or None, revision=self.commit, recursive=True
                )
            )
        except EntryNotFoundError:
            return []
        found = []
        for entry in entries:
            if isinstance(entry, huggingface_hub.hf_api.RepoFile):
                name = entry.path[len(self._subfolder) :].lstrip("/")
                sha256 = entry.lfs.sha256 if entry.lfs else None
                found.append(FileInfo(name, entry.size, sha256 or entry.blob_id, sha256=sha256))
        return [f for f in found if self.commit is not None or f.name not in _OWN]

    def read(self, name: str) -> bytes:
        """A small file, as it is now."""
        location = HubRepository.to_read(
            "/".join(filter(None, (self.repo, self._subfolder))),
            revision=None,
            subfolder=None,
            token=self._token,
            download=False,
        )
        if isinstance(location, LocalFolder):
            raise OutputError(f"{self}: the Hub cannot be written to offline; unset HF_HUB_OFFLINE")
        with closing(location.open(name)) as file:
            return read_whole(file)

    def put(self, files: Mapping[str, Path | bytes], sums: Mapping[str, str]) -> None:
        """Commit files, all in one commit, and hold what the Hub then lists against their sums.

        A repository that is not there is made, as a private one.
        """
        additions = {}
        for name, data in files.items():
            addition = huggingface_hub.CommitOperationAdd(
                self._path(name), data if isinstance(data, bytes) else str(data)
            )
            if name in sums:  # known: the file need not be read once more for it
                addition.upload_info.sha256 = bytes.fromhex(sums[name])
            additions[name] = addition
        self._commit(lambda: [*additions.values()], f"Add {', '.join(files)}")
        there = self.listing()
        for name, addition in additions.items():
            sent, info = addition.upload_info, there.get(name)
            if (
                info is None
                or info.nbytes != sent.size
                or info.sha256 not in (None, sent.sha256.hex())
            ):
                raise MachineError(
                    f"{self.display_path(name)}: what the Hub lists is not what was sent; run the same "
                    "command again"
                )

    def delete(self, names: list[str]) -> None:
        """Delete files, all in one commit."""

        def deletions() -> list[Any]:
            there = self.listing()
            return [
                huggingface_hub.CommitOperationDelete(self._path(n)) for n in names if n in there
            ]

        if names:
            self._commit(deletions, f"Delete {', '.join(names)}")

    def _commit(self, operations: Callable[[], list[Any]], message: str) -> None:
        def commit() -> None:
            # Known anew each time: the Hub may have done it, and not have come to say so.
            if left := operations():
                self._api.create_commit(self.repo, left, commit_message=message[:200])

        with output_errors(str(self)), without_progress_bars():
            if not self._is_made:
                retry(
                    lambda: self._api.create_repo(self.repo, private=True, exist_ok=True), str(self)
                )
                self._is_made = True
            retry(commit, str(self))


def _parse(name: str) -> tuple[str, str | None, str | None]:
    match = _NAME.fullmatch(name.strip("/"))
    if match is None or name.startswith(("datasets/", "spaces/")):
        raise OptionError(f"hf://{name}: name a model as hf://user/name@revision/folder")
    return match[1], match[2], match[3]


def _cached_folder(repo: str, revision: str | None, subfolder: str) -> LocalFolder:
    with source_errors(f"hf://{repo}"):
        try:
            path = huggingface_hub.snapshot_download(repo, revision=revision, local_files_only=True)
        except LocalEntryNotFoundError:
            raise CheckpointError(
                f"hf://{repo}: HF_HUB_OFFLINE is set, and it is not in the cache; unset it, or "
                "download the repository first"
            ) from None
    return LocalFolder(Path(path) / subfolder)
