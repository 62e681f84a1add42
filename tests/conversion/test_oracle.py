"""The output is bit for bit that of transformers and TransformerLens."""

from __future__ import annotations

import json

import oracle
import pytest
import torch
from outputs import load_output, same_bits

import gptoss_stream

# Each breaks a symmetry that could hide a confusion of axes.
SHAPES = {
    "tiny": {},
    "one expert": {"experts": 1},
    "one key/value head": {"num_key_value_heads": 1},
    "as many key/value heads as heads": {"num_key_value_heads": 4, "layers": 1},
    "I > H": {"hidden_size": 32, "intermediate_size": 96, "layers": 1},
    "I = H": {"hidden_size": 64, "intermediate_size": 64, "layers": 1},
    "heads * dim = H": {"hidden_size": 128, "layers": 1},
    "even vocabulary, odd head": {"vocab_size": 64, "head_dim": 7 * 2, "layers": 1},
    "twelve layers, whose names do not sort by number": {"layers": 12, "experts": 2},
    "every raw tensor in a shard of its own": {"max_shard_size": 1, "layers": 1},
    "several source shards": {"max_shard_size": "200KB"},
}


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
def test_every_tensor_is_as_expected(options, checkpoints, tmp_path):
    source = checkpoints(**options)
    gptoss_stream.convert(source, tmp_path / "out")
    found, expected = load_output(tmp_path / "out"), oracle.state_dict(source)
    assert set(found) == set(expected)
    differing = [name for name in expected if not same_bits(found[name], expected[name])]
    assert differing == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_dtype(dtype, checkpoints, tmp_path):
    source = checkpoints()
    gptoss_stream.convert(source, tmp_path / "out", dtype=dtype)
    found = load_output(tmp_path / "out")
    expected = oracle.state_dict(source, getattr(torch, dtype))
    differing = [name for name in expected if not same_bits(found[name], expected[name])]
    assert differing == []


@pytest.mark.parametrize("limit", [1, 10_000, "100KB", "1MB", "5GB"])
def test_every_shard_limit(limit, checkpoints, tmp_path):
    """A tensor that is larger than the limit has its own shard."""
    source = checkpoints(layers=1)
    report = gptoss_stream.convert(source, tmp_path / "out", max_shard_size=limit)
    found, expected = load_output(tmp_path / "out"), oracle.state_dict(source)
    assert set(found) == set(expected)
    assert all(same_bits(found[name], expected[name]) for name in expected)
    if limit == 1:
        assert len(report.shards) == len(expected)
    if limit == "5GB":
        assert list(report.shards) == ["model.safetensors"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_missing_biases_are_zeros_and_tied_embeddings_are_used_twice(bias, tied, tmp_path):
    """Of a checkpoint that transformers wrote."""
    source = oracle.save_mxfp4(tmp_path / "source", attention_bias=bias, tie_word_embeddings=tied)
    gptoss_stream.convert(source, tmp_path / "out")
    found, expected = load_output(tmp_path / "out"), oracle.state_dict(source)
    assert set(found) == set(expected)
    differing = [name for name in expected if not same_bits(found[name], expected[name])]
    assert differing == []


def test_the_configuration_is_as_expected(checkpoints, tmp_path):
    source = checkpoints()
    gptoss_stream.convert(source, tmp_path / "out")
    ours = json.loads((tmp_path / "out/tl_config.json").read_text())
    theirs = oracle.hooked_config(source)
    theirs["dtype"] = str(theirs["dtype"]).removeprefix("torch.")
    theirs = {key: value for key, value in theirs.items() if value is not None}
    # The source's folder and quantisation do not describe the output.
    del theirs["tokenizer_name"], theirs["quantization_method"]
    assert theirs.items() <= ours.items()
    assert ours["use_attention_sinks"]
    assert ours["use_yarn_rope"]
    assert ours["attn_types"] == ["local", "global"] * 2
    assert ours["original_architecture"] == "GptOssForCausalLM"
