"""Random checkpoints are valid and deterministic, and impossible shapes are refused."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file
from transformers import AutoConfig

import gptoss_stream
from gptoss_stream.errors import OptionError


def test_a_seed_gives_the_same_tensors_in_any_sharding(tmp_path):
    gptoss_stream.synth(tmp_path / "a", seed=3, workers=1)
    gptoss_stream.synth(tmp_path / "b", seed=3, max_shard_size="200KB", workers=4)
    gptoss_stream.synth(tmp_path / "c", seed=4)
    a, c = (load_file(tmp_path / name / "model.safetensors") for name in "ac")
    b = {}
    for shard in (tmp_path / "b").glob("*.safetensors"):
        b |= load_file(shard)
    assert (tmp_path / "b/model-00000-of-00004.safetensors").exists()
    assert set(a) == set(b) == set(c)
    assert all(a[name].equal(b[name]) for name in a)
    assert not any(a[name].equal(c[name]) for name in a)


def test_the_values_are_like_those_of_a_model(checkpoints):
    tensors = load_file(checkpoints() / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("_scales"):
            assert 100 < tensor.min() <= tensor.max() < 130
        elif not name.endswith("_blocks"):
            assert tensor.isfinite().all()
            assert 0 < tensor.float().abs().mean() < 2
            assert len(tensor.unique()) > 1


def test_transformers_reads_the_configuration(checkpoints):
    config = AutoConfig.from_pretrained(checkpoints(experts=3))
    assert config.model_type == "gpt_oss"
    assert config.num_local_experts == 3


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 100}, "hidden_size 100: MXFP4 needs a multiple of 32"),
        ({"intermediate_size": 48}, "intermediate_size 48: MXFP4 needs"),
        ({"num_key_value_heads": 3}, "4 attention heads cannot share 3"),
        ({"layers": 0}, "num_layers is 0"),
        ({"experts": -1}, "is -1"),
        ({"seed": -1}, "seed -1"),
        ({"preset": "7b"}, "unknown preset '7b'"),
    ],
)
def test_impossible_shapes_are_refused(overrides, message, tmp_path):
    with pytest.raises(OptionError, match=message):
        gptoss_stream.synth(tmp_path / "out", **overrides)
    assert not (tmp_path / "out").exists()
