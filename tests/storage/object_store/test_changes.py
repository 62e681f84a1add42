"""An object that is replaced while tensors are read of it."""

from __future__ import annotations

import fsspec
import pytest
import torch

import gptoss_stream
from gptoss_stream.checkpoint.block_reader import BlockReader
from gptoss_stream.errors import CheckpointError
from gptoss_stream.storage.location import read_whole


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks so small that a tensor of the tiny checkpoint is read by itself."""
    defaults = BlockReader.__init__.__defaults__
    monkeypatch.setattr(BlockReader.__init__, "__defaults__", (defaults[0], 4096, defaults[2]))


def without_condition(request, answer):
    """A store that does not know the condition of the request."""
    request.headers.pop("if-match", None)
    return answer(request)


@pytest.mark.parametrize("how", [lambda request, answer: answer(request), without_condition])
def test_a_replaced_object_is_not_read_and_not_kept(how, s3, checkpoints):
    """Nor after the first object, which has the same ETag, is back."""
    folder = checkpoints()
    key, old = "source/model.safetensors", (folder / "model.safetensors").read_bytes()
    url, local = s3.fill(folder), gptoss_stream.open_state_dict(folder)
    s3.proxy.spoil("^GET", how)
    state = gptoss_stream.open_state_dict(url, cache="100MB")
    first, *_, last = local
    assert torch.equal(state[first], local[first])
    s3.write(key, old[:-100_000] + bytes(byte ^ 1 for byte in old[-100_000:]))
    with pytest.raises(CheckpointError, match=f"{key}: it changed while it was being read"):
        state[last]
    s3.write(key, old)
    again = gptoss_stream.open_state_dict(url, cache="100MB")
    for name in local:
        assert torch.equal(again[name], local[name]), name


def test_any_other_store_is_asked_after_each_read():
    fsspec.filesystem("memory").pipe_file("/changing/file", b"first")
    file = gptoss_stream.open_location("memory://changing").open("file")
    assert read_whole(file) == b"first"
    fsspec.filesystem("memory").pipe_file("/changing/file", b"other")
    with pytest.raises(CheckpointError, match="file: it changed while it was being read"):
        read_whole(file)
