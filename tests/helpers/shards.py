"""safetensors files and JSON files, taken apart and put together with struct and json alone.

Nothing here is checked: these functions make what is sound and what is not alike.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import NamedTuple

INDEX_NAME = "model.safetensors.index.json"


class Stored(NamedTuple):
    """A tensor as it lies in a file."""

    dtype: str
    shape: list[int]
    data: bytes
    shard: str


def read_shard(file: Path) -> tuple[dict, bytes]:
    """A file's header and what follows it."""
    raw = file.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def shard_bytes(header: dict | bytes, data: bytes) -> bytes:
    """A file of this header, or header text, and this data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def write_shard(file: Path, header: dict | bytes, data: bytes) -> None:
    """Write a file of this header, or header text, and this data."""
    file.write_bytes(shard_bytes(header, data))


def edit_header(file: Path, change) -> None:
    """Change a file's header, its data staying where it is."""
    header, data = read_shard(file)
    change(header)
    write_shard(file, header, data)


def edit_json(file: Path, change) -> None:
    """Change the value of a JSON file."""
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def read_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder's shards."""
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        header, data = read_shard(file)
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                tensors[name] = Stored(entry["dtype"], entry["shape"], data[begin:end], file.name)
    return tensors


def edit_tensors(folder: Path, change) -> None:
    """Change a folder's tensors, and write its shards and its index anew, all of them sound."""
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
