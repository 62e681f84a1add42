"""A shard gets its final name only if the `safetensors` package reads it as intended."""

from __future__ import annotations

import numpy as np
import pytest
from runs import assert_resumes, digests
from shards import edit_header

import gptoss_stream
from gptoss_stream.checkpoint.metadata import read_header
from gptoss_stream.errors import OutputError
from gptoss_stream.storage.local_folder import LocalFolder
from gptoss_stream.writing.safetensors_check import find_problem
from gptoss_stream.writing.shard_file import ShardFile


def rename(header):
    header["embed.X"] = header.pop("embed.W_E")


def reshape(header):
    rows, columns = header["embed.W_E"]["shape"]
    header["embed.W_E"]["shape"] = [columns, rows]


def retype(header):
    header["embed.W_E"]["dtype"] = "F16"


def move(header):
    header["embed.W_E"]["data_offsets"][0] += 2


DAMAGES = {
    rename: "it sees 176 tensors",
    reshape: "'embed.W_E' as",
    retype: "as F16",
    move: "Error",
}


def expected_tensors(file):
    """Return name, dtype and shape of each tensor in a file."""
    tensors = read_header(LocalFolder(file.parent), file.name)[1]
    return [(raw.name, raw.dtype, raw.shape) for raw in tensors.values()]


@pytest.mark.parametrize("damage", DAMAGES)
def test_problems_are_found(damage, checkpoints, tmp_path):
    gptoss_stream.convert(checkpoints(), tmp_path / "out")
    file = tmp_path / "out/model.safetensors"
    expected = expected_tensors(file)
    assert find_problem(file, expected) is None
    edit_header(file, damage)
    assert DAMAGES[damage] in find_problem(file, expected)


def test_a_shard_that_cannot_be_read_gets_no_final_name(checkpoints, tmp_path, monkeypatch):
    """For example if the disk returns other bytes than were written. The next run completes the
    output."""
    source, out = checkpoints(layers=2), tmp_path / "out"
    whole = tmp_path / "whole"
    options = ("--max-shard-size", "300KB")
    gptoss_stream.convert(source, whole, max_shard_size="300KB")
    write = ShardFile.write

    def damaging(self, chunk, offset):
        damaged = chunk.copy() if offset else np.frombuffer(b"\xff" * len(chunk), np.uint8)
        write(self, damaged, offset)

    with monkeypatch.context() as patch:
        patch.setattr(ShardFile, "write", damaging)
        with pytest.raises(OutputError, match="safetensors cannot read what was written"):
            gptoss_stream.convert(source, out, max_shard_size="300KB")
    assert not list(out.glob("*.safetensors"))
    assert_resumes(source, out, digests(whole), *options)


def test_verify_uses_the_same_check(checkpoints, tmp_path, monkeypatch):
    gptoss_stream.convert(checkpoints(), tmp_path / "out")
    assert gptoss_stream.verify(checkpoints(), tmp_path / "out").equal
    monkeypatch.setattr(
        "gptoss_stream.verification.stored_output.find_problem", lambda file, tensors: "it is odd"
    )
    (difference,) = gptoss_stream.verify(checkpoints(), tmp_path / "out").differences
    assert (difference.kind, difference.name) == ("file", "model.safetensors")
    assert "it is odd" in str(difference)


def test_a_file_that_cannot_be_opened_raises_the_error_of_the_system(tmp_path):
    """safetensors reports all these errors as a missing file."""
    with pytest.raises(FileNotFoundError, match="No such file"):
        find_problem(tmp_path / "none", [])
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        find_problem(tmp_path / "loop", [])
