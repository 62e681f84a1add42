"""The rotary settings and other entries of config.json mean the same in the output as in the
source: transformers 5 and TransformerLens compute from both, and what they compute is compared."""

from __future__ import annotations

import copy
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rotary_configs import YARN
from rotary_judge import ENTRIES, differences, written
from transformer_lens.components.abstract_attention import AbstractAttention
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

from gptoss_stream.errors import ConfigError, GptOssStreamError
from gptoss_stream.formats import openai
from gptoss_stream.formats._hugging_face_config import hugging_face_config, parse_config
from gptoss_stream.formats._transformer_lens_config import (
    check,
    hooked_transformer_config,
    parse_fields,
)
from gptoss_stream.model.config import ModelConfig
from gptoss_stream.tensors.dtypes import DType

pytestmark = pytest.mark.usefixtures("quiet_transformers")

HEAD = 16
SIZES = {"head_dim": HEAD, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 259}
SIZES |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
BASE = {**SIZES, "model_type": "gpt_oss", "num_local_experts": 4, "num_experts_per_tok": 2}
BASE["max_position_embeddings"] = 131_072
LENGTH = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, LENGTH: 8192}
LLAMA3 |= {"rope_type": "llama3", "factor": 8.0}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1 + i / 8 for i in range(HEAD // 2)],
    "long_factor": [4 + i / 2 for i in range(HEAD // 2)],
    LENGTH: 4096,
}


def settings(base: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return settings with changes; the value `...` removes one."""
    return {key: value for key, value in {**base, **changes}.items() if value is not ...}


def scaling(**changes: Any) -> dict[str, Any]:
    """Return YaRN's settings as older programs write them."""
    return {"rope_scaling": settings(YARN, **changes)}


def parameters(base: dict[str, Any] = YARN, **changes: Any) -> dict[str, Any]:
    """Return settings as transformers 5 writes them."""
    return {"rope_parameters": settings(base, **changes)}


TYPES = {
    "yarn": YARN,
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": LLAMA3,
    "longrope": LONGROPE,
    "proportional": {"rope_type": "proportional", PARTIAL: 0.5, "factor": 2.0},
}
SAME = {
    "nothing": {},
    "both null": {"rope_scaling": None, "rope_parameters": None},
    "both empty": {"rope_scaling": {}, "rope_parameters": {}},
    "empty rope_parameters": {"rope_parameters": {}},
    "empty rope_scaling": {"rope_scaling": {}},
    "empty rope_scaling, other rope_parameters": {"rope_scaling": {}, **parameters(factor=8)},
    "rope_scaling": scaling(factor=8),
    "rope_parameters": parameters(factor=8),
    "two that differ": {**scaling(factor=64.0), **parameters(factor=8)},
    "type": scaling(rope_type=..., type="yarn"),
    "type twice": parameters(type="yarn"),
    "no length": scaling(**{LENGTH: ...}),
    "no length, fewer positions": {**parameters(**{LENGTH: ...}), "max_position_embeddings": 8192},
    "length at the top": {**scaling(**{LENGTH: ...}), LENGTH: 2048},
    "two lengths": {**parameters(), LENGTH: 2048},
    "factor null": scaling(factor=None),
    "mscale": scaling(mscale=0.7, mscale_all_dim=1.2),
    "mscale alone": scaling(mscale=0.7),
    "mscale_all_dim alone": scaling(mscale_all_dim=0.7),
    "mscale 0": scaling(mscale=0, mscale_all_dim=1.2),
    "mscale null": scaling(mscale=None, mscale_all_dim=1.2),
    "attention_factor": scaling(attention_factor=1.25),
    "attention_factor 0": scaling(attention_factor=0, mscale=0.7, mscale_all_dim=1.2),
    "attention_factor null": scaling(attention_factor=None),
    "truncate": scaling(truncate=True),
    "truncate null": scaling(truncate=None),
    "truncate absent": scaling(truncate=...),
    "betas 0": scaling(beta_fast=0, beta_slow=0),
    "betas null": scaling(beta_fast=None, beta_slow=None),
    "betas absent": scaling(beta_fast=..., beta_slow=...),
    "integers": scaling(factor=16, beta_fast=20, beta_slow=2, attention_factor=1),
    "theta beside": {**scaling(), "rope_theta": 10_000},
    "theta inside": parameters(rope_theta=10_000),
    "two thetas": {**parameters(rope_theta=10_000), "rope_theta": 5e5},
    "theta inside the settings that do not count": {**scaling(), **parameters(rope_theta=10_000)},
    "theta inside and null beside": {**parameters(rope_theta=10_000), "rope_theta": None},
    "theta below 1": {**scaling(), "rope_theta": 0.5},
    "whole heads": {**scaling(), PARTIAL: 1},
    "whole heads, inside": {**scaling(**{PARTIAL: 1.0}), PARTIAL: 0.5},
    "part null": {**scaling(), PARTIAL: None},
    **{rope_type: parameters(rope) for rope_type, rope in TYPES.items()},
    "llama3, length at the top": {**parameters(LLAMA3, **{LENGTH: ...}), LENGTH: 4096},
    "longrope, length at the top": {**parameters(LONGROPE, **{LENGTH: ...}), LENGTH: 8192},
    "longrope, factor": parameters(LONGROPE, factor=6.5),
    "longrope, attention_factor": parameters(LONGROPE, attention_factor=1.3),
    "proportional": parameters({"rope_type": "proportional", PARTIAL: 0.6, "factor": 2}),
    "proportional, part beside": {**parameters({"rope_type": "proportional"}), PARTIAL: 0.25},
    "num_experts": {"num_local_experts": ..., "num_experts": 8},
    "no window": {"sliding_window": None},
    "layers": {"layer_types": ["full_attention", "sliding_attention"]},
    "other values": {"rms_norm_eps": 1e-6, "swiglu_limit": 5.0, "swiglu_alpha": 1.5},
    "no biases": {"attention_bias": False},
}
REFUSED = {
    "a factor without a type": ({"rope_scaling": {"factor": 32.0}}, "a factor and no rope_type"),
    "a factor of the default": (scaling(rope_type="default"), 'a factor and rope_type "default"'),
    "two types": (scaling(type="linear"), "rope_type 'yarn' and type 'linear'"),
    "type null": (scaling(rope_type=None, type="yarn"), "the type 'None', not a name"),
    "unknown type": (scaling(rope_type="su"), "the type 'su', which transformers does not"),
    "another model's type": (scaling(rope_type="axial"), "the type 'axial', which"),
    "nested": (parameters({"full_attention": YARN}), "of their own for 'full_attention'"),
    "nested nulls": (parameters({"full_attention": None}), "of their own for 'full_attention'"),
    "nested null beside": (parameters(sliding_attention=None), "of their own for 'sliding_atten"),
    "nested list": (parameters(sliding_attention=[]), "of their own for 'sliding_attention'"),
    "length null": (scaling(**{LENGTH: None}), f"{LENGTH} is null"),
    "length null at the top": ({**scaling(), LENGTH: None}, f"{LENGTH} is null"),
    "length 0": (scaling(**{LENGTH: 0}), f"{LENGTH} is 0; it must be positive"),
    "length beyond all": (scaling(**{LENGTH: 10**400}), "beyond what programs compute"),
    "positions beyond all": ({"max_position_embeddings": 10**400}, "beyond what programs compute"),
    "no factor": (scaling(factor=...), "factor is missing"),
    "factor 0": (scaling(factor=0), "factor of the rotary embedding is 0"),
    "beta negative": (
        scaling(beta_fast=-1),
        "YaRN cannot be computed with factor 32, beta_fast -1",
    ),
    "beta too small": (scaling(beta_slow=5e-324, truncate=True), "beta_slow 4.94066e-324"),
    "theta 1": ({**scaling(), "rope_theta": 1}, "and rope_theta 1"),
    "theta null": ({**scaling(), "rope_theta": None}, "rope_theta is null"),
    "theta null inside": ({**parameters(rope_theta=None), "rope_theta": 1e4}, "rope_theta is null"),
    "mscale": (scaling(mscale=1, mscale_all_dim=-2.8853900817779268), "YaRN cannot be computed"),
    "a part of each head": (scaling(**{PARTIAL: 0.5}), "always rotates whole heads"),
    "a part of each head, beside": ({**scaling(), PARTIAL: 0.5}, "always rotates whole heads"),
    "part null inside": (scaling(**{PARTIAL: None}), f"{PARTIAL} is null"),
    "dynamic, tiny heads": ({**parameters(TYPES["dynamic"]), "head_dim": 2}, "with head_dim 2"),
    "dynamic, huge": (parameters({"rope_type": "dynamic", "factor": 2**53}), "and factor 9.0072e"),
    "longrope, short list": (parameters(LONGROPE, long_factor=[1.0]), "not a list of 8 numbers"),
    "odd heads": ({**scaling(), "head_dim": 15}, "head_dim is 15"),
    "two counts": ({"num_experts": 8}, "num_local_experts is 4 and num_experts is 8"),
    "activation": ({"hidden_act": 5}, "hidden_act is not a name"),
    "settings by layer": ({"per_layer_config": {"1": {}}}, "per_layer_config has settings"),
    "settings by layer of another kind": ({"per_layer_config": False}, "per_layer_config has"),
}


@pytest.mark.parametrize("changes", SAME.values(), ids=SAME.keys())
def test_what_is_written_means_the_same(changes):
    config = settings(BASE, **changes)
    assert differences(config, written(parse_config(copy.deepcopy(config)), config)) == []


@pytest.mark.parametrize(("changes", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_computed_or_contradicts_itself_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        parse_config(settings(BASE, **changes))


INSIDE = [
    *sorted({key for rope in TYPES.values() for key in rope}),
    *("type", "attention_factor", "mscale", "mscale_all_dim", "rope_theta", "full_attention", "x"),
]
BESIDE = [*ENTRIES, "rope_theta", LENGTH, PARTIAL, "rope_scaling", "rope_parameters"]
BESIDE += ["num_experts", "experts_per_token", "per_layer_config"]
BESIDE.remove("num_hidden_layers")  # transformers makes an object for each of any number
NUMBERS = [
    0,
    1,
    -1,
    0.5,
    2,
    3,
    8,
    16,
    32.0,
    100,
    4096,
    4096.0,
    1e-300,
    5e-324,
    1e17,
    1e299,
    10**400,
]
OTHERS = [
    None,
    True,
    False,
    "yarn",
    "default",
    "4096",
    [],
    {},
    [1.0] * (HEAD // 2),
    *TYPES.values(),
]
FLOATS = ("rms_norm_eps", "swiglu_alpha", "swiglu_limit")


def random_config(choice: random.Random) -> dict[str, Any]:
    """Return a configuration of any type and spelling, with up to three entries changed."""
    keys = ["rope_scaling", "rope_parameters"]
    choice.shuffle(keys)
    rope = dict(TYPES[choice.choice([*TYPES, "yarn", "yarn", "yarn"])])
    config = {**BASE, keys[0]: rope}
    if choice.random() < 0.2:
        rope["type"] = rope.pop("rope_type")
    if choice.random() < 0.2:
        config[keys[1]] = dict(choice.choice([{}, YARN, LLAMA3]))
    if choice.random() < 0.4:
        choice.choice([config, rope])["rope_theta"] = choice.choice([10_000, 150_000.0, 1e6])
    for _ in range(choice.choice([0, 1, 1, 2, 3])):
        place = choice.choice([config, *(v for v in config.values() if isinstance(v, dict))])
        key = choice.choice(BESIDE if place is config else INSIDE)
        if choice.random() < 0.25:
            place.pop(key, None)
        elif choice.random() < 0.3:
            place[key] = 10 ** choice.uniform(-3, 6)
        else:
            place[key] = copy.deepcopy(choice.choice(choice.choice([NUMBERS, NUMBERS, OTHERS])))
    return config


def as_documented(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration with what is read otherwise than transformers reads it on purpose."""
    config = {k: float(v) if k in FLOATS and type(v) is int else v for k, v in config.items()}
    if "experts_per_token" in config:
        config.setdefault("num_experts_per_tok", config["experts_per_token"])
    return config


@pytest.mark.parametrize("seed", range(4))
def test_random_configurations_mean_the_same_or_are_refused(seed):
    """If transformers cannot read or compute the source's configuration, it is refused."""
    choice = random.Random(seed)
    accepted, number = 0, 500
    for _ in range(number):
        config = random_config(choice)
        try:
            model = parse_config(copy.deepcopy(config))
        except GptOssStreamError:
            continue
        accepted += 1
        assert differences(as_documented(config), written(model, config)) == [], config
    assert 0.3 < accepted / number < 0.8


def hooked(model: ModelConfig, positions: int) -> tuple[torch.Tensor, ...]:
    """Return the sines and cosines that TransformerLens computes for a half of each head."""
    check(model)
    fields = hooked_transformer_config(model, DType.F32)
    unset = ("use_yarn_rope", "use_NTK_by_parts_rope", "yarn_global_attn_only")
    settings = dict.fromkeys((*unset, "rotary_adjacent_pairs"), False) | fields
    attention = SimpleNamespace(cfg=SimpleNamespace(**settings), attn_type="global")
    sizes = (fields["rotary_dim"], positions, fields["rotary_base"])
    values = AbstractAttention.calculate_sin_cos_rotary(attention, *sizes)
    return tuple(value[:, : model.head_dim // 2] for value in values)


def random_yarn(choice: random.Random) -> dict[str, Any]:
    """Return YaRN's settings, or none, with values that models may have."""
    rope = settings(
        YARN,
        factor=choice.choice([1, 0.5, None, choice.uniform(1, 100)]),
        beta_fast=choice.choice([..., None, choice.uniform(2, 64)]),
        beta_slow=choice.choice([..., 0, choice.uniform(0.1, 4)]),
        truncate=choice.choice([..., None, True, False]),
        mscale=choice.choice([..., 0, choice.uniform(0.1, 2)]),
        mscale_all_dim=choice.choice([..., None, choice.uniform(0.1, 2)]),
        attention_factor=choice.choice([..., None, choice.uniform(0.5, 2)]),
        **{LENGTH: choice.choice([..., choice.randrange(64, 20_000)])},
    )
    sizes = {"head_dim": choice.choice([2, 4, 16, 64]), "rope_theta": 10 ** choice.uniform(1, 7)}
    return {**BASE, **sizes, "rope_scaling": choice.choice([rope, rope, {"rope_type": "default"}])}


@pytest.mark.parametrize("seed", range(100))
def test_transformer_lens_computes_the_same_rotary_embedding(seed):
    """Up to position 20, where the rounding of positions times frequencies does not show."""
    config = random_yarn(random.Random(seed))
    rotary = GptOssRotaryEmbedding(GptOssConfig.from_dict(copy.deepcopy(config)))
    cosines, sines = rotary(torch.zeros(1), torch.arange(20)[None])
    found = hooked(parse_config(config), 20)
    for one, two in zip(found, (sines[0], cosines[0]), strict=True):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=0)


@pytest.mark.parametrize("field", ["beta_slow", "factor", LENGTH])
def test_fields_of_transformer_lens_that_cannot_be_computed_are_refused(field):
    fields = hooked_transformer_config(parse_config({**BASE, **scaling()}), DType.F32)
    assert parse_fields(fields).rope == YARN
    with pytest.raises(ConfigError, match="YaRN cannot be computed with"):
        parse_fields({**fields, f"yarn_{field}": 0})


OPENAI = {**SIZES, "num_experts": 4, "experts_per_token": 2}
OWN = {"initial_context_length": 4096, "rope_theta": 150_000, "rope_scaling_factor": 32.0}
OWN |= {"rope_ntk_alpha": 1.0, "rope_ntk_beta": 32.0}
OPENAI_SAME = {
    "its own": (OWN, scaling()),
    "its defaults": ({}, scaling()),
    "its own, other values": (
        {**OWN, "rope_scaling_factor": 16, "rope_ntk_alpha": 2, "initial_context_length": 2048},
        scaling(factor=16, beta_slow=2, **{LENGTH: 2048}),
    ),
    "both, that agree": ({**OWN, **parameters()}, scaling()),
    "rope_parameters": (parameters(factor=8, rope_theta=10_000), None),
    "rope_scaling": ({**scaling(factor=8), **parameters(), "rope_theta": 10_000}, None),
    "default": (parameters({"rope_type": "default"}), None),
    "length beside": ({**parameters(**{LENGTH: ...}), LENGTH: 2048}, None),
    "null and empty": ({**OWN, "rope_parameters": None, "rope_scaling": {}}, scaling()),
}
OPENAI_WRONG = {
    "another factor": ({**OWN, **parameters(factor=8)}, "rope_scaling_factor is 32, and the"),
    "another beta": ({"rope_ntk_beta": 16.0, **parameters()}, "rope_ntk_beta is 16, and the"),
    "another length": ({"initial_context_length": 2048, **parameters()}, "initial_context_length"),
    "another theta": ({**OWN, **parameters(rope_theta=10_000)}, "rope_theta is 150000, and the"),
    "two lengths": ({**OWN, LENGTH: 2048}, f"is 4096, which is 0 or contradicts {LENGTH} 2048"),
    "three lengths": ({**OWN, **parameters(), LENGTH: 2048}, "is 4096, which is 0 or contradicts"),
    "truncate": ({**OWN, **parameters(truncate=...)}, "have truncate"),
    "attention factor": ({**OWN, **parameters(attention_factor=1.0)}, "or an attention factor"),
    "no scaling": (
        {**OWN, **parameters({"rope_type": "default"})},
        "rope_scaling_factor is 32, and",
    ),
    "empty": ({**OWN, "rope_parameters": {}}, "rope_scaling_factor is 32, and the"),
    "another type": (parameters(LLAMA3), "of the type 'llama3', which a configuration with"),
    "no length": (parameters(**{LENGTH: ...}), f"have no {LENGTH}"),
    "beta 0": ({**OWN, "rope_ntk_alpha": 0}, "rope_ntk_alpha is 0, which is 0"),
    "a part of each head": ({**OWN, PARTIAL: 0.5}, "always rotates whole heads"),
    "too long": ({**OWN, "rope_scaling_factor": 1e299}, "is too large"),
}


@pytest.mark.parametrize(("changes", "expected"), OPENAI_SAME.values(), ids=OPENAI_SAME.keys())
def test_openais_configuration_with_other_settings_means_the_same(changes, expected):
    """Without `expected`, it is what transformers computes from the same settings."""
    found = hugging_face_config(openai.parse_config({**OPENAI, **changes}))
    same = {"max_position_embeddings": found["max_position_embeddings"]}
    config = {**BASE, **(changes if expected is None else expected), **same}
    assert differences(config, found) == []


@pytest.mark.parametrize(("changes", "words"), OPENAI_WRONG.values(), ids=OPENAI_WRONG.keys())
def test_openais_configuration_that_contradicts_itself_is_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        openai.parse_config({**OPENAI, **changes})
