"""What convert writes is read by other code: safetensors, and a checker of the format in here.

`test_hooked_transformer` tests that TransformerLens can load it.
"""

from __future__ import annotations

import json
import os
import stat
import struct
from math import prod

import pytest
import torch
from mutants import Header, files, in_pairs, json_text
from runs import INDEX_NAME
from safetensors import deserialize, safe_open
from safetensors.torch import load_file
from shards import read_tensors

import gptoss_stream

REFUSALS = (AssertionError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
NBYTES = {"BF16": 2, "F16": 2, "F32": 4}


def check(raw: bytes) -> dict[str, tuple[int, int]]:
    """Return the byte range of each tensor in a file that keeps every rule of the format and ours.

    Our rules: only float dtypes, a header of a multiple of 8 bytes, with
    {"format": "pt"} and below the Hub's limit, and tensors in the header's order, aligned.
    """
    assert len(raw) >= 8
    (length,) = struct.unpack("<Q", raw[:8])
    start = 8 + length
    assert length % 8 == 0
    assert length < 25_000_000
    assert start <= len(raw)
    text = raw[8:start].decode("utf-8")
    assert text[0] == "{"
    assert text.rstrip(" ")[-1] == "}"
    assert len(text) - len(text.rstrip(" ")) < 8

    def unique(pairs: list[tuple]) -> dict:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    header = json.loads(text, object_pairs_hook=unique)
    assert header.pop("__metadata__") == {"format": "pt"}
    ranges, at = {}, start
    for name, entry in header.items():
        assert name
        assert name.isprintable()
        assert list(entry) == ["dtype", "shape", "data_offsets"]
        size = NBYTES[entry["dtype"]]
        assert all(type(number) is int for number in entry["shape"] + entry["data_offsets"])
        assert min(entry["shape"], default=0) >= 0
        begin, end = (start + offset for offset in entry["data_offsets"])
        assert begin == at
        assert begin % size == 0
        assert end - begin == prod(entry["shape"]) * size
        ranges[name] = begin, end
        at = end
    assert at == len(raw)
    return ranges


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("size", ["5GB", "500KB", "100KB", 1])
def test_every_shard_is_valid(dtype, size, checkpoints, tmp_path):
    """safetensors reads it, by mmap and pread, and finds the bytes that the checker finds."""
    source, out = checkpoints(layers=2), tmp_path / "out"
    report = gptoss_stream.convert(source, out, dtype=dtype, max_shard_size=size)
    assert {file.name for file in out.glob("*.safetensors")} == set(report.shards)
    weight_map = {}
    for name, nbytes in report.shards.items():
        raw = (out / name).read_bytes()
        assert len(raw) == nbytes
        ranges = check(raw)
        weight_map |= dict.fromkeys(ranges, name)
        for backend in ("mmap", "pread"):
            with safe_open(out / name, "pt", backend=backend) as shard:
                assert shard.metadata() == {"format": "pt"}
                assert shard.offset_keys() == list(ranges)
                for tensor, (begin, end) in ranges.items():
                    value = shard.get_tensor(tensor)
                    assert str(value.dtype) == f"torch.{dtype}"
                    assert bytes(value.view(-1).view(torch.uint8).numpy()) == raw[begin:end]
        assert load_file(out / name).keys() == ranges.keys()
    index = json.loads((out / INDEX_NAME).read_text())
    assert index["weight_map"] == weight_map
    assert index["metadata"] == {"total_size": sum(len(t.data) for t in read_tensors(out).values())}
    assert len(weight_map) == report.tensors


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_have_the_modes_of_the_umask(umask, tiny, tmp_path):
    """As any other program creates them, not with the mode 0600 of temporary files."""
    (tiny / "additional_chat_templates").mkdir()
    (tiny / "additional_chat_templates/tool.jinja").write_text("{{ tools }}")
    (tiny / "additional_chat_templates/tool.jinja").chmod(0o600)
    out = tmp_path / "made/out"
    before = os.umask(umask)
    try:
        gptoss_stream.convert(tiny, out, max_shard_size="300KB")
    finally:
        os.umask(before)
    found = [out.parent, out, *out.rglob("*")]
    modes = {str(file.relative_to(tmp_path)): stat.S_IMODE(file.stat().st_mode) for file in found}
    expected = {
        str(file.relative_to(tmp_path)): (0o777 if file.is_dir() else 0o666) & ~umask
        for file in found
    }
    assert len(found) > 10
    assert modes == expected


def test_the_checker_accepts_nothing_that_safetensors_refuses():
    """Tried with 5,000 damaged files, of which it accepts hundreds."""
    header = {"__metadata__": {"format": "pt"}}
    header["a"] = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
    header["b"] = {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]}
    spaces = " " * (-len(json_text(in_pairs(header))) % 8)
    accepted = 0
    for file in files(6, 5000, lambda rng: Header(in_pairs(header), bytes(32), after=spaces)):
        try:
            check(file)
        except REFUSALS:
            continue
        accepted += 1
        deserialize(file)
    assert accepted > 300
