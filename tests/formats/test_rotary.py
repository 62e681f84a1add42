"""The settings of config.json against transformers 5: the same rotary embedding, or refused.

The configuration that is written must mean to transformers what the source's means. The judge is
`GptOssRotaryEmbedding`, and the refusal of transformers where it refuses.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from rotary_configs import BASE, YARN, mutated
from transformer_lens.components.abstract_attention import AbstractAttention
from transformer_lens.config import HookedTransformerConfig
from transformers import GptOssConfig, logging
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssRotaryEmbedding,
    apply_rotary_pos_emb,
)

from gptoss_stream.errors import GptOssStreamError
from gptoss_stream.formats import _transformer_lens_config, openai
from gptoss_stream.formats._hugging_face_config import config_files, config_notes, parse_config
from gptoss_stream.tensors.dtypes import DType

SAME = "the same as transformers"
FIELDS = (
    "attention_bias",
    "head_dim",
    "hidden_act",
    "layer_types",
    "max_position_embeddings",
    "num_experts_per_tok",
    "num_key_value_heads",
    "num_local_experts",
    "rms_norm_eps",
    "sliding_window",
    "swiglu_alpha",
    "swiglu_limit",
)
PLAIN = {"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 2048}
NULL_LENGTH = {**YARN, "original_max_position_embeddings": None}
NO_LENGTH = {"rope_type": "yarn", "factor": 32.0}
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def scaling(**values) -> dict:
    return {"rope_scaling": {**YARN, **values}}


def parameters(**values) -> dict:
    """Return settings as transformers 5 writes them."""
    return {"rope_scaling": ..., "rope_theta": ..., "rope_parameters": {**YARN, **values}}


CASES = {
    "as released": ({}, SAME),
    "as transformers 5 writes it": (parameters(rope_theta=1e5, factor=16.0), SAME),
    "both, the same": ({"rope_parameters": dict(YARN)}, SAME),
    "both, different": (
        {"rope_scaling": PLAIN, "rope_parameters": {**YARN, "rope_theta": 5e5}},
        SAME,
    ),
    "both, without a base beside them": (
        {"rope_theta": ..., "rope_scaling": PLAIN, "rope_parameters": {**YARN, "rope_theta": 5e5}},
        SAME,
    ),
    "an empty rope_scaling": ({"rope_scaling": {}}, SAME),
    "an empty rope_scaling, rope_parameters": (
        {"rope_scaling": {}, "rope_parameters": PLAIN},
        SAME,
    ),
    "an empty rope_parameters": ({"rope_scaling": ..., "rope_parameters": {}}, SAME),
    "an empty rope_parameters, rope_scaling": ({"rope_parameters": {}}, SAME),
    "null for rope_scaling": ({"rope_scaling": None}, SAME),
    "null for both": ({"rope_scaling": None, "rope_parameters": None}, SAME),
    "neither": ({"rope_scaling": ...}, SAME),
    "a string": ({"rope_scaling": "yarn"}, "rope_scaling is not an object"),
    "a factor without a type": ({"rope_scaling": {"factor": 32.0}}, "a factor and no rope_type"),
    "a factor of type default": (scaling(rope_type="default"), 'rope_type "default"'),
    "the old spelling of the type": (
        {"rope_scaling": {"type": "yarn", **NO_LENGTH} | {"rope_type": "yarn"}},
        SAME,
    ),
    "only the old spelling": ({"rope_scaling": {"type": "yarn", "factor": 8.0}}, SAME),
    "two types": (scaling(type="linear"), "rope_type 'yarn' and type 'linear'"),
    "null for a type": (scaling(rope_type=None), "has the type 'None'"),
    "an unknown type": (scaling(rope_type="su"), "the type 'su'"),
    "by kind of layer": (
        {
            "rope_scaling": ...,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": YARN},
        },
        "settings of their own for 'full_attention'",
    ),
    "null for a kind of layer": (
        {"rope_scaling": ..., "rope_parameters": {"full_attention": None}},
        "settings of their own for 'full_attention'",
    ),
    "a tiny beta": (scaling(beta_slow=1e-320), "cannot be computed"),
    "mscale that divides by zero": (
        scaling(factor=2.718281828459045, mscale=1.0, mscale_all_dim=-10.0),
        "cannot be computed",
    ),
    "a string for the inner of two lengths": (
        {
            "rope_scaling": {**YARN, "original_max_position_embeddings": "32"},
            "original_max_position_embeddings": 2048,
        },
        "original_max_position_embeddings is '32'",
    ),
    "an integer beyond floats": (
        {"max_position_embeddings": 10**30},
        "beyond what programs compute",
    ),
    "dynamic, heads of 2": (
        {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}, "head_dim": 2},
        "head_dim is 2",
    ),
    "no original length": ({"rope_scaling": NO_LENGTH}, SAME),
    "no original length, a short context": (
        {"rope_scaling": NO_LENGTH, "max_position_embeddings": 2048},
        SAME,
    ),
    "an original length beside": (
        {"rope_scaling": NO_LENGTH, "original_max_position_embeddings": 2048},
        SAME,
    ),
    "two original lengths": ({"original_max_position_embeddings": 2048}, SAME),
    "null for the original length": ({"rope_scaling": NULL_LENGTH}, "embeddings is null"),
    "null for the one beside": ({"original_max_position_embeddings": None}, "embeddings is null"),
    "null for the inner of two": (
        {"rope_scaling": NULL_LENGTH, "original_max_position_embeddings": 2048},
        "is null",
    ),
    "an original length of 0": (scaling(original_max_position_embeddings=0), "must be positive"),
    "no factor": ({"rope_scaling": {"rope_type": "yarn"}}, "factor is missing"),
    "null for the factor": (scaling(factor=None), SAME),
    "a factor of 0": (scaling(factor=0), "must be positive"),
    "a string for the factor": (scaling(factor="32"), "factor is '32'"),
    "a factor of 1": (scaling(factor=1.0), SAME),
    "mscale and mscale_all_dim": (scaling(mscale=1.0, mscale_all_dim=0.5), SAME),
    "mscale alone": (scaling(mscale=2.0), SAME),
    "mscale of 0": (scaling(mscale=0, mscale_all_dim=1.0), SAME),
    "an attention factor": (scaling(attention_factor=1.5), SAME),
    "an attention factor and mscale": (
        scaling(attention_factor=2, mscale=1.0, mscale_all_dim=0.5),
        SAME,
    ),
    "null for the attention factor": (scaling(attention_factor=None), SAME),
    "no truncate": ({"rope_scaling": PLAIN}, SAME),
    "null for truncate": (scaling(truncate=None), SAME),
    "a string for truncate": (scaling(truncate="false"), "neither true nor false"),
    "betas of 0 and null": (scaling(beta_fast=0, beta_slow=None), SAME),
    "a negative beta": (scaling(beta_fast=-1.0), "cannot be computed"),
    "a part of each head": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    "a part of each head, inside": (
        scaling(partial_rotary_factor=0.5),
        "partial_rotary_factor is 0.5",
    ),
    "the whole of each head": ({"partial_rotary_factor": 1.0}, SAME),
    "null for the part": (scaling(partial_rotary_factor=None), "partial_rotary_factor is null"),
    "a base inside": (scaling(rope_theta=5e5), SAME),
    "null for the base": ({"rope_theta": None}, "rope_theta is null"),
    "null for the base inside": (scaling(rope_theta=None), "rope_theta is null"),
    "no base": ({"rope_theta": ...}, SAME),
    "a base of 1": ({"rope_theta": 1}, "cannot be computed"),
    "no scaling": ({"rope_scaling": {"rope_type": "default"}}, SAME),
    "linear": ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, SAME),
    "dynamic": ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, SAME),
    "llama3": (
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            }
        },
        SAME,
    ),
    "llama3 without a factor": (
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        "low_freq_factor",
    ),
    "longrope": (
        {
            "rope_scaling": {
                "rope_type": "longrope",
                "factor": 8.0,
                **FACTORS,
                "original_max_position_embeddings": 4096,
            }
        },
        SAME,
    ),
    "longrope without a factor": (
        {
            "rope_scaling": {
                "rope_type": "longrope",
                **FACTORS,
                "original_max_position_embeddings": 4096,
            }
        },
        SAME,
    ),
    "longrope of other heads": (
        {"rope_scaling": {"rope_type": "longrope", **FACTORS}, "head_dim": 8},
        "not a list of 4",
    ),
    "proportional": (
        {"rope_scaling": {"rope_type": "proportional", "partial_rotary_factor": 0.5}},
        SAME,
    ),
    "an odd size of heads": ({"head_dim": 15}, "head_dim is 15"),
    "num_experts": ({"num_local_experts": ..., "num_experts": 4}, SAME),
    "two numbers of experts": ({"num_experts": 3}, "num_local_experts is 4 and num_experts is 3"),
    "two numbers of chosen experts": ({"experts_per_token": 4}, "num_experts_per_tok is 2 and"),
    "no head_dim": ({"head_dim": ...}, SAME),
    "null for head_dim": ({"head_dim": None}, "head_dim is null"),
    "null for num_key_value_heads": ({"num_key_value_heads": None}, "num_key_value_heads is null"),
    "settings for single layers": (
        {"per_layer_config": {"1": {"num_local_experts": 2}}},
        "per_layer_config",
    ),
}


@pytest.fixture(autouse=True)
def quiet():
    """Let transformers not warn about the settings."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(before)


def judged(config: dict) -> tuple[GptOssConfig, GptOssRotaryEmbedding]:
    """Return what transformers reads and computes; raises if it cannot rotate heads with it."""
    read = GptOssConfig.from_dict(json.loads(json.dumps(config)))
    rotary = GptOssRotaryEmbedding(read)
    heads = torch.zeros(1, 1, 3, read.head_dim)
    cos, sin = rotary(heads, torch.arange(3)[None])
    assert cos.shape[-1] * 2 == read.head_dim
    apply_rotary_pos_emb(heads, heads, cos, sin)
    return read, rotary


def written(config: dict) -> dict:
    """Return the config.json that is written for a source's."""
    model = parse_config(json.loads(json.dumps(config)))
    return json.loads(config_files(model, config, DType.BF16, partial=False)["config.json"])


def assert_same(config: dict, output: dict) -> None:
    """Compare what transformers computes from a source's configuration and from the output's."""
    (expected, rotary), (found, found_rotary) = judged(config), judged(output)
    assert torch.equal(found_rotary.inv_freq, rotary.inv_freq)
    assert math.isclose(found_rotary.attention_scaling, rotary.attention_scaling, rel_tol=1e-14)
    differing = [key for key in FIELDS if getattr(found, key) != getattr(expected, key)]
    assert differing == []


def changed(values: dict) -> dict:
    """Return the base configuration with some entries replaced, or removed by `...`."""
    return {key: value for key, value in {**BASE, **values}.items() if value is not ...}


@pytest.mark.parametrize(("values", "expected"), CASES.values(), ids=CASES.keys())
def test_settings(values, expected):
    config = changed(values)
    if expected == SAME:
        assert_same(config, written(config))
        return
    with pytest.raises(GptOssStreamError) as refusal:
        parse_config(config)
    assert expected in str(refusal.value)


def test_two_spellings_are_written():
    """So transformers 4 and other programs read the same."""
    output = written(changed(parameters(rope_theta=1e5, factor=16.0)))
    assert output["rope_theta"] == output["rope_parameters"]["rope_theta"] == 1e5
    assert output["rope_scaling"] | {"rope_theta": 1e5} == output["rope_parameters"]
    assert output["rope_scaling"]["factor"] == 16.0


def test_experts_per_token_alone_is_written_under_both_names():
    """transformers ignores that name and takes 4 experts; a note says so."""
    config = changed({"num_experts_per_tok": ..., "experts_per_token": 2})
    output = written(config)
    assert output["num_experts_per_tok"] == output["experts_per_token"] == 2
    assert ["experts_per_token 2" in note for note in config_notes(config)] == [True]


@pytest.mark.parametrize(
    ("seed", "count"), [(1, 3000), pytest.param(2, 100_000, marks=pytest.mark.slow)]
)
def test_random_settings(seed, count):
    """Whatever is accepted means the same to transformers, and it accepts that too."""
    source, outcomes = random.Random(seed), Counter()
    for _ in range(count):
        config = mutated(source)
        try:
            output = written(config)
        except GptOssStreamError:
            outcomes["refused"] += 1
            continue
        assert_same(config, output)
        outcomes["the same"] += 1
    assert min(outcomes.values()) > count / 5, outcomes


def test_random_settings_in_transformer_lens():
    """TransformerLens rotates by the same angles, with what tl_config.json says."""
    source, compared = random.Random(3), 0
    while compared < 150:
        config = mutated(source)
        try:
            model = parse_config(config)
            _transformer_lens_config.check(model)
        except GptOssStreamError:
            continue
        fields = _transformer_lens_config.hooked_transformer_config(model, DType.F32)
        hooked = HookedTransformerConfig.from_dict(fields | {"n_ctx": 64, "dtype": torch.float32})
        attention = SimpleNamespace(cfg=hooked, attn_type="global")
        sin, cos = AbstractAttention.calculate_sin_cos_rotary(
            attention, hooked.rotary_dim, 64, base=hooked.rotary_base, dtype=torch.float32
        )
        rotary, half = judged(config)[1], model.head_dim // 2
        expected = rotary(torch.zeros(1, 1, 64, model.head_dim), torch.arange(64)[None])
        limit = 2e-5 * max(1.0, abs(rotary.attention_scaling))
        for mine, theirs in zip((cos, sin), expected, strict=True):
            assert (mine[:, :half] - theirs[0]).abs().max() < limit, config
        compared += 1


OPENAI = {
    "num_hidden_layers": 2,
    "num_experts": 4,
    "experts_per_token": 2,
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "head_dim": 16,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 128,
}
IN_OPENAIS = {
    "rope_parameters": ({"rope_parameters": {**YARN, "factor": 8.0, "rope_theta": 2e5}}, SAME),
    "rope_scaling": ({"rope_scaling": {**PLAIN}, "rope_theta": 2e5}, SAME),
    "agreeing entries": (
        {"rope_parameters": dict(YARN), "rope_scaling_factor": 32.0, "rope_ntk_beta": 32.0},
        SAME,
    ),
    "no scaling": ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, SAME),
    "another factor": (
        {"rope_parameters": dict(YARN), "rope_scaling_factor": 8.0},
        "rope_scaling_factor is 8",
    ),
    "another base": (
        {"rope_parameters": {**YARN, "rope_theta": 2e5}, "rope_theta": 1e5},
        "rope_theta is 100000",
    ),
    "another length": (
        {"rope_parameters": dict(YARN), "initial_context_length": 2048},
        "initial_context_length is 2048",
    ),
    "no length": ({"rope_parameters": NO_LENGTH}, "no original_max_position_embeddings"),
    "another type": ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "type 'linear'"),
}


@pytest.mark.parametrize(("values", "expected"), IN_OPENAIS.values(), ids=IN_OPENAIS.keys())
def test_hugging_faces_settings_in_openais_configuration(values, expected):
    """Some programs put them there (huggingface/transformers#42007)."""
    if expected != SAME:
        with pytest.raises(GptOssStreamError, match=expected):
            openai.parse_config({**OPENAI, **values})
        return
    model = openai.parse_config({**OPENAI, **values})
    output = json.loads(config_files(model, {}, DType.BF16, partial=False)["config.json"])
    rope = {key: value for key, value in values.items() if key.startswith("rope_")}
    cleared = {"rope_scaling": ..., "rope_theta": ...}
    expected_rotary = judged(changed({**cleared, **rope}))[1]
    rotary = judged(output)[1]
    assert torch.equal(rotary.inv_freq, expected_rotary.inv_freq)
    assert rotary.attention_scaling == expected_rotary.attention_scaling
