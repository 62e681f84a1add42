"""A folder of any file system that fsspec supports: `s3://`, `gs://`, `abfs://`, `sftp://`, ….

fsspec and its implementation for the file system send the requests, with the credentials of the
environment. This module checks the number of bytes that arrive, and that files do not change.
"""

from __future__ import annotations

import hashlib
import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs

from ..errors import (
    CheckpointError,
    GptOssStreamError,
    MissingPackageError,
    OptionError,
    OutputError,
)
from .etags import PART_NBYTES, etag_matches, md5
from .location import FileInfo, ShownByName
from .object_file import ObjectFile
from .object_store_errors import redacted, refused_as, retry
from .retries import FEW_TRIES

__all__ = ["ObjectStore"]

_MAX_PARTS = 3  # uploaded at the same time
_S3 = {"chunksize": PART_NBYTES, "max_concurrency": _MAX_PARTS}
_GCS = {"chunksize": PART_NBYTES}
_AZURE = {"max_concurrency": _MAX_PARTS}
_PUT_OPTIONS: Mapping[str, Mapping[str, int]] = {
    **dict.fromkeys(("s3", "s3a"), _S3),
    **dict.fromkeys(("gs", "gcs"), _GCS),
    **dict.fromkeys(("abfs", "abfss", "az"), _AZURE),
}
"""What bounds the memory of an upload. By default s3fs holds ten parts of 50 MiB, each of them
twice, gcsfs four of 50 MiB, and adlfs so many of 4 MiB that a shard of 2 GB takes 2 GB."""
_READ_BACK_NBYTES = 16 << 20
_ATOMIC = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory"}
"""Protocols by which a file appears only when it is complete."""
_PARTIAL = ".partial"
"""The suffix of a file that is being written by any other protocol."""
_WITHOUT_HOST = {"file", "local", "memory"}
_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "crc32c", "mtime", "LastModified",
             "last_modified", "modified", "created")  # fmt: skip


class ObjectStore(ShownByName):
    """A folder of an object store (see `Location` and `WritableLocation`)."""

    revision = None
    is_local = False

    def __init__(self, url: str) -> None:
        self.protocol, _, rest = url.partition("://")
        host, slash, path = rest.partition("/")
        self._shown = f"{self.protocol}://{host.rpartition('@')[2]}{slash}{path}".rstrip("/")
        self._shown = self._shown.partition("?")[0]
        if self.protocol in ("s3", "s3a") and re.match(r"(?!arn:)[^@]*:[^@]*@", rest):
            raise OptionError(
                f"{self.protocol}://: a key in a URL is not used; set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY in the environment"
            )
        if not host and self.protocol not in _WITHOUT_HOST:
            raise OptionError(f"{self.protocol}://: name a bucket or a server after it")
        try:
            self.file_system, root = url_to_fs(url)
        except ImportError as error:
            raise MissingPackageError(
                f"{self._shown}: {redacted(error)}; install what it names"
            ) from None
        except Exception as error:
            raise OptionError(f"{self._shown}: {redacted(error)}; check the URL") from None
        self._root: str = root.rstrip("/")
        self._found: Mapping[str, FileInfo] | None = None
        self._is_atomic = self.protocol in _ATOMIC
        self._has_md5_etags = True

    def __str__(self) -> str:
        return self._shown

    @property
    def identity(self) -> str:
        """Its URL, without secrets."""
        return self._shown

    def display_path(self, name: str) -> str:
        """Return the URL of a file, without secrets."""
        return f"{self._shown}/{name}"

    # --- reading -------------------------------------------------------------------------------

    @property
    def _files(self) -> Mapping[str, FileInfo]:
        """The files at the first listing, by name."""
        if self._found is None:
            self._found = self._list(CheckpointError)
        return self._found

    def check(self) -> None:
        """Check that there are files in it (see `Location.check`)."""
        if not self._files:
            raise CheckpointError(f"{self}: there are no files in it; check the URL")

    def has(self, name: str) -> bool:
        """Return whether a file exists."""
        return name in self._files

    def names(self, folder: str = "") -> list[str]:
        """Return the names of the files in it or in a folder of it, sorted."""
        parents = ((name.rpartition("/"), name) for name in self._files)
        return sorted(last for (parent, _, last), _ in parents if parent == folder)

    def open(self, name: str) -> ObjectFile:
        """Open a file (see `Location.open`)."""
        if name not in self._files:
            raise CheckpointError(f"{self.display_path(name)}: there is no such file")
        # Not the listed information: some protocols describe a file differently in a listing.
        return ObjectFile(self, self.info(name))

    def pinned_to(self, state: Mapping[str, Any] | None) -> ObjectStore:
        """Return the folder: it has no revisions."""
        return self

    def download(self, names: list[str]) -> None:
        """Do nothing: only the Hub has a cache."""

    def path(self, name: str) -> str:
        """Return the path of a file in its file system."""
        return f"{self._root}/{name}"

    def fetch(self, name: str, begin: int, end: int) -> bytes:
        """Read bytes `begin … end` of a file in one request, without checks."""
        with refused_as(CheckpointError, self.display_path(name)):
            data: bytes = self.file_system.cat_file(self.path(name), start=begin, end=end)
        return data

    def info(self, name: str) -> FileInfo:
        """Request the current size and version of a file."""
        path = self.path(name)

        def request() -> FileInfo:
            self.file_system.invalidate_cache(self.file_system._parent(path))
            return _file_info(name, self.file_system.info(path))

        with refused_as(CheckpointError, self.display_path(name)):
            return retry(request, self.display_path(name))

    # --- writing -------------------------------------------------------------------------------

    def listing(self) -> Mapping[str, FileInfo]:
        """Return all files (see `WritableLocation.listing`)."""
        return self._list(OutputError)

    def _list(
        self, refusal: type[GptOssStreamError], *, partials: bool = False
    ) -> Mapping[str, FileInfo]:
        """Return all files; with `partials`, also the partial files of interrupted uploads."""

        def find() -> dict[str, Any]:
            self.file_system.invalidate_cache()
            try:
                found: dict[str, Any] = self.file_system.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
            return found

        with refused_as(refusal, str(self)):
            found = retry(find, str(self), tries=FEW_TRIES)
        root = self._root.lstrip("/")
        named = {path.lstrip("/")[len(root) :].lstrip("/"): info for path, info in found.items()}
        return {
            name: _file_info(name, info)
            for name, info in named.items()
            if name and (partials or self._is_atomic or not name.endswith(_PARTIAL))
        }

    def read(self, name: str) -> bytes:
        """Read a small file as it is now."""
        with refused_as(OutputError, self.display_path(name)):
            data: bytes = retry(
                lambda: self.file_system.cat_file(self.path(name)), self.display_path(name)
            )
        return data

    def put(self, files: Mapping[str, Path | bytes], checksums: Mapping[str, str]) -> None:
        """Write files one after another, and check size and ETag of each."""
        for name, data in files.items():
            with refused_as(OutputError, self.display_path(name)):
                retry(partial(self._put, name, data), self.display_path(name))

    def _put(self, name: str, data: Path | bytes) -> None:
        """Write one file; delete it again if it has not arrived as it was sent."""
        final = self.path(name)
        path = final if self._is_atomic else f"{final}.{uuid.uuid4().hex}{_PARTIAL}"
        if path != final:
            # Atomic locations need no folders, and s3fs would create a missing bucket.
            self.file_system.makedirs(self.file_system._parent(path), exist_ok=True)
        if isinstance(data, bytes):
            self.file_system.pipe_file(path, data)
        else:
            self.file_system.put_file(str(data), path, **_PUT_OPTIONS.get(self.protocol, {}))
        if path != final:
            self.file_system.mv(path, final)
        has_arrived = False
        try:
            has_arrived = self._has_arrived(name, data)
        finally:
            if not has_arrived:  # a later run would consider it finished
                self.file_system.rm_file(final)
        if not has_arrived:
            raise OSError("the remote location has other bytes than were sent")

    def _has_arrived(self, name: str, data: Path | bytes) -> bool:
        """Return whether a file has arrived as it was sent, by size and ETag.

        An ETag may look like an MD5 and be something else, for example of encrypted files. Then a
        file is read back once to find out.
        """
        info = self.info(name)
        nbytes = len(data) if isinstance(data, bytes) else data.stat().st_size
        if info.nbytes != nbytes:
            return False
        if self._has_md5_etags and not etag_matches(str(info.version).strip('"'), data, nbytes):
            self._has_md5_etags = not self._reads_back(name, data, nbytes)
            return not self._has_md5_etags
        return True

    def _reads_back(self, name: str, data: Path | bytes, nbytes: int) -> bool:
        """Read a file back, and return whether it has the bytes that were sent."""
        for begin in range(0, nbytes, _READ_BACK_NBYTES):
            end = min(begin + _READ_BACK_NBYTES, nbytes)
            digest = hashlib.md5(self.fetch(name, begin, end), usedforsecurity=False).digest()
            if digest != md5(data, begin, end - begin):
                return False
        return True

    def delete(self, names: list[str]) -> None:
        """Delete files, and the partial files of interrupted uploads of them."""
        found = self._list(OutputError, partials=True)
        suffixed = {*names, *(f"{name}{_PARTIAL}" for name in names)}
        partials = (
            name
            for name in found
            if not self._is_atomic and f"{_final_name(name)}{_PARTIAL}" in suffixed
        )
        for name in {*(found.keys() & {*names}), *partials}:
            with refused_as(OutputError, self.display_path(name)), suppress(FileNotFoundError):
                retry(partial(self.file_system.rm_file, self.path(name)), self.display_path(name))
        if self.protocol in ("file", "local"):  # other protocols have no real folders
            for folder in {name.rpartition("/")[0] for name in names} - {""}:
                with suppress(OSError):  # it is not empty, or does not exist
                    self.file_system.rmdir(f"{self._root}/{folder}")


def _final_name(name: str) -> str | None:
    """Return the final name of a partial file."""
    match = re.fullmatch(rf"(.+?)(\.[0-9a-f]{{32}})?{re.escape(_PARTIAL)}", name)
    return match[1] if match else None


def _file_info(name: str, info: Mapping[str, Any]) -> FileInfo:
    """Return a file as this package describes it, from fsspec's description."""
    version = next((str(info[key]) for key in _VERSIONS if info.get(key) is not None), "")
    return FileInfo(name, int(info["size"] or 0), version)
