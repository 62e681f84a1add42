"""A folder of any store that fsspec knows: `s3://`, `gs://`, `abfs://`, `sftp://` and so on.

fsspec and its implementation for the store talk to it, with the credentials of the environment;
a length that is not the one asked for, and a file that changes, are noticed here.
"""

from __future__ import annotations

import hashlib
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fsspec.core import url_to_fs

from ..errors import (
    CheckpointError,
    GptOssStreamError,
    MachineError,
    MissingPackageError,
    OptionError,
    OutputError,
)
from .etags import PART_NBYTES, etag_matches, md5
from .location import NEVER, FileInfo, changed
from .retries import FEW_TRIES, TRIES, RetryPolicy

__all__ = ["ObjectStore"]


_PARTS = 3  # sent at a time


_BACK_NBYTES = 16 << 20  # read back at a time


_T = TypeVar("_T")


_ATOMIC = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "memory"}
"""Stores in which a file is there when all of it is, and not before."""


_PARTIAL = ".partial"
"""Ends the name of a file that is being written to any other store."""


_WITHOUT_HOST = {"file", "local", "memory"}


_VERSIONS = ("ETag", "etag", "md5Hash", "content_md5", "crc32c", "mtime", "LastModified",
             "last_modified", "modified", "created")  # fmt: skip


class ObjectStore:
    """A folder of a store (see `places.Place` and `places.Store`)."""

    revision = None
    is_local = False

    def __init__(self, url: str) -> None:
        self._protocol, _, rest = url.partition("://")
        host, slash, path = rest.partition("/")
        self._shown = f"{self._protocol}://{host.rpartition('@')[2]}{slash}{path}".rstrip("/")
        self._shown = self._shown.partition("?")[0]
        if self._protocol in ("s3", "s3a") and re.match(r"(?!arn:)[^@]*:[^@]*@", rest):
            raise OptionError(
                f"{self._protocol}://: a key is not taken from a URL; give it by the environment, "
                "as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            )
        if not host and self._protocol not in _WITHOUT_HOST:
            raise OptionError(f"{self._protocol}://: name a bucket or a server after it")
        try:
            self._fs, root = url_to_fs(url)
        except ImportError as error:
            raise MissingPackageError(
                f"{self._shown}: {_redacted(error)}; install what it names"
            ) from None
        except Exception as error:
            raise OptionError(f"{self._shown}: {_redacted(error)}; check the URL") from None
        self._root: str = root.rstrip("/")
        self._found: Mapping[str, FileInfo] | None = None
        self._is_atomic = self._protocol in _ATOMIC
        self._has_md5s = True

    def __str__(self) -> str:
        return self._shown

    @property
    def identity(self) -> str:
        """Its URL, without secrets."""
        return self._shown

    def display_path(self, name: str) -> str:
        """The URL of a file, without secrets."""
        return f"{self._shown}/{name}"

    @property
    def _files(self) -> Mapping[str, FileInfo]:
        if self._found is None:
            self._found = self._list(CheckpointError)
        return self._found

    def check(self) -> None:
        """Raise `CheckpointError` if there is nothing in it."""
        if not self._files:
            raise CheckpointError(f"{self}: there are no files in it; check the URL")

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return name in self._files

    def names(self, folder: str = "") -> list[str]:
        """The names of the files right in it, or in a folder of it."""
        parents = ((name.rpartition("/"), name) for name in self._files)
        return sorted(last for (parent, _, last), _ in parents if parent == folder)

    def open(self, name: str) -> _ObjectFile:
        """A file of it."""
        if name not in self._files:
            raise CheckpointError(f"{self.display_path(name)}: there is no such file")
        # Not as it was listed: some stores describe a file in one way there, in another here.
        return _ObjectFile(self, self.info(name))

    def pinned_to(self, state: Mapping[str, Any] | None) -> ObjectStore:
        """It has but one state."""
        return self

    def prepare(self, names: list[str]) -> None:
        """Nothing to do."""

    def fetch(self, name: str, begin: int, end: int) -> bytes:
        """Bytes `begin … end` of a file, as the store gives them."""
        with _refused_as(CheckpointError, self.display_path(name)):
            data: bytes = self._fs.cat_file(f"{self._root}/{name}", start=begin, end=end)
        return data

    def info(self, name: str) -> FileInfo:
        """What the store says of a file now."""
        path = f"{self._root}/{name}"

        def ask() -> FileInfo:
            self._fs.invalidate_cache(self._fs._parent(path))
            return _file_info(name, self._fs.info(path))

        with _refused_as(CheckpointError, self.display_path(name)):
            return _retry(ask, self.display_path(name))

    def listing(self) -> Mapping[str, FileInfo]:
        """All files in it; none where there is no such folder."""
        return self._list(OutputError)

    def _list(
        self, refusal: type[GptOssStreamError], *, partials: bool = False
    ) -> Mapping[str, FileInfo]:
        """All files, and with `partials` what an interrupted `put` has left of some."""

        def find() -> dict[str, Any]:
            self._fs.invalidate_cache()
            try:
                found: dict[str, Any] = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
            return found

        with _refused_as(refusal, str(self)):
            found = _retry(find, str(self), tries=FEW_TRIES)
        root = self._root.lstrip("/")
        named = {path.lstrip("/")[len(root) :].lstrip("/"): info for path, info in found.items()}
        return {
            name: _file_info(name, info)
            for name, info in named.items()
            if name and (partials or self._is_atomic or not name.endswith(_PARTIAL))
        }

    def read(self, name: str) -> bytes:
        """A small file, as it is now."""
        with _refused_as(OutputError, self.display_path(name)):
            data: bytes = _retry(
                lambda: self._fs.cat_file(f"{self._root}/{name}"), self.display_path(name)
            )
        return data

    def put(self, files: Mapping[str, Path | bytes], sums: Mapping[str, str]) -> None:
        """Write files one after another, and hold size and ETag of each against what was sent."""
        for name, data in files.items():
            with _refused_as(OutputError, self.display_path(name)):
                _retry(partial(self._put, name, data), self.display_path(name))

    def _put(self, name: str, data: Path | bytes) -> None:
        final = f"{self._root}/{name}"
        path = final if self._is_atomic else f"{final}.{uuid.uuid4().hex}{_PARTIAL}"
        if path != final:
            # In a bucket folders need no making; s3fs would make a bucket that is not there.
            self._fs.makedirs(self._fs._parent(path), exist_ok=True)
        if isinstance(data, bytes):
            self._fs.pipe_file(path, data)
        elif self._protocol in ("s3", "s3a"):
            # By itself s3fs would hold ten parts of 50 MiB, each of them twice.
            self._fs.put_file(str(data), path, chunksize=PART_NBYTES, max_concurrency=_PARTS)
        else:
            self._fs.put_file(str(data), path)
        if path != final:
            self._fs.mv(path, final)
        has_arrived = False
        try:
            has_arrived = self._has_arrived(name, data)
        finally:
            if not has_arrived:  # a later run would take it for finished
                self._fs.rm_file(final)
        if not has_arrived:
            raise OSError("what the store has is not what was sent")

    def _has_arrived(self, name: str, data: Path | bytes) -> bool:
        """Whether the store has what was sent, by size and ETag. An ETag may look like an MD5 and
        be none (of encrypted files, for one): a file that is read back shows it."""
        info = self.info(name)
        nbytes = len(data) if isinstance(data, bytes) else data.stat().st_size
        if info.nbytes != nbytes:
            return False
        if self._has_md5s and not etag_matches(str(info.version).strip('"'), data, nbytes):
            self._has_md5s = not self._holds(name, data, nbytes)
            return not self._has_md5s
        return True

    def _holds(self, name: str, data: Path | bytes, nbytes: int) -> bool:
        """Whether a file reads as what was sent."""
        for at in range(0, nbytes, _BACK_NBYTES):
            end = min(at + _BACK_NBYTES, nbytes)
            digest = hashlib.md5(self.fetch(name, at, end), usedforsecurity=False).digest()
            if digest != md5(data, at, end - at):
                return False
        return True

    def delete(self, names: list[str]) -> None:
        """Delete files."""
        there = self._list(OutputError, partials=True)
        wanted = {*names, *(f"{name}{_PARTIAL}" for name in names)}
        partials = (n for n in there if not self._is_atomic and f"{_whole(n)}{_PARTIAL}" in wanted)
        for name in {*(there.keys() & {*names}), *partials}:
            with _refused_as(OutputError, self.display_path(name)), suppress(FileNotFoundError):
                _retry(partial(self._fs.rm_file, f"{self._root}/{name}"), self.display_path(name))
        if self._protocol in ("file", "local"):  # others have no folders, or say nothing of them
            for folder in {name.rpartition("/")[0] for name in names} - {""}:
                with suppress(OSError):  # something is in it, or it is not there
                    self._fs.rmdir(f"{self._root}/{folder}")


class _ObjectFile:
    """A file of a store (see `places.File`)."""

    def __init__(self, location: ObjectStore, info: FileInfo) -> None:
        self._location = location
        self.info = info

    def read_into(self, out: memoryview, at: int, stop: threading.Event) -> None:
        """Fill `out` with the bytes from `at` on."""
        if not out:
            return

        def fetch() -> None:
            data = self._location.fetch(self.info.name, at, at + len(out))
            if len(data) != len(out):
                raise OSError(f"{len(data)} bytes came for {len(out)}")
            out[:] = data

        _retry(fetch, self._location.display_path(self.info.name), stop)

    def check_unchanged(self) -> None:
        """Ask the store once more."""
        if self._location.info(self.info.name) != self.info:
            raise changed(self._location.display_path(self.info.name))

    def close(self) -> None:
        """Nothing is held."""


def _whole(name: str) -> str | None:
    """The name of the file that a partial one is of."""
    match = re.fullmatch(rf"(.+?)(\.[0-9a-f]{{32}})?{re.escape(_PARTIAL)}", name)
    return match[1] if match else None


def _file_info(name: str, info: Mapping[str, Any]) -> FileInfo:
    version = next((str(info[key]) for key in _VERSIONS if info.get(key) is not None), "")
    return FileInfo(name, int(info["size"] or 0), version)


def _retry(
    call: Callable[[], _T], where: str, stop: threading.Event = NEVER, tries: int = TRIES
) -> _T:
    """Call, and again where the store fails in a way that may pass."""
    patience = RetryPolicy(stop, tries)
    while True:
        try:
            return call()
        except (GptOssStreamError, FileNotFoundError, PermissionError):
            raise
        except Exception as error:  # each store has its own kinds
            patience.wait(
                MachineError(
                    f"{where}: {_redacted(error)}; check the network and run the same command "
                    "again: what is finished stays"
                )
            )


@contextmanager
def _refused_as(kind: type[GptOssStreamError], where: str) -> Iterator[None]:
    """A store's refusals, which no patience helps against."""
    try:
        yield
    except FileNotFoundError as error:
        raise kind(f"{where}: it is not there ({_redacted(error)}); check the URL") from None
    except PermissionError as error:
        raise kind(f"{where}: no access ({_redacted(error)}); check the credentials") from None


def _redacted(error: Exception) -> str:
    """An error's text on one line, without what may be secret in an address."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = re.sub(r"\?\S+", "?…", text)
    return re.sub(r"[^/\s\"'@]*:[^/\s\"'@]*@|(?<=://)[^/\s@]*@", "", text)[:300]
