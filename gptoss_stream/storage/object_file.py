"""An open file of an object store."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fsspec.asyn import sync

from ..errors import CheckpointError
from .location import FileInfo, changed
from .object_store_errors import refused_as, retry

if TYPE_CHECKING:
    from .object_store import ObjectStore

__all__ = ["ObjectFile"]

_UNIQUE_VERSIONS = {"gs", "gcs", "abfs", "abfss", "az"}
"""Protocols by which no two versions of a file have the same ETag, not even of equal bytes."""


class ObjectFile:
    """An open file of an object store (see `File`). Each read is of the version that was opened."""

    def __init__(self, location: ObjectStore, info: FileInfo) -> None:
        self._location = location
        self.info = info

    def read_into(self, out: memoryview, begin: int, stop: threading.Event) -> bool:
        """Fill memory with the file's bytes (see `File.read_into`)."""
        if not out:
            return False
        location, name, etag = self._location, self.info.name, str(self.info.version)
        where, end = location.display_path(name), begin + len(out)
        is_s3 = hasattr(location.file_system, "call_s3") and etag.startswith('"')

        def fetch() -> None:
            if is_s3:
                data = _read_s3(location.file_system, location.path(name), begin, end, etag, where)
            else:
                data = location.fetch(name, begin, end)
            if len(data) != len(out):
                raise OSError(f"{len(data)} bytes came for {len(out)}")
            out[:] = data

        with refused_as(CheckpointError, where):
            retry(fetch, where, stop)
        if not is_s3:  # fsspec takes no condition, and returns no header of the reply
            self.check_unchanged()
        return is_s3 or location.protocol in _UNIQUE_VERSIONS

    def check_unchanged(self) -> None:
        """Check that the file is unchanged (see `File.check_unchanged`)."""
        if self._location.info(self.info.name) != self.info:
            raise changed(self._location.display_path(self.info.name))

    def close(self) -> None:
        """Do nothing: each request has its own connection."""


def _read_s3(file_system: Any, path: str, begin: int, end: int, etag: str, where: str) -> bytes:
    """Read bytes `begin … end` of an object of S3 in one request, if it still has an ETag.

    Raises:
        CheckpointError: If it has another ETag.
    """
    bucket, key, _ = file_system.split_path(path)
    part = f"bytes={begin}-{end - 1}"
    try:
        reply = file_system.call_s3("get_object", Bucket=bucket, Key=key, Range=part, IfMatch=etag)
    except OSError as error:
        response = getattr(error.__cause__, "response", None)
        code = response.get("Error", {}).get("Code") if isinstance(response, Mapping) else None
        if code in ("PreconditionFailed", "412"):
            raise changed(where) from None
        raise
    body = reply["Body"]
    try:
        if reply.get("ETag", etag) != etag:  # not every store knows the condition
            raise changed(where)
        data: bytes = sync(file_system.loop, body.read)
    finally:
        body.close()
    return data
