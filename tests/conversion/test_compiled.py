"""Conversions by compiled code give the bytes of those by numpy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from runs import digests

import gptoss_stream
from gptoss_stream.tensors import compiled

pytest.importorskip("numba")
SHAPE = {"layers": 2, "experts": 3, "hidden_size": 96, "intermediate_size": 160, "vocab_size": 131}


@pytest.fixture(scope="module")
def usual(checkpoints) -> Path:
    return checkpoints(**SHAPE)


@pytest.fixture(scope="module")
def unusual(usual, tmp_path_factory) -> Path:
    """With scales by which values are subnormal in bfloat16, in float16, or large."""
    folder = tmp_path_factory.mktemp("unusual") / "source"
    shutil.copytree(usual, folder)
    for file in folder.glob("*.safetensors"):
        data = bytearray(file.read_bytes())
        begin = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(bytes(data[8:begin])).items():
            if name.endswith("_scales"):
                low, high = (begin + offset for offset in entry["data_offsets"])
                scales = np.frombuffer(data, np.uint8)[low:high]
                scales[::7], scales[3::50], scales[1::11] = 0, 1, 113
        file.write_bytes(data)
    return folder


@pytest.mark.parametrize("chunk", [1 << 14, 5 << 12])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("to", ["hf", "hf-unfused", "transformer-lens"])
@pytest.mark.parametrize("name", ["usual", "unusual"])
def test_the_bytes_are_the_same(name, to, dtype, chunk, request, tmp_path, monkeypatch):
    """Chunks begin and end within rows, and within blocks of 32 columns."""
    source = request.getfixturevalue(name)
    monkeypatch.setattr("gptoss_stream.writing.executor.CHUNK_NBYTES", chunk)
    for enabled in (False, True):
        monkeypatch.setattr(compiled, "_is_enabled", enabled)
        gptoss_stream.convert(source, tmp_path / str(enabled), to=to, dtype=dtype, workers=3)
    assert digests(tmp_path / "True", "*.safetensors") == digests(
        tmp_path / "False", "*.safetensors"
    )


@pytest.mark.parametrize(("nbytes", "enabled"), [(1, True), (1 << 60, False)])
def test_it_is_used_where_much_is_decoded(nbytes, enabled, usual, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "_is_enabled", False)
    monkeypatch.setattr(compiled, "_WORTHWHILE_NBYTES", nbytes)
    gptoss_stream.convert(usual, tmp_path / "copied", to="openai")
    assert not compiled.is_enabled()
    gptoss_stream.convert(usual, tmp_path / "decoded", to="hf")
    assert compiled.is_enabled() == enabled
