"""Tensors and models straight off a remote checkpoint, by byte range."""

from __future__ import annotations

import huggingface_hub.constants
import pytest
import torch
from format_pairs import FORMATS
from loopback import FileServer
from outputs import same_bits

import gptoss_stream

TOKENS = torch.arange(60)[None] * 25 % 1009


@pytest.fixture(autouse=True)
def _online(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def cache_home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("source", FORMATS)
def test_every_tensor_is_that_of_the_local_folder(source, checkpoints, cache_home):
    """Stored, and in every format; whole and in part."""
    folder = checkpoints(format=source, max_shard_size="300KB")
    with FileServer(folder) as server:
        for to in (None, *FORMATS):
            local = gptoss_stream.open_state_dict(folder, to=to)
            remote = gptoss_stream.open_state_dict(server.url, to=to)
            assert [*remote] == [*local]
            for name in local:
                assert not remote.is_mapped(name)
                assert same_bits(remote[name], local[name].contiguous()), name
                assert torch.equal(remote.get_slice(name)[1:2], local[name][1:2])
    assert not cache_home.exists()  # nothing is kept on the disk by default


@pytest.mark.parametrize(
    "load", [gptoss_stream.load_hf_model, gptoss_stream.load_hooked_transformer]
)
@torch.no_grad()
def test_a_model_computes_what_the_local_one_does(load, checkpoints, cache_home):
    def logits(model):
        found = model(TOKENS)
        return getattr(found, "logits", found)

    folder = checkpoints(max_shard_size="300KB")
    with FileServer(folder) as server:
        model = load(server.url, cache="1GB")
        assert torch.equal(logits(model), logits(load(folder)))
        before = len(server.requests)
        assert torch.equal(logits(model), logits(load(folder)))
        assert len(server.requests) == before  # memory holds the whole tiny model


def test_the_cache_on_disk_serves_the_next_process(checkpoints, cache_home):
    """Its blocks are not asked for again, but the headers are."""
    folder = checkpoints()
    name = "blocks.1.mlp.experts.2.W_in.weight"
    with FileServer(folder) as server:
        counts = []
        for _ in range(2):
            before = len(server.requests)
            state = gptoss_stream.open_state_dict(server.url, to="transformer-lens", cache="1GB")
            opened = len(server.requests)
            tensor = state[name]
            counts.append((opened - before, len(server.requests) - opened))
            expected = gptoss_stream.open_state_dict(folder, to="transformer-lens")[name]
            assert torch.equal(tensor, expected)
    reads = [request for _, request in counts]
    assert reads[0] > reads[1]
    assert any(cache_home.rglob("*"))
