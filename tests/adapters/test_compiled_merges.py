"""Merges by compiled code give the bytes, and the errors, of those by numpy."""

from __future__ import annotations

import pytest
import torch
from adapter_cases import Case
from peft_rewrites import read, write
from runs import digests

import gptoss_stream
from gptoss_stream.errors import TensorError
from gptoss_stream.tensors import compiled

pytest.importorskip("numba")

CASES = ["attention, experts and head", "rsLoRA", "DoRA", "router and experts"]
ALL = Case("attention, experts and head")


def assert_alike(source, folder, monkeypatch, **options) -> None:
    """Convert by numpy and by compiled code, and compare the bytes."""
    for enabled in (False, True):
        monkeypatch.setattr(compiled, "_is_enabled", enabled)
        gptoss_stream.convert(source, folder / str(enabled), workers=3, **options)
    found = [digests(folder / str(enabled), "*.safetensors") for enabled in (False, True)]
    assert found[0] == found[1]


@pytest.mark.parametrize("to", ["hf", "transformer-lens", "hf-mxfp4", "openai"])
@pytest.mark.parametrize("name", CASES)
def test_from_mxfp4(name, to, made, tmp_path, monkeypatch, additions):
    """Chunks begin and end within rows."""
    monkeypatch.setattr("gptoss_stream.writing.executor.CHUNK_NBYTES", 5 << 12)
    adapter = made.adapter(Case(name), torch.bfloat16)
    assert_alike(made.mxfp4(), tmp_path, monkeypatch, to=to, adapters=[adapter])
    assert bool(additions) == (name != "DoRA")  # which scales the sums before they are rounded


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("to", ["hf", "transformer-lens"])
@pytest.mark.parametrize("source", ["mxfp4", torch.bfloat16, torch.float32])
def test_each_dtype(source, to, dtype, made, tmp_path, monkeypatch):
    base = made.mxfp4() if source == "mxfp4" else made.base(source)
    adapter = made.adapter(ALL, torch.bfloat16)
    assert_alike(base, tmp_path, monkeypatch, to=to, dtype=dtype, adapters=[adapter])


@pytest.mark.parametrize("options", [{"merge_like_peft": True}, {}])
def test_two_adapters(options, made, tmp_path, monkeypatch):
    adapters = [made.adapter(Case(name), torch.bfloat16) for name in ("experts", "rsLoRA")]
    assert_alike(made.mxfp4(), tmp_path, monkeypatch, to="hf", adapters=adapters, **options)


@pytest.mark.parametrize("to", ["hf", "transformer-lens", "hf-mxfp4"])
@pytest.mark.parametrize("added", [3.398e38, 4e38])
def test_values_that_are_too_large(added, to, made, tmp_path, monkeypatch):
    """In bfloat16, or in float32 too. The message names the same tensor."""
    tensors, config = read(made.adapter(Case("experts"), torch.bfloat16))
    for name in tensors:
        value = 2.0**64 if "lora_A" in name else added / 2.0**64 / config["r"]
        tensors[name] = torch.full(tensors[name].shape, value)
    write(tmp_path / "adapter", tensors, config | {"lora_alpha": config["r"]})
    options = {"to": to, "adapters": tmp_path / "adapter", "workers": 1}
    said = []
    for enabled in (False, True):
        monkeypatch.setattr(compiled, "_is_enabled", enabled)
        with pytest.raises(TensorError) as error:
            gptoss_stream.convert(made.mxfp4(), tmp_path / str(enabled), **options)
        said.append(str(error.value))
    assert said[0] == said[1]


def test_merged_bytes_count(made, tmp_path, monkeypatch):
    """The formats are the same, so that without an adapter nothing is decoded."""
    monkeypatch.setattr(compiled, "_is_enabled", False)
    monkeypatch.setattr(compiled, "_WORTHWHILE_NBYTES", 1)
    gptoss_stream.convert(made.mxfp4(), tmp_path / "copied", to="hf-mxfp4")
    assert not compiled.is_enabled()
    adapter = made.adapter(Case("experts"), torch.bfloat16)
    gptoss_stream.convert(made.mxfp4(), tmp_path / "merged", to="hf-mxfp4", adapters=adapter)
    assert compiled.is_enabled()
