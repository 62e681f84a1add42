"""Parsing and building headers and indexes: a table of valid headers and one of damaged ones."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gptoss_stream.errors import HeaderError
from gptoss_stream.tensors.dtypes import DType
from gptoss_stream.tensors.safetensors_header import (
    build_header,
    build_index,
    header_nbytes,
    parse_header,
    parse_index,
)


def parse(data: bytes):
    length = header_nbytes(data[:64], len(data), "x.safetensors")
    return parse_header(data[8 : 8 + length], len(data), "x.safetensors", "x.safetensors")[0]


def entry(dtype="U8", shape=(4,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def file_of(header, nbytes: int = 4) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(nbytes)


VALID = {
    "one tensor": file_of({"a": entry()}),
    "no tensor": file_of({}, 0),
    "empty tensor": file_of({"a": entry(shape=(0, 3), offsets=(0, 0))}, 0),
    "scalar": file_of({"a": entry("F32", (), (0, 4))}),
    "order of names is not order of data": file_of(
        {"a": entry(offsets=(4, 8)), "b": entry(offsets=(0, 4))}, 8
    ),
    "metadata": file_of({"__metadata__": {"format": "pt"}, "a": entry()}),
    "spaces before and after": file_of(b"  " + json.dumps({"a": entry()}).encode() + b" \n"),
    "half bytes": file_of({"a": entry("F4", (8,), (0, 4))}),
}


@pytest.mark.parametrize("data", VALID.values(), ids=VALID.keys())
def test_valid_headers_are_read_as_safetensors_reads_them(data, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(data)
    infos = parse(data)
    with safe_open(tmp_path / "x.safetensors", "np") as theirs:
        assert {info.name for info in infos} == set(theirs.keys())
        for info in infos:
            view = theirs.get_slice(info.name)
            assert list(info.shape) == view.get_shape()
            assert info.dtype.code == view.get_dtype()


# name: (the file, what the message says, whether safetensors refuses it too)
DAMAGED = {
    "nothing": (b"", "too few", True),
    "seven bytes": (b"1234567", "too few", True),
    "header length zero": (bytes(8), "not JSON", True),
    "header beyond the file": (b"\xff\0\0\0\0\0\0\0{}", "truncated", True),
    "header length huge": ((2**63).to_bytes(8, "little") + b"{}", "header length", True),
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "LFS", True),
    "HTML page": (b"<!DOCTYPE html><html></html>", "HTML", True),
    "JSON error message": (b'{"error": "not found"}', "JSON text", True),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not UTF-8", True),
    "UTF-16": (file_of(json.dumps({"a": entry()}).encode("utf-16")), "not UTF-8", True),
    "byte order mark": (file_of(b"\xef\xbb\xbf{}", 0), "byte order mark", True),
    "not JSON": (file_of(b"{'a': 1}"), "not JSON", True),
    "NaN": (file_of(b'{"a": NaN}'), "NaN", True),
    "an integer of 5,000 digits": (file_of(b'{"a": ' + b"9" * 5000 + b"}"), "", True),
    "an array": (file_of(b"[]"), "not a JSON object", True),
    "nested 10,000 deep": (file_of(b'{"a":' * 10_000 + b"1" + b"}" * 10_000), "deep", True),
    "one name twice": (
        file_of(b'{"a":%s,"a":%s}' % ((json.dumps(entry()).encode(),) * 2)),
        "twice",
        False,
    ),
    "one name twice, once escaped": (
        file_of(b'{"a":%s,"\\u0061":%s}' % ((json.dumps(entry()).encode(),) * 2)),
        "twice",
        False,
    ),
    "lone surrogate": (
        file_of(b'{"\\ud800":%s}' % json.dumps(entry()).encode()),
        "surrogate",
        True,
    ),
    "empty name": (file_of({"": entry()}), "empty", False),
    "control character in a name": (file_of({"a\0b": entry()}), "control", False),
    "metadata not strings": (file_of({"__metadata__": {"a": 1}, "a": entry()}), "__meta", True),
    "metadata null": (file_of({"__metadata__": None, "a": entry()}), "__metadata__", False),
    "entry is an array": (file_of({"a": ["U8", [4], [0, 4]]}), "exactly", False),
    "entry with more": (file_of({"a": entry(more=1)}), "exactly", False),
    "entry with less": (file_of({"a": {"dtype": "U8", "shape": [4]}}), "exactly", True),
    "unknown dtype": (file_of({"a": entry("U7")}), "unknown dtype", True),
    "dtype in lower case": (file_of({"a": entry("u8")}), "unknown dtype", True),
    "dtype not a string": (file_of({"a": entry({"U8": None})}), "unknown dtype", False),
    "negative size": (file_of({"a": entry(shape=(-4,))}), "non-negative", True),
    "size true": (file_of({"a": entry(shape=(True, 4))}), "non-negative", True),
    "size 4.0": (file_of({"a": entry(shape=(4.0,))}), "non-negative", True),
    "size a string": (file_of({"a": entry(shape=("4",))}), "non-negative", True),
    "shape not a list": (
        file_of({"a": {"dtype": "U8", "shape": 4, "data_offsets": [0, 4]}}),
        "not a list",
        True,
    ),
    "three offsets": (file_of({"a": entry(offsets=(0, 2, 4))}), "data_offsets", True),
    "shape and offsets disagree": (file_of({"a": entry(shape=(5,))}), "takes 5 bytes", True),
    "bits that are not whole bytes": (file_of({"a": entry("F4", (7,), (0, 4))}), "takes 3.5", True),
    "shape overflows": (file_of({"a": entry(shape=(2**32, 2**32))}), "overflows", True),
    "shape overflows, then a zero": (
        file_of({"a": entry(shape=(2**32, 2**32, 0), offsets=(0, 0))}, 0),
        "overflows",
        True,
    ),
    "many dimensions": (file_of({"a": entry(shape=(1,) * 9 + (4,))}), "dimensions", False),
    "offsets backwards": (file_of({"a": entry(offsets=(4, 0))}), "backwards", True),
    "offsets overlap": (
        file_of({"a": entry(), "b": entry(offsets=(2, 6))}, 6),
        "overlaps",
        True,
    ),
    "a hole": (file_of({"a": entry(), "b": entry(offsets=(6, 10))}, 10), "hole", True),
    "begins late": (file_of({"a": entry(offsets=(1, 5))}, 5), "hole", True),
    "truncated by one byte": (file_of({"a": entry()}, 3), "1 are missing", True),
    "one byte too many": (file_of({"a": entry()}, 5), "1 bytes follow", True),
}


@pytest.mark.parametrize(("data", "message", "refused_too"), DAMAGED.values(), ids=DAMAGED.keys())
def test_damaged_headers_are_refused(data, message, refused_too, tmp_path):
    """The message names the file. Everything that safetensors refuses is refused."""
    with pytest.raises(HeaderError, match=r"x\.safetensors") as refusal:
        parse(data)
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)
    (tmp_path / "x.safetensors").write_bytes(data)
    if refused_too:
        with (
            pytest.raises((SafetensorError, ValueError)),
            safe_open(tmp_path / "x.safetensors", "np"),
        ):
            pass
    else:
        with safe_open(tmp_path / "x.safetensors", "np"):
            pass  # documented as stricter than safetensors


def test_a_huge_header_length_allocates_nothing():
    with pytest.raises(HeaderError, match="25000000 is the most"):
        header_nbytes((100_000_001).to_bytes(8, "little"), 10**12, "x")


def test_build_and_parse_agree():
    tensors = [("b", DType.F32, (3,)), ("a", DType.BF16, (0, 2)), ("ü", DType.U8, (5, 1))]
    header = build_header(tensors)
    infos = parse(header + bytes(17))
    assert [(i.name, i.dtype, i.shape) for i in infos] == tensors
    start = len(header)
    assert [(i.offset - start, i.end - start) for i in infos] == [(0, 12), (12, 12), (12, 17)]
    assert len(header) % 8 == 0
    assert b'"__metadata__":{"format":"pt"}' in header


def test_a_header_is_what_save_file_writes(tmp_path):
    tensors = {"a": np.zeros((2, 3), np.float32), "b": np.zeros(5, np.float32)}
    save_file(tensors, tmp_path / "x", metadata={"format": "pt"})
    header = build_header([("a", DType.F32, (2, 3)), ("b", DType.F32, (5,))])
    assert (tmp_path / "x").read_bytes()[: len(header)] == header


BAD_INDEXES = {
    "not JSON": b"x",
    "an array": b"[]",
    "no weight_map": b"{}",
    "weight_map empty": b'{"weight_map": {}}',
    "weight_map a list": b'{"weight_map": []}',
    "a number": b'{"weight_map": {"a": 1}}',
    "up": b'{"weight_map": {"a": "../x.safetensors"}}',
    "absolute": b'{"weight_map": {"a": "/x.safetensors"}}',
    "a folder": b'{"weight_map": {"a": "b/x.safetensors"}}',
    "backslash": b'{"weight_map": {"a": "b\\\\x.safetensors"}}',
    "NUL": b'{"weight_map": {"a": "x\\u0000.safetensors"}}',
    "hidden": b'{"weight_map": {"a": ".x.safetensors"}}',
    "another kind": b'{"weight_map": {"a": "x.bin"}}',
    "one name twice": b'{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}',
}


@pytest.mark.parametrize("text", BAD_INDEXES.values(), ids=BAD_INDEXES.keys())
def test_bad_indexes_are_refused(text):
    with pytest.raises(HeaderError, match=r"^i\.json: "):
        parse_index(text, "i.json")


def test_an_index_is_read_as_written():
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    assert parse_index(build_index(7, weight_map), "i.json") == weight_map
    assert json.loads(build_index(7, weight_map))["metadata"] == {"total_size": 7}
