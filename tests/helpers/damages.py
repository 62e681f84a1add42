"""Damage to a checkpoint folder: each function gives one that is done when it is called.

The checkpoint is the tiny one with two layers, in four shards; see `several` in `conftest`.
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
"""Does something to a folder; a path that it returns is the source to use instead."""

INDEX, CONFIG = "model.safetensors.index.json", "config.json"
SHARDS = tuple(f"model-{number:05d}-of-00003.safetensors" for number in range(4))
FIRST, SHARD, LAST = SHARDS[0], SHARDS[2], SHARDS[3]  # layer 0 and most of layer 1 lie in SHARD
NORM, HEAD = "model.layers.0.input_layernorm.weight", "lm_head.weight"
BLOCKS = "model.layers.1.mlp.experts.down_proj_blocks"
SCALES = "model.layers.1.mlp.experts.down_proj_scales"

_BITS = {"U8": 8, "F8_E8M0": 8, "I8": 8, "BF16": 16, "F32": 32, "F64": 64}


def text(name: str, data: bytes) -> Damage:
    """Other bytes in a file, or one more file."""
    return lambda folder: (folder / name).write_bytes(data) and None


def shard(change: Callable[[bytes], bytes], name: str = SHARD) -> Damage:
    """Another file in place of a shard, made from its bytes."""
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes())) and None


def length(nbytes: int) -> Damage:
    """Another length of the header."""
    return shard(lambda data: nbytes.to_bytes(8, "little") + data[8:])


def cut_header(share: float) -> Damage:
    """A shard that ends in its header, after that share of it."""
    return shard(lambda data: data[: 8 + int(int.from_bytes(data[:8], "little") * share)])


def header(change: Callable[[dict], object]) -> Damage:
    """Another header over the same data."""
    return lambda folder: edit_header(folder / SHARD, change)


def entry(name: str, **changes: object) -> Damage:
    """Other fields in a tensor's entry in the header."""
    return header(lambda h: h[name].update(changes))


def header_text(change: Callable[[bytes], bytes]) -> Damage:
    """Another text for a header, made from its text."""

    def rewrite(data: bytes) -> bytes:
        start = 8 + int.from_bytes(data[:8], "little")
        return shard_bytes(change(data[8:start]), data[start:])

    return shard(rewrite)


def config(**changes: object) -> Damage:
    """Other values in config.json; `...` takes one away."""

    def change(value: dict) -> None:
        value.update(changes)
        for key in [k for k, v in value.items() if v is ...]:
            del value[key]

    return lambda folder: edit_json(folder / CONFIG, change)


def yarn(**changes: object) -> Damage:
    """Other settings of the rotary embedding."""
    rope = {"rope_type": "yarn", "factor": 32.0, "original_max_position_embeddings": 4096}
    return config(rope_scaling={k: v for k, v in {**rope, **changes}.items() if v is not ...})


def index(change: Callable[[dict], object]) -> Damage:
    """Another index."""
    return lambda folder: edit_json(folder / INDEX, change)


def lies(name: str, where: object) -> Damage:
    """An index that says where a tensor lies."""
    return index(lambda i: i["weight_map"].update({name: where}))


def tensors(change: Callable[[dict[str, Stored]], object]) -> Damage:
    """Other tensors, in a sound checkpoint."""
    return lambda folder: edit_tensors(folder, change)


def without(*parts: str) -> Damage:
    """No tensors with any of these in their names, in a sound checkpoint."""
    return tensors(lambda t: [t.pop(n) for n in list(t) if any(part in n for part in parts)])


def tensor(name: str, dtype: str, *shape: int) -> Damage:
    """Another tensor of a name, or one more, in a sound checkpoint."""
    data = bytes(prod(shape) * _BITS[dtype] // 8)
    return tensors(lambda t: t.update({name: Stored(dtype, list(shape), data, LAST)}))


def renamed(change: Callable[[str], str]) -> Damage:
    """The same tensors under other names, in a sound checkpoint."""
    return tensors(lambda t: [t.update({change(n): t.pop(n)}) for n in list(t)])


def poke(name: str, at: int, value: bytes) -> Damage:
    """Other bytes in a tensor's data."""

    def change(t: dict[str, Stored]) -> None:
        data = t[name].data
        t[name] = t[name]._replace(data=data[:at] + value + data[at + len(value) :])

    return tensors(change)


def scale(value: int) -> Damage:
    """A scale for two groups of expert 2 in layer 1, and the largest code beneath it."""
    group = (2 * 96 + 7) * 2 + 1
    return both(poke(SCALES, group, bytes([value])), poke(BLOCKS, group * 16 + 3, b"\x77"))


def both(*damages: Damage) -> Damage:
    """One damage after another."""

    def damage(folder: Path) -> None:
        for one in damages:
            one(folder)

    return damage


def gone(*names: str) -> Damage:
    """Files that are not there."""

    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def instead(name: str, make: Callable[[Path], object]) -> Damage:
    """Something else that has a file's name."""
    return both(gone(name), lambda folder: make(folder / name))


def link(target: str) -> Callable[[Path], None]:
    """A link, which may lead to `../elsewhere.safetensors`."""

    def make(file: Path) -> None:
        (file.parents[1] / "elsewhere.safetensors").write_bytes(b"")
        file.symlink_to(target)

    return make


def listen(file: Path) -> None:
    """A socket."""
    with socket.socket(socket.AF_UNIX) as one:
        at = Path.cwd()
        os.chdir(file.parent)  # a socket's whole path must be short
        one.bind(file.name)
        os.chdir(at)


def only(files: dict[str, bytes]) -> Damage:
    """A folder with these files and nothing else."""

    def make(folder: Path) -> Path:
        other = folder.parent / "other"
        other.mkdir()
        for name, data in files.items():
            (other / name).write_bytes(data)
        return other

    return make
