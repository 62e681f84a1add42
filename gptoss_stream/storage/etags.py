"""A folder of any store that fsspec knows: `s3://`, `gs://`, `abfs://`, `sftp://` and so on.

fsspec and its implementation for the store talk to it, with the credentials of the environment;
a length that is not the one asked for, and a file that changes, are noticed here.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

__all__ = ["PART_NBYTES", "etag_matches", "md5"]


PART_NBYTES = 16 << 20


def etag_matches(etag: str, data: Path | bytes, nbytes: int) -> bool:
    """Whether an ETag of S3's two kinds (the MD5 of a file, or of its parts' MD5s) is that of the
    data; one of any other kind says nothing."""
    match = re.fullmatch(r"([0-9a-f]{32})(?:-(\d+))?", etag)
    if match is None or (match[2] and int(match[2]) != -(-nbytes // PART_NBYTES)):
        return True
    size = PART_NBYTES if match[2] else max(nbytes, 1)
    sums = [md5(data, at, size) for at in range(0, max(nbytes, 1), size)]
    found = hashlib.md5(b"".join(sums), usedforsecurity=False).digest() if match[2] else sums[0]
    return found.hex() == match[1]


def md5(data: Path | bytes, at: int, nbytes: int) -> bytes:
    digest = hashlib.md5(usedforsecurity=False)
    if isinstance(data, bytes):
        digest.update(data[at : at + nbytes])
        return digest.digest()
    with open(data, "rb") as opened:
        opened.seek(at)
        while nbytes and (chunk := opened.read(min(nbytes, 1 << 20))):
            digest.update(chunk)
            nbytes -= len(chunk)
    return digest.digest()
