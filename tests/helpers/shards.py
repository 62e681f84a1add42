"""Read and write safetensors and JSON files with struct and json only.

Nothing is checked, so that invalid files can be written too.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import NamedTuple

INDEX_NAME = "model.safetensors.index.json"


class Stored(NamedTuple):
    """A tensor as it is stored in a file."""

    dtype: str
    shape: list[int]
    data: bytes
    shard: str


def read_shard(file: Path) -> tuple[dict, bytes]:
    """Return a file's header, and the bytes after it."""
    raw = file.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def shard_bytes(header: dict | bytes, data: bytes) -> bytes:
    """Return the bytes of a file with this header, or header text, and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_shard(file: Path, header: dict | bytes, data: bytes) -> None:
    """Write a file with this header, or header text, and this data."""
    file.write_bytes(shard_bytes(header, data))


def edit_header(file: Path, change) -> None:
    """Change a file's header, and keep its data."""
    header, data = read_shard(file)
    change(header)
    write_shard(file, header, data)


def edit_json(file: Path, change) -> None:
    """Change the value of a JSON file."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def read_tensors(folder: Path) -> dict[str, Stored]:
    """Return every tensor of a folder's shards."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        header, data = read_shard(file)
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[name] = Stored(entry["dtype"], entry["shape"], data[begin:end], file.name)
    return tensors


def edit_tensors(folder: Path, change) -> None:
    """Change a folder's tensors, and rewrite its shards and index; all of them are valid."""
    tensors = read_tensors(folder)
    shards = {tensor.shard for tensor in tensors.values()}
    change(tensors)
    for shard in shards | {tensor.shard for tensor in tensors.values()}:
        header, data = {}, b""
        for name, tensor in tensors.items():
            if tensor.shard == shard:
                offsets = [len(data), len(data) + len(tensor.data)]
                header[name] = {"dtype": tensor.dtype, "shape": tensor.shape}
                header[name]["data_offsets"] = offsets
                data += tensor.data
        write_shard(folder / shard, header, data)
    weight_map = {name: tensor.shard for name, tensor in tensors.items()}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
