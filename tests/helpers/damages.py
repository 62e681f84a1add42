"""Damages to a checkpoint folder.

Each function returns a `Damage`, which changes the folder when it is called. The checkpoint is the
tiny one with two layers in four shards: see the fixture `several` in `conftest`.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import TypeAlias

from shards import Stored, edit_header, edit_json, edit_tensors, shard_bytes

Damage: TypeAlias = Callable[[Path], object]
"""Changes a folder. If it returns a path, that is the source to convert instead."""

INDEX, CONFIG = "model.safetensors.index.json", "config.json"
SHARDS = tuple(f"model-{number:05d}-of-00003.safetensors" for number in range(4))
FIRST, SHARD, LAST = SHARDS[0], SHARDS[2], SHARDS[3]  # SHARD has layer 0 and most of layer 1
NORM, HEAD = "model.layers.0.input_layernorm.weight", "lm_head.weight"
BLOCKS = "model.layers.1.mlp.experts.down_proj_blocks"
SCALES = "model.layers.1.mlp.experts.down_proj_scales"

_BITS = {"U8": 8, "F8_E8M0": 8, "I8": 8, "BF16": 16, "F32": 32, "F64": 64}


def text(name: str, data: bytes) -> Damage:
    """Write other bytes to a file, or add a file."""
    return lambda folder: (folder / name).write_bytes(data) and None


def shard(change: Callable[[bytes], bytes], name: str = SHARD) -> Damage:
    """Replace the bytes of a shard with others computed from them."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def length(nbytes: int) -> Damage:
    """Change the length field of a shard's header."""
    return shard(lambda data: nbytes.to_bytes(8, "little") + data[8:])


def cut_header(fraction: float) -> Damage:
    """Cut a shard in its header, after this fraction of the header."""
    return shard(lambda data: data[: 8 + int(int.from_bytes(data[:8], "little") * fraction)])


def header(change: Callable[[dict], object]) -> Damage:
    """Change the header of a shard, not its data."""
    return lambda folder: edit_header(folder / SHARD, change)


def entry(name: str, **changes: object) -> Damage:
    """Change fields of a tensor's entry in the header."""
    return header(lambda h: h[name].update(changes))


def header_text(change: Callable[[bytes], bytes]) -> Damage:
    """Replace the text of a header with another computed from it."""

    def rewrite(data: bytes) -> bytes:
        start = 8 + int.from_bytes(data[:8], "little")
        return shard_bytes(change(data[8:start]), data[start:])

    return shard(rewrite)


def config(**changes: object) -> Damage:
    """Change values in config.json; the value `...` removes a key."""

    def change(value: dict) -> None:
        value.update(changes)
        for key in [k for k, v in value.items() if v is ...]:
            del value[key]

    return lambda folder: edit_json(folder / CONFIG, change)


def yarn(**changes: object) -> Damage:
    """Change settings of the rotary embedding; the value `...` removes one."""
    rope = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
    return config(rope_scaling={k: v for k, v in {**rope, **changes}.items() if v is not ...})


def index(change: Callable[[dict], object]) -> Damage:
    """Change the index."""
    return lambda folder: edit_json(folder / INDEX, change)


def mapped(name: str, shard: object) -> Damage:
    """Change the shard that the index names for a tensor."""
    return index(lambda i: i["weight_map"].update({name: shard}))


def tensors(change: Callable[[dict[str, Stored]], object]) -> Damage:
    """Change tensors; the checkpoint stays valid."""
    return lambda folder: edit_tensors(folder, change)


def without(*words: str) -> Damage:
    """Remove tensors with any of these in their names; the checkpoint stays valid."""
    return tensors(lambda t: [t.pop(n) for n in list(t) if any(word in n for word in words)])


def tensor(name: str, dtype: str, *shape: int) -> Damage:
    """Replace or add a tensor of zeros; the checkpoint stays valid."""
    data = bytes(prod(shape) * _BITS[dtype] // 8)
    return tensors(lambda t: t.update({name: Stored(dtype, list(shape), data, LAST)}))


def renamed(change: Callable[[str], str]) -> Damage:
    """Rename tensors; the checkpoint stays valid."""
    return tensors(lambda t: [t.update({change(n): t.pop(n)}) for n in list(t)])


def poke(name: str, at: int, value: bytes) -> Damage:
    """Overwrite bytes in a tensor's data, from byte `at` on."""

    def change(t: dict[str, Stored]) -> None:
        data = t[name].data
        t[name] = t[name]._replace(data=data[:at] + value + data[at + len(value) :])

    return tensors(change)


def scale(value: int) -> Damage:
    """Set the scale of a block of 32 values in expert 2 of layer 1, and two values to the largest
    code."""
    block = (2 * 96 + 7) * 2 + 1  # expert 2, row 7, the second of 2 blocks
    return both(poke(SCALES, block, bytes([value])), poke(BLOCKS, block * 16 + 3, b"\x77"))


def both(*damages: Damage) -> Damage:
    """Apply several damages, in order."""

    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def gone(*names: str) -> Damage:
    """Remove files."""

    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def replaced(name: str, create: Callable[[Path], object]) -> Damage:
    """Replace a file with something else of the same name, which `create` creates."""
    return both(gone(name), lambda folder: create(folder / name))


def link(target: str) -> Callable[[Path], None]:
    """Return a function that creates a symbolic link; `../elsewhere.safetensors` then exists."""

    def create(file: Path) -> None:
        (file.parents[1] / "elsewhere.safetensors").write_bytes(b"")
        file.symlink_to(target)

    return create


def listen(file: Path) -> None:
    """Create a socket."""
    with socket.socket(socket.AF_UNIX) as listener:
        before = Path.cwd()
        os.chdir(file.parent)  # the path of a socket must be short
        listener.bind(file.name)
        os.chdir(before)


def only(files: dict[str, bytes]) -> Damage:
    """Use another source: a folder with these files and nothing else."""

    def create(folder: Path) -> Path:
        other = folder.parent / "other"
        other.mkdir()
        for name, data in files.items():
            (other / name).write_bytes(data)
        return other

    return create
