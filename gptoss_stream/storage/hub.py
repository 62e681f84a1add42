"""A repository of the Hub, to read from and to write to.

A revision is resolved to a commit once, and all files are read from that commit. `huggingface_hub`
sends the requests: it handles login, endpoint, proxies, cache, uploads and commits. This package
checks the bytes that arrive (`byte_ranges`). A token is sent to the Hub's own origin only.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path, PurePosixPath
from typing import Any

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import BadRequestError, EntryNotFoundError

from ..errors import CheckpointError, OptionError, OutputError
from .byte_ranges import TIMEOUT
from .hub_additions import (
    check_listed,
    check_sent,
    check_written,
    file_addition,
    make_receipt,
    uploaded_addition,
)
from .hub_commits import known_commit, known_files, remember
from .hub_file import Address, HubFile, cached_folder
from .hub_names import parse_name
from .hub_requests import NotFoundError, list_files, resolve, retry, source_errors, uploading
from .local_folder import LocalFolder
from .location import FileInfo, ShownByName, read_whole
from .retries import FEW_TRIES
from .tokens import check_token
from .xet import bound_memory, send_large_file, uses_xet

__all__ = ["HubRepository"]


class HubRepository(ShownByName):
    """A repository, or a folder of it, at one commit (see `Location`, `WritableLocation`)."""

    is_local = False

    def __init__(
        self, repo: str, commit: str | None, subfolder: str, token: str | None, download: bool
    ) -> None:
        self.repo = repo
        self.commit = commit
        self.revision = commit
        """The requested revision."""
        self._subfolder = subfolder
        self.token = token
        self._download = download
        self._api = huggingface_hub.HfApi(token=token, library_name="gptoss_stream")
        self._files: Mapping[str, FileInfo] = {}
        self._addresses: dict[str, Address] = {}
        self._exists = False
        self._is_reachable = False
        if token is None:
            check_token(huggingface_hub.get_token(), "HF_TOKEN or the cached login")

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
        """Open a repository to read from, and resolve its revision to a commit.

        Args:
            name: user/name@revision/subfolder.
            revision: A branch, tag or commit, if the name has none.
            subfolder: A folder in the one that the name has.
            token: A token; by default the cached login.
            download: Whether to download files to the cache before reading them.

        Returns:
            The repository or, offline, its folder in the Hub's cache.
        """
        repo, revision, folder = parse_name(name, revision, subfolder)
        if constants.HF_HUB_OFFLINE:
            return cached_folder(repo, revision, folder)
        location = cls(repo, None, folder, token, download)
        location.revision = revision or constants.DEFAULT_REVISION
        commit = known_commit(repo, location.revision) or resolve(location._api, repo, revision)
        location.commit = commit
        known = known_files(repo, commit, folder)
        if known is None:
            with source_errors(str(location)):
                known = dict(location.listing())
            remember(repo, commit, folder, known)
        location._files = known
        return location

    @classmethod
    def to_write(cls, name: str, *, token: str | None) -> HubRepository:
        """Return a repository to write to, which need not exist yet.

        Args:
            name: user/name or user/name/subfolder.
            token: A token; by default the cached login.
        """
        repo, revision, folder = parse_name(name)
        if revision:
            raise OptionError(f"hf://{name}: name no revision; outputs go to the branch main")
        bound_memory()
        return cls(repo, None, folder, token, False)

    def __str__(self) -> str:
        commit = f"@{self.commit[:12]}" if self.commit else ""
        return "/".join(filter(None, (f"hf://{self.repo}{commit}", self._subfolder)))

    @property
    def identity(self) -> str:
        """The repository, the whole commit, and the folder."""
        commit = f"@{self.commit}" if self.commit else ""
        return "/".join(filter(None, (f"hf://{self.repo}{commit}", self._subfolder)))

    def display_path(self, name: str) -> str:
        """Return the name of a file in messages."""
        return f"{self}/{name}"

    def check(self) -> None:
        """Check that there are files in it (see `Location.check`)."""
        if not self._files:
            raise CheckpointError(f"{self}: there are no files in it; check the name of the folder")

    def has(self, name: str) -> bool:
        """Return whether a file exists."""
        return name in self._files

    def names(self, folder: str = "") -> list[str]:
        """Return the names of the files in it or in a folder of it, sorted."""
        paths = map(PurePosixPath, self._files)
        return sorted(path.name for path in paths if path.parent == PurePosixPath(folder))

    def open(self, name: str) -> HubFile:
        """Open a file (see `Location.open`)."""
        if name not in self._files:
            raise CheckpointError(f"{self.display_path(name)}: there is no such file")
        address = self._addresses.setdefault(name, Address())
        return HubFile(self, self._files[name], address)

    def pinned_to(self, state: Mapping[str, Any] | None) -> HubRepository | LocalFolder:
        """Return the repository at the commit that an unfinished run began to read."""
        if state is None or state.get("source_revision") != self.revision:
            return self
        earlier = re.fullmatch(
            rf"hf://{re.escape(self.repo)}@([0-9a-f]{{40}})(?:/.*)?", str(state.get("source"))
        )
        if earlier is None or earlier[1] == self.commit:
            return self
        try:
            location = HubRepository.to_read(
                "/".join(filter(None, (self.repo, self._subfolder))),
                revision=earlier[1],
                subfolder=None,
                token=self.token,
                download=self._download,
            )
        except NotFoundError:
            raise CheckpointError(
                f"hf://{self.repo}@{earlier[1][:12]}: it no longer exists, and the run began to "
                "read it; start again with --overwrite"
            ) from None
        if isinstance(location, HubRepository):
            location.revision = self.revision
        return location

    def download(self, names: list[str]) -> None:
        """Download files into the Hub's cache (see `Location.download`)."""
        for name in names if self._download else ():
            with source_errors(self.display_path(name)):
                retry(
                    lambda name=name: huggingface_hub.hf_hub_download(  # type: ignore[misc]
                        self.repo,
                        self.repo_path(name),
                        revision=self.commit,
                        token=self.token,
                        library_name="gptoss_stream",
                        endpoint=constants.ENDPOINT,
                    ),
                    self.display_path(name),
                )

    def repo_path(self, name: str) -> str:
        """Return the path of a file in the repository."""
        return f"{self._subfolder}/{name}" if self._subfolder else name

    # --- writing -------------------------------------------------------------------------------

    def listing(self) -> Mapping[str, FileInfo]:
        """Return all files, with the SHA-256 of large ones (see `WritableLocation`)."""
        try:
            with source_errors(str(self)):
                if self.commit is None and not self._is_reachable:
                    self._check_reachable()
                found = retry(
                    lambda: list_files(self._api, self.repo, self.commit, self._subfolder),
                    str(self),
                )
        except NotFoundError:
            if self.commit is not None:
                raise
            return {}
        return {info.name: info for info in found}

    def _check_reachable(self) -> None:
        """Check with few tries that the Hub can be reached: a listing is retried for minutes."""
        retry(lambda: self._api.repo_info(self.repo, timeout=TIMEOUT), str(self), tries=FEW_TRIES)
        self._is_reachable = True

    def read(self, name: str) -> bytes:
        """Read a small file as it is now."""
        location = HubRepository.to_read(
            "/".join(filter(None, (self.repo, self._subfolder))),
            revision=None,
            subfolder=None,
            token=self.token,
            download=False,
        )
        if isinstance(location, LocalFolder):
            raise OutputError(f"{self}: the Hub cannot be written to offline; unset HF_HUB_OFFLINE")
        with closing(location.open(name)) as file:
            return read_whole(file)

    def put(self, files: Mapping[str, Path | bytes], checksums: Mapping[str, str]) -> None:
        """Write files in one commit, and check what the Hub then lists.

        A repository that does not exist is created as a private one.
        """
        self._add({n: file_addition(self.repo_path(n), files[n], checksums.get(n)) for n in files})

    def upload(self, name: str, file: Path, checksum: str) -> bytes:
        """Upload a file, which is not visible before `publish` (see `BatchingLocation`)."""
        where = self.display_path(name)
        # hf_xet computes the checksum of what it sends; LFS needs it before.
        addition = file_addition(self.repo_path(name), file, None if uses_xet() else checksum)
        with uploading(str(self)):
            self._create()
            try:
                retry(lambda: send_large_file(self._api, self.repo, addition), where)
            except BadRequestError:
                check_written(file, checksum)
                raise
        check_sent(addition, file, checksum, where)
        return make_receipt(addition)

    def publish(self, receipts: Mapping[str, bytes], files: Mapping[str, bytes]) -> None:
        """Make uploaded files visible, all at once, in one commit (see `BatchingLocation`)."""
        additions = {n: file_addition(self.repo_path(n), files[n], None) for n in files}
        additions |= {n: uploaded_addition(self.repo_path(n), receipts[n]) for n in receipts}
        self._add(additions)

    def _add(self, additions: Mapping[str, huggingface_hub.CommitOperationAdd]) -> None:
        """Add files in one commit, and check what the Hub then lists."""
        self._commit(lambda: [*additions.values()], f"Add {', '.join(additions)}")
        check_listed(additions, self.listing, self.display_path)

    def delete(self, names: list[str]) -> None:
        """Delete files in one commit."""

        def deletions() -> list[Any]:
            listed = self.listing()
            deletion = huggingface_hub.CommitOperationDelete
            return [deletion(self.repo_path(name)) for name in names if name in listed]

        if names:
            self._commit(deletions, f"Delete {', '.join(names)}")

    def _commit(self, operations: Callable[[], list[Any]], message: str) -> None:
        """Commit operations; creates the repository first if it does not exist."""

        def commit() -> None:
            # Computed for each try: the last may have succeeded although its reply was lost.
            if left := operations():
                self._api.create_commit(self.repo, left, commit_message=message[:200])

        with uploading(str(self)):
            self._create()
            try:
                retry(commit, str(self))
            except EntryNotFoundError:  # another process has just deleted one of the files
                retry(commit, str(self))

    def _create(self) -> None:
        """Create the repository, as a private one, if it does not exist."""
        if not self._exists:
            retry(lambda: self._api.create_repo(self.repo, private=True, exist_ok=True), str(self))
            self._exists = True
