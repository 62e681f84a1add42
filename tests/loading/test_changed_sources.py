"""A file on a server that is replaced while tensors are read of it."""

from __future__ import annotations

import logging
import os
import shutil

import huggingface_hub.constants
import pytest
import torch
from loopback import FileServer

import gptoss_stream
from gptoss_stream.checkpoint.block_reader import BlockReader
from gptoss_stream.errors import CheckpointError

DATES = ["Wed, 21 Oct 2015 07:28:00 GMT", "Thu, 22 Oct 2015 07:28:00 GMT"]
VERSIONS = {  # of the replies to HEAD and to GET
    "both": (("ETag", "Last-Modified"), ("ETag", "Last-Modified")),
    "ETag": (("ETag",), ("ETag",)),
    "Last-Modified": (("Last-Modified",), ("Last-Modified",)),
    "ETag, then Last-Modified": (("ETag", "Last-Modified"), ("Last-Modified",)),
    "Last-Modified, then ETag": (("Last-Modified",), ("ETag",)),
    "ETag of HEAD": (("ETag",), ()),
    "ETag of GET": ((), ("ETag",)),
    "Last-Modified of GET": ((), ("Last-Modified",)),
    "other kinds": (("ETag",), ("Last-Modified",)),
}


@pytest.fixture(autouse=True)
def _setting(tmp_path, monkeypatch):
    """Blocks so small that a tensor of the tiny checkpoint is read by itself."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    defaults = BlockReader.__init__.__defaults__
    monkeypatch.setattr(BlockReader.__init__, "__defaults__", (defaults[0], 4096, defaults[2]))


@pytest.fixture
def served(checkpoints, tmp_path):
    """A server of a copy, which gives the headers in `sent`; and the bytes of another version."""
    folder = shutil.copytree(checkpoints(), tmp_path / "served")
    file = folder / "model.safetensors"
    old = file.read_bytes()
    header_nbytes = 8 + int.from_bytes(old[:8], "little")
    new = old[:header_nbytes] + bytes(byte ^ 1 for byte in old[header_nbytes:])
    with FileServer(folder) as server:

        def headed(request, answer):
            reply = answer(request)
            is_new = file.read_bytes() == new
            found = {"ETag": f'"{is_new}"', "Last-Modified": DATES[is_new]}
            reply.headers.pop("ETag", None)
            kept = server.sent[request.method != "HEAD"]
            reply.headers |= {name: found[name] for name in kept}
            return reply

        server.spoil("", headed)
        yield server, file, old, new


@pytest.mark.parametrize("versions", VERSIONS)
def test_a_replaced_file_is_not_read_and_not_kept(versions, served, checkpoints):
    """Nor when the first version is back, with the same headers."""
    server, file, old, new = served
    server.sent = VERSIONS[versions]
    local = gptoss_stream.open_state_dict(checkpoints())
    state = gptoss_stream.open_state_dict(server.url, cache="100MB")
    first, *_, last = local
    assert torch.equal(state[first], local[first])
    file.write_bytes(new)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: it changed while"):
        state[last]
    file.write_bytes(old)
    again = gptoss_stream.open_state_dict(server.url, cache="100MB")
    for name in local:
        assert torch.equal(again[name], local[name]), name


def test_what_the_replies_do_not_identify_is_not_kept(served, checkpoints):
    """Another version may be sent between two requests that name the same one."""
    server, file, old, new = served
    server.sent = VERSIONS["ETag of HEAD"]

    def exchanged(request, answer):
        file.write_bytes(new)
        reply = answer(request)
        file.write_bytes(old)
        return reply

    local = gptoss_stream.open_state_dict(checkpoints())
    state = gptoss_stream.open_state_dict(server.url, cache="100MB")
    server.spoil("^GET .*safetensors", exchanged, times=1)
    last = [*local][-1]
    assert not torch.equal(state[last], local[last])
    server.sent = VERSIONS["ETag"]
    again = gptoss_stream.open_state_dict(server.url, cache="100MB")
    assert torch.equal(again[last], local[last])


def test_a_server_without_versions_is_warned_of_once(served, caplog):
    server, file, _, _ = served
    server.sent = ((), ())
    with caplog.at_level(logging.WARNING):
        state = gptoss_stream.open_state_dict(server.url)
        for name in state:
            state[name]
    (record,) = [r for r in caplog.records if r.name.startswith("gptoss_stream")]
    assert "sends neither ETag nor Last-Modified" in record.getMessage()
    state = gptoss_stream.open_state_dict(server.url)
    os.truncate(file, file.stat().st_size + 1)
    with pytest.raises(CheckpointError, match="it changed while"):
        state[name]
