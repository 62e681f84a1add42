"""Random checkpoints, made once each."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import gptoss_stream

os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """Give the folder of a random checkpoint with these options; do not change what is in it."""
    made: dict[tuple, Path] = {}

    def checkpoint(**options) -> Path:
        key = tuple(sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            made[key] = gptoss_stream.synth(folder, **options)
        return made[key]

    return checkpoint


@pytest.fixture
def tiny(checkpoints, tmp_path) -> Path:
    """A tiny checkpoint of one's own, to damage."""
    return Path(shutil.copytree(checkpoints(layers=2), tmp_path / "source"))


@pytest.fixture
def several(checkpoints, tmp_path) -> Path:
    """A tiny checkpoint of four shards, to damage."""
    source = checkpoints(layers=2, max_shard_size="200KB")
    return Path(shutil.copytree(source, tmp_path / "source"))
