"""A format is added by one file, as CONTRIBUTING.md shows, and is then read and written."""

from __future__ import annotations

import re
import sys

import oracle
import pytest
import torch
from outputs import load_output, same_bits
from runs import ROOT
from safetensors.torch import load_file, save_file

import gptoss_stream
from gptoss_stream.errors import CheckpointError, OptionError

GUIDE = (ROOT / "CONTRIBUTING.md").read_text()
(HALVES,) = re.findall(r"<!-- format -->\n```python\n(.*?)```\n<!-- end -->", GUIDE, re.DOTALL)


@pytest.fixture
def add_format(tmp_path, monkeypatch):
    """Return a function that adds a format, as a single file, and returns its name."""
    (tmp_path / "formats").mkdir()
    folders = [*gptoss_stream.formats.__path__, str(tmp_path / "formats")]
    monkeypatch.setattr(gptoss_stream.formats, "__path__", folders)
    names = []

    def add(name, code):
        (tmp_path / f"formats/{name}.py").write_text(code)
        names.append(name)
        return name

    yield add
    for name in names:
        sys.modules.pop(f"gptoss_stream.formats.{name}", None)


@pytest.fixture
def halves(add_format):
    """Return the name of the format that CONTRIBUTING.md adds."""
    return add_format("halves", HALVES)


def as_halves(tensors):
    """Return Hugging Face's tensors as that format stores them."""
    out = {}
    for name, tensor in tensors.items():
        if name.endswith("gate_up_proj"):
            halves = tensor.transpose(1, 2)
            out[name.replace("gate_up_proj", "w13")] = torch.cat(
                [halves[:, 0::2], halves[:, 1::2]], 1
            )
        elif name.endswith("gate_up_proj_bias"):
            out[name.replace("gate_up_proj", "w13")] = torch.cat(
                [tensor[:, 0::2], tensor[:, 1::2]], 1
            )
        elif name.endswith("down_proj"):
            out[name.replace("down_proj", "w2")] = tensor.transpose(1, 2).contiguous()
        else:
            out[name.replace("down_proj", "w2")] = tensor
    return out


@pytest.mark.parametrize("other", gptoss_stream.formats.names())
def test_a_format_is_added_as_contributing_says(other, halves, checkpoints, tmp_path):
    """It is converted from and to all others."""
    assert halves in gptoss_stream.formats.names()
    source = checkpoints(format=other)
    gptoss_stream.convert(source, tmp_path / "halves", to=halves, dtype="bfloat16")
    found = load_output(tmp_path / "halves")
    expected = as_halves(oracle.load_model(checkpoints()).state_dict())
    assert set(found) == set(expected)
    assert [name for name in expected if not same_bits(found[name], expected[name])] == []
    assert gptoss_stream.verify(source, tmp_path / "halves").equal
    assert gptoss_stream.plan(tmp_path / "halves", to="hf").source_format == halves
    if other in ("hf-mxfp4", "openai"):
        return
    gptoss_stream.convert(tmp_path / "halves", tmp_path / "back", to=other)
    before, after = load_output(source), load_output(tmp_path / "back")
    assert set(before) == set(after)
    assert [name for name in before if not same_bits(after[name], before[name])] == []
    gptoss_stream.convert(tmp_path / "halves", tmp_path / "again", to=halves)
    again = load_output(tmp_path / "again")
    assert [name for name in found if not same_bits(again[name], found[name])] == []


def test_a_format_that_lacks_a_tensor(add_format, checkpoints, tmp_path):
    """It is not written, which would lose the tensor, and another is not made of it."""
    code = HALVES.replace("    *FIRST,", "    *[row for row in FIRST if row.tensor != 'sinks'],")
    name = add_format("sinkless", code)
    words = "self_attn.sinks' is one that the format sinkless cannot"
    with pytest.raises(CheckpointError, match=words):
        gptoss_stream.convert(checkpoints(), tmp_path / "out", to=name)
    gptoss_stream.convert(checkpoints(), tmp_path / "with", to=add_format("halves", HALVES))
    sinks = {"source_format": name, "to": "hf"}
    with pytest.raises(OptionError, match=r"holds nothing that 'model.layers.0.self_attn.sinks'"):
        gptoss_stream.convert(tmp_path / "with", tmp_path / "out", **sinks)
    assert not (tmp_path / "out").exists()


def test_a_format_with_an_optional_unembedding_bias(add_format, checkpoints, tmp_path):
    """The bias is read if it is stored."""
    row = 'Row("lm_head.bias", "unembed_bias", "v", optional=True)'
    name = add_format("biased", HALVES.replace("    *LAST,", f"    *LAST,\n    {row},"))
    gptoss_stream.convert(checkpoints(), tmp_path / "halves", to=name)
    assert "lm_head.bias" not in load_output(tmp_path / "halves")
    assert gptoss_stream.plan(tmp_path / "halves", to="hf", source_format=name).num_tensors == 71
    shard = tmp_path / "halves/model.safetensors"
    tensors = load_file(shard) | {"lm_head.bias": torch.arange(1009).bfloat16()}
    save_file(tensors, shard, {"format": "pt"})
    (tmp_path / "halves/model.safetensors.index.json").unlink()
    gptoss_stream.convert(tmp_path / "halves", tmp_path / "tl", source_format=name)
    found = load_output(tmp_path / "tl")["unembed.b_U"]
    assert torch.equal(found, torch.arange(1009).bfloat16())
    gptoss_stream.convert(tmp_path / "tl", tmp_path / "back", to=name)
    assert torch.equal(load_output(tmp_path / "back")["lm_head.bias"], found)
    words = "'lm_head.bias' is not zero, and the format hf cannot"
    with pytest.raises(CheckpointError, match=words):
        gptoss_stream.plan(tmp_path / "halves", to="hf", source_format=name)
