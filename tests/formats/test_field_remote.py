"""Checkpoints as people have them, on a server: read or refused as local ones are."""

from __future__ import annotations

import huggingface_hub.constants
import pytest
from field_converted import CONVERTED
from field_kinds import KINDS
from field_refused import REFUSED
from loopback import FileServer
from runs import digests

import gptoss_stream
from gptoss_stream.errors import CheckpointError

CHOSEN = sorted(CONVERTED)[::6]
UNREADABLE = [*sorted(REFUSED)[::8], "an adapter and no config.json", "DCP", "PyTorch"]


@pytest.fixture(autouse=True)
def _online(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("name", CHOSEN)
def test_a_remote_checkpoint_is_converted(name, tmp_path):
    CONVERTED[name].source.write(tmp_path / "source")
    local = gptoss_stream.convert(tmp_path / "source", tmp_path / "local", to="hf")
    with FileServer(tmp_path / "source") as server:
        remote = gptoss_stream.convert(server.url, tmp_path / "remote", to="hf")
    assert remote.notes == local.notes
    pattern = "*.safetensors"
    assert digests(tmp_path / "remote", pattern) == digests(tmp_path / "local", pattern)
    config = (tmp_path / "remote/config.json").read_bytes()
    assert config == (tmp_path / "local/config.json").read_bytes()


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_remote_checkpoint_is_refused(name, tmp_path):
    """With the words of the local refusal."""
    case = {**REFUSED, **KINDS}[name]
    case.source.write(tmp_path / "source")
    with FileServer(tmp_path / "source") as server, pytest.raises(CheckpointError) as refusal:
        gptoss_stream.convert(server.url, tmp_path / "out", to="hf")
    assert [word for word in case.words if word not in str(refusal.value)] == []
    assert not (tmp_path / "out").exists()
