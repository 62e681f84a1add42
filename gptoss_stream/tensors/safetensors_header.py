"""The safetensors format: header bytes to descriptions of tensors and back, and the index file.

No file is opened here. The format (safetensors README, "Format"): 8 bytes with the length of the
header as a little-endian u64; the header, a JSON object that maps each tensor's name to its dtype,
shape and `data_offsets` (from the end of the header), padded with spaces; then the data, without
holes.

This reader is deliberately stricter than that of safetensors 0.8. It refuses what makes two readers
see two different files: duplicate names (safetensors keeps the last), unknown fields of an entry
(it ignores them), entries written as arrays, a dtype written as `{"U8": null}`,
`"__metadata__": null`. It also refuses what no checkpoint has: names that are empty, longer than
1,000 characters or with control characters, more than 8 dimensions, sizes and products beyond 2^48,
and headers of more than 25 MB, which the Hub refuses too (a parsed header takes up to 25 times its
size).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .._utils import strict_json
from ..errors import HeaderError
from .dtypes import DType
from .raw_tensor import RawTensor

__all__ = [
    "INDEX_NAME",
    "LENGTH_NBYTES",
    "MAX_HEADER_NBYTES",
    "METADATA",
    "SINGLE_NAME",
    "build_header",
    "build_index",
    "header_nbytes",
    "parse_header",
    "parse_index",
]

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
"""The name of the only shard of a checkpoint that has no more."""
LENGTH_NBYTES = 8
"""Bytes of the header's length, at the beginning of a file."""
MAX_HEADER_NBYTES = 25_000_000  # huggingface_hub: SAFETENSORS_MAX_HEADER_LENGTH
METADATA = {"format": "pt"}
"""The metadata of every shard that is written; transformers requires it."""
_ALIGNMENT = 8  # safetensors pads its headers to this
_MAX_ELEMENTS = 2**48
_MAX_RANK = 8
_MAX_NAME = 1000
_DTYPES = {dtype.code: dtype for dtype in DType}
_SHARD_NAME = re.compile(r"[A-Za-z0-9._-]{1,243}\.safetensors")  # at most 255 bytes
_LOOKS_LIKE = (
    (b"version https://git-lfs", "a Git LFS pointer; run `git lfs pull`"),
    (b"<", "an HTML or XML page saved under this name; download the file again"),
    (b'{"', "a JSON text, perhaps an error message saved under this name; download it again"),
    (b"PK\x03\x04", "a zip archive or a PyTorch pickle"),
    (b"GGUF", "a GGUF file"),
    (b"\x89HDF", "an HDF5 file"),
)


def header_nbytes(first_bytes: bytes, file_nbytes: int, file: str) -> int:
    """Return the length of the header's JSON text, before anything of that length is read.

    Args:
        first_bytes: The file's first bytes, at most 64. More than 8 are used to tell what a file
            is that is not a safetensors file.
        file_nbytes: The size of the file.
        file: The path or URL of the file, for messages.

    Raises:
        HeaderError: If the file is not a safetensors file or is truncated.
    """
    if file_nbytes < LENGTH_NBYTES:
        raise HeaderError(
            f"{file}: {file_nbytes} bytes are too few for a safetensors file; download it again"
        )
    length = int.from_bytes(first_bytes[:LENGTH_NBYTES], "little")
    if length > MAX_HEADER_NBYTES:
        for prefix, what in _LOOKS_LIKE:
            if first_bytes.startswith(prefix):
                raise HeaderError(f"{file}: not a safetensors file but {what}")
        raise HeaderError(
            f"{file}: its header length says {length}, and {MAX_HEADER_NBYTES} is the most; the "
            "file is damaged or not safetensors"
        )
    if LENGTH_NBYTES + length > file_nbytes:
        raise HeaderError(
            f"{file}: truncated: a header of {length} bytes in a file of {file_nbytes}; "
            "download it again"
        )
    return length


def parse_header(
    header: bytes, file_nbytes: int, file: str, shard: str
) -> tuple[tuple[RawTensor, ...], dict[str, str]]:
    """Parse a header.

    Args:
        header: The JSON text, without its length.
        file_nbytes: The size of the file.
        file: The path or URL of the file, for messages.
        shard: The name of the file in its folder, for `RawTensor.shard`.

    Returns:
        The tensors, in the order of their data, and the metadata.

    Raises:
        HeaderError: If the header breaks a rule of the format.
    """
    try:
        entries = strict_json.loads(header)
    except ValueError as error:
        raise HeaderError(f"{file}: the header is {_as_predicate(error)}") from None
    if not isinstance(entries, dict):
        raise HeaderError(f"{file}: the header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise HeaderError(f"{file}: __metadata__ is not a map of strings to strings")
    start = LENGTH_NBYTES + len(header)
    tensors = sorted(
        (_parse_entry(name, entry, file, shard, start) for name, entry in entries.items()),
        key=lambda tensor: (tensor.offset, tensor.end),
    )
    _check_coverage(tensors, start, file_nbytes - start, file)
    return tuple(tensors), metadata


def _as_predicate(error: ValueError) -> str:
    """Return the message of an error of `strict_json` so that it can follow "the header is"."""
    text = str(error)
    return text if text.startswith("not ") else f"not valid: {text}"


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0  # bool is an int in Python, but not in JSON


def _parse_entry(name: str, entry: Any, file: str, shard: str, start: int) -> RawTensor:
    """Parse a tensor's entry; `start` is the first byte of the data in the file."""

    def bad(reason: str) -> HeaderError:
        return HeaderError(f"{file}: tensor {name[:_MAX_NAME]!r}: {reason}")

    if len(name) > _MAX_NAME:
        raise bad(f"a name of {len(name)} characters; {_MAX_NAME} at most are supported")
    if not name or any(ord(c) < 32 or 0xD800 <= ord(c) < 0xE000 for c in name):
        raise bad("a name that is empty or holds control characters or lone surrogates")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise bad("an entry must hold exactly dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise bad(f"unknown dtype {str(code)[:40]!r}")
    if not isinstance(shape, list) or not all(map(_is_size, shape)):
        raise bad("its shape is not a list of non-negative integers")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise bad("its data_offsets are not two non-negative integers")
    if len(shape) > _MAX_RANK:
        raise bad(f"{len(shape)} dimensions; {_MAX_RANK} at most are supported")
    elements = 1
    for size in shape:
        elements *= size
        if size > _MAX_ELEMENTS or elements > _MAX_ELEMENTS:
            raise bad("its shape overflows")
    dtype = _DTYPES[code]
    nbits = elements * dtype.bits
    begin, end = offsets
    if end < begin:
        raise bad(f"its data_offsets run backwards ({begin} to {end})")
    if nbits % 8 or nbits // 8 != end - begin:
        raise bad(f"{code} {shape} takes {nbits / 8:g} bytes, its data_offsets hold {end - begin}")
    return RawTensor(name, dtype, tuple(shape), shard, start + begin)


def _check_coverage(tensors: list[RawTensor], start: int, data_nbytes: int, file: str) -> None:
    """Check that the tensors cover the data: no hole, no overlap, nothing before or after."""
    expected = start
    for tensor in tensors:
        if tensor.offset != expected:
            fault = "overlaps the tensor before it" if tensor.offset < expected else "leaves a hole"
            raise HeaderError(
                f"{file}: tensor {tensor.name!r}: its data {fault} at byte {expected - start}"
            )
        expected = tensor.end
    described = expected - start
    if described > data_nbytes:
        raise HeaderError(
            f"{file}: truncated: {data_nbytes} bytes of tensor data, the header describes "
            f"{described} ({described - data_nbytes} are missing); download it again"
        )
    if described < data_nbytes:
        raise HeaderError(
            f"{file}: {data_nbytes - described} bytes follow the last tensor; the file is damaged"
        )


def build_header(tensors: Iterable[tuple[str, DType, tuple[int, ...]]]) -> bytes:
    """Return the first bytes of a shard: the length of the header, and the header.

    Args:
        tensors: Name, dtype and shape of each tensor, in the order of their data, without holes.

    Returns:
        The bytes, whose number is a multiple of 8. The metadata of the header is `METADATA`.
    """
    entries: dict[str, Any] = {"__metadata__": METADATA}
    begin = 0
    for name, dtype, shape in tensors:
        nbits = dtype.bits
        for size in shape:
            nbits *= size
        end = begin + nbits // 8
        entries[name] = {"dtype": dtype.code, "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(LENGTH_NBYTES, "little") + text


def build_index(total_nbytes: int, weight_map: Mapping[str, str]) -> bytes:
    """Return the text of `model.safetensors.index.json`.

    Args:
        total_nbytes: Bytes of tensor data in all shards.
        weight_map: The shard of each tensor, by name.
    """
    index = {"metadata": {"total_size": total_nbytes}, "weight_map": dict(weight_map)}
    return (json.dumps(index, indent=2, ensure_ascii=False) + "\n").encode()


def parse_index(text: bytes, file: str) -> dict[str, str]:
    """Parse an index.

    Args:
        text: The text of the index.
        file: The path or URL of the index, for messages.

    Returns:
        The shard of each tensor, by name.

    Raises:
        HeaderError: If it is damaged or names files outside the folder.
    """
    try:
        index = strict_json.loads(text)
    except ValueError as error:
        raise HeaderError(f"{file}: {error}") from None
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeaderError(f"{file}: it has no weight_map of tensor names to shard files")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard) or shard[0] == ".":
            raise HeaderError(
                f"{file}: tensor {name[:_MAX_NAME]!r} is said to be in {str(shard)[:80]!r}, which "
                "is not the name of a safetensors file in this folder"
            )
    return weight_map
