"""Checks uploaded files by their ETags, as S3 computes them."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

__all__ = ["PART_NBYTES", "etag_matches", "md5"]

PART_NBYTES = 16 << 20
"""The size of the parts in which a large file is uploaded."""


def etag_matches(etag: str, data: Path | bytes, nbytes: int) -> bool:
    """Return whether an ETag can be that of a file.

    An ETag of S3 is the MD5 of the file, or the MD5 of its parts' MD5s with the number of parts.
    ETags of any other kind say nothing, and are accepted.

    Args:
        etag: The ETag without quotes.
        data: The local file or bytes.
        nbytes: Its size.
    """
    match = re.fullmatch(r"([0-9a-f]{32})(?:-(\d+))?", etag)
    if match is None or (match[2] and int(match[2]) != -(-nbytes // PART_NBYTES)):
        return True
    size = PART_NBYTES if match[2] else max(nbytes, 1)
    digests = [md5(data, begin, size) for begin in range(0, max(nbytes, 1), size)]
    if match[2]:
        return hashlib.md5(b"".join(digests), usedforsecurity=False).hexdigest() == match[1]
    return digests[0].hex() == match[1]


def md5(data: Path | bytes, begin: int, nbytes: int) -> bytes:
    """Return the MD5 of a range of bytes of a local file or of bytes."""
    digest = hashlib.md5(usedforsecurity=False)
    if isinstance(data, bytes):
        digest.update(data[begin : begin + nbytes])
        return digest.digest()
    with open(data, "rb") as opened:
        opened.seek(begin)
        while nbytes and (chunk := opened.read(min(nbytes, 1 << 20))):
            digest.update(chunk)
            nbytes -= len(chunk)
    return digest.digest()
