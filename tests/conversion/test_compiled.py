"""Conversions by compiled code give the bytes of those by numpy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from runs import digests

import gptoss_stream
from gptoss_stream import Report
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
    assert_alike(source, tmp_path, monkeypatch, to=to, dtype=dtype)


@pytest.mark.parametrize("source", ["hf", "hf-unfused", "transformer-lens"])
@pytest.mark.parametrize("name", ["usual", "unusual"])
def test_what_is_encoded_is_the_same(name, source, request, tmp_path, monkeypatch):
    """And what the report says of it."""
    monkeypatch.setattr("gptoss_stream.writing.executor.CHUNK_NBYTES", 5 << 12)
    floats = tmp_path / "floats"
    gptoss_stream.convert(request.getfixturevalue(name), floats, to=source)
    reports = assert_alike(floats, tmp_path, monkeypatch, to="openai", mxfp4_rule="ocp")
    assert reports[0].mxfp4 == reports[1].mxfp4


def assert_alike(source: Path, folder: Path, monkeypatch, **options) -> list[Report]:
    """Convert without and with compiled code, and compare the shards; returns the reports."""
    reports = []
    for enabled in (False, True):
        monkeypatch.setattr(compiled, "_is_enabled", enabled)
        reports.append(gptoss_stream.convert(source, folder / str(enabled), workers=3, **options))
    assert digests(folder / "True", "*.safetensors") == digests(folder / "False", "*.safetensors")
    return reports


@pytest.mark.parametrize(("nbytes", "enabled"), [(1, True), (1 << 60, False)])
def test_it_is_used_where_much_is_decoded_or_encoded(nbytes, enabled, usual, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "_is_enabled", False)
    monkeypatch.setattr(compiled, "_WORTHWHILE_NBYTES", nbytes)
    gptoss_stream.convert(usual, tmp_path / "copied", to="openai")
    assert not compiled.is_enabled()
    gptoss_stream.convert(usual, tmp_path / "decoded", to="hf")
    assert compiled.is_enabled() == enabled
    monkeypatch.setattr(compiled, "_is_enabled", False)
    gptoss_stream.convert(tmp_path / "decoded", tmp_path / "encoded", to="openai")
    assert compiled.is_enabled() == enabled
