"""Random checkpoints, each written once per session."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

import gptoss_stream
import gptoss_stream.verification.verify  # before a test patches what it imports
from gptoss_stream.tensors import compiled_merge

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A failure within a helper shows the values too.
pytest.register_assert_rewrite(*(file.stem for file in Path(__file__).parent.glob("helpers/*.py")))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """A function from options of `synth` to a folder with that checkpoint; tests must not change
    its files."""
    folders: dict[tuple, Path] = {}

    def checkpoint(**options) -> Path:
        key = tuple(sorted(options.items()))
        if key not in folders:
            folder = tmp_path_factory.mktemp("checkpoint")
            folders[key] = gptoss_stream.synth(folder, **options)
        return folders[key]

    return checkpoint


@pytest.fixture
def tiny(checkpoints, tmp_path) -> Path:
    """A tiny checkpoint that the test may damage."""
    return Path(shutil.copytree(checkpoints(layers=2), tmp_path / "source"))


@pytest.fixture
def several(checkpoints, tmp_path) -> Path:
    """A tiny checkpoint of four shards that the test may damage."""
    source = checkpoints(layers=2, max_shard_size="200KB")
    return Path(shutil.copytree(source, tmp_path / "source"))


@pytest.fixture(scope="session")
def flock_library(tmp_path_factory):
    """A function from an error, or 0 for success, to a library for LD_PRELOAD in which `flock`
    always ends so."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs gcc")
    folder = tmp_path_factory.mktemp("flock")

    def library(error: str) -> str:
        path = folder / f"{error}.so"
        if not path.exists():
            result = f"errno = {error}; return {error} ? -1 : 0;"
            code = f"#include <errno.h>\nint flock(int file, int operation) {{ {result} }}\n"
            command = [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)]
            subprocess.run(command, input=code, text=True, check=True)
        return str(path)

    return library


@pytest.fixture
def additions(monkeypatch) -> list[int]:
    """The sizes of what compiled code added."""
    sizes, add = [], compiled_merge.add_to_bfloat16

    def note(bits, added, out):
        sizes.append(added.size)
        return add(bits, added, out)

    monkeypatch.setattr(compiled_merge, "add_to_bfloat16", note)
    return sizes
