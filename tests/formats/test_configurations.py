"""The configuration files of each written format, and models that its loaders cannot compute."""

from __future__ import annotations

import json
import shutil

import independent
import oracle
import pytest
import torch
from transformers import AutoConfig

import gptoss_stream
from gptoss_stream.errors import ConfigError

SOURCES = ("hf-mxfp4", "openai")


@pytest.mark.parametrize("source", SOURCES)
def test_openais_configuration_is_complete(source, checkpoints, tmp_path):
    """It has all that gpt-oss's own `ModelConfig` reads, and converts back to the same."""
    gptoss_stream.convert(checkpoints(format=source), tmp_path / "out", to="openai")
    found = json.loads((tmp_path / "out/config.json").read_text())
    original = AutoConfig.from_pretrained(checkpoints())
    assert found == independent.openai_config(original.to_dict())
    gptoss_stream.convert(tmp_path / "out", tmp_path / "back", to="hf-mxfp4")
    back = AutoConfig.from_pretrained(tmp_path / "back").to_dict()
    lost = {"eos_token_id": None, "pad_token_id": None}  # OpenAI's configuration has no tokens
    assert back == original.to_dict() | {"_name_or_path": back["_name_or_path"]} | lost


@pytest.mark.parametrize("source", SOURCES)
def test_an_mxfp4_configuration_says_so(source, checkpoints, tmp_path):
    gptoss_stream.convert(checkpoints(format=source), tmp_path / "out", to="hf-mxfp4")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    gptoss_stream.convert(tmp_path / "out", tmp_path / "hf", to="hf")
    assert "quantization_config" not in json.loads((tmp_path / "hf/config.json").read_text())


def test_a_part_of_a_model_is_not_a_checkpoint(checkpoints, tmp_path):
    """transformers would load it with random values for missing tensors, others would fail."""
    part = gptoss_stream.Selection(layers="1")
    for target in ("hf", "hf-mxfp4", "hf-unfused", "openai"):
        gptoss_stream.convert(checkpoints(), tmp_path / target, to=target, selection=part)
        assert not (tmp_path / target / "config.json").exists()
        assert (tmp_path / target / "source_config.json").exists()


def yarn(**values):
    """Return the rotary settings of the released models, with some values replaced."""
    settings = {
        "rope_type": "yarn",
        "rope_theta": 150_000.0,
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 256,
    }
    return {"rope_parameters": {**settings, **values}}


NOT_OPENAIS = {
    "layers that do not alternate": (
        {"layer_types": ["full_attention"] * 4},
        "layer_types is \\['full",
    ),
    "layers that alternate the other way": (
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        "layer_types is \\['full",
    ),
    "no window": ({"sliding_window": None}, "sliding_window is false"),
    "another epsilon": ({"rms_norm_eps": 1e-6}, "rms_norm_eps is 1e-06"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act is gelu"),
    "another slope": ({"swiglu_alpha": 1.5}, "swiglu_alpha is 1.5"),
    "truncated frequencies": (yarn(truncate=True), "rope truncate is true"),
    "a factor below 1": (yarn(factor=0.5), "what OpenAI's code cannot compute"),
    "frequencies out of range": (
        yarn(original_max_position_embeddings=128),
        "what OpenAI's code cannot compute",
    ),
    "another attention factor": (yarn(attention_factor=1.0), "rope attention_factor is 1.0"),
    "no YaRN": (yarn(rope_type="linear"), "rope_type is linear"),
}


@pytest.mark.parametrize(("values", "words"), NOT_OPENAIS.values(), ids=NOT_OPENAIS.keys())
def test_models_that_openais_code_cannot_compute_are_refused(values, words, checkpoints, tmp_path):
    source = shutil.copytree(checkpoints(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config.pop("rope_scaling")
    (source / "config.json").write_text(json.dumps({**config, **yarn(), **values}))
    with pytest.raises(ConfigError, match=words):
        gptoss_stream.convert(source, tmp_path / "out", to="openai")
    assert not (tmp_path / "out").exists()
    assert gptoss_stream.plan(source, to="hf").to == "hf"


@pytest.mark.parametrize("values", [{"swiglu_limit": 5.0}, yarn(beta_fast=16.0, factor=8.0)])
def test_settings_that_openais_configuration_has_are_written(values, checkpoints, tmp_path):
    source = shutil.copytree(checkpoints(), tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config.pop("rope_scaling")
    (source / "config.json").write_text(json.dumps({**config, **yarn(), **values}))
    gptoss_stream.convert(source, tmp_path / "openai", to="openai")
    gptoss_stream.convert(tmp_path / "openai", tmp_path / "back", to="hf-mxfp4")
    configs = [AutoConfig.from_pretrained(folder) for folder in (source, tmp_path / "back")]
    for key in ("rope_parameters", "swiglu_limit", "sliding_window"):
        assert getattr(configs[0], key) == getattr(configs[1], key), key


def test_a_stored_unembedding_and_biases_are_in_the_configuration(tmp_path):
    """If a format always stores them, they are tensors of the model after that."""
    settings = {"tie_word_embeddings": True, "attention_bias": False}
    source = oracle.save_dense(tmp_path / "source", torch.float32, **settings)
    gptoss_stream.convert(source, tmp_path / "tl", dtype="keep")
    gptoss_stream.convert(tmp_path / "tl", tmp_path / "back", to="hf")
    config = json.loads((tmp_path / "back/config.json").read_text())
    assert (config["tie_word_embeddings"], config["attention_bias"]) == (False, True)
    expected = independent.complete(independent.load_folder(source))
    found = independent.read_hf(tmp_path / "back")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
